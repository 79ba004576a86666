#!/usr/bin/env bash
# What the other scripts have done on each worker; it runs there, in the user's home.
#   worker.sh setup BUCKET FOLDER   Python and the package, and the bucket mounted at FOLDER
#   worker.sh idle                  fails while a run is live
#   worker.sh start RUN ARGS...     begins python -m jax_sft.main ARGS, detached from the ssh session
#   worker.sh status                one line: worker=0 run=RUN state=running|ended|stopped|lost|none code=0
#   worker.sh tail LINES | follow LINES
#   worker.sh stop | kill           SIGTERM, upon which the run saves and ends; SIGKILL
set -euo pipefail
state_dir=$HOME/jax_sft_run # of the newest run: run, pid, log, code, asked_to_stop
python=$HOME/jax_sft_env/bin/python
number_url=http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
mkdir -p "$state_dir"
cd "$HOME/jax_sft"

say() { echo "worker $(number): $*"; }

fail() { # fail TEXT...: a user's mistake
  echo "error: worker $(number): $*" >&2
  exit 2
}

number() { cat "$state_dir/number" 2>/dev/null || hostname; }

is_live() { # whether the run's process is there, and is no other with its number
  local pid
  pid=$(cat "$state_dir/pid" 2>/dev/null) && grep -qs supervise "/proc/$pid/cmdline"
}

setup() {
  trap 'exit 1' ERR # what fails here is no user's mistake, whatever code it ends with
  set -E
  curl -sf -m 10 -H "Metadata-Flavor: Google" "$number_url" -o "$state_dir/number" || true
  install
  mount_bucket "$1" "$2"
  say "ready, $("$python" --version)"
}

install() { # the image's Python is too old, and its apt is locked in the first minutes: uv needs neither
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null ||
    curl -LsSf --retry 5 https://astral.sh/uv/install.sh -o "$state_dir/install_uv.sh"
  command -v uv >/dev/null || sh "$state_dir/install_uv.sh" --quiet
  [ -x "$python" ] || uv venv --quiet --python 3.12 "$HOME/jax_sft_env"
  uv pip install --quiet --python "$python" -e "$HOME/jax_sft[tpu]"
}

mount_bucket() { # mount_bucket BUCKET FOLDER
  local mounted check
  mounted=$(findmnt -n -o SOURCE --mountpoint "$2" || true)
  if [ -z "$mounted" ]; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    sudo mkdir -p "$2"
    sudo chown "$USER" "$2"
    # Workers must see at once what others wrote, so nothing about files is remembered.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      "$1" "$2" >/dev/null
  elif [ "$mounted" != "$1" ]; then
    fail "$2 is the bucket $mounted, not $1: delete the slice, or unmount it with fusermount -u $2"
  fi
  check=$2/.jax_sft_check.$(number)
  rm -rf "$check" "$check.renamed"
  mkdir "$check" || fail "the bucket $1 cannot be written: give the service account of the slice" \
    "the role roles/storage.objectUser on it"
  touch "$check/file"
  mv -T "$check" "$check.renamed" || fail "the bucket $1 cannot rename folders, as checkpoints" \
    "need: make one with --enable-hierarchical-namespace --uniform-bucket-level-access"
  rm -rf "$check.renamed"
}

install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/gcsfuse.list
  curl -sSf --retry 5 https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" >/dev/null
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee "$list" >/dev/null
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq -y install gcsfuse >/dev/null
}

idle() {
  if is_live; then fail "run $(cat "$state_dir/run") is live: wait, or end it with tpu/stop.sh"; fi
}

start() { # start RUN ARGS...
  local run=$1
  shift
  exec 9>"$state_dir/lock"
  flock 9
  if is_live && [ "$(cat "$state_dir/run")" = "$run" ]; then # asked again after a lost connection
    say "started $run"
    return
  fi
  idle
  [ -x "$python" ] || fail "there is no $python: run tpu/setup.sh"
  rm -f "$state_dir/code" "$state_dir/asked_to_stop"
  echo "$run" >"$state_dir/run"
  echo "== $(date -u +%FT%TZ) $run: python -m jax_sft.main$(printf ' %q' "$@")" >>"$state_dir/log"
  setsid bash "$HOME/jax_sft/tpu/worker.sh" supervise "$@" </dev/null >>"$state_dir/log" 2>&1 9>&- &
  echo $! >"$state_dir/pid"
  say "started $run"
}

supervise() { # the run, then its exit code in a file
  code=2 # until the run begins: a worker_env that fails is a mistake
  trap note_code EXIT
  echo $$ >"$state_dir/pid" # start does so too, unless its connection is cut off
  trap : TERM INT HUP # the run takes these, saves and ends; this shell stays to write the code
  if [ -r "$HOME/jax_sft_worker.env" ]; then
    set -a
    # shellcheck disable=SC1091 # the user's
    . "$HOME/jax_sft_worker.env"
    set +a
  fi
  code=0
  PYTHONUNBUFFERED=1 "$python" -m jax_sft.main "$@" || code=$?
}

note_code() {
  echo "== $(date -u +%FT%TZ) exit code $code"
  echo "$code" >"$state_dir/code.new"
  mv "$state_dir/code.new" "$state_dir/code"
}

status() {
  local run state=lost code=-
  run=$(cat "$state_dir/run" 2>/dev/null) || run=-
  if [ "$run" = - ]; then
    state=none
  elif is_live; then
    state=running
  elif [ -e "$state_dir/code" ]; then
    code=$(cat "$state_dir/code")
    if [ -e "$state_dir/asked_to_stop" ]; then state=stopped; else state=ended; fi
  fi
  echo "worker=$(number) run=$run state=$state code=$code"
}

end_with() { # end_with SIGNAL: to every process of the run
  if is_live; then kill "-$1" -- "-$(cat "$state_dir/pid")"; fi
}

case ${1:-} in
  setup | idle | start | status | supervise) "$@" ;;
  tail) sed "s/^/[$(number)] /" <(tail -n "$2" "$state_dir/log") ;;
  follow) tail -n "$2" -F "$state_dir/log" | sed -u "s/^/[$(number)] /" ;;
  stop)
    touch "$state_dir/asked_to_stop"
    end_with TERM
    ;;
  kill)
    if is_live; then
      end_with KILL
      echo - >"$state_dir/code" # what it ends with is no cause of anything
    fi
    ;;
  *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
