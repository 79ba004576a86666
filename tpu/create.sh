#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource, and waits until it is there.
#   tpu/create.sh --settings=FILE [--spot] [--dry_run] [-- FLAGS FOR GCLOUD]
# Settings: project, zone, name, accelerator_type (v5litepod-16, v5p-128, v6e-64, ...),
# runtime_version (by default the one for the accelerator type), spot. Where the slice is already
# there, or waited for, nothing is asked again. Exit code 1: it is FAILED or SUSPENDED.
set -euo pipefail
. "$(dirname "$0")/settings.sh"
poll_seconds=30
read_settings "poll_seconds" "$@"
require project zone name accelerator_type
require_numbers poll_seconds
case $accelerator_type in
  v5e-*) fail "accelerator_type is '$accelerator_type'; gcloud calls it v5litepod-${accelerator_type#v5e-}" ;;
esac

if [ -z "$runtime_version" ]; then
  case $accelerator_type in
    v2-* | v3-* | v4-*) runtime_version=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    *) fail "runtime_version is not set, and none is known here for accelerator_type" \
      "'$accelerator_type': gcloud compute tpus tpu-vm versions list shows them" ;;
  esac
fi

create=(gcloud compute tpus queued-resources create "$name" --node-id="$name"
  --project="$project" --zone="$zone" --accelerator-type="$accelerator_type"
  --runtime-version="$runtime_version" --async --quiet
  --scopes=https://www.googleapis.com/auth/cloud-platform) # for the bucket
if [ "$spot" = true ]; then create+=(--spot); fi
create+=(${words[@]+"${words[@]}"})

if [ "$dry_run" = true ]; then
  quoted "${create[@]}"
  tpu_state # again and again, until it is ACTIVE
  exit
fi

if [ "$(tpu_state)" = NONE ]; then "${create[@]}"; fi
shown='' num_unseen=0
while [ "$num_unseen" -lt 10 ]; do
  if ! state=$(tpu_state); then state=NONE; fi # asked again: the wait may be of hours
  if [ "$state" != "$shown" ]; then echo "$(date -u +%H:%M:%S) $name is $state"; fi
  shown=$state
  case $state in
    ACTIVE) exit ;;
    FAILED | SUSPENDED | SUSPENDING)
      gcloud compute tpus queued-resources describe "$name" --project="$project" --zone="$zone" \
        --format="yaml(state)" >&2 || true
      echo "error: $name is $state and will not become ACTIVE: its machines could not be had, or" \
        "were taken back (see above); run tpu/delete.sh, then tpu/create.sh again" >&2
      exit 1
      ;;
    NONE) num_unseen=$((num_unseen + 1)) ;;
    *) num_unseen=0 ;;
  esac
  sleep "$poll_seconds"
done
echo "error: $name was asked for and is not in the queue: was it deleted?" >&2
exit 1
