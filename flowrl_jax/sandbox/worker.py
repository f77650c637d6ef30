"""The part of a sandbox that is the program: it gives up privileges, then runs what it was given.

Nothing here can be trusted once the program has begun; it holds no secret and no expected result.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import types

from flowrl_jax.sandbox import codec, kernel, syscalls, wire

TYPE_CHECKING = False  # typing's own would be an import that costs milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

HIT_LIMIT = 86
"""Exit status of a program that ended by an exception for want of something."""

_WANTING = (errno.EFBIG, errno.ENOSPC, errno.EAGAIN, errno.EMFILE, errno.ENOMEM, errno.EDQUOT)


def confine(settings: dict[str, Any], seconds: float, keep: tuple[int, ...] = ()) -> None:
    """Gives up privileges, descriptors and resources for good.

    Args:
        settings: of the launcher.
        seconds: of processor time.
        keep: descriptors to keep, besides 0, 1 and 2, in ascending order.
    """
    start = 3
    for descriptor in keep:
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, 1 << 16)
    os.setsid()
    os.umask(0o077)
    megabyte = 1 << 20
    kernel.limit(resource.RLIMIT_CORE, 0)
    kernel.limit(resource.RLIMIT_CPU, int(seconds) + 2)
    kernel.limit(resource.RLIMIT_AS, settings["memory_mb"] * megabyte)
    kernel.limit(resource.RLIMIT_FSIZE, settings["disk_mb"] * megabyte)
    kernel.limit(resource.RLIMIT_NOFILE, settings["open_files"])
    kernel.limit(resource.RLIMIT_NPROC, settings["processes"])
    kernel.become(settings["user"])
    syscalls.forbid()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)  # a Python program meets an OSError instead


def run(program: str) -> int:
    """Runs a program as `python program.py` would.

    Args:
        program: its source.

    Returns:
        The exit status.
    """
    status = _execute(program, "__main__", {})
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        sys.stdout.flush()
    except BaseException as error:
        status = status or _status(error)
    return status


def serve(program: str, calls: int, results: int) -> None:
    """Runs a program as `import program` would, then does with it what the judge asks.

    Args:
        program: its source.
        calls: descriptor to read requests from.
        results: descriptor to write replies to.
    """
    namespace: dict[str, Any] = {}
    status = _execute(program, "program", namespace)
    # Imported when there are functions to call: programs that read and print start without it.
    import json

    wire.send_bytes(results, json.dumps({"began": status}).encode())
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    while status == 0:
        request = json.loads(wire.receive_bytes(calls))
        try:
            arguments = codec.decode(request["arguments"], objects.__getitem__)
            named = codec.decode(request["named"], objects.__getitem__)
            value = _perform(request["do"], namespace, arguments, named)
            reply = json.dumps({"value": codec.encode(value, keep)})
        except BaseException as error:
            raised = {"raised": type(error).__name__, "text": _text(error)}
            reply = json.dumps({**raised, "status": _status(error)})
        wire.send_bytes(results, reply.encode())


def _perform(do: str, namespace: dict[str, Any], arguments: list[Any], named: dict) -> Any:
    """Does one thing that the judge asks for."""
    if do == "name":
        return _find(namespace, arguments[0])
    first, *rest = arguments
    if do == "run":
        return _find(namespace, first)(*rest, **named)
    if do == "call":
        return first(*rest, **named)
    if do == "list":
        return list(first)
    if do == "length":
        return len(first)
    if do == "item":
        return first[rest[0]]
    if do == "get":
        return getattr(first, rest[0])
    if do == "set":
        return setattr(first, rest[0], rest[1])
    raise ValueError(do)


def _find(namespace: dict[str, Any], name: str) -> Any:
    """A method of the program's class Solution, or else whatever has this name."""
    solution = namespace.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    if name not in namespace:
        raise NameError(f"the program defines no {name!r}")
    return namespace[name]


def _execute(program: str, name: str, namespace: dict[str, Any]) -> int:
    module = types.ModuleType(name)
    module.__dict__.update(namespace)
    sys.modules[name] = module
    sys.argv = ["program.py"]
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
        status = 0
    except BaseException as error:
        status = _status(error)
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
    namespace.update(module.__dict__)
    return status


def _status(error: BaseException) -> int:
    """The exit status after an exception that nobody caught."""
    if isinstance(error, SystemExit):
        code = error.code
        return code & 0xFF if isinstance(code, int) else int(code is not None)
    wanting = isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno in _WANTING
    )
    return HIT_LIMIT if wanting or "can't start new thread" in _text(error) else 1


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return type(error).__name__
