#!/usr/bin/env bash
# Ends the run: it saves a checkpoint and ends with exit code 75, and tpu/watch.sh lets it be.
#   tpu/stop.sh --settings=FILE [--dry_run]
# The slice stays, and is paid for, until tpu/delete.sh.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
read_settings "" "$@"
require project zone name
no_words
on_workers all "bash jax_sft/tpu/worker.sh stop"
