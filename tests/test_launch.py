"""The scripts that rent, ready, run, watch and give back a TPU slice, in a stand-in cloud.

A stand-in `gcloud`, first on PATH, writes down what it is called with and plays the service: it
keeps the slice's state, and runs remote commands with bash, once a worker, each in a home of its
own. `worker.sh` is the real one; only Python, git and what needs root are stand-ins there.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TPU = ROOT / "tpu"
SCRIPTS = ["create", "setup", "run", "status", "logs", "stop", "watch", "delete"]
SETTINGS = {
    "project": "my-project",
    "zone": "us-west4-a",
    "name": "sft",
    "accelerator_type": "v5litepod-16",
    "run_dir": "gs://my-bucket/runs/first",
}
AT = ["--project=my-project", "--zone=us-west4-a"]
TRAIN = ["--config=configs/gpt2.py", "--config.data.train=my file.jsonl"]
SSH_FLAG = "--ssh-flag=-o ConnectTimeout=20 -o ServerAliveInterval=20"
LIST = ["compute", "tpus", "queued-resources", "list", *AT]
LIST += ["--format=value(name.basename(),state.state)"]

# Words end in \x1f in what is written down, and calls in \x1e.
GCLOUD = r"""#!/bin/bash
{ printf '%s\x1f' "$@"; printf '\x1e'; } >>"$CLOUD/calls"
fail() { echo "ERROR: $*" >&2; exit 1; }
flag() { for word in "${words[@]}"; do [[ $word != $1=* ]] || echo "${word#*=}"; done; }
remote() { # on a worker, where the mount point is in its home
  cd "$CLOUD/workers/$1"
  HOME=$PWD USER=me PATH=$WORKER_PATH exec bash -c "${2//\/mnt\/bucket/$PWD/mnt}"
}
words=("$@")
[ ! -e "$CLOUD/offline" ] || { rm "$CLOUD/offline"; fail no network; }
case "$3 $4" in
  "queued-resources list")
    printf 'sft-2\tACTIVE\n'
    [ ! -e "$CLOUD/queued" ] || read -r state later <"$CLOUD/queued"
    [ -z "$state" ] || printf 'sft\t%s\n' "$state"
    [ -z "$later" ] || echo "$later" >"$CLOUD/queued"
    ;;
  "queued-resources create") cp "$CLOUD/created" "$CLOUD/queued" ;;
  "queued-resources describe") echo "state: why it is so" ;;
  "queued-resources delete")
    rm -rf "$CLOUD/queued" "$CLOUD/node" "$CLOUD"/workers/*
    mkdir "$CLOUD"/workers/{0,1}
    ;;
  "tpu-vm list") printf 'sft\t%s\n' "$(cat "$CLOUD/node" || echo READY)" ;;
  "tpu-vm scp") for home in "$CLOUD"/workers/*; do cp "$5" "$home/${6#*:}"; done ;;
  "tpu-vm ssh")
    [ ! -e "$CLOUD/node" ] || exit 255
    which=$(flag --worker) code=0
    for worker in ${which/all/0 1}; do
      (remote "$worker" "$(flag --command)") </dev/null || code=$?
    done
    exit "$code"
    ;;
  *)
    [ "$1 $2" = "storage ls" ] || fail "not played: $*"
    [ ! -e "$CLOUD/forbidden" ] || fail 403
    [ -e "$CLOUD/saved" ] || fail "One or more URLs matched no objects."
    echo "${3/\*/$(cat "$CLOUD/saved")}"
    ;;
esac
"""

# A run: it notes its words, and plays the next line of the plan (the last one again and again),
# such as "codes=75,75 step=10": it saves a step, and ends with a code for each worker.
PYTHON = r"""#!/bin/bash
[ "$1" != --version ] || { echo Python 3.12.0; exit; }
trap 'kill %1; exit 75' TERM
worker=${HOME##*/} started=$CLOUD/started${HOME##*/}
{ printf '%s\x1f' "$@"; printf '\x1e'; } >>"$started"
echo "$HF_TOKEN" >>"$CLOUD/tokens"
num=$(tr -cd '\036' <"$started" | wc -c)
read -r plan < <(head -n "$num" "$CLOUD/plans" | tail -n 1)
echo "what went on here"
for word in $plan; do
  case $word in
    codes=*) IFS=, read -ra codes <<<"${word#codes=}" ;;
    step=*) [ "$worker" != 0 ] || echo "${word#*=}" >"$CLOUD/saved" ;;
    edited=*) echo "half an edit" >"${word#*=}" ;;
    preempted=*) # once: a worker that is late would take the next slice, too
      [ "$worker" = 0 ] || continue
      tr , ' ' <<<"${word#*=}" >"$CLOUD/queued"; echo PREEMPTED >"$CLOUD/node"
      ;;
  esac
done
case ${codes[$worker]:-none} in
  none) sleep 30 & wait ;;
  137) kill -KILL $$ ;;
  *) exit "${codes[$worker]}" ;;
esac
"""

WORKER_BIN = {
    "uv": """echo "uv $*" >>"$HOME/did"
case $1 in
  venv) mkdir -p "${@: -1}/bin" && cp "$CLOUD/python" "${@: -1}/bin/python" ;;
  pip) exit "$(cat "$CLOUD/uv_code" 2>/dev/null || echo 0)" ;;
esac""",
    "git": """[ "$1" = init ] && mkdir -p jax_sft/tpu && cp "$CLOUD/worker.sh" jax_sft/tpu/
