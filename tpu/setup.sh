#!/usr/bin/env bash
# Readies every worker: this clone (or --repo=URL --ref=BRANCH), Python 3.12 with the package and
# libtpu, and the bucket of run_dir mounted at /mnt/bucket. Once more does no harm.
#   tpu/setup.sh --settings=FILE [--dry_run]
# Settings: project, zone, name, run_dir, repo, ref, worker_env. Exit code 2: a mistake, such as a
# live run or a bucket that cannot rename folders.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
archive='' # of the clone; tpu/watch.sh has one for all its starts
read_settings "archive" "$@"
require project zone name run_dir
no_words
if [ -n "$ref" ] && [ -z "$repo" ]; then
  fail "ref is '$ref', but repo is not set: ref is a branch or a commit of it"
fi
if [ -n "$worker_env" ]; then
  secrets=$(at_home "$worker_env")
  is_file "$secrets" || fail "worker_env is '$worker_env', which cannot be read"
  if grep -q $'\r' "$secrets"; then
    fail "worker_env is '$worker_env', whose lines end in CRLF: the values would, too; make it LF"
  fi
  bash -n "$secrets" 2>/dev/null ||
    fail "worker_env is '$worker_env', which bash cannot read; bash -n shows why"
fi

copy_to_workers() { # copy_to_workers FILE NAME: into the home of each
  do_or_show gcloud compute tpus tpu-vm scp "$1" "$name:$2" --project="$project" --zone="$zone" \
    --worker=all --quiet </dev/null
}

idle='{ test ! -f jax_sft/tpu/worker.sh || bash jax_sft/tpu/worker.sh idle; }'
if [ -n "$repo" ]; then
  code="git init -q jax_sft && git -C jax_sft fetch -q --depth=1 $(quoted "$repo" "${ref:-HEAD}")"
  code+=" && git -C jax_sft checkout -q --force --detach FETCH_HEAD"
else
  if [ -z "$archive" ]; then
    archive=$(mktemp)
    trap 'rm -f "$archive"' EXIT
    pack "$archive"
  fi
  copy_to_workers "$archive" jax_sft.tar.gz
  code="mkdir -p jax_sft && tar -xzf jax_sft.tar.gz -C jax_sft"
fi
if [ -n "$worker_env" ]; then
  copy_to_workers "$secrets" jax_sft_worker.env
  code+=" && chmod 600 jax_sft_worker.env"
fi
on_workers all "$idle && $code && bash jax_sft/tpu/worker.sh setup $(bucket) $mount_point"
