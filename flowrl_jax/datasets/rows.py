"""From the records of public data sets to rows: prompt, answer, and what tasks read besides.

Each function takes a record and the name of the split, and returns the row, or text that says why
the record makes none, which is counted. `tests` of code problems is JSON in the form that the data
set has; `flowrl_jax.rewards.code` knows these forms, and here only their outline is checked.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowrl_jax.datasets.files import Record, field, prompt_text
from flowrl_jax.errors import InputError

Row = dict[str, Any]
RowFunction = Callable[[Record, str], Row | str]

NO_ANSWER = "no answer"
NO_TESTS = "no tests"
_CALCULATOR = re.compile(r"<<[^>]*>>")
_MBPP_SPLITS = {"test": range(11, 511), "train": range(601, 975)}
_GAME24_TEST = range(901, 1001)


def problem(
    source: str,
    *,
    prompt: str = "problem",
    answer: str = "answer",
    extras: Mapping[str, str] | None = None,
) -> RowFunction:
    """Returns a row function for problems whose fields need renaming only.

    Args:
        source: the row's `data_source`.
        prompt: field with the problem.
        answer: field with the answer: text, a number, or a list whose first element counts, as in
            the released FlowRL. An integer is written as one: 27.0 and "027" become 27.
        extras: field of the row -> field of the record, for what else is kept.
    """

    def row(record: Record, split: str) -> Row | str:
        del split
        value = field(record, answer)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None or value == "":
            return NO_ANSWER
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"{record.place}: {answer!r}={value!r}; give text or a number")
        text = str(value).strip()
        found = {name: field(record, column) for name, column in (extras or {}).items()}
        return {
            "prompt": _text(record, prompt),
            "answer": (text.lstrip("0") or "0") if re.fullmatch(r"[0-9]+", text) else text,
            "data_source": source,
            **{name: value for name, value in found.items() if value is not None},
        }

    return row


def gsm8k(record: Record, split: str) -> Row | str:
    """GSM8K: the answer stands after #### at the end of the solution."""
    del split
    solution, mark, answer = _text(record, "answer").rpartition("####")
    if not mark or not answer.strip():
        raise InputError(f"{record.place}: 'answer' has no '#### ' with the result; add it")
    return {
        "prompt": _text(record, "question"),
        "answer": answer.strip().replace(",", ""),
        "solution": _CALCULATOR.sub("", solution).strip(),
        "data_source": "gsm8k",
    }


def dapo(record: Record, split: str) -> Row | str:
    """DAPO-Math-17k: the bare problem, without the instruction and reminder around it."""
    del split
    prompt = prompt_text(record, "prompt")
    first, _, rest = prompt.partition("\n\n")
    middle, _, last = rest.rpartition("\n\n")
    if "Answer: $Answer" not in first or '"Answer:"' not in last or not middle.strip():
        raise InputError(
            f"{record.place}: 'prompt' is not wrapped as DAPO-Math-17k's are; for bare problems"
            " name no set in data.options, only the file"
        )
    answer = field(record, "reward_model.ground_truth")
    if not isinstance(answer, str) or not answer.strip():
        return NO_ANSWER
    return {"prompt": middle.strip(), "answer": answer.strip(), "data_source": "math_dapo"}


def game24(record: Record, split: str) -> Row | str:
    """Game of 24: a Countdown problem; ranks 901 to 1000 are the test set of Tree of Thoughts."""
    try:
        rank = int(field(record, "Rank"))
        numbers = [int(number) for number in field(record, "Puzzles").split()]
    except (ValueError, AttributeError):
        raise InputError(f"{record.place}: 'Rank' or 'Puzzles' holds no whole numbers") from None
    if (rank in _GAME24_TEST) != (split == "test"):
        return "of the other split"
    row = {"numbers": numbers, "target": 24, "rank": rank, "data_source": "game24"}
    return {"prompt": "", "answer": "", **row}


def countdown(record: Record, split: str) -> Row | str:
    """Countdown-Tasks-3to4 as TinyZero has it: numbers, target and a prompt."""
    del split
    prompt = prompt_text(record, "prompt") if "prompt" in record.fields else ""
    row = {"numbers": field(record, "nums"), "target": field(record, "target")}
    return {"prompt": prompt, "answer": "", **row, "data_source": "countdown"}


def humaneval(source: str) -> RowFunction:
    """Returns the row function of HumanEval, or of HumanEval+ in HumanEval's form."""

    def row(record: Record, split: str) -> Row | str:
        del split
        prompt, entry_point = _text(record, "prompt"), _text(record, "entry_point")
        tests = {"prompt": prompt, "test": _text(record, "test"), "entry_point": entry_point}
        return {
            **_code(prompt, tests, source),
            "starter_code": prompt,
            "entry_point": entry_point,
            "solution": prompt + _text(record, "canonical_solution"),
            "task_id": field(record, "task_id"),
        }

    return row