echo "git $*" >>"$HOME/did" """,
    "curl": """echo "curl $*" >>"$HOME/did"
case "$*" in *agent-worker-number*) basename "$HOME" >"${@: -1}" ;; esac""",
    "findmnt": 'cat "$HOME/mounted" 2>/dev/null',
    "gcsfuse": 'echo "gcsfuse $*" >>"$HOME/did"; echo "${@: -2:1}" >"$HOME/mounted"',
    "sudo": 'echo "sudo $*" >>"$HOME/did"; case $1 in mkdir) "$@" ;; esac',
    "mv": """case "$*" in *.renamed) [ -e "$CLOUD/flat" ] && exit 1 ;; esac; exec /bin/mv "$@" """,
}


def words_of(text):
    """[[word, ...], ...] of what the stand-ins wrote down."""
    return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]


class Cloud:
    """A project in a temporary folder, with a slice of two workers."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("bin", "worker_bin", "workers/0", "workers/1"):
            (folder / name).mkdir(parents=True)
        self._script("bin/gcloud", GCLOUD)
        self._script("python", PYTHON)
        for name, text in WORKER_BIN.items():
            self._script(f"worker_bin/{name}", f"#!/bin/bash\n{text}\n")
        shutil.copy(TPU / "worker.sh", folder / "worker.sh")
        self.write("created", "ACTIVE")
        self.write("plans", "codes=0,0")
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environ = dict(
            os.environ,
            CLOUD=str(folder),
            PATH=self.path,
            WORKER_PATH=f"{folder / 'worker_bin'}:{os.environ['PATH']}",
        )

    def _script(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def read(self, name):
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def calls(self, *beginning):
        """The words of each call of gcloud that begins so, without gcloud."""
        calls = words_of(self.read("calls"))
        return [call for call in calls if call[: len(beginning)] == list(beginning)]

    def did(self, worker=0):
        return self.read(f"workers/{worker}/did").splitlines()

    def starts(self, worker=0):
        """The words that each start of the run got on a worker."""
        return words_of(self.read(f"started{worker}"))

    def script(self, name, /, *words, root=ROOT, **settings):
        given = SETTINGS | settings
        flags = [f"--{key}={value}" for key, value in given.items() if value is not None]
        command = [str(root / "tpu" / f"{name}.sh"), *flags, *words]
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=30, cwd=self.folder
        )

    def watch(self, *words, **settings):
        quick = dict(poll_seconds=0.1, backoff_seconds=0, repo="there")
        return self.script("watch", *words, "--", *TRAIN, **(quick | settings))

    def ready(self):
        """A slice that is there and set up."""
        self.write("queued", "ACTIVE")
        done = self.script("setup", repo="there")
        assert done.returncode == 0, done.stderr

    def wait_for(self, what, seconds=10):
        last = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < last, self.script("status").stdout
            time.sleep(0.02)

    def close(self):
        for file in self.folder.glob("workers/*/jax_sft_run/pid"):
            try:
                os.killpg(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.close()


def ssh(command, worker="all"):
    where = ["compute", "tpus", "tpu-vm", "ssh", "sft", *AT]
    return [*where, f"--worker={worker}", SSH_FLAG, "--quiet", f"--command={command}"]


CREATE = ["compute", "tpus", "queued-resources", "create", "sft", "--node-id=sft", *AT]
CREATE += ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--async"]
CREATE += ["--quiet", "--scopes=https://www.googleapis.com/auth/cloud-platform"]
DELETE = ["compute", "tpus", "queued-resources", "delete", "sft", *AT, "--force", "--quiet"]


# What is printed, and what is refused


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_script_s_head(cloud, name):
    done = cloud.script(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"tpu/{name}.sh --settings=FILE" in done.stdout
    assert "set -e" not in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_missing_setting_is_one_line_and_exit_code_2(cloud, name):
    needed = ["project", "zone", "name"]
    needed += ["accelerator_type"] if name in ("create", "watch") else []
    needed += ["run_dir"] if name in ("setup", "run", "watch") else []
    for key in needed:
        done = cloud.script(name, **{key: None})
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {key} is not set: give --{key}=VALUE")
        assert done.stderr.count("\n") == 1
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--zon=a"], "--zon=a: there is no setting 'zon'"),
        (["--zone"], "--zone has no value; give it as --zone=VALUE"),
        (["us-west4-a"], "unexpected argument 'us-west4-a'"),
        (["--lines=few"], "lines is 'few'; expected a whole number"),
        (["--name=My TPU"], "name is 'My TPU'; expected lower-case"),
        (["--run_dir=runs/first"], "run_dir is 'runs/first'; expected gs://"),
        (["--run_dir=gs://bucket"], "run_dir is 'gs://bucket'; expected gs://"),
        (["--run_dir=gs://$(id)/x"], "run_dir is 'gs://$(id)/x'; expected gs://"),
        (["--run_dir=gs://b/../x"], "run_dir is 'gs://b/../x'; expected gs://"),
        (["--run_dir=gs://b/x/.."], "run_dir is 'gs://b/x/..'; expected gs://"),
        (["--run_dir=gs://b/./x"], "run_dir is 'gs://b/./x'; expected gs://"),
        (["--run_dir=gs://b//x"], "run_dir is 'gs://b//x'; expected gs://"),
        (["--run_dir=gs://b/x*"], "run_dir is 'gs://b/x*'; expected gs://"),
        (["--=a"], "--=a: there is no setting ''"),
        (["--zone name=a"], "--zone name=a: there is no setting 'zone name'"),
        (["--settings", "sft.env"], "--settings has no value; give it as --settings=FILE"),
        (["--settings=nowhere"], "--settings=nowhere cannot be read"),
        (["--settings=."], "--settings=. cannot be read"),
        (["--settings=bad"], "bad, line 3: there is no setting 'lines'"),
        (["--settings=worse"], "worse, line 1 is 'a line'; expected key=value"),
    ],
)
def test_mistakes_in_settings_are_named(cloud, words, error):
    cloud.write("bad", "# a comment\n\nlines=3\n")
    cloud.write("worse", "a line")
    done = cloud.script("logs", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("project=mine", "mine"),
        ('project="mine"', "mine"),
        ("project='mine'\r", "mine"),
        ("  project=mine  # my own", "mine"),
        ('project="mine" # it\'s "mine"', "mine"),
        ("project=mine#own", "mine#own"),
        ("project='mine # own' ", "mine # own"),
        ('project="it\'s"', "it's"),
    ],
)
def test_a_line_of_a_settings_file_means_a_value(cloud, line, value):
    cloud.write("sft.env", f"# mine\r\n \r\n{line}\n")
    done = cloud.script("create", "--settings=sft.env", "--dry_run", project=None)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"--project={value}" in shlex.split(done.stdout.splitlines()[0])


