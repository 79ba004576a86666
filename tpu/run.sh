#!/usr/bin/env bash
# Starts the training command on every worker, detached: it outlives this terminal.
#   tpu/run.sh --settings=FILE [--dry_run] -- --config=configs/gpt2.py --config.data.train=...
# Settings: project, zone, name, run_dir. What follows -- is what python -m jax_sft.main takes, but
# for train.checkpoint_dir, which is run_dir. Exit code 2: a mistake, such as a run that is live.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
read_settings "" "$@"
require project zone name run_dir
[ -n "$(config_file)" ] || fail "no --config=FILE: give what python -m jax_sft.main takes after --"
for word in "${words[@]}"; do
  case $word in
    --config.train.checkpoint_dir*) fail "$word: it is run_dir, $(checkpoint_dir) on the workers" ;;
  esac
done

run=$(date -u +%Y%m%d-%H%M%S)-$$ # a start that gcloud repeats is one start
on_workers all "bash jax_sft/tpu/worker.sh idle"
on_workers all "bash jax_sft/tpu/worker.sh start $run \
$(quoted "--config.train.checkpoint_dir=$(checkpoint_dir)" "${words[@]}")"
