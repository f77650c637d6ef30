"""The process between the trainer and a sandbox: it makes the namespaces and compares output.

Run as `python -S launcher.py` with two messages on standard input, the settings and the job; the
verdict goes to standard output. It imports next to nothing, since it starts once for every program.
"""

from __future__ import annotations

import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from flowrl_jax.sandbox import kernel, wire
from flowrl_jax.sandbox.executor import execute, kill_all, members
from flowrl_jax.sandbox.worker import HIT_LIMIT

TYPE_CHECKING = False  # typing's own would be an import that costs milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

_NOBODY = 65534
_FIRST_USER = 1 << 30
_GRACE = 2.0


def main() -> None:
    """Judges one program."""
    settings = wire.receive(0)
    kernel.die_with_parent()
    if os.getppid() != settings["parent"]:
        return
    try:
        enter_namespaces(settings)
    except OSError as error:
        report({"outcome": "refused", "passed": 0, "detail": str(error)})
        return
    kernel.die_with_parent()  # New credentials made the kernel forget it.
    kernel.hide_memory()
    requests, requests_end = os.pipe()
    replies, replies_end = os.pipe()
    # The executor is forked before the job is read: its memory, of which programs have a copy,
    # has no expected result in it.
    executor = os.fork()
    if executor == 0:
        os.close(requests_end)
        os.close(replies)
        try:
            execute(settings, requests, replies_end)
        except wire.Ended:
            pass
        finally:
            os._exit(0)
    os.close(requests)
    os.close(replies_end)
    job = wire.receive(0)
    deadline = time.monotonic() + settings["total_seconds"] + _GRACE
    try:
        verdict = judge(job, requests_end, replies, deadline)
    except wire.Late:
        verdict = {"outcome": "timeout", "passed": 0, "detail": "all tests together"}
    except wire.Ended:
        verdict = {"outcome": "error", "passed": 0, "detail": "the sandbox was killed"}
    os.kill(executor, signal.SIGKILL)
    os.waitpid(executor, 0)  # In a namespace of its own this returns when all inside are gone.
    if not settings["namespaces"]:
        sweep(settings)
    report(verdict)


def enter_namespaces(settings: dict[str, Any]) -> None:
    """Enters new namespaces where that is wanted, and chooses the user that programs run as.

    Args:
        settings: `namespaces` says whether; `user` is set.

    Raises:
        OSError: the kernel does not allow it.
    """
    root = os.geteuid() == 0
    # A user of its own: nothing else runs under this number, and limits on processes count by it.
    settings["user"] = _free_user() if root else os.geteuid()
    if not settings["namespaces"]:
        kernel.adopt_orphans()
        if root:
            os.chown(settings["folder"], settings["user"], settings["user"])
        else:
            settings["processes"] += _tasks(settings["user"])
        return
    try:
        kernel.unshare(kernel.NAMESPACES)
    except OSError:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(kernel.NAMESPACES | kernel.CLONE_NEWUSER)
        settings["user"] = user
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        if _kernel() < (5, 14):  # An older one counts a user's processes over all namespaces.
            settings["processes"] += _tasks(user)


def _free_user() -> int:
    """A user id that this process may take, its own number among those nobody has if possible."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [[int(part) for part in line.split()] for line in file]
    wanted = _FIRST_USER + os.getpid()
    mapped = any(first <= wanted < first + count for first, _, count in ranges)
    return wanted if mapped else _NOBODY


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def _tasks(user: int) -> int:
    """Processes and threads that a user has by now, as far as /proc shows them."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def judge(job: dict[str, Any], requests: int, replies: int, deadline: float) -> dict[str, Any]:
    """Has the executor run the tests of a job, and compares what is printed.

    Args:
        job: `program`, `kind`, `cases`, and `function` and `setup` for calls and assertions.
        requests: descriptor to the executor.
        replies: descriptor from it.
        deadline: on `time.monotonic`'s clock.

    Returns:
        `outcome`, `passed` (tests), `detail`.

    Raises:
        wire.Late: the executor is not done before the deadline.
        wire.Ended: the executor ended.
    """
    ready = wire.receive(replies, deadline)
    if "refused" in ready:
        return {"outcome": "refused", "passed": 0, "detail": ready["refused"]}
    program = {"program": job["program"]}
    if job["kind"] != "stdin":
        wire.send(requests, program, deadline)
        wire.send(requests, {key: job[key] for key in job if key != "program"}, deadline)
        return called(wire.receive(replies, deadline))
    for passed, (given, expected) in enumerate(job["cases"]):
        wire.send(requests, {**program, "input": given}, deadline)
        outcome, detail = ran(wire.receive(replies, deadline), expected)
        if outcome != "correct":
            return {"outcome": outcome, "passed": passed, "detail": f"test {passed}: {detail}"}
    return {"outcome": "correct", "passed": len(job["cases"]), "detail": ""}


def ran(reply: dict[str, Any], expected: str) -> tuple[str, str]:
    """Returns outcome and detail of a program that was run as a command."""
    if reply["cause"]:
        return reply["cause"], ""
    if reply["status"]:
        return died(reply["status"]), reply["other"][-300:]
    return ("correct", "") if same_output(reply["out"], expected) else ("wrong", "")


def called(reply: dict[str, Any]) -> dict[str, Any]:
    """Returns the verdict on a program whose functions were called."""
    if reply["cause"]:
        return {"outcome": reply["cause"], "passed": 0, "detail": "all tests together"}
    try:
        import json

        verdict = json.loads(reply["other"])  # from the pipe that only the judge has
    except ValueError:
        return {"outcome": "error", "passed": 0, "detail": "the judge was killed"}
    if verdict["outcome"] == "gone":
        verdict["outcome"] = died(reply["status"])
    return verdict


def died(status: int) -> str:
    """Returns the outcome that the wait status of a process that failed stands for."""
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) == signal.SIGXCPU else "error"
    return "limit" if os.WEXITSTATUS(status) == HIT_LIMIT else "error"


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs have the same lines: the same text, or the same decimal numbers.

    White space around the output and around each line does not count (the rule of LiveCodeBench).

    Args:
        printed: what a program wrote.
        expected: what it should have written.
    """
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (printed, expected)]
    if len(lines[0]) != len(lines[1]):
        return False
    pairs = zip(*lines, strict=True)
    return all(one == other or _same_numbers(one, other) for one, other in pairs)


def _same_numbers(one: str, other: str) -> bool:
    from decimal import Decimal, InvalidOperation

    try:
        first, second = ([Decimal(word) for word in line.split()] for line in (one, other))
        return first == second
    except InvalidOperation:
        return False


def sweep(settings: dict[str, Any]) -> None:
    """Kills what outlived its executor, all of which the kernel has handed to this process."""
    until = time.monotonic() + _GRACE
    while members(settings) and time.monotonic() < until:
        kill_all(settings)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return


def report(verdict: dict[str, Any]) -> None:
    """Writes the verdict for the trainer."""
    lines = f"{verdict['outcome']}\n{verdict['passed']}\n{verdict['detail']}"
    with open(1, "wb", closefd=False) as file:
        file.write(lines.encode("utf-8", "replace"))


if __name__ == "__main__":
    main()