@pytest.mark.parametrize(
    "value", ["my own", " mine", '"mine', "'mine\"", "mi'ne'", '"mi" ne', "it's"]
)
def test_a_value_that_may_mean_two_things_is_refused(cloud, value):
    cloud.write("sft.env", f"zone=a\nproject={value}\n")
    done = cloud.script("create", "--settings=sft.env")
    error = f"error: sft.env, line 2 is 'project={value}'; expected key=value, with quotes"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(error) and done.stderr.count("\n") == 1
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("name", "switch", "value"),
    [
        ("create", "dry_run", "1"),
        ("create", "spot", "yes"),
        ("logs", "follow", ""),
        ("watch", "delete_at_end", "True"),
    ],
)
def test_a_switch_is_true_or_false(cloud, name, switch, value):
    done = cloud.script(name, f"--{switch}={value}")
    error = f"error: --{switch}={value}: {switch} is '{value}'; expected true or false\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)
    cloud.write("sft.env", f"zone=a\nspot={value}\n")
    done = cloud.script(name, "--settings=sft.env")
    error = f"error: sft.env, line 2: spot is '{value}'; expected true or false\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("create", "poll_seconds", "abc"),
        ("watch", "poll_seconds", "-1"),
        ("watch", "poll_seconds", ""),
        ("watch", "backoff_seconds", "08"),  # which bash's arithmetic refuses
        ("watch", "max_restarts", "9" * 20),  # more than bash can compare
        ("watch", "grace_seconds", "1.5"),
    ],
)
def test_a_number_is_one(cloud, name, key, value):
    done = cloud.script(name, f"--{key}={value}", "--", *TRAIN)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {key} is '{value}'; expected a whole number")
    assert done.stderr.count("\n") == 1 and not cloud.calls()


def test_a_switch_that_is_false_is_off(cloud):
    off = ["--dry_run=false", "--spot=false", "--delete_at_end=false"]
    done = cloud.watch(*off)
    assert done.returncode == 0, done.stderr + done.stdout
    assert cloud.calls(*CREATE[:4]) == [CREATE] and not cloud.calls(*DELETE[:4])


def test_settings_come_from_a_file_and_flags_win(cloud):
    lines = [f"{key}={value}" for key, value in SETTINGS.items()]
    cloud.write("sft.env", "\n".join(["# mine", "", *lines, "spot=true"]))
    nothing = dict.fromkeys(SETTINGS)
    done = cloud.script("create", "--name=other", "--settings=sft.env", "--dry_run", **nothing)
    [create, _] = [shlex.split(line) for line in done.stdout.splitlines()]
    assert create[5:9] == ["other", "--node-id=other", *AT] and create[-1] == "--spot"
    done = cloud.script("create", f"--settings={TPU / 'example.env'}", "--dry_run", **nothing)
    assert done.returncode == 0 and "--accelerator-type=v5litepod-16" in done.stdout


@pytest.mark.parametrize(
    ("name", "words", "commands"),
    [
        ("create", ["--spot", "--", "--reserved"], [[*CREATE, "--spot", "--reserved"], LIST]),
        ("status", [], [ssh("bash jax_sft/tpu/worker.sh status")]),
        ("logs", ["--lines=5"], [ssh("bash jax_sft/tpu/worker.sh tail 5", worker=0)]),
        (
            "logs",
            ["--worker=all", "--follow"],
            [ssh("bash jax_sft/tpu/worker.sh follow 40")],
        ),
        ("stop", [], [ssh("bash jax_sft/tpu/worker.sh stop")]),
        ("delete", [], [DELETE]),
    ],
)
def test_dry_run_prints_what_is_run_and_runs_nothing(cloud, name, words, commands):
    shown = cloud.script(name, "--dry_run", *words)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = [shlex.split(line) for line in shown.stdout.splitlines()]
    assert lines == [["gcloud", *command] for command in commands]
    assert not cloud.calls()
    if "--follow" not in words:
        if name != "create":
            cloud.ready()
        cloud.script(name, *words)
        for command in commands:
            assert command in cloud.calls()


