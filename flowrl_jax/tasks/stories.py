"""Stories: continue an opening so that the asked-for words appear and the story ends.

A reward that needs no judge, for small language models that tell stories but follow no
instructions: the prompt is the opening alone, and the words wanted are known to the reward only.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import Row, Task, Verdict

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


class Stories(Task):
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

    def judge(self, response: str, row: Row) -> Verdict:
        """Returns share of asked-for words in the response + end_bonus if its sentence is complete.

        A word counts as a whole word in any case, once however often it appears, and only where
        the response has it: the opening does not count. A sentence is complete when the response
        ends with . ! or ?, closing quotation marks aside; an empty response has none.

        A response is correct when it earns all of this. Two stories are the same solution when
        they use the same set of words: the form is these, sorted.
        """
        asked, used = self._words(row), set(_WORD.findall(response.lower()))
        found, ends = asked & used, _ends(response)
        reward = len(found) / len(asked) + (self.config.end_bonus if ends else 0.0)
        if found != asked or not ends:
            return Verdict(reward, None, "wrong")
        return Verdict(reward, " ".join(sorted(used)), "correct")

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


def _ends(response: str) -> bool:
    return response.rstrip().rstrip(_CLOSING_MARKS).endswith((".", "!", "?"))
