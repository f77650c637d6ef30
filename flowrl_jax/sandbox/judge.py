"""The part of a sandbox that knows what a program's functions should return.

It is a process of its own: the program is called through pipes, so that it sees the arguments and
never what they should lead to, and what comes back is plain data (`codec`), compared here.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import os
import sys
import time

from flowrl_jax.sandbox import codec, wire
from flowrl_jax.sandbox.worker import HIT_LIMIT

TYPE_CHECKING = False  # typing's own would be an import that costs milliseconds of every start
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


class Failed(Exception):
    """The program, and not a comparison, ended a test.

    Args:
        outcome: "error", "timeout" or "limit", or "gone" where the program's process ended.
        detail: for people.
    """

    def __init__(self, outcome: str, detail: str):
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class Program:
    """The program under test, in its own process.

    Args:
        calls: descriptor to write requests to.
        results: descriptor to read replies from.
        longest: bytes that a reply may have.
    """

    def __init__(self, calls: int, results: int, longest: int):
        self._calls, self._results, self._longest = calls, results, longest
        self.deadline = float("inf")

    def began(self) -> None:
        """Waits until the program's definitions are made.

        Raises:
            Failed: it ended instead.
        """
        status = self._exchange(None)["began"]
        if status:
            raise Failed("limit" if status == HIT_LIMIT else "error", "ends when it is imported")

    def ask(self, do: str, *arguments: Any, **named: Any) -> Any:
        """Does something with objects of the program.

        Raises:
            Failed: the program cannot.
            Exception: a built-in one that the program raised.
        """
        coded = codec.encode(list(arguments), _number), codec.encode(named, _number)
        reply = self._exchange({"do": do, "arguments": coded[0], "named": coded[1]})
        if "value" in reply:
            return codec.decode(reply["value"], lambda number: Remote(self, number))
        if reply.get("status") == HIT_LIMIT:
            raise Failed("limit", str(reply.get("text")))
        kind = getattr(builtins, str(reply.get("raised")), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in _OURS:
            error = Exception.__new__(kind)
            error.args = (str(reply.get("text")),)
            error.add_note(_RAISED)
            raise error
        raise Failed("error", str(reply.get("text")))

    def _exchange(self, request: Any) -> dict[str, Any]:
        try:
            if request is not None:
                wire.send_bytes(self._calls, json.dumps(request).encode(), self.deadline)
            body = wire.receive_bytes(self._results, self.deadline, self._longest)
            reply = json.loads(body)
        except wire.Late:
            raise Failed("timeout", "no answer in time") from None
        except wire.Ended:
            raise Failed("gone", "the program's process ended") from None
        except wire.TooLong:
            raise Failed("limit", "returns too much") from None
        except ValueError:
            raise Failed("error", "writes to the judge's pipe") from None
        if not isinstance(reply, dict):
            raise Failed("error", "writes to the judge's pipe")
        return reply


_OURS = (AssertionError, ImportError, SyntaxError, MemoryError)
_RAISED = "raised by the program"


class Remote:
    """An object of the program that is no plain data.

    It equals only itself: a program's own idea of equality decides nothing.

    Args:
        program: whose object.
        number: by which it is known there.
    """

    def __init__(self, program: Program, number: int):
        object.__setattr__(self, "_remote", (program, number))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._remote[0].ask("call", self, *arguments, **named)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._remote[0].ask("list", self))

    def __len__(self) -> int:
        return int(self._remote[0].ask("length", self))

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._remote[0].ask("item", self, key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Such a name is Python asking what this object can do.
            raise AttributeError(name)
        return self._remote[0].ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote[0].ask("set", self, name, value)


class _Named:
    """A name of the program, looked up there whenever it is used."""

    def __init__(self, program: Program, name: str):
        self._program, self._name = program, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask("run", self._name, *arguments, **named)


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return value._remote[1]
    if isinstance(value, _Named):
        return _number(value._program.ask("name", value._name))
    raise TypeError(f"a test hands a {type(value).__name__} to the program")


def judge(job: dict[str, Any], settings: dict[str, Any], calls: int, results: int, out: int):
    """Runs tests until one fails, and writes the verdict.

    Args:
        job: `kind` "call" or "assert", `cases`, `function`, `setup`.
        settings: of the launcher.
        calls: descriptor to write requests to the program to.
        results: descriptor to read its replies from.
        out: descriptor to write the verdict to.
    """
    program = Program(calls, results, settings["output_mb"] << 20)
    passed, outcome, detail = 0, "correct", ""
    try:
        program.deadline = time.monotonic() + settings["seconds"]
        program.began()
        check = _call(program, job) if job["kind"] == "call" else _assertion(program, job)
        for case in job["cases"]:
            program.deadline = time.monotonic() + settings["seconds"]
            if not check(case):
                outcome, detail = "wrong", f"test {passed}"
                break
            passed += 1
    except Failed as failed:
        outcome, detail = failed.outcome, f"test {passed}: {failed.detail}"
    except _Broken as broken:
        outcome, detail = "refused", f"test {passed}: {broken}"
    except Exception as error:  # What came back breaks what reads or compares it.
        outcome, detail = "error", f"test {passed}: {type(error).__name__}"
    verdict = {"outcome": outcome, "passed": passed, "detail": detail[:300]}
    os.write(out, json.dumps(verdict).encode())  # at once: it is shorter than a pipe is
    os._exit(0)


class _Broken(Exception):
    """The tests themselves cannot be run."""


def _call(program: Program, job: dict[str, Any]):
    """Compares what the function returns with what it should."""
    function = _Named(program, job["function"])

    def check(case: list[Any]) -> bool:
        arguments, expected = codec.decode(case[0]), codec.decode(case[1])
        try:
            found = function(*arguments)
        except Exception as error:
            raise Failed(getattr(error, "outcome", "error"), str(error)) from None
        return any(_same(found, accepted) for accepted in expected)

    return check


def _same(found: Any, expected: Any) -> bool:
    """Whether two values are equal, where JSON, which tests are kept in, knows no tuple."""
    if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return found == expected


def _assertion(program: Program, job: dict[str, Any]):
    """Runs test code, in which names that it does not define are the program's."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    function = job["function"]

    def run(source: str) -> None:
        try:
            tree = ast.parse(source)
            for name in _names(tree):
                if name not in namespace and (name == function or not hasattr(builtins, name)):
                    namespace[name] = _trusted(name) if name != function else None
                    namespace[name] = namespace[name] or _Named(program, name)
            exec(compile(tree, "tests.py", "exec"), namespace)
        except (SyntaxError, ImportError) as error:
            raise _Broken(f"the tests cannot run: {error}") from None

    def check(case: str) -> bool:
        try:
            run(case)
        except (Failed, _Broken):
            raise
        except AssertionError:
            return False
        except Exception as error:
            if _RAISED in getattr(error, "__notes__", ()):
                raise Failed("error", str(error)) from None
            return False  # A test that cannot deal with a result does not accept it.
        return True

    if job["setup"]:
        check(job["setup"])
    return check


def _trusted(name: str) -> Any:
    """A module of the standard library that tests use without importing it, or None.

    Were it the program's, then so would be the `math.isclose` that a test decides by.
    """
    return importlib.import_module(name) if name in sys.stdlib_module_names else None


def _names(tree: ast.AST) -> set[str]:
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}
