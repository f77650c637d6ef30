"""Runs of configs/test_tiny.py: in this process over one device, or in processes of their own."""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from flowrl_jax.assembly import CHECKPOINTS
from flowrl_jax.checkpoint import HOST, HOST_FILE, saved_steps
from flowrl_jax.cli import load_config
from flowrl_jax.config import Config, parse_config
from flowrl_jax.metrics import read_metrics
from flowrl_jax.sft import sft
from flowrl_jax.sharding import make_mesh

REPOSITORY = Path(__file__).resolve().parent.parent
HARD_LIMIT = 600  # seconds; a process that is still there has been forgotten, or waits in vain
TINY = REPOSITORY / "configs" / "test_tiny.py"


@cache
def scratch() -> Path:
    """A folder that lives as long as this process."""
    folder = tempfile.mkdtemp(prefix="flowrl-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def tiny_arguments(objective: str = "flowrl_per_token", **changes: Any) -> list[str]:
    """A command line's words for the tiny config; `loss__beta=5` sets `loss.beta`."""
    changes = {"data__data_dir": scratch() / "data", "metrics__tensorboard": False} | changes
    settings = [f"--config.{k.replace('__', '.')}={v}" for k, v in changes.items()]
    return [f"--config={TINY}:{objective}", *settings]


def tiny_run(objective: str = "flowrl_per_token", **changes: Any) -> Config:
    """The tiny config with changes; `loss__beta=5` sets `loss.beta`."""
    config, *settings = tiny_arguments(objective, **changes)
    overrides = dict(word.removeprefix("--config.").split("=", 1) for word in settings)
    return parse_config(load_config(config.removeprefix("--config="), overrides))


@contextmanager
def one_device() -> Iterator[None]:
    """Runs within use one of this process's virtual devices."""
    with mock.patch(
        "flowrl_jax.assembly.make_mesh", lambda config: make_mesh(config, jax.devices()[:1])
    ):
        yield


@cache
def warmup() -> Path:
    """The folder of a policy that has seen demonstrations, and earns rewards now and then."""
    folder = scratch() / "warmup"
    with one_device():
        sft(tiny_run(sft__steps=80), folder)
    return folder


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """All metrics of a run that two identical runs have in common."""
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in read_metrics(workdir)
    ]


def final_state(workdir: Path) -> dict[str, Any]:
    """Step, position and the digest of every array of a run's latest checkpoint."""
    step = saved_steps(workdir / CHECKPOINTS)[-1]
    record = json.loads((workdir / CHECKPOINTS / str(step) / HOST / HOST_FILE).read_text())
    return {"step": step, "host": record["host"], "leaves": record["leaves"]}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(
    command: str, *arguments: Any, cache_dir: Path | None = None, **environment: str
) -> subprocess.Popen:
    """Starts `python -m flowrl_jax.COMMAND` in the scratch folder, on one device by default.

    Args:
        command: name of the entry point.
        arguments: its words.
        cache_dir: folder of compiled programs, which the process reads and fills.
        environment: more of it.
    """
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    variables.pop("XLA_FLAGS", None)
    if cache_dir is not None:
        variables["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir)
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if sys.dont_write_bytecode:  # then importing takes most of what a short run takes
        variables["PYTHONDONTWRITEBYTECODE"] = ""
        variables["PYTHONPYCACHEPREFIX"] = str(scratch() / "bytecode")
    # The alarm outlives exec, and whoever started the process.
    limited = (
        "import os, signal, sys; _, seconds, *command = sys.argv; signal.alarm(int(seconds));"
        " os.execv(command[0], command)"
    )
    python = (sys.executable, "-m", f"flowrl_jax.{command}", *map(str, arguments))
    return subprocess.Popen(
        [sys.executable, "-S", "-c", limited, str(HARD_LIMIT), *python],
        env=variables | environment,
        cwd=scratch(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def started_together(
    command: str, *arguments: Any, count: int, devices: int, cache_dir: Path
) -> Iterator[list[subprocess.Popen]]:
    """Starts the processes of one run; whoever is still alive in the end is killed.

    Args:
        command: name of the entry point.
        arguments: its words, the same for all.
        count: of processes; a single one joins nobody.
        devices: of each process.
        cache_dir: folder of compiled programs, which the processes read and fill.
    """
    environment = {
        # Programs run for moments here: little is to be gained by compiling them well.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "NPROC": "16",  # threads; how some sums are cut depends on their number
    }
    started: list[subprocess.Popen] = []
    # Bound, but without listening, the port is nobody else's; gRPC may share it.
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port.bind(("", 0))
        address = f"127.0.0.1:{port.getsockname()[1]}"
        try:
            for index in range(count):
                joining = f"{address},{count},{index}" if count > 1 else "none"
                words = (*arguments, f"--distributed={joining}")
                started.append(start(command, *words, cache_dir=cache_dir, **environment))
            yield started
        finally:
            for process in started:
                process.kill()
                process.communicate()


def finish(processes: list[subprocess.Popen], seconds: float = 300.0) -> list[str]:
    """Waits for processes, and gives what each has said on stderr.

    Raises:
        subprocess.TimeoutExpired: one of them has not ended in time.
    """
    end = time.monotonic() + seconds
    return [
        process.communicate(timeout=max(end - time.monotonic(), 0.1))[1] for process in processes
    ]
