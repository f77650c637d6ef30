"""The program of a worker process: reads items, runs one function on each, writes what it returns.

Started by `flowrl_jax.rewards.workers`, never by hand. It imports the function's module and
nothing else of this package. A message is its length in eight bytes and JSON; standard output is
not used for them, so that what a library prints cannot be taken for an answer.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

HEADER = 8
"""Bytes that say how long a message is."""
GRACE = 5
"""Seconds of CPU beyond an item's limit after which the kernel ends a worker nobody ended."""

_PR_SET_PDEATHSIG = 1


def main(requests: int, replies: int, function: str, memory: int, parent: int) -> int:
    """Serves until the other end of the pipe is closed.

    Args:
        requests: file descriptor of the items.
        replies: file descriptor of the results.
        function: "module:name".
        memory: bytes of address space; 0 for no limit.
        parent: process id of the one that started this one.
    """
    _die_with(parent)
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reader, writer = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")
    try:
        module, _, name = function.partition(":")
        run = getattr(importlib.import_module(module), name)
    except Exception as error:
        write(writer, {"status": "failed", "value": one_line(error)})
        return 1
    write(writer, {"status": "ready", "value": None})
    while (item := read(reader)) is not None:
        _limit_cpu(item["limit"])
        reply, healthy = attempt(run, item["item"])
        write(writer, reply)
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


def write(stream: BinaryIO, message: Any) -> None:
    """Writes a message."""
    stream.write(encode(message))
    stream.flush()


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
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    )