def test_dry_run_of_watch_is_a_whole_round(cloud):
    shown = cloud.script("watch", "--dry_run", "--", *TRAIN)
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = [line for line in shown.stdout.splitlines() if line.startswith("gcloud")]
    verbs = [" ".join(shlex.split(line)[1:5]) for line in lines]
    assert verbs == [
        "compute tpus queued-resources create",
        "compute tpus queued-resources list",
        "compute tpus tpu-vm scp",
        "compute tpus tpu-vm ssh",
        "storage ls gs://my-bucket/runs/first/checkpoints/*/manifest.json",
        "compute tpus tpu-vm ssh",
        "compute tpus tpu-vm ssh",
        "compute tpus queued-resources list",
        "compute tpus tpu-vm ssh",
        "compute tpus queued-resources delete",
    ]
    assert not cloud.calls() and not (cloud.folder / "workers/0/jax_sft").exists()


# Asking for a slice


@pytest.mark.parametrize(
    ("accelerator_type", "runtime_version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_has_its_runtime(cloud, accelerator_type, runtime_version):
    done = cloud.script("create", "--dry_run", accelerator_type=accelerator_type)
    assert f"--runtime-version={runtime_version} " in done.stdout
    mine = cloud.script("create", "--dry_run", "--runtime_version=mine")
    assert "--runtime-version=mine " in mine.stdout
    unknown = cloud.script("create", "--dry_run", accelerator_type="v9-8")
    assert unknown.returncode == 2 and "runtime_version is not set" in unknown.stderr
    by_chip = cloud.script("create", "--dry_run", accelerator_type="v5e-16")
    assert by_chip.stderr == "error: accelerator_type is 'v5e-16'; gcloud calls it v5litepod-16\n"


def test_create_waits_until_the_slice_is_active(cloud):
    cloud.write("created", "ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    done = cloud.script("create", poll_seconds=0)
    assert done.returncode == 0 and cloud.calls(*CREATE[:4]) == [CREATE]
    states = re.findall(r"sft is (\w+)", done.stdout)
    assert states == ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert cloud.script("create").returncode == 0  # it is there: nothing is asked again
    assert len(cloud.calls(*CREATE[:4])) == 1


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_create_says_that_a_slice_will_not_come(cloud, state):
    cloud.write("created", f"WAITING_FOR_RESOURCES {state}")
    done = cloud.script("create", poll_seconds=0)
    assert done.returncode == 1
    why, error = done.stderr.splitlines()
    assert why == "state: why it is so"
    assert error.startswith(f"error: sft is {state} and will not become ACTIVE")
    assert "tpu/delete.sh" in error


def test_delete_deletes_what_is_there(cloud):
    assert cloud.script("delete").stdout == "there is no sft in us-west4-a\n"
    cloud.write("queued", "ACTIVE")
    assert cloud.script("delete").returncode == 0
    assert cloud.calls(*DELETE[:4]) == [DELETE]


# Readying the workers


def make_clone(folder):
    """A small repository: a tracked file that is gone, a new one, and an ignored one."""
    clone = folder / "clone"
    shutil.copytree(TPU, clone / "tpu")
    (clone / "configs").mkdir()
    for name in ("kept.py", "gone.py", "my data.jsonl", "ignored.bin", "configs/gpt2.py"):
        (clone / name).write_text(name)
    (clone / ".gitignore").write_text("ignored.bin\n")
    git = ["git", "-C", str(clone)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "tpu", "kept.py", "gone.py", ".gitignore"], check=True)
    (clone / "gone.py").unlink()
    return clone


def test_setup_copies_the_clone_and_readies_each_worker(cloud):
    clone = make_clone(cloud.folder)
    cloud.write("secrets.env", "HF_TOKEN='my token'\n")
    done = cloud.script("setup", root=clone, worker_env="secrets.env")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "worker 0: ready, Python 3.12.0\nworker 1: ready, Python 3.12.0\n"
    for worker in (0, 1):
        home = cloud.folder / f"workers/{worker}"
        code = {path.name for path in (home / "jax_sft").iterdir()}
        assert code == {"tpu", "configs", "kept.py", "my data.jsonl", ".gitignore"}
        assert (home / "jax_sft_worker.env").stat().st_mode & 0o777 == 0o600
        assert f"uv venv --quiet --python 3.12 {home}/jax_sft_env" in cloud.did(worker)
        assert any(line.endswith(f"-e {home}/jax_sft[tpu]") for line in cloud.did(worker))
        [mount] = [line for line in cloud.did(worker) if line.startswith("gcsfuse")]
        assert "--metadata-cache-ttl-secs=0" in mount and mount.endswith(f"my-bucket {home}/mnt")
        assert not list((home / "mnt").iterdir())
    cloud.script("run", "--", *TRAIN)
    cloud.wait_for(lambda: cloud.read("tokens") == "my token\nmy token\n")


def test_setup_again_does_no_harm(cloud):
    cloud.ready()
    cloud.ready()
    did = " ".join(cloud.did())
    assert did.count("uv venv") == did.count("gcsfuse") == 1 and did.count("uv pip") == 2
    assert "git -C jax_sft fetch -q --depth=1 there HEAD" in did


def test_setup_leaves_a_live_run_alone(cloud):
    cloud.write("plans", "")
    cloud.ready()
    assert cloud.script("run", "--", *TRAIN).returncode == 0
    done = cloud.script("setup", repo="there")
    assert done.returncode == 2 and "error: worker 0: run 2" in done.stderr
    assert "is live: wait, or end it with tpu/stop.sh" in done.stderr
    assert sum("uv pip" in line for line in cloud.did()) == 1


def test_setup_names_a_bucket_that_will_not_do(cloud):
    cloud.write("flat", "")
    done = cloud.script("setup", repo="there")
    assert done.returncode == 2 and "--enable-hierarchical-namespace" in done.stderr
    cloud.write("workers/0/mounted", "other-bucket")
    done = cloud.script("setup", repo="there")
    assert done.returncode == 2 and "is the bucket other-bucket, not my-bucket" in done.stderr


def test_an_installation_that_fails_is_no_mistake_of_the_user(cloud):
    cloud.write("uv_code", "2")
    assert cloud.script("setup", repo="there").returncode == 1


# Running


def test_every_word_arrives_as_it_was_given(cloud):
    cloud.ready()
    words = ["it's", '"q" \\', "$HOME `id` $(id)", "*", "a  b", "", "ü\u2028", "new\nline", "-e;#&"]
    words = ["--config=my config.py", *(f"--config.data.filter={word}" for word in words), ""]
    done = cloud.script("run", "--", *words)
    assert done.returncode == 0, done.stderr
    cloud.wait_for(lambda: cloud.starts(0) and cloud.starts(1))
    first = f"--config.train.checkpoint_dir={cloud.folder}/workers/1/mnt/runs/first"
    assert cloud.starts(1) == [["-m", "jax_sft.main", first, *words]]
    command = next(word for word in cloud.calls()[-1] if word.startswith("--command="))
    start = shlex.split(command.removeprefix("--command="))
    assert start[:3] == ["bash", "jax_sft/tpu/worker.sh", "start"]
    assert start[4:] == ["--config.train.checkpoint_dir=/mnt/bucket/runs/first", *words]
    shown = cloud.script("run", "--dry_run", "--", *words)
    again = shlex.split(shlex.split(shown.stdout)[-1].removeprefix("--command="))
    assert again[4:] == start[4:]


def test_a_run_outlives_its_terminal_and_is_alone(cloud):
    cloud.write("plans", "")
    cloud.ready()
    assert cloud.script("status").stdout == (
        "worker=0 run=- state=none code=-\nworker=1 run=- state=none code=-\n"
    )
    done = cloud.script("run", "--", *TRAIN)
    assert re.fullmatch(r"(worker \d: started \S+\n){2}", done.stdout)
    run = done.stdout.split()[-1]
    start = cloud.calls()[-1]
    again = subprocess.run(["gcloud", *start], env=cloud.environ, capture_output=True, text=True)
    assert again.stdout == done.stdout  # asked again, as gcloud does after a lost connection
    second = cloud.script("run", "--", *TRAIN)
    assert second.returncode == 2 and f"run {run} is live" in second.stderr
    cloud.wait_for(lambda: cloud.starts(0) and cloud.starts(1))
    assert cloud.script("status").stdout == (
        f"worker=0 run={run} state=running code=-\nworker=1 run={run} state=running code=-\n"
    )
    assert cloud.script("stop").returncode == 0
    stopped = f"worker=1 run={run} state=stopped code=75"
    cloud.wait_for(lambda: stopped in cloud.script("status").stdout)
    assert len(cloud.starts(0)) == len(cloud.starts(1)) == 1
    log = cloud.script("logs", "--worker=1").stdout
    assert "[1] what went on here\n" in log and log.endswith("exit code 75\n")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--config.train.seed=1"], "no --config=FILE"),
        (["--config="], "no --config=FILE"),
        (["--config"], "no --config=FILE"),
        ([*TRAIN, "--config.train.checkpoint_dir=here"], "it is run_dir, /mnt/bucket/runs/first"),
    ],
)
@pytest.mark.parametrize("name", ["run", "watch"])
def test_mistakes_in_the_run_are_named(cloud, name, words, error):
    done = cloud.script(name, "--", *words)
    assert done.returncode == 2 and error in done.stderr and not cloud.calls()
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["setup", "watch"])
@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (dict(worker_env="nowhere"), "worker_env is 'nowhere', which cannot be read"),
        (dict(worker_env="."), "worker_env is '.', which cannot be read"),
        (dict(worker_env="~/nowhere"), "worker_env is '~/nowhere', which cannot be read"),
        (dict(worker_env="crlf.env"), "worker_env is 'crlf.env', whose lines end in CRLF"),
        (dict(worker_env="open.env"), "worker_env is 'open.env', which bash cannot read"),
        (dict(ref="main"), "ref is 'main', but repo is not set"),
    ],
)
def test_mistakes_in_the_setup_are_seen_before_it(cloud, name, settings, error):
    cloud.write("crlf.env", "HF_TOKEN=mine\r\n")
    cloud.write("open.env", "HF_TOKEN='mine\n")
    done = cloud.script(name, "--", *(TRAIN if name == "watch" else []), **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {error}") and done.stderr.count("\n") == 1
    assert not cloud.calls()


def test_watch_sees_a_mistake_in_the_slice_before_it_takes_a_run_up(cloud):
    cloud.ready()
    num_calls = len(cloud.calls())
    done = cloud.watch(accelerator_type="v5e-16")
    assert (done.returncode, done.stdout, len(cloud.calls())) == (2, "", num_calls)
    assert done.stderr == "error: accelerator_type is 'v5e-16'; gcloud calls it v5litepod-16\n"


def test_a_home_is_expanded(cloud):
    cloud.environ["HOME"] = str(cloud.folder)
    cloud.write("sft.env", "worker_env=~/secrets.env\n")
    cloud.write("secrets.env", "HF_TOKEN=mine\n")
    done = cloud.script("setup", "--settings=~/sft.env", repo="there")
    assert done.returncode == 0, done.stderr
    assert cloud.read("workers/0/jax_sft_worker.env") == "HF_TOKEN=mine\n"


def test_watch_looks_for_the_config_in_the_clone(cloud):
    done = cloud.script("watch", "--", "--config", "configs/none.py")
    assert (done.returncode, done.stdout) == (2, "") and not cloud.calls()
    assert done.stderr.startswith("error: --config=configs/none.py is not in the clone")


@pytest.mark.parametrize("name", ["setup", "status", "logs", "stop", "delete"])
def test_words_that_no_one_reads_are_refused(cloud, name):
    done = cloud.script(name, "--", "--dry_run")
    error = "error: unexpected '--dry_run' after --: nothing is passed on here\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", error)
    assert not cloud.calls()


