#!/usr/bin/env bash
# Rehearses a pod on this machine: N processes through the entry that a pod uses, the
# environment set by hand, DEVICES (4) CPU devices each.
#
#     scripts/rehearse_pod.sh N [DEVICES]
#
# One run is left alone. Another loses its last process to kill -9 between two checkpoints, and a
# small supervisor starts all again until all are done: it must end in the same bits (law 4). A
# third is one process with as many devices: the same losses to 1e-5 (law 2). As root, where the
# kernel has network namespaces, a fourth has a host each, whose link is cut instead. Prints what
# it checks; 0 if all of it holds.
set -euo pipefail

[[ $# == [12] && $1 != -* ]] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }

# at_least LEAST NAME VALUE
at_least() {
  [[ $3 =~ ^[1-9][0-9]{0,8}$ && $3 -ge $1 ]] && return
  echo "error: $2 is '$3'; expected a whole number of $1 or more" >&2
  exit 2
}

at_least 2 N "$1"
at_least 1 DEVICES "${2-4}"
n=$1 devices=${2-4} host=$(uname -n)
root=$(cd "$(dirname "$0")/.." && pwd)
dir=$(mktemp -d -t rehearse_pod.XXXXXX)
ns=rp$$ # names of network interfaces have 15 letters at most
readonly n devices host root dir ns
pids=()

export PYTHONPATH=$root:$root/tests:$dir JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 NPROC=32
export JAX_NUM_PROCESSES=$n XLA_FLAGS=--xla_force_host_platform_device_count=$devices
export JAX_COMPILATION_CACHE_DIR=$dir/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export REHEARSE_PAUSE=0 # seconds that each evaluation takes, to have time to hit the run in one

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }

clean_up() {
  local status=$?
  ((${#pids[@]} == 0)) || kill -9 "${pids[@]}" 2>/dev/null || true
  drop_network
  say "the runs and their logs: $dir"
  exit "$status"
}

make_inputs() {
  cat > "$dir/rehearsal.py" <<'EOF'
import os
import time


def length(*, outputs, **_):
    time.sleep(float(os.environ["REHEARSE_PAUSE"]))
    return {"length": [len(output) for output in outputs]}
EOF
  python - "$dir" "$((n * devices))" <<'EOF'
import json
import sys
from pathlib import Path

from tiny_runs import PROMPTS, SAMPLES, TINY_GPT2, tiny_config

folder, num_devices = Path(sys.argv[1]), int(sys.argv[2])
rows = [{"prompt": prompt, "output": output} for prompt, output in SAMPLES]
(folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
config = tiny_config(
    folder / "run",
    train=dict(total_steps=12, eval_interval=4, checkpoint_interval=4, batch_size=num_devices),
    model=dict(config=TINY_GPT2 | dict(embd_pdrop=0.1, n_embd=4 * num_devices)),
    data=dict(
        train=str(folder / "pairs.jsonl"),
        eval_prompts=tuple(PROMPTS), metric_fn="rehearsal:length",
    ),
)
(folder / "config.json").write_text(json.dumps(config.to_dict()))
EOF
}

# start NAME [FLAG ...]: starts the processes; in the namespaces, if there are any.
start() {
  local name=$1 i
  local -a in_place=()
  shift
  local port=$((20000 + RANDOM % 20000)) address=127.0.0.1
  [[ -z ${network:-} ]] || address=10.77.0.1
  pids=()
  mkdir -p "$dir/logs.$name"
  for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
    [[ -z ${network:-} ]] || in_place=(ip netns exec "${ns}_$i")
    JAX_COORDINATOR_ADDRESS=$address:$port JAX_PROCESS_ID=$i "${in_place[@]}" \
      python -m jax_sft.main "--config=$dir/config.json" \
      "--config.train.checkpoint_dir=$dir/$name" "$@" >> "$dir/logs.$name/$i" 2>&1 &
    pids+=($!)
  done
}

# wait_all: waits for the processes, and leaves their exit codes in `codes`.
wait_all() {
  local pid code
  codes=()
  for pid in "${pids[@]}"; do
    code=0
    wait "$pid" 2>/dev/null || code=$?
    codes+=("$code")
  done
  pids=()
}

all_done() { [[ "${codes[*]}" =~ ^0( 0)*$ ]]; }

# run NAME [FLAG ...]: a run that must end well.
run() {
  say "$1: $JAX_NUM_PROCESSES process(es)"
  start "$@"
  wait_all
  all_done || fail "$1" "exit codes ${codes[*]}"
}

# supervise NAME: starts a run again until it is done, as a pod's supervisor does.
supervise() {
  local name=$1 tries
  for tries in 1 2 3; do
    for code in "${codes[@]}"; do
      ((code != 2)) || fail "$name" "exit code 2, a mistake: it is not started again"
    done
    start "$name" --config.train.resume_from_checkpoint=auto
    wait_all
    say "$name: start $tries after the loss, exit codes ${codes[*]}"
    grep '^resumed' "$dir/logs.$name/0" | tail -n 1
    all_done && return
  done
  fail "$name" "not done after three starts"
}

# wait_for_step NAME STEP: until process 0 has logged the step.
wait_for_step() {
  local i
  for ((i = 0; i < 3000; i++)); do
    grep -q "^step *$2/" "$dir/logs.$1/0" 2>/dev/null && return
    sleep 0.1
  done
  fail "$1" "step $2 was not reached"
}

fail() {
  say "FAILED: $1: $2"
  for file in "$dir/logs.$1"/*; do
    printf -- '--- %s\n' "$file" && tail -n 15 "$file"
  done
  exit 1
}

compare() {
  python - "$dir" "$@" <<'EOF'
import sys
from pathlib import Path

import numpy as np
from run_files import assert_same_run, log_lines

folder, how, one, other = Path(sys.argv[1]), *sys.argv[2:]
if how == "bits":
    assert_same_run(folder / one, folder / other)
    what = "parameters, optimizer state, counters, log lines, samples and export: the same bits"
else:
    names = ("step", "loss", "grad_norm", "tokens", "trained_tokens")
    table = [
        np.array([[line[x] for x in names] for line in log_lines(folder / run) if "loss" in line])
        for run in (one, other)
    ]
    np.testing.assert_allclose(*table, rtol=1e-5)
    worst = np.max(np.abs(table[0] / table[1] - 1))
    what = f"losses, gradient norms and tokens of {len(table[0])} steps: within {worst:.1e}"
print(f"          {one} and {other}: {what}")
EOF
}

make_network() {
  local i
  ip netns add "${ns}_0" || return 1
  ip link add "${ns}br" type bridge && ip link set "${ns}br" up || return 1
  for ((i = 0; i < n; i++)); do
    ((i == 0)) || ip netns add "${ns}_$i"
    ip link add "${ns}v$i" type veth peer name eth0 netns "${ns}_$i"
    ip link set "${ns}v$i" master "${ns}br" up
    ip -n "${ns}_$i" link set lo up
    ip -n "${ns}_$i" addr add "10.77.0.$((i + 1))/24" dev eth0
    ip -n "${ns}_$i" link set eth0 up
    # gloo binds the address of the host's name, which all of them share.
    mkdir -p "/etc/netns/${ns}_$i"
    printf '127.0.0.1 localhost\n10.77.0.%d %s\n' "$((i + 1))" "$host" > "/etc/netns/${ns}_$i/hosts"
  done
}

drop_network() {
  local i
  for ((i = 0; i < n; i++)); do
    ip netns del "${ns}_$i" 2>/dev/null || true
    rm -rf "/etc/netns/${ns}_$i"
  done
  ip link del "${ns}br" 2>/dev/null || true
}

# has_network: whether namespaces can be made; says why not.
has_network() {
  local why
  [[ $(id -u) == 0 ]] || { say "no cut link: only root may make network namespaces"; return 1; }
  why=$(ip netns add "${ns}_t" 2>&1 && ip netns del "${ns}_t" 2>&1) && return
  say "no cut link: 'ip netns add' says: $why"
  return 1
}

trap clean_up EXIT
trap 'exit 130' INT TERM
cd "$dir"
make_inputs

run straight

say "killed: the last process, in the evaluation of step 8"
REHEARSE_PAUSE=5 start killed
wait_for_step killed 7
kill -9 "${pids[-1]}"
begun=$SECONDS
wait_all
say "killed: exit codes ${codes[*]}, $((SECONDS - begun)) s after the kill"
supervise killed
compare bits killed straight

JAX_NUM_PROCESSES=1 XLA_FLAGS=--xla_force_host_platform_device_count=$((n * devices)) run one
compare losses straight one

if has_network; then
  make_network
  export network=1 JAX_SFT_HEARTBEAT_SECONDS=10
  say "cut: the link of the last of $n hosts, in the evaluation of step 8"
  REHEARSE_PAUSE=5 start cut
  wait_for_step cut 7
  ip link set "${ns}v$((n - 1))" down
  begun=$SECONDS
  wait_all
  say "cut: exit codes ${codes[*]}, all $((SECONDS - begun)) s after the cut"
  ip link set "${ns}v$((n - 1))" up
  supervise cut
  compare bits cut straight
fi
say "all of it holds"
