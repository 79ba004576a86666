#!/usr/bin/env bash
# Keeps a run going until it is done: asks for the slice, readies it and starts the run, and does so
# again from the newest checkpoint after a preemption or a lost machine.
#   tpu/watch.sh --settings=FILE [--delete_at_end] [--dry_run] -- --config=configs/gpt2.py ...
# Settings: those of create.sh, setup.sh and run.sh; max_restarts (5) in a row without a newer
# checkpoint, poll_seconds (60), backoff_seconds (30, doubled each time, at most four times),
# grace_seconds (300) for the workers that outlive another. A run that is there is taken up, so
# Ctrl-C and a second start do no harm; later edits of the clone do not reach the run. Ends with
# the run's exit code: 0 done, 75 by tpu/stop.sh, 2 and others a mistake, with the end of its log;
# 1 also after too many restarts.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
max_restarts=5 poll_seconds=60 backoff_seconds=30 grace_seconds=300 delete_at_end=false
read_settings "max_restarts poll_seconds backoff_seconds grace_seconds delete_at_end" "$@"
require project zone name accelerator_type run_dir
require_numbers max_restarts poll_seconds backoff_seconds grace_seconds

script() { # script NAME [WORDS]: another of these, with the same settings
  local path=$here/$1.sh
  shift
  "$path" "${shared[@]}" --dry_run="$dry_run" "$@"
}

# The mistakes that they name are better named before a slice is paid for.
script create --dry_run=true >/dev/null
script setup --dry_run=true >/dev/null
script run --dry_run=true -- ${words[@]+"${words[@]}"} >/dev/null
config=$(config_file)
if [ -z "$repo" ] && [[ $config != /* && ! -e $here/../$config ]]; then
  fail "--config=$config is not in the clone, $(dirname "$here"), which is copied to the workers"
fi

say() { echo "$(date -u +%H:%M:%S) $*"; }

manifests=(gcloud storage ls "$run_dir/checkpoints/*/manifest.json")
status='test -f jax_sft/tpu/worker.sh && bash jax_sft/tpu/worker.sh status || echo state=none code=-'
own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
errors=$own/errors # of the newest look

resumed=(--config.train.resume_from_checkpoint=auto)
asks_resume=''
for word in ${words[@]+"${words[@]}"}; do
  case $word in --config.train.resume_from_checkpoint*) asks_resume=true ;; esac
done

if [ "$dry_run" = true ]; then
  echo "# First, where the slice or the run is not there, and again after each preemption:"
  script create
  script setup
  quoted "${manifests[@]}"
  script run -- ${words[@]+"${words[@]}"} "${resumed[@]}"
  echo "# Every $poll_seconds s:"
  tpu_state
  on_workers all "$status"
  echo "# After a preemption, before create:"
  script delete
  exit
fi

from_clone=()
if [ -z "$repo" ]; then
  pack "$own/clone.tar.gz"
  from_clone=(--archive="$own/clone.tar.gz")
fi

look() { # what is to be seen: a word, and what decided
  local state report
  state=$(tpu_state 2>"$errors") || { echo "unseen" && return; }
  case $state in
    ACTIVE) ;;
    NONE | SUSPENDED | FAILED) echo "gone $state" && return ;;
    SUSPENDING | DELETING) echo "busy $state" && return ;;
    *) echo "queued $state" && return ;;
  esac
  if report=$(on_workers all "$status" 2>"$errors"); then
    awk -f "$here/verdict.awk" <<<"$report"
    return
  fi
  state=$(node_state 2>/dev/null) || state=unseen
  case $state in
    PREEMPTED | TERMINATED | NONE) echo "gone $state" ;;
    *) echo "unseen $state" ;;
  esac
}

newest_step() { # of the newest complete checkpoint; 0 where there is none
  local found
  if ! found=$("${manifests[@]}" 2>"$errors"); then
    grep -q "matched no objects" "$errors" || return
  fi
  awk -F/ 'NF > 1 && $(NF - 1) > newest { newest = $(NF - 1) + 0 } END { print newest + 0 }' \
    <<<"$found"
}