def test_a_worker_that_started_anew_has_lost_its_run(cloud):
    cloud.write("plans", "")
    cloud.ready()
    cloud.script("run", "--", *TRAIN)
    cloud.close()  # kills the run and the shell that would have written its exit code
    cloud.wait_for(lambda: cloud.script("status").stdout.count("state=lost") == 2)


def test_a_worker_env_that_fails_is_a_mistake_and_is_not_started_again(cloud):
    cloud.write("secrets.env", "HF_TOKEN=my token\n")  # runs a command called token
    done = cloud.watch(worker_env="secrets.env")
    assert done.returncode == 2, done.stderr + done.stdout
    assert "token: command not found" in done.stdout and not cloud.starts()
    assert "the run ended with exit code 2 on worker" in done.stdout


# Watching


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        (["running -", "running -"], "running"),
        (["running -", "ended 1"], "partly"),
        (["none -", "none -"], "idle"),
        (["ended 0", "ended 0"], "done 0 0"),
        (["stopped 75", "stopped 75"], "stopped"),
        (["ended 75", "ended 75"], "again 75 0"),
        (["ended 0", "ended 134"], "again 134 1"),
        (["ended 139", "ended 0"], "again 139 0"),
        (["ended 0", "none -"], "again 0 0"),
        (["ended 1", "ended 1"], "end 1 0"),
        (["ended 134", "ended 1"], "end 1 1"),
        (["ended 1", "ended 137"], "again 137 1"),  # 1 came of the killed one
        (["ended 1", "lost -"], "again lost 1"),
        (["ended 143", "ended 1"], "again 143 0"),
        (["ended 137", "ended 2"], "end 2 1"),
        (["ended 130", "ended 1"], "end 130 0"),
        (["ended 127", "ended 134"], "end 127 0"),
        (["ended 1", "ended -"], "end 1 0"),  # the second one was killed by the watcher
        (["ended -", "ended -"], "again 0 "),
    ],
)
def test_verdicts(lines, verdict):
    report = [
        f"worker={i} run=r state={line.split()[0]} code={line.split()[1]}"
        for i, line in enumerate(lines)
    ]
    awk = ["awk", "-f", str(TPU / "verdict.awk")]
    done = subprocess.run(awk, input="\n".join(report), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{verdict}\n", "")


AUTO = "--config.train.resume_from_checkpoint=auto"


def test_watch_brings_a_run_to_its_end(cloud):
    done = cloud.watch("--delete_at_end")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "the run is done: gs://my-bucket/runs/first/hf_model" in done.stdout
    assert len(cloud.starts()) == 1 and cloud.starts()[0][3:] == [*TRAIN, AUTO]
    assert len(cloud.calls(*CREATE[:4])) == len(cloud.calls(*DELETE[:4])) == 1


@pytest.mark.parametrize(
    "plan",
    ["codes=75,75", "codes=1,137"],
    ids=["saved", "killed"],
)
def test_watch_starts_a_run_again_on_the_slice_that_is_there(cloud, plan):
    cloud.write("plans", f"{plan}\ncodes=0,0")
    cloud.ready()
    done = cloud.watch()
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(cloud.starts()) == 2 and not cloud.calls(*CREATE[:4])
    assert not cloud.calls(*DELETE[:4]) and "sft stays, and is paid for" in done.stdout


@pytest.mark.parametrize("state", ["SUSPENDING,SUSPENDED", "ACTIVE"])
def test_watch_takes_a_new_slice_after_a_preemption(cloud, state):
    # At first the queue may still say ACTIVE, while the machines are PREEMPTED.
    cloud.write("plans", f"preempted={state}\ncodes=0,0")
    done = cloud.watch()
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(cloud.calls(*CREATE[:4])) == 2 and cloud.calls(*DELETE[:4]) == [DELETE]
    assert len(cloud.starts()) == 2


@pytest.mark.parametrize("code", [1, 2])
def test_watch_ends_where_the_run_would_end_so_again(cloud, code):
    cloud.write("plans", f"codes=134,{code}")
    cloud.ready()
    done = cloud.watch()
    assert done.returncode == code and len(cloud.starts()) == 1
    assert "[1] what went on here\n" in done.stdout and "[0]" not in done.stdout
    assert f"the run ended with exit code {code} on worker 1" in done.stdout


def test_watch_gives_up_where_nothing_new_is_saved(cloud):
    cloud.write("plans", "step=10 codes=137,137")
    cloud.ready()
    done = cloud.watch(max_restarts=1)
    assert done.returncode == 1 and len(cloud.starts()) == 2
    assert "given up: 1 restarts since step 10 was saved, and no newer one" in done.stdout


def test_watch_does_not_count_restarts_with_newer_checkpoints(cloud):
    steps = [f"step={step} codes=75,75" for step in (8, 9, 100)]
    cloud.write("plans", "\n".join([*steps, "codes=0,0"]))
    cloud.ready()
    done = cloud.watch(max_restarts=1)
    assert done.returncode == 0 and len(cloud.starts()) == 4


def test_watch_ends_the_workers_that_outlive_another(cloud):
    cloud.write("plans", "codes=1,none")
    cloud.ready()
    done = cloud.watch(grace_seconds=0)
    assert done.returncode == 1 and "ending the workers that outlived another" in done.stdout
    assert "the run ended with exit code 1 on worker 0" in done.stdout
    assert len(cloud.starts()) == 1


def test_watch_asks_first_for_the_checkpoint_that_the_user_names(cloud):
    other = "--config.train.resume_from_checkpoint=/mnt/bucket/runs/other"
    cloud.write("plans", "codes=75,75\nstep=5 codes=75,75\ncodes=0,0")
    cloud.ready()
    words = ["--", *TRAIN, other]
    done = cloud.script("watch", *words, poll_seconds=0.05, backoff_seconds=0, repo="there")
    assert done.returncode == 0
    resumes = [[word for word in words if "resume" in word] for words in cloud.starts()]
    other = other.replace("/mnt/bucket", f"{cloud.folder}/workers/0/mnt")
    assert resumes == [[other], [other], [other, AUTO]]


def test_watch_may_be_interrupted_and_takes_a_live_run_up_again(cloud):
    cloud.write("plans", "")
    cloud.ready()
    flags = [f"--{key}={value}" for key, value in SETTINGS.items()]
    command = [TPU / "watch.sh", *flags, "--poll_seconds=0.05", "--repo=there", "--", *TRAIN]
    # Where the tests run in the background, Ctrl-C is ignored, and bash would inherit that.
    first = subprocess.Popen(
        ["env", "--default-signal=INT", *command],
        env=cloud.environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    cloud.wait_for(lambda: cloud.starts(0) and cloud.starts(1))
    os.killpg(first.pid, signal.SIGINT)
    said = first.communicate(timeout=10)[0]
    assert first.returncode == 130 and "no longer watching: the run, if it is there" in said
    second = subprocess.Popen(command, env=cloud.environ, stdout=subprocess.PIPE, text=True)
    cloud.write("offline", "")  # for one call
    cloud.wait_for(lambda: not (cloud.folder / "offline").exists())
    assert cloud.script("stop").returncode == 0
    said = second.communicate(timeout=10)[0]
    assert second.returncode == 75 and "ended, as tpu/stop.sh asked" in said
    assert len(cloud.starts()) == 1


def test_watch_starts_the_code_that_stood_when_it_was_started(cloud):
    clone = make_clone(cloud.folder)
    kept = clone / "kept.py"
    cloud.write("plans", f"preempted=SUSPENDED edited={kept}\ncodes=0,0")
    done = cloud.script("watch", "--", *TRAIN, root=clone, poll_seconds=0.05, backoff_seconds=0)
    assert done.returncode == 0, done.stderr + done.stdout
    assert len(cloud.calls(*CREATE[:4])) == 2 and kept.read_text() == "half an edit\n"
    assert (cloud.folder / "workers/0/jax_sft/kept.py").read_text() == "kept.py"


def test_watch_needs_a_bucket_that_it_can_list(cloud):
    cloud.ready()
    cloud.write("forbidden", "")
    done = cloud.watch()
    assert done.returncode == 2 and not cloud.starts()
    assert "gs://my-bucket/runs/first cannot be listed: ERROR: 403" in done.stdout


def test_watch_ends_at_a_mistake_in_the_setup(cloud):
    cloud.write("flat", "")
    done = cloud.watch()
    assert done.returncode == 2 and "not started, see above" in done.stdout
    assert "--enable-hierarchical-namespace" in done.stderr and not cloud.starts()


# Other clusters


def test_the_jobset_has_a_machine_for_every_four_chips():
    jobset = yaml.safe_load((TPU / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    [slices] = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    chips = rows * columns
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    # A pod that fails fails its job, and so starts all anew, but for a mistake.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    [mistake] = job["podFailurePolicy"]["rules"]
    assert mistake["action"] == "FailJob"
    assert mistake["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2, 130],
    }
    assert container["command"][:3] == ["python", "-m", "jax_sft.main"]
    assert container["command"][-1] == AUTO
    [mount] = container["volumeMounts"]
    [volume] = pod["volumes"]
    assert mount["name"] == volume["name"] and mount["mountPath"] == "/mnt/bucket"
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"


SLURM_BIN = {
    # Each task is a process of its own, as under srun, and gets what srun is told.
    "srun": """trap 'kill -TERM $tasks' TERM
for ((task = 0; task < SLURM_NTASKS; task++)); do
  if [ "${LOST:-}" != "$task" ]; then SLURM_PROCID=$task "$@" & tasks+=" $!"; fi
done
while [ -n "$(jobs -r)" ]; do wait; done""",
    "scontrol": 'echo "scontrol $*" >>"$CLOUD/requeued"',
    "python": """trap 'kill %1; exit 75' TERM
echo "$*" >>"$CLOUD/trained$SLURM_PROCID"
codes=($CODES)
[ "${codes[$SLURM_PROCID]}" = wait ] && { sleep 30 & wait; }
exit "${codes[$SLURM_PROCID]}" """,
}


class TestSlurm:
    @pytest.fixture
    def submit(self, tmp_path):
        for name, text in SLURM_BIN.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / "tpu").symlink_to(TPU)

        def submit(codes, **environ):
            job = dict(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="7", SLURM_NTASKS="2")
            path = f"{tmp_path}:{os.environ['PATH']}"
            self.folder = tmp_path
            return subprocess.Popen(
                ["bash", ROOT / "scripts/train.slurm", *TRAIN],
                env=os.environ | job | dict(PATH=path, CLOUD=str(tmp_path), CODES=codes) | environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        return submit

    def read(self, name):
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    @pytest.mark.parametrize(
        ("codes", "environ", "ends_with", "is_requeued"),
        [
            ("0 0", {}, 0, False),
            ("75 75", {}, 0, True),
            ("134 137", {}, 0, True),
            ("0 0", {"LOST": "1"}, 0, True),
            ("134 2", {}, 2, False),
            ("1 1", {}, 1, False),
            ("75 75", {"SLURM_RESTART_COUNT": "20"}, 1, False),
        ],
    )
    def test_requeues_what_is_to_go_on(self, submit, codes, environ, ends_with, is_requeued):
        job = submit(codes, **environ)
        said = job.communicate(timeout=10)[0]
        assert job.returncode == ends_with, said
        assert self.read("requeued") == ("scontrol requeue 7\n" if is_requeued else "")
        resumed = f" {AUTO}" if environ.get("SLURM_RESTART_COUNT") else ""
        assert self.read("trained0") == f"-u -m jax_sft.main {' '.join(TRAIN)}{resumed}\n"
        assert not list(self.folder.glob(".codes*"))

    @pytest.mark.parametrize(
        ("name", "ends_with", "is_requeued"),
        [("SIGUSR1", 0, True), ("SIGTERM", 75, False)],
        ids=["time_limit", "cancelled"],
    )
    def test_signals_reach_every_task(self, submit, name, ends_with, is_requeued):
        job = submit("wait wait")
        last = time.monotonic() + 10
        while not (self.read("trained0") and self.read("trained1")):
            assert time.monotonic() < last
            time.sleep(0.02)
        time.sleep(0.1)  # for the traps to stand
        job.send_signal(signal.Signals[name])
        said = job.communicate(timeout=10)[0]
        assert job.returncode == ends_with and "again: 75 on task 0" in said
        assert self.read("requeued") == ("scontrol requeue 7\n" if is_requeued else "")

    def test_a_number_of_restarts_is_one(self, submit):
        job = submit("75 75", MAX_RESTARTS="many")
        said = job.communicate(timeout=10)[0]
        assert job.returncode == 2 and not self.read("trained0") and not self.read("requeued")
        assert said == "error: MAX_RESTARTS is 'many'; expected a whole number\n"

    def test_asks_for_one_process_a_node_and_a_signal(self):
        asked = re.findall(r"^#SBATCH (\S+)", (ROOT / "scripts/train.slurm").read_text(), re.M)
        assert {"--ntasks-per-node=1", "--signal=B:USR1@300", "--requeue"} <= set(asked)


# On one machine


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["1"], "N is '1'; expected a whole number of 2 or more"),
        (["08"], "N is '08'; expected a whole number of 2 or more"),
        (["2", "x"], "DEVICES is 'x'; expected a whole number of 1 or more"),
        (["2", "0"], "DEVICES is '0'; expected a whole number of 1 or more"),
    ],
)
def test_a_rehearsal_s_numbers_are_checked(words, error):
    command = [ROOT / "scripts/rehearse_pod.sh", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {error}\n")


def test_a_benchmark_s_names_are_checked_before_the_first_runs(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\ntouch "$0.ran"\n')
    (tmp_path / "python").chmod(0o755)
    environ = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    command = [ROOT / "scripts/benchmark_gpu.sh", "data", "tokenizer", "gpt2", "gpt3"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and not (tmp_path / "python.ran").exists()
    assert done.stderr == "benchmark_gpu.sh: no shape is called gpt3\n"


# What is written


def shell_scripts():
    return [*sorted(TPU.glob("*.sh")), *sorted((ROOT / "scripts").glob("*.sh"))] + [
        ROOT / "scripts/train.slurm",
        ROOT / ".ci/run",
    ]


# A virtual environment's programs need not be on PATH.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    command = [SHELLCHECK, "-x", "-P", "SCRIPTDIR", *shell_scripts()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_scripts_can_be_run():
    for name in [*SCRIPTS, "worker"]:
        assert os.access(TPU / f"{name}.sh", os.X_OK)


def test_the_configs_in_the_heads_of_scripts_exist():
    named = {
        config
        for script in [*shell_scripts(), TPU / "jobset.yaml"]
        for config in re.findall(r"--config[= ](configs/\S+)", script.read_text())
    }
    assert named and all((ROOT / config).exists() for config in named), named


def test_the_commands_in_the_documentation_are_right(cloud):
    shutil.copy(TPU / "example.env", cloud.folder / "sft.env")
    page = (ROOT / "docs/pods.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ")
    commands = [line for line in blocks.splitlines() if line.startswith("tpu/")]
    assert {command.split()[0] for command in commands} == {f"tpu/{name}.sh" for name in SCRIPTS}
    for command in commands:
        name, *words = shlex.split(command, comments=True)
        words.insert(1, "--dry_run")
        done = subprocess.run(
            [ROOT / name, *words],
            env=cloud.environ,
            capture_output=True,
            text=True,
            cwd=cloud.folder,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
    assert not cloud.calls()
