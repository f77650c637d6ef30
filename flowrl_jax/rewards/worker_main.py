"""The program that worker processes are forked from: it imports their function once.

Started by `flowrl_jax.rewards.workers`, never by hand. It imports the function's module and nothing
else of this package, and runs no thread, so that its forks are sound; a worker that was killed is
replaced in milliseconds. A message is its length in eight bytes and JSON, over pipes of its own, so
that what a library prints cannot be taken for an answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

HEADER = 8
"""Bytes that say how long a message is."""
GRACE = 5
"""Seconds of CPU beyond an item's limit after which the kernel ends a worker nobody ended."""

_PR_SET_PDEATHSIG = 1


def main(control: socket.socket, function: str, memory: int, parent: int) -> int:
    """Forks workers as it is told, until the other end of the socket is closed.

    Args:
        control: with two file descriptors comes the order for a worker that serves them, answered
            by its process id; without, the order to wait for the end of one, answered by its exit
            code, or null where it does not end in time.
        function: "module:name".
        memory: bytes of address space of a worker; 0 for no limit.
        parent: process id of the one that started this one.
    """
    _die_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        module, _, name = function.partition(":")
        run = getattr(importlib.import_module(module), name)
    except Exception as error:
        control.sendall(json.dumps(one_line(error)).encode())
        return 1
    gc.freeze()  # the forks share what is imported
    control.sendall(json.dumps(None).encode())
    workers: set[int] = set()
    while True:
        order, pipes, _, _ = socket.recv_fds(control, 256, 2)
        if not order:
            break
        if len(pipes) == 2:
            pid = os.fork()
            if pid == 0:
                control.close()
                _work(run, pipes[0], pipes[1], memory, os.getppid())
            workers.add(pid)
            for end in pipes:
                os.close(end)
            control.sendall(json.dumps(pid).encode())
        else:
            pid, seconds = json.loads(order)
            code = _wait_for(pid, seconds)
            workers -= {pid} if code is not None else set()
            control.sendall(json.dumps(code).encode())
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


def _wait_for(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what it has started; the id is still its own
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def _work(run: Callable[[Any], Any], requests: int, replies: int, memory: int, parent: int) -> None:
    """Is a worker; does not return."""
    code = 1
    try:
        os.setsid()  # whatever a worker starts can be killed with it
        _die_with(parent)
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        code = serve(run, os.fdopen(requests, "rb"), os.fdopen(replies, "wb"))
    finally:
        os._exit(code)


def serve(run: Callable[[Any], Any], reader: BinaryIO, writer: BinaryIO) -> int:
    """Answers items until there are no more; returns an exit code.

    Args:
        run: the function.
        reader: of the items.
        writer: of the results.
    """
    while (item := read(reader)) is not None:
        _limit_cpu(item["limit"])
        reply, healthy = attempt(run, item["item"])
        writer.write(encode(reply))
        writer.flush()
        if not healthy:
            return 1
    return 0


def attempt(run: Callable[[Any], Any], item: Any) -> tuple[dict[str, Any], bool]:
    """Returns the reply to an item, and whether this process may go on."""
    try:
        value = run(item)
        json.dumps(value)
    except MemoryError:
        return {"status": "error", "value": "MemoryError: beyond the worker's limit"}, False
    except Exception as error:
        return {"status": "error", "value": one_line(error)}, True
    return {"status": "ok", "value": value}, True


def one_line(error: BaseException) -> str:
    """Returns an exception as a line of at most 200 characters."""
    try:
        text = " ".join(str(error)[:1000].split())
    except Exception:  # messages are made of expressions, and printing those may fail as well
        text = ""
    return f"{type(error).__name__}: {text}"[:200]


def encode(message: Any) -> bytes:
    """Returns the bytes of a message."""
    body = json.dumps(message).encode()
    return len(body).to_bytes(HEADER, "big") + body


def read(stream: BinaryIO) -> Any:
    """Returns the next message; None at the end."""
    header = stream.read(HEADER)
    if len(header) < HEADER:
        return None
    return json.loads(stream.read(int.from_bytes(header, "big")))


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it went before the kernel was told
        os._exit(1)


def _limit_cpu(seconds: float) -> None:
    """Ends this process when an item takes more, should there be no one left to do so."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    ceiling = math.ceil(used.ru_utime + used.ru_stime + seconds + GRACE)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    sys.exit(
        main(
            socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        )
    )