begin() { # begin STATE STEP: the slice, what is on it, and the run
  local resume=()
  case $1 in SUSPENDED | FAILED | PREEMPTED | TERMINATED) script delete || return ;; esac
  script create || return
  script setup ${from_clone[@]+"${from_clone[@]}"} || return
  if [ "$2" -gt 0 ] || [ -z "$asks_resume" ]; then resume=("${resumed[@]}"); fi
  script run -- ${words[@]+"${words[@]}"} ${resume[@]+"${resume[@]}"}
}

begun='' restarts=0 last_step=0
begin_or_end() { # begin_or_end STATE: unless it has been in vain too often
  local step code=0 wait_seconds=$backoff_seconds i
  if ! step=$(newest_step); then
    say "the checkpoints in $run_dir cannot be listed: $(tail -n 1 "$errors")"
    [ -n "$begun" ] || end 2 "not started"
    return
  fi
  if [ -n "$begun" ]; then
    if [ "$step" -gt "$last_step" ]; then restarts=0; fi
    restarts=$((restarts + 1))
    if [ "$restarts" -gt "$max_restarts" ]; then
      script logs --worker=all --lines=10 || true
      end 1 "given up: $max_restarts restarts since step $step was saved, and no newer one"
    fi
    for ((i = 1; i < restarts && i < 5; i++)); do wait_seconds=$((wait_seconds * 2)); done
    say "restart $restarts of at most $max_restarts without a newer checkpoint than step $step"
    sleep "$wait_seconds"
  fi
  begun=true
  last_step=$step
  begin "$1" "$step" || code=$?
  if [ "$code" = 2 ]; then end 2 "not started, see above"; fi
}

end() { # end CODE TEXT
  say "$2"
  if [ "$delete_at_end" = true ]; then
    script delete
  elif [ "$(tpu_state || echo unseen)" != NONE ]; then
    say "$name stays, and is paid for, until" \
      "$(quoted "$here/delete.sh" --project="$project" --zone="$zone" --name="$name")"
  fi
  exit "$1"
}

interrupted() {
  echo
  say "no longer watching: the run, if it is there, goes on, and the same command takes it up again;" \
    "tpu/stop.sh ends the run, tpu/delete.sh gives the slice back"
  exit 130
}
trap interrupted INT TERM HUP

shown='' partly_since=''
while true; do
  seen=$(look)
  read -r word detail worker <<<"$seen"
  if [ "$seen" != "$shown" ]; then
    case $word in
      running) say "the run is live" ;;
      partly) say "the run is live on some workers, and has ended on others" ;;
      idle) say "$name has no run yet" ;;
      again) say "the run has ended, with exit code $detail on worker $worker" ;;
      unseen) say "$name cannot be seen: $(tail -n 1 "$errors")" ;;
      gone | busy | queued) say "$name: ${detail/NONE/not there}" ;;
    esac
  fi
  shown=$seen
  if [ "$word" != partly ]; then partly_since=''; fi
  case $word in
    running | unseen | busy) ;;
    gone | queued | idle | again) begin_or_end "$detail" ;;
    partly)
      partly_since=${partly_since:-$SECONDS}
      if [ $((SECONDS - partly_since)) -ge "$grace_seconds" ]; then
        say "ending the workers that outlived another by $grace_seconds s"
        on_workers all "bash jax_sft/tpu/worker.sh kill" || true
      fi
      ;;
    done) end 0 "the run is done: $run_dir/hf_model" ;;
    stopped) end 75 "the run has ended, as tpu/stop.sh asked" ;;
    end)
      script logs --worker="$worker" --lines=30 || true
      end "$detail" "the run ended with exit code $detail on worker $worker, and would so again"
      ;;
  esac
  sleep "$poll_seconds"
done
