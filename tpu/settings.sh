# shellcheck shell=bash disable=SC2034 # who sources it uses what stands here
# What the scripts here share: settings, quoting, and how gcloud is asked. It is sourced.
# A setting is a flag, as --zone=us-west4-a, or a line of the file in --settings=FILE, as
# zone=us-west4-a (see example.env); a flag wins over the file. Nothing in it is expanded, but for a
# path's first ~.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mount_point=/mnt/bucket # where run_dir's bucket is, on every worker

project='' zone='' name='' accelerator_type='' runtime_version='' spot=false run_dir=''
repo='' ref='' worker_env=''
shared_settings="project zone name accelerator_type runtime_version spot run_dir repo ref worker_env"
switches=' spot dry_run follow delete_at_end '
dry_run=false
words=()  # what follows --
shared=() # the shared settings as flags, for the next script

fail() { # fail TEXT...: a user's mistake
  echo "error: $*" >&2
  exit 2
}

quoted() { # quoted WORDS...: one line that any shell reads back as these words
  local word line='' apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$apostrophe/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

do_or_show() { # do_or_show WORDS...: runs a command, or with --dry_run prints it
  if [ "$dry_run" = true ]; then quoted "$@"; else "$@"; fi
}

read_settings() { # read_settings "OWN FLAGS" "$@": a variable for each setting, and words
  local known=" $shared_settings dry_run $1 " word
  shift
  for word in "$@"; do
    case $word in
      --) break ;;
      --settings=*) read_file "$(at_home "${word#*=}")" "$word" ;;
      --settings) fail "--settings has no value; give it as --settings=FILE" ;;
      --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
    esac
  done
  while [ $# -gt 0 ]; do
    word=$1
    shift
    case $word in
      --) words=("$@") && break ;;
      --settings=*) ;;
      --*) take_flag "$known" "${word#--}" ;;
      *) fail "unexpected argument '$word'; flags are --key=value, and what follows -- is passed on" ;;
    esac
  done
  for word in $shared_settings; do
    if [ -n "${!word}" ]; then shared+=("--$word=${!word}"); fi
  done
}

at_home() { # at_home PATH: which shells leave alone where it follows --key=
  # shellcheck disable=SC2088 # the letter is meant
  case $1 in
    "~/"*) printf '%s\n' "$HOME/${1#"~/"}" ;;
    *) printf '%s\n' "$1" ;;
  esac
}

is_file() { [ -r "$1" ] && [ ! -d "$1" ]; }

read_file() { # read_file FILE FLAG: lines of key=value, empty lines and # comments
  local line number=0
  local value="\"([^\"]*)\"|'([^']*)'|([^\"'[:space:]]*)"
  local pair="^[[:space:]]*([^#=[:space:]][^=[:space:]]*)=($value)([[:space:]]+#.*)?[[:space:]]*\$"
  is_file "$1" || fail "$2 cannot be read: write one as in tpu/example.env"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%$'\r'}
    if [[ $line =~ $pair ]]; then
      value=${BASH_REMATCH[3]}${BASH_REMATCH[4]}${BASH_REMATCH[5]}
      set_key " $shared_settings " "${BASH_REMATCH[1]}" "$value" "$1, line $number"
    elif [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]]; then
      fail "$1, line $number is '$line'; expected key=value, with quotes around a value that has" \
        "spaces or quotes"
    fi
  done <"$1"
}

take_flag() { # take_flag " KNOWN " key=value, or key alone for a switch
  local key=${2%%=*} value=true
  case $2 in
    *=*) value=${2#*=} ;;
    *) if [[ $1 == *" $key "* && $switches != *" $key "* ]]; then
      fail "--$key has no value; give it as --$key=VALUE"
    fi ;;
  esac
  set_key "$1" "$key" "$value" "--$2"
}

set_key() { # set_key " KNOWN " KEY VALUE WHERE
  [[ $2 =~ ^[a-z_]+$ && $1 == *" $2 "* ]] || fail "$4: there is no setting '$2'; there are$1"
  if [[ $switches == *" $2 "* && ! $3 =~ ^(true|false)$ ]]; then
    fail "$4: $2 is '$3'; expected true or false"
  fi
  printf -v "$2" %s "$3"
}

require() { # require KEYS...: fails on the first that is not set, or not as it must be
  local key
  for key in "$@"; do
    [ -n "${!key}" ] ||
      fail "$key is not set: give --$key=VALUE, or a line $key=VALUE in the file of --settings"
  done
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "name is '$name'; expected lower-case letters, digits and dashes, a letter first"
  if [ -n "$run_dir" ]; then
    # What a mounted bucket and gcloud take for one folder: no empty part, no . or .., no wildcard.
    if [[ ! $run_dir =~ ^gs://[-a-z0-9._]+(/[^]/*?#[]+)+$ || $run_dir/ =~ /\.\.?/ ]]; then
      fail "run_dir is '$run_dir'; expected gs://BUCKET/FOLDER, a folder for each run, without" \
        ". or .. or wildcards"
    fi
  fi
}

no_words() { # for scripts that pass nothing on
  [ ${#words[@]} = 0 ] || fail "unexpected '${words[0]}' after --: nothing is passed on here"
}

config_file() { # what --config=FILE, or --config FILE, names after --
  local word last=''
  for word in ${words[@]+"${words[@]}"}; do
    if [ "$last" = --config ]; then echo "$word"; fi
    case $word in --config=*) echo "${word#*=}" ;; esac
    last=$word
  done
}

require_numbers() { # require_numbers KEYS...: whole, and such as bash computes with
  local key
  for key in "$@"; do
    if [[ $key = poll_seconds && ${!key} =~ ^[0-9]+\.[0-9]+$ ]]; then continue; fi # for sleep alone
    [[ ${!key} =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "$key is '${!key}'; expected a whole number"
  done
}

bucket() { # the bucket of run_dir
  local path=${run_dir#gs://}
  echo "${path%%/*}"
}

checkpoint_dir() { # run_dir as the workers see it
  local path=${run_dir#gs://}
  echo "$mount_point/${path#*/}"
}

pack() { # pack FILE: the clone's files as they are now, but for what git ignores
  do_or_show bash -o pipefail -c "cd $(quoted "$here/..") &&
    git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e \"\$file\" ] || printf '%s\\0' \"\$file\"; done |
    tar -czf $(quoted "$1") --null -T -"
}

on_workers() { # on_workers WORKER COMMAND: a line for the shell of one worker, or of all
  do_or_show gcloud compute tpus tpu-vm ssh "$name" --project="$project" --zone="$zone" \
    --worker="$1" --ssh-flag="-o ConnectTimeout=20 -o ServerAliveInterval=20" --quiet \
    --command="$2" </dev/null
}

state_in() { # state_in queued-resources|tpu-vm FIELD: this name's state; NONE where it is not there
  local states
  local list=(gcloud compute tpus "$1" list --project="$project" --zone="$zone"
    --format="value(name.basename(),$2)")
  if [ "$dry_run" = true ]; then
    quoted "${list[@]}"
    return
  fi
  states=$("${list[@]}") || return # a list that failed is no empty one
  awk -v name="$name" '
    $1 == name { state = $2 ? $2 : "UNKNOWN" }
    END { print state ? state : "NONE" }' <<<"$states"
}

tpu_state() { state_in queued-resources state.state; }

node_state() { state_in tpu-vm state; }