def mbpp(record: Record, split: str) -> Row | str:
    """MBPP: the asserts belong to the question, since only they name the function."""
    task_id, asserts = field(record, "task_id"), field(record, "test_list")
    if task_id not in _MBPP_SPLITS[split]:
        return "of another split"
    if not isinstance(asserts, list) or not all(isinstance(line, str) for line in asserts):
        raise InputError(f"{record.place}: 'test_list' is not a list of assertions; give one")
    setup, solution = field(record, "test_setup_code"), _text(record, "code").replace("\r\n", "\n")
    listed = "\n".join(asserts)
    prompt = f"{_text(record, 'text')}\nThe code has to pass these tests:\n\n{listed}\n"
    function = _tested_function(solution, listed)
    cases = [f"{setup}\n{line}".lstrip() for line in asserts]
    return {
        **_code(prompt, {"kind": "assert", "cases": cases, "function": function}, "mbpp"),
        "entry_point": function,
        "solution": solution,
        "task_id": task_id,
    }


def contest(source: str) -> RowFunction:
    """Returns the row function of DeepCoder's files, whichever of its four sources they are from.

    TACO has parallel lists of inputs and outputs, PrimeIntellect and LiveCodeBench lists of tests,
    Codeforces such a list without types. Which one a record is decides its `data_source`, unless it
    has one; `source` stands for the last.
    """

    def row(record: Record, split: str) -> Row | str:
        del split
        tests = _json(record, "tests")
        metadata = _json(record, "metadata") if record.fields.get("metadata") else None
        _check_tests(record, tests)
        if not (tests["inputs"] if isinstance(tests, dict) else tests):
            return NO_TESTS
        name = source
        if isinstance(tests, dict):
            name, function = "taco", tests.get("fn_name")
        else:
            function = tests[0].get("fn_name")
            if "testtype" in tests[0]:
                name, function = "livecodebench", _named_function(record, tests, metadata)
            elif "type" in tests[0]:
                name = "primeintellect"
        return {
            **_code(_text(record, "problem"), tests, name),
            "starter_code": record.fields.get("starter_code") or "",
            "entry_point": function or "",
        }

    return row


def livecodebench(record: Record, split: str) -> Row | str:
    """LiveCodeBench's own files: public and private tests, the latter usually packed."""
    del split
    metadata = _json(record, "metadata") if record.fields.get("metadata") else None
    tests = [*_json(record, "public_test_cases"), *_private_tests(record)]
    _check_tests(record, tests)
    if not tests:
        return NO_TESTS
    entry_point = _named_function(record, tests, metadata)
    return {
        **_code(_text(record, "question_content"), tests, "livecodebench"),
        "starter_code": _text(record, "starter_code"),
        "entry_point": entry_point,
        "contest_date": str(field(record, "contest_date")),
        "level": field(record, "difficulty"),
        "task_id": field(record, "question_id"),
    }


def _text(record: Record, name: str) -> str:
    value = field(record, name)
    if not isinstance(value, str):
        raise InputError(f"{record.place}: {name!r} is a {type(value).__name__}; give text")
    return value


def _json(record: Record, name: str) -> Any:
    value = field(record, name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise InputError(f"{record.place}: {name!r} is not JSON; copy the file anew") from None


def _code(prompt: str, tests: Any, source: str) -> Row:
    """A row of a code problem; its tests are text, so that values of any type fit one column."""
    return {
        "prompt": prompt,
        "answer": "",
        "tests": json.dumps(tests, ensure_ascii=False),
        "starter_code": "",
        "entry_point": "",
        "data_source": source,
    }


def _check_tests(record: Record, tests: Any) -> None:
    if isinstance(tests, dict):
        given, wanted = tests.get("inputs"), tests.get("outputs")
        if not (isinstance(given, list) and isinstance(wanted, list) and len(given) == len(wanted)):
            raise InputError(f"{record.place}: 'tests' has no inputs and outputs of one length")
    elif not isinstance(tests, list) or not all(
        isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests
    ):
        raise InputError(f"{record.place}: 'tests' is not a list of tests with input and output")


def _named_function(record: Record, tests: Sequence[Row], metadata: Any) -> str:
    """The function that LiveCodeBench's tests call; it is written into them if it stands beside."""
    if all(test.get("testtype") != "functional" for test in tests):
        return ""
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    for test in tests:
        name = name or (test.get("metadata") or {}).get("func_name")
        test["fn_name"] = name
    if not name:
        raise InputError(f"{record.place}: 'tests' call a function that 'metadata' does not name")
    return str(name)


def _private_tests(record: Record) -> list[Row]:
    text = _text(record, "private_test_cases")
    try:
        return json.loads(text)
    except ValueError:
        pass  # packed, then
    try:
        return json.loads(_TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load())
    except (ValueError, TypeError, EOFError, zlib.error, pickle.UnpicklingError):
        raise InputError(
            f"{record.place}: 'private_test_cases' is neither JSON nor packed; copy the file anew"
        ) from None


class _TextOnly(pickle.Unpickler):
    """A pickle may run any program when it is read; one that holds a text needs no names."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} in a pickle of text")


def _tested_function(solution: str, asserts: str) -> str:
    """The name of the function of a solution that assertions call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in old programs
            body = ast.parse(solution).body
    except SyntaxError:
        return ""
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    called = [name for name in names if re.search(rf"\b{re.escape(name)}\(", asserts)]
    return called[-1] if called else ""
