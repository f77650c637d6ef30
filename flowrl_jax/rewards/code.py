"""The code reward: the last fenced program of a response, run against tests in a sandbox.

The rule is that of the DeepCoder data, which the released FlowRL trains on (`rllm/rewards`): all
tests must pass, and there is no credit for some of them. Programs that read and print are compared
line by line as LiveCodeBench does, exactly or as decimal numbers; functions by equality. Of the
tests of TACO and PrimeIntellect the 15 with the longest inputs count.

Departures: programs run in a sandbox (`flowrl_jax.sandbox`) and not on the trainer's host; TACO's
printed output is compared by LiveCodeBench's rule as well; a program that ends with an exit status
other than 0 fails.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flowrl_jax.errors import InputError, require
from flowrl_jax.sandbox import codec
from flowrl_jax.sandbox.limits import Limits
from flowrl_jax.sandbox.runner import Sandbox

KINDS = ("stdin", "call", "assert")
LONGEST_TESTS = 15
"""How many of a problem's tests count where the release takes those with the longest inputs."""

SECONDS = {"taco": 12.0, "primeintellect": 12.0, "livecodebench": 6.0}
"""Time of one test by source, as released; others take `Limits.seconds`."""

_LONGEST_FIRST = ("taco", "primeintellect")
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Tests:
    """The tests of one problem.

    Attributes:
        kind: "stdin": the program reads and prints; "call": a function returns; "assert": test
            code calls functions of the program and asserts.
        cases: pairs (input, output) of text; pairs (arguments, accepted values); or test code, all
            pieces of which share their names.
        function: the function under test, of the program or of its class `Solution`; for "assert"
            the name that is the program's even where Python has one of its own.
        prelude: code before both the program and the tests, such as imports and given helpers.
        seconds: of one test; 0 leaves it to the limits.
    """

    __test__ = False  # pytest: this is no class of tests

    kind: str
    cases: tuple[Any, ...]
    function: str = ""
    prelude: str = ""
    seconds: float = 0.0

    def __post_init__(self):
        require(self.kind in KINDS, f"tests of kind {self.kind!r}: give one of {', '.join(KINDS)}")
        require(bool(self.cases), "a problem without tests: drop it from the data")
        require(self.kind != "call" or bool(self.function), "tests that call name no function")


class Result(NamedTuple):
    """What became of a program.

    Attributes:
        outcome: "correct", "wrong", "error", "timeout", "limit" or "refused".
        passed: tests before the first that failed.
        total: tests there are.
        detail: for people.
    """

    outcome: str
    passed: int
    total: int
    detail: str


def extract(response: str) -> str | None:
    """Returns the last fenced block of a response, or None where there is none that is closed."""
    blocks = _BLOCK.findall(response)
    return blocks[-1] if blocks else None


def run_tests(
    program: str,
    tests: Tests,
    *,
    limits: Limits | None = None,
    isolation: str = "auto",
    sandbox: Sandbox | None = None,
) -> Result:
    """Runs a program against tests until one fails, in one sandbox for all of them.

    Args:
        program: its source.
        tests: of the problem.
        limits: what it may use; the tests' own time for each test, if they have one, by default.
        isolation: "auto", "required" or "none", see `flowrl_jax.sandbox.runner.Sandbox`.
        sandbox: to use instead of one with this isolation.

    Raises:
        InputError: isolation is required and this machine refuses it.
    """
    limits = limits or Limits(seconds=tests.seconds or Limits.seconds)
    sandbox = sandbox or Sandbox(isolation)
    cases: Sequence[Any] = tests.cases
    if tests.kind == "call":
        cases = [[codec.encode(given), codec.encode(accepted)] for given, accepted in cases]
    source = f"{tests.prelude}\n{program}" if tests.prelude else program
    verdict = sandbox.judge(
        {
            "program": source,
            "kind": tests.kind,
            "cases": list(cases),
            "function": tests.function,
            "setup": tests.prelude,
        },
        limits,
    )
    return Result(verdict.outcome, verdict.passed, len(cases), verdict.detail)


def parse(truth: Any, source: str = "") -> Tests:
    """Returns the tests that a row of a data set holds, in whichever of the known forms.

    Args:
        truth: JSON or what JSON holds: `{"inputs", "outputs", "fn_name"?}` (TACO);
            `[{"input", "output", "type" or "testtype", ...}]` (PrimeIntellect, LiveCodeBench,
            Codeforces); `{"test", "entry_point"}` (HumanEval and HumanEval+); a list of assertions
            (MBPP); what `dump` wrote. Text that is no JSON, or JSON of a text, is test code.
        source: the data set's name, lower case; decides the time and the number of tests.

    Raises:
        InputError: it is none of these, or has no tests.
    """
    if isinstance(truth, str):
        with contextlib.suppress(ValueError):  # code, then
            truth = json.loads(truth)
    if isinstance(truth, str):
        truth = [truth]
    seconds = SECONDS.get(source, 0.0)
    if isinstance(truth, Mapping) and "kind" in truth:
        return _load(truth)
    if isinstance(truth, Mapping) and "test" in truth:
        return humaneval({"prompt": "", **truth})
    if isinstance(truth, Mapping) and {"inputs", "outputs"} <= truth.keys():
        pairs = list(zip(truth["inputs"], truth["outputs"], strict=True))
        return _pairs(pairs, truth.get("fn_name") or "", source, seconds)
    if isinstance(truth, Sequence) and truth and all(isinstance(one, str) for one in truth):
        _asserting("\n".join(truth))
        return Tests("assert", tuple(truth), seconds=seconds)
    if isinstance(truth, Sequence) and truth and all("input" in one for one in truth):
        pairs = [(one["input"], one["output"]) for one in truth]
        return _pairs(pairs, _function(truth[0]), source, seconds)
    raise InputError(
        f"tests {str(truth)[:60]!r}: of no known form; see docs/rewards.md for those there are"
    )


