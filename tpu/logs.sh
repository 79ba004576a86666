#!/usr/bin/env bash
# Shows the end of a worker's log, or of all; --follow goes on until Ctrl-C.
#   tpu/logs.sh --settings=FILE [--worker=0|1|...|all] [--lines=40] [--follow] [--dry_run]
set -euo pipefail
. "$(dirname "$0")/settings.sh"
worker=0 lines=40 follow=false
read_settings "worker lines follow" "$@"
require project zone name
no_words
require_numbers lines
verb="tail"
if [ "$follow" = true ]; then verb="follow"; fi
on_workers "$worker" "bash jax_sft/tpu/worker.sh $verb $lines"
