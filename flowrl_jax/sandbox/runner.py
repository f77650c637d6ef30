"""The trainer's side of a sandbox: starts one for a program, and never waits longer than agreed."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from typing import Any, NamedTuple

from absl import logging

from flowrl_jax.errors import InputError, require
from flowrl_jax.sandbox import launcher, wire
from flowrl_jax.sandbox.limits import ISOLATIONS, Limits

_GRACE = 5.0  # seconds that a launcher has to end things by itself
_TOKEN = "FLOWRL_SANDBOX"


class Verdict(NamedTuple):
    """What became of a program.

    Attributes:
        outcome: "correct", "wrong", "error", "timeout", "limit" or "refused" (no sandbox could be
            started, or the tests themselves cannot run).
        passed: tests before the first that failed.
        detail: for people.
    """

    outcome: str
    passed: int
    detail: str


class Sandbox:
    """Starts sandboxes; safe to use from several threads.

    Args:
        isolation: "required": new namespaces, or nothing runs. "none": limits, a user of its own
            where this process is root, and no namespaces. "auto": namespaces where the kernel
            allows them, else none and a warning.
        probing: to find out what the machine allows.

    Raises:
        InputError: isolation is required and this machine refuses it, or no such isolation.
    """

    def __init__(self, isolation: str = "auto", *, probing: bool = False):
        require(
            isolation in ISOLATIONS,
            f"sandbox isolation={isolation!r}: unknown; give one of {', '.join(ISOLATIONS)}",
        )
        self._namespaces = isolation != "none" and isolate(isolation == "required")
        if not self._namespaces and os.geteuid() == 0 and not probing:
            _require_readable()
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._closed = False

    def judge(self, job: dict[str, Any], limits: Limits) -> Verdict:
        """Judges one program; returns within the limits and a few seconds, whatever it does.

        Args:
            job: `program` (source), `kind` ("stdin", "call" or "assert"), `cases`, and for the last
                two `function` and `setup`; see `flowrl_jax.rewards.code`.
            limits: of the program.
        """
        settings = dataclasses.asdict(limits)
        settings["total_seconds"] = limits.total(len(job["cases"]))
        return self._start({**settings, "namespaces": self._namespaces}, job)

    def close(self) -> None:
        """Ends what runs; a program that is judged from now on is refused."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()

    def _start(self, settings: dict[str, Any], job: dict[str, Any]) -> Verdict:
        token = secrets.token_hex(16)
        folder = _mount_point() if settings["namespaces"] else tempfile.mkdtemp(prefix="flowrl-")
        settings = {**settings, **_paths(), "folder": folder, "parent": os.getpid()}
        settings["kind"] = job["kind"]
        home = "/tmp" if settings["namespaces"] else folder
        try:
            process = self._launch(_environment(home, token))
            if process is None:
                return Verdict("refused", 0, "the task is closed")
            seconds = settings["total_seconds"] + _GRACE
            messages = b"".join(map(wire.framed, (settings, job)))
            verdict = _verdict(process, messages, seconds)
            with self._lock:
                self._running.discard(process)
            return verdict
        except OSError as error:
            return Verdict("refused", 0, f"no process: {error}")
        finally:
            if not settings["namespaces"]:
                _sweep(token)
                shutil.rmtree(folder, ignore_errors=True)

    def _launch(self, environment: dict[str, str]) -> subprocess.Popen | None:
        with self._lock:
            if self._closed:
                return None
            process = subprocess.Popen(
                [_interpreter(), "-s", "-S", "-P", "-X", "utf8", launcher.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
            self._running.add(process)
            return process


def _verdict(process: subprocess.Popen, messages: bytes, seconds: float) -> Verdict:
    try:
        out, err = process.communicate(messages, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Verdict("timeout", 0, "the sandbox did not end by itself")
    try:
        outcome, passed, detail = out.decode().split("\n", 2)
        return Verdict(outcome, int(passed), detail)
    except ValueError:
        detail = err.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return Verdict("refused" if detail else "error", 0, detail or "the sandbox was killed")


@functools.cache
def _refusal() -> str:
    """Why this machine allows no namespaces; empty where it does."""
    limits = {**dataclasses.asdict(Limits(seconds=20.0)), "total_seconds": 20.0}
    probe = Sandbox("none", probing=True)
    job = {"program": "print(1)", "kind": "stdin", "cases": [["", "1"]]}
    verdict = probe._start({**limits, "namespaces": True}, job)
    return "" if verdict.outcome == "correct" else verdict.detail or verdict.outcome


@functools.cache
def isolate(required: bool) -> bool:
    """Whether programs get namespaces of their own; tried once in a process, and said aloud.

    Args:
        required: whether to raise where they do not.

    Raises:
        InputError: they do not.
    """
    refusal = _refusal()
    if refusal and required:
        raise InputError(
            f"sandbox isolation='required': this machine allows no namespaces ({refusal}); allow"
            " unprivileged user namespaces, or judge elsewhere by an endpoint"
        )
    if refusal:
        logging.warning(
            "sandbox: this machine allows no namespaces (%s): programs of the policy run with"
            " limits%s alone, and can reach the network and read files%s",
            refusal,
            " and as a user of their own" if os.geteuid() == 0 else "",
            "" if os.geteuid() == 0 else ", and end this process",
        )
    return not refusal


@functools.cache
def _mount_point() -> str:
    """An empty folder, over which each sandbox mounts its root where only it sees it."""
    folder = tempfile.mkdtemp(prefix="flowrl-sandbox-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _paths() -> dict[str, Any]:
    """Where Python and its packages are, which programs may read."""
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    interpreter = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    shown = [*sorted(interpreter - {"/"}), *(path for path in packages if os.path.isdir(path))]
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return {"packages": packages, "shown": shown, "package": package}


def _require_readable() -> None:
    """Refuses a Python that the user of its own, which programs run as, cannot read.

    Raises:
        InputError: a folder above the standard library is closed to others.
    """
    path = os.path.dirname(os.path.realpath(os.__file__))
    while path != "/":
        require(
            os.stat(path).st_mode & 0o001 != 0,
            f"sandbox without namespaces as root: {path} of this Python is closed to other users,"
            " and programs run as one; use a Python that everybody can read, or allow namespaces",
        )
        path = os.path.dirname(path)


def _interpreter() -> str:
    return getattr(sys, "_base_executable", None) or sys.executable


def _environment(folder: str, token: str) -> dict[str, str]:
    """All that a program finds in its environment: of the trainer's, only where libraries are."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {
        **kept,
        "HOME": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # Every thread reserves memory, which is limited.
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0",  # The same program gets the same verdict.
        "TMPDIR": folder,
        _TOKEN: token,
    }


def _sweep(token: str) -> None:
    """Kills what a sandbox without namespaces left, should its launcher have been killed."""
    mark = f"{_TOKEN}={token}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/environ", "rb") as file:
                found = mark in file.read().split(b"\0")
            if found:
                os.kill(int(name), signal.SIGKILL)
