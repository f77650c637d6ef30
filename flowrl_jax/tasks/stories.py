"""Stories: continue an opening so that the asked-for words appear and the story ends.

A reward that needs no judge, for small language models that tell stories but follow no
instructions: the prompt is the opening alone, and the words wanted are known to the reward only.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import Row

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_CLOSING_MARKS = "\"')\u201d\u2019"


@dataclasses.dataclass(frozen=True)
class StoriesConfig:
    """Settings of the task.

    Attributes:
        end_bonus: reward of a response whose last sentence is complete, on top of the share of
            asked-for words (0 to 1).
    """

    end_bonus: float = 0.25


class Stories:
    """The stories task; rows have `prompt` (the opening) and `words` (the asked-for words).

    Args:
        config: the settings.
    """

    name = "stories"

    def __init__(self, config: StoriesConfig):
        self.config = config

    def prompt(self, row: Row) -> str:
        """Returns the opening of the story."""
        return row["prompt"]

    def grade(self, response: str, row: Row) -> float:
        """Returns share of asked-for words in the response + end_bonus if its sentence is complete.

        A word counts as a whole word in any case, once however often it appears, and only where
        the response has it: the opening does not count. A sentence is complete when the response
        ends with . ! or ?, closing quotation marks aside; an empty response has none.
        """
        found = self._found(response, row)
        bonus = self.config.end_bonus if _ends(response) else 0.0
        return len(found) / len(self._words(row)) + bonus

    def canonical(self, response: str, row: Row) -> str | None:
        """Returns the sorted words of a response with full reward, else None.

        Two stories are the same solution when they use the same set of words.
        """
        if self._found(response, row) != self._words(row) or not _ends(response):
            return None
        return " ".join(sorted(set(_WORD.findall(response.lower()))))

    def demonstration(self, row: Row, rng: np.random.Generator) -> str:
        """Raises InputError: stories have no demonstrations, a pretrained model is the start."""
        del rng
        raise InputError(
            f"stories {row['prompt']!r}: the task has no demonstrations; "
            "start from a pretrained model"
        )

    def _words(self, row: Row) -> set[str]:
        words = {word.lower() for word in row["words"]}
        if not words:
            raise InputError(f"stories {row['prompt']!r}: no asked-for words; give at least one")
        return words

    def _found(self, response: str, row: Row) -> set[str]:
        return self._words(row) & set(_WORD.findall(response.lower()))


def _ends(response: str) -> bool:
    return response.rstrip().rstrip(_CLOSING_MARKS).endswith((".", "!", "?"))
