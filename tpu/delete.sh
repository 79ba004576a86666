#!/usr/bin/env bash
# Gives the slice back, with whatever runs on it (tpu/stop.sh first lets a run save), and its place
# in the queue. The bucket stays.
#   tpu/delete.sh --settings=FILE [--dry_run]
set -euo pipefail
. "$(dirname "$0")/settings.sh"
read_settings "" "$@"
require project zone name
no_words
if [ "$dry_run" != true ] && [ "$(tpu_state)" = NONE ]; then
  echo "there is no $name in $zone"
  exit
fi
do_or_show gcloud compute tpus queued-resources delete "$name" --project="$project" \
  --zone="$zone" --force --quiet
