#!/usr/bin/env bash
# One line a worker on the newest run: running, ended, stopped (by tpu/stop.sh), lost (its machine
# started anew) or none, and the exit code.
#   tpu/status.sh --settings=FILE [--dry_run]
set -euo pipefail
. "$(dirname "$0")/settings.sh"
read_settings "" "$@"
require project zone name
no_words
on_workers all "bash jax_sft/tpu/worker.sh status"
