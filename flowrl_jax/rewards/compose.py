"""Rewards beside correctness, added to it by weight: form, length, repetition, and a user's own.

A task takes text, so lengths are in characters; a token of English or LaTeX is about three of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from flowrl_jax.errors import InputError

Function = Callable[[str, Mapping[str, Any]], float]
"""A user's reward: of the response and the row of the data set that it answers."""


@dataclasses.dataclass(frozen=True)
class ComposeConfig:
    """What is added to the reward of correctness; nothing by default.

    Attributes:
        format_weight: of `format_reward`.
        format_pattern: regular expression that a response in form has a match of.
        length_weight: of `length_reward`.
        length_limit: characters from which on a response has the whole penalty.
        length_buffer: characters before the limit over which the penalty grows.
        repetition_weight: of `repetition_reward`.
        repetition_ngram: words of the sequences that are counted.
        function: a user's reward, "module:function" or "path.py:function"; "" for none.
        function_weight: of what it returns.
    """

    format_weight: float = 0.0
    format_pattern: str = r"(?im)^\W*answer\W*:.*\S\s*\Z"
    length_weight: float = 0.0
    length_limit: int = 24_576
    length_buffer: int = 12_288
    repetition_weight: float = 0.0
    repetition_ngram: int = 8
    function: str = ""
    function_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("format_weight", "length_weight", "repetition_weight", "function_weight"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name}={getattr(self, name)}: weights must be finite numbers")
        if not 0 < self.length_buffer <= self.length_limit:
            raise InputError(
                f"length_buffer={self.length_buffer}: must be more than 0 and at most"
                f" length_limit={self.length_limit}"
            )
        if self.repetition_ngram < 1:
            raise InputError(f"repetition_ngram={self.repetition_ngram}: must be at least 1")
        try:
            re.compile(self.format_pattern)
        except re.error as error:
            raise InputError(
                f"format_pattern={self.format_pattern!r}: no regular expression: {error}"
            ) from None


class Composer:
    """Computes what is added to the reward of correctness.

    Args:
        config: the settings.

    Raises:
        InputError: the user's function cannot be loaded.
    """

    def __init__(self, config: ComposeConfig):
        self.config = config
        self._function = load_function(config.function) if config.function else None
        self._pattern = re.compile(config.format_pattern)

    def __call__(self, response: str, row: Mapping[str, Any]) -> float:
        """Returns the weighted sum.

        Args:
            response: what the policy wrote.
            row: what it answers.

        Raises:
            InputError: the user's function raised, or returned no finite number.
        """
        config, total = self.config, 0.0
        if config.format_weight:
            total += config.format_weight * format_reward(response, self._pattern)
        if config.length_weight:
            total += config.length_weight * length_reward(
                response, limit=config.length_limit, buffer=config.length_buffer
            )
        if config.repetition_weight:
            total += config.repetition_weight * repetition_reward(
                response, ngram=config.repetition_ngram
            )
        if self._function is not None:
            value = call_function(self._function, config.function, response, row)
            total += config.function_weight * value
        return total


def format_reward(response: str, pattern: re.Pattern[str]) -> float:
    """Returns 1 where a response has a match of the pattern, else 0."""
    return float(pattern.search(response) is not None)


def length_reward(response: str, *, limit: int, buffer: int) -> float:
    """Returns the soft overlong penalty of DAPO (arXiv 2503.14476, equation 13), in characters.

    Args:
        response: what the policy wrote.
        limit: characters from which on it is -1.
        buffer: characters before the limit over which it falls from 0 to -1, linearly.
    """
    return -min(max((len(response) - (limit - buffer)) / buffer, 0.0), 1.0)


def repetition_reward(response: str, *, ngram: int) -> float:
    """Returns minus the share of a response's n-grams that have come before.

    Args:
        response: what the policy wrote.
        ngram: words of an n-gram; a response of fewer words has none, and 0.
    """
    words = response.split()
    count = len(words) - ngram + 1
    if count < 1:
        return 0.0
    different = {tuple(words[place : place + ngram]) for place in range(count)}
    return len(different) / count - 1.0


def load_function(name: str) -> Function:
    """Returns the function that a setting names.

    Args:
        name: "module:function" or "path.py:function", a path from the working directory.

    Raises:
        InputError: no such file, module or function, or importing it fails.
    """
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise InputError(
            f"reward function {name!r}: write it as module:function or path.py:function"
        )
    try:
        module = (
            _module_of(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"reward function {name!r}: importing it fails: {_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"reward function {name!r}: {where} has no function {function!r}")
    return cast(Function, found)


def _module_of(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"reward function: no file {path}; a path is from the working directory")
    name = f"_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # so it is for every name in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look there
    spec.loader.exec_module(module)
    return module


def call_function(function: Function, name: str, response: str, row: Mapping[str, Any]) -> float:
    """Returns what a user's reward says of a response.

    Args:
        function: the reward.
        name: as the setting has it, for messages.
        response: what the policy wrote.
        row: what it answers.

    Raises:
        InputError: it raised, or returned no finite number.
    """
    asked = f"reward function {name!r}, prompt {row.get('prompt_id')}"
    try:
        value = function(response, row)
        number = float(value)
    except Exception as error:
        raise InputError(
            f"{asked}: {_line(error)}; mend it, every response needs a number"
        ) from error
    if not math.isfinite(number):
        raise InputError(f"{asked}: returned {value!r}; rewards must be finite")
    return number


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
