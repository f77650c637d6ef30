"""The first process inside a sandbox: it starts programs, bounds what they use and ends them.

It never learns what a program's output should be before the process that runs the program exists;
where it is process 1 of its own namespace, its end is the end of everything inside.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from flowrl_jax.sandbox import kernel, wire, worker
from flowrl_jax.sandbox.root import enter_root

TYPE_CHECKING = False  # typing's own would be an import that costs milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

_LOOK = 0.05  # seconds between looks at the memory
_KILL_SECONDS = 5.0


def execute(settings: dict[str, Any], requests: int, replies: int) -> None:
    """Does what the launcher asks until it is gone.

    Args:
        settings: of the launcher.
        requests: descriptor to read what to do from.
        replies: descriptor to write what came of it to.
    """
    if settings["namespaces"] and os.getpid() != 1:
        wire.send(replies, {"refused": "no namespace of process ids"})
        return
    kernel.die_with_parent()
    kernel.hide_memory()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(nothing, standard)
    os.close(nothing)
    os.umask(0o022)
    if settings["kind"] != "stdin":  # Programs that read and print start without what this costs.
        import flowrl_jax.sandbox.judge  # noqa: F401  before the package is out of sight
    if settings["namespaces"]:
        try:
            enter_root(settings)
        except OSError as error:
            wire.send(replies, {"refused": str(error)})
            return
    else:
        kernel.adopt_orphans()
        os.chdir(settings["folder"])
    sys.path[:] = [path for path in sys.path if path != settings["package"]] + settings["packages"]
    wire.send(replies, {"ready": True})
    while True:
        request = wire.receive(requests)
        reply = (
            _run(settings, request) if "input" in request else _serve(settings, request, requests)
        )
        wire.send(replies, reply)


def _run(settings: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Runs the program once, as a command."""
    standard_input = os.memfd_create("stdin")
    with os.fdopen(os.dup(standard_input), "wb") as file:
        file.write(request["input"].encode("utf-8", "replace"))
    os.lseek(standard_input, 0, os.SEEK_SET)
    out, out_end = os.pipe()
    err, err_end = os.pipe()
    child = os.fork()
    if child == 0:
        _become_program(settings, standard_input, out_end, err_end, settings["seconds"])
        os._exit(worker.run(request["program"]))
    for descriptor in (standard_input, out_end, err_end):
        os.close(descriptor)
    watch = Watch(settings, child, out, err)
    return watch.until(time.monotonic() + settings["seconds"])