def _asserting(text: str) -> None:
    """Refuses test code that tests nothing when it is run."""
    require(
        "assert" in text,
        f"tests {text[:60]!r}: neither JSON nor code that asserts; see docs/rewards.md for the"
        " forms that tests have",
    )
    require(
        not re.search(r"^def check\(", text, re.MULTILINE) or _calls_check(text),
        f"tests {text[:60]!r}: define check and do not call it, so that any program passes; give"
        ' JSON with "test" and "entry_point"',
    )


def _calls_check(test: str) -> bool:
    """Whether code calls `check` when it is run; a call in a definition is not taken for one."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    try:
        run = [one for one in ast.parse(test).body if not isinstance(one, definitions)]
    except SyntaxError:
        return True  # and every program fails
    nodes = (node for statement in run for node in ast.walk(statement))
    return any(isinstance(node, ast.Call) and ast.unparse(node.func) == "check" for node in nodes)


def dump(tests: Tests) -> str:
    """Returns tests as JSON that `parse` reads."""
    return json.dumps({**dataclasses.asdict(tests), "cases": codec.encode(tests.cases)})


def humaneval(row: Mapping[str, Any]) -> Tests:
    """Returns the tests of a row of HumanEval or HumanEval+.

    Args:
        row: `prompt` (imports, helpers, and the function up to its docstring), `test` (code that
            defines `check`) and `entry_point`.

    Raises:
        InputError: the prompt is no Python, or without an entry_point the tests call nothing.
    """
    function, test = row.get("entry_point") or "", row["test"]
    if not function:
        _asserting(test)
    called = not function or _calls_check(test)
    return Tests(
        "assert",
        (test if called else f"{test}\ncheck({function})\n",),
        function,
        _without(row["prompt"], function),
        # All assertions are one test here; evaluations give a second to each, of which there are
        # many on a machine that is busy with other things too.
        seconds=60.0,
    )


def mbpp(row: Mapping[str, Any]) -> Tests:
    """Returns the tests of a row of MBPP.

    Args:
        row: `test_list`, `test_setup_code`, and `code`, the reference, which tells the function
            under test from functions of Python that tests use.

    Raises:
        InputError: the row has no tests.
    """
    cases = [str(case) for case in row["test_list"]]
    require(bool(cases), f"MBPP task {row.get('task_id')}: no tests; drop it from the data")
    defined = set(re.findall(r"^def\s+(\w+)", row.get("code") or "", re.MULTILINE))
    used = [name for name in re.findall(r"(\w+)\s*\(", cases[0]) if name in defined]
    if row.get("test_setup_code"):
        cases[0] = f"{row['test_setup_code']}\n{cases[0]}"
    return Tests("assert", tuple(cases), used[0] if used else "")


def _load(truth: Mapping[str, Any]) -> Tests:
    fields = {field.name for field in dataclasses.fields(Tests)}
    unknown = sorted(truth.keys() - fields)
    require(not unknown, f"tests with {unknown}: known are {', '.join(sorted(fields))}")
    cases = codec.decode(truth["cases"])
    return Tests(**{**truth, "cases": tuple(cases)})


def _function(test: Mapping[str, Any]) -> str:
    """The function of the first of a list of tests; empty for a program that reads and prints."""
    kind = test.get("type") or test.get("testtype") or "stdin"
    if kind in ("stdin", "stdin_stdout"):
        return ""
    metadata = test.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    name = test.get("fn_name") or metadata.get("func_name")
    if not name:
        raise InputError(f"tests of type {kind!r}: no fn_name and no metadata.func_name")
    return name


def _pairs(pairs: list[tuple[Any, Any]], function: str, source: str, seconds: float) -> Tests:
    if source in _LONGEST_FIRST and len(pairs) > LONGEST_TESTS:
        by_length = sorted(range(len(pairs)), key=lambda i: -len(str(pairs[i][0])))
        pairs = [pairs[i] for i in sorted(by_length[:LONGEST_TESTS])]
    if not function:
        cases = tuple((_lines(given), _lines(expected)) for given, expected in pairs)
        return Tests("stdin", cases, seconds=seconds)
    wrapped = source != "livecodebench"  # TACO keeps the value returned in a list of its own.
    cases = tuple((_arguments(given), _accepted(out, wrapped)) for given, out in pairs)
    return Tests("call", cases, function, seconds=seconds)


def _lines(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(str(line) for line in text)


def _arguments(given: Any) -> list[Any]:
    """The arguments of a call: a list, or lines of JSON with one argument each."""
    if isinstance(given, str):
        return [_value(line) for line in given.split("\n") if line.strip()]
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _accepted(expected: Any, wrapped: bool) -> list[Any]:
    value = _value(expected) if isinstance(expected, str) and not wrapped else expected
    inner = isinstance(value, list) and len(value) == 1 and wrapped
    return [value, value[0]] if inner else [value]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without(prompt: str, function: str) -> str:
    """The code of a prompt less the function that is asked for."""
    try:
        tree = ast.parse(prompt)
    except SyntaxError:
        raise InputError(f"HumanEval prompt of {function!r}: is no Python") from None
    body = [node for node in tree.body if getattr(node, "name", None) != function]
    return ast.unparse(ast.Module(body, []))
