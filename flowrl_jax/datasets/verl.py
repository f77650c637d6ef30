"""Code problems in verl's form, the one of the released FlowRL's training data.

A record has `prompt` (chat messages), `data_source`, and the tests as `reward_model.ground_truth`:
JSON text of inputs and outputs, of a list of tests or assertions, or code that asserts. The columns
may have other names. `rewards.code.parse`, by which tests are read when a program is judged, reads
each row's here as well, so that an unusable one is found with its file, row and column.
"""

from __future__ import annotations

import json
from typing import Any

from flowrl_jax.datasets.files import Record, field, prompt_text
from flowrl_jax.datasets.rows import NO_TESTS, Row, RowFunction
from flowrl_jax.errors import InputError
from flowrl_jax.rewards import code

_UNUSABLE = (InputError, LookupError, TypeError, ValueError, AttributeError)


def code_problem(
    *,
    prompt: str = "prompt",
    tests: str = "reward_model.ground_truth",
    source: str = "data_source",
) -> RowFunction:
    """Returns the row function of code problems.

    The prompt stays as it is: in the released data it holds the instruction already, so the task
    needs `wrap=False`.

    Args:
        prompt: column with text or chat messages, whose contents are joined.
        tests: column with the tests; "a.b" is column b within a.
        source: column with the data set's name, which decides time and number of tests.
    """

    def row(record: Record, split: str) -> Row | str:
        del split
        name = field(record, source)
        if not isinstance(name, str) or not name:
            raise InputError(f"{record.place}: {source!r}={name!r}; give the data set's name")
        text = tests_text(record, tests, name)
        problem = prompt_text(record, prompt)
        if not problem.strip():
            raise InputError(f"{record.place}: {prompt!r} is empty; give a prompt")
        if text is None:
            return NO_TESTS
        return {"prompt": problem, "answer": "", "tests": text, "data_source": name.lower()}

    return row


def tests_text(record: Record, name: str, source: str = "") -> str | None:
    """Returns the tests in a column as text, so that values of any type fit one column.

    Args:
        record: the record.
        name: of the column; "a.b" is column b within a.
        source: the data set's name.

    Returns:
        What `rewards.code.parse` reads; None where the column holds no test.

    Raises:
        InputError: there is no such column, or it holds no tests that can be used.
    """
    value = field(record, name)
    if _empty(value):
        return None
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        code.parse(text, source.lower())
    except _UNUSABLE as error:
        cause = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(
            f"{record.place}: {name!r} holds no tests that can be run ({cause})"
        ) from None
    return text


def _empty(value: Any) -> bool:
    """Whether there is no test, rather than one that cannot be read."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return not value.strip()
    if isinstance(value, dict) and {"inputs", "outputs"} <= value.keys():
        return not value["inputs"] and not value["outputs"]
    return value is None or value in ("", [], {})