def _serve(settings: dict[str, Any], request: dict[str, Any], requests: int) -> dict[str, Any]:
    """Has a judge, in a process of its own, call the program's functions."""
    from flowrl_jax.sandbox import judge

    calls, calls_end = os.pipe()
    results, results_end = os.pipe()
    out, out_end = os.pipe()
    nothing = os.open(os.devnull, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        seconds = settings["total_seconds"]
        _become_program(settings, nothing, out_end, out_end, seconds, (calls, results_end))
        worker.serve(request["program"], calls, results_end)
        os._exit(0)
    # Only now, when the program's process exists, does anything inside learn about the tests.
    job = wire.receive(requests)
    verdict, verdict_end = os.pipe()
    judging = os.fork()
    if judging == 0:
        os.dup2(nothing, 2)
        kept = tuple(sorted((calls_end, results, verdict_end)))
        worker.confine(settings, settings["total_seconds"], kept)
        judge.judge(job, settings, calls_end, results, verdict_end)
    for descriptor in (calls, calls_end, results, results_end, out_end, verdict_end, nothing):
        os.close(descriptor)
    watch = Watch(settings, judging, out, verdict)
    return watch.until(time.monotonic() + settings["total_seconds"], program=child)


def _become_program(settings, standard_input, out, err, seconds, keep=()) -> None:
    for descriptor, standard in ((standard_input, 0), (out, 1), (err, 2)):
        os.dup2(descriptor, standard)
    worker.confine(settings, seconds, tuple(sorted(keep)))


class Watch:
    """A process that was started, and what it writes.

    Args:
        settings: of the launcher.
        child: the process whose end is the end of the run.
        out: descriptor of what is printed; too much of it ends the run.
        other: descriptor of a second stream, kept apart.
    """

    def __init__(self, settings: dict[str, Any], child: int, out: int, other: int):
        self._settings, self._child = settings, child
        self._texts = {out: bytearray(), other: bytearray()}
        self._out, self._other = out, other
        self._poll = select.poll()
        for descriptor in self._texts:
            os.set_blocking(descriptor, False)
            self._poll.register(descriptor, select.POLLIN)
        self._open = set(self._texts)
        self._statuses: dict[int, int] = {}

    def until(self, deadline: float, program: int | None = None) -> dict[str, Any]:
        """Waits for the end of the process, or brings it about; ends everything else it started.

        Args:
            deadline: on `time.monotonic`'s clock.
            program: another process whose exit status is wanted.

        Returns:
            `cause` ("", "timeout" or "limit"), `status` of the process or of `program`, `out` and
            `other`.
        """
        cause = self._wait(deadline)
        if program is not None and not cause:
            self._reap(program, block=0.05)
        self._end_all()
        self._read()
        for descriptor in self._texts:
            os.close(descriptor)
        status = self._statuses.get(self._child if program is None else program, 0)
        texts = [bytes(text).decode("utf-8", "replace") for text in self._texts.values()]
        return {"cause": cause, "status": status, "out": texts[0], "other": texts[1]}

    def _wait(self, deadline: float) -> str:
        longest, looked = self._settings["output_mb"] << 20, time.monotonic()
        pause = 0.001
        while not self._reap(self._child):
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            if now - looked >= _LOOK:
                looked = now
                if memory(members(self._settings)) > self._settings["memory_mb"] << 20:
                    return "limit"
            if self._open:
                self._poll.poll(1000 * min(_LOOK, deadline - now))
            else:
                time.sleep(pause)
                pause = min(2 * pause, _LOOK)
            self._read()
            if any(len(text) > longest for text in self._texts.values()):
                return "limit"
        return ""

    def _read(self) -> None:
        longest = self._settings["output_mb"] << 20
        for descriptor in list(self._open):
            text = self._texts[descriptor]
            while len(text) <= longest:
                try:
                    part = os.read(descriptor, 1 << 16)
                except BlockingIOError:
                    break
                if not part:
                    self._poll.unregister(descriptor)
                    self._open.discard(descriptor)
                    break
                text += part

    def _reap(self, process: int, block: float = 0.0) -> bool:
        until = time.monotonic() + block
        while process not in self._statuses:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                self._statuses[process] = status
            elif time.monotonic() >= until:
                return False
            else:
                time.sleep(0.002)
        return True

    def _end_all(self) -> None:
        """Kills every process inside, and takes note of how those that matter ended."""
        until = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < until:
            kill_all(self._settings)
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process:
                self._statuses.setdefault(process, status)
            else:
                time.sleep(0.001)


def kill_all(settings: dict[str, Any]) -> None:
    """Kills what this process started, and what that started, and so on."""
    # From anywhere but process 1 of a namespace this would kill everything on the host.
    if settings["namespaces"] and os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return
        return
    for process in members(settings):
        try:
            os.kill(process, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def members(settings: dict[str, Any]) -> list[int]:
    """Returns the processes inside but this one, as far as /proc shows them."""
    try:
        everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    own = os.getpid()
    if settings["namespaces"] and own == 1:
        return [process for process in everyone if process != own]
    parents = {process: _parent(process) for process in everyone}
    found, known = [own], {own}
    for parent in found:
        found += [p for p, of in parents.items() if of == parent and p not in known]
        known.update(found)
    return found[1:]


def memory(processes: list[int]) -> int:
    """Returns the bytes that processes hold in memory."""
    pages = 0
    for process in processes:
        try:
            with open(f"/proc/{process}/statm", encoding="ascii") as file:
                pages += int(file.read().split()[1])
        except (OSError, IndexError):
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


def _parent(process: int) -> int:
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
