"""What a task is: a question to ask, and a judgement of the answers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from flowrl_jax.errors import InputError

Row = Mapping[str, Any]
"""One example of a data set as plain Python values; `prompt_id` is its index in the split."""

C = TypeVar("C")


class Verdict(NamedTuple):
    """What a task says of a response.

    Attributes:
        reward: finite.
        form: the canonical form of a correct solution; None for any other response. Two responses
            have the same form exactly when they count as one solution.
        outcome: one word, which runs count: "correct", "wrong", or what kept the response from
            being judged, such as "timeout".
    """

    reward: float
    form: str | None
    outcome: str


class Task(Protocol):
    """A question, the reward of a response to it, and what makes two right responses the same.

    A task whose responses end in an answer may also have `answer(response, row) -> str | None`,
    what a response answers, right or wrong, in a form that equal answers share: votes (maj@k) and
    the entropy of answers are counted of it.

    Attributes:
        name: the name under which `flowrl_jax.tasks.build` finds the task.
        parallel: responses that are judged at one time, each in a thread; more than 1 where
            `judge` waits for a process or the network.
    """

    name: str
    parallel: int = 1

    def prompt(self, row: Row) -> str:
        """Returns the text put before the policy."""
        ...

    def judge(self, response: str, row: Row) -> Verdict:
        """Returns the verdict on a response; never raises on what a policy may write."""
        ...

    def answer(self, response: str, row: Row) -> str | None:
        """Returns what a response answers, right or wrong, in the form in which votes are counted.

        None where it answers nothing, or the task has no answers apart from whole responses.
        """
        return None

    def demonstration(self, row: Row, rng: np.random.Generator) -> str:
        """Returns a correct response to imitate, drawn with `rng`.

        Raises:
            InputError: the row has no solution to show.
        """
        ...

    def close(self) -> None:
        """Ends the processes that the task has started, if any."""


def make_config(config_class: type[C], options: Mapping[str, Any], *, owner: str) -> C:
    """Builds a frozen config dataclass from plain options, rejecting what it does not know.

    Args:
        config_class: a dataclass whose fields all have defaults.
        options: field name -> value; a list is taken for a tuple, an int for a float.
        owner: what the options belong to, for messages ("task countdown").

    Raises:
        InputError: an unknown name or a value of another type than the field's default.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in fields:
            raise InputError(f"{owner}: no option {name!r}; {nearest(name, fields)}")
        default = fields[name].default
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if default is not None and type(value) is not type(default):
            raise InputError(
                f"{owner}: option {name}={value!r} is a {type(value).__name__}; "
                f"give a {type(default).__name__} such as {default!r}"
            )
        values[name] = value
    return config_class(**values)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message that helps somebody who mistyped one of the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {close[0]!r}? (known: {listed})" if close else f"known: {listed}"
