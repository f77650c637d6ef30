"""The semantic math verifier: equal as mathematics, not as text, and never later than its limit.

What exact numbers, words and normal forms decide is decided here, in microseconds; everything else
goes to a worker process with sympy, which is killed at the limit.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import NamedTuple

from flowrl_jax.errors import InputError
from flowrl_jax.rewards import answers
from flowrl_jax.rewards.extraction import extract
from flowrl_jax.rewards.workers import WorkerPool

FUNCTION = "flowrl_jax.rewards.symbolic:equal"


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    """Settings of the verifier.

    Attributes:
        limit: seconds of wall-clock time for a comparison that needs sympy.
        workers: processes with sympy; 0 for half of this host's cores, at most 8.
        memory_mb: MiB of address space of each.
    """

    limit: float = 5.0
    workers: int = 0
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        if self.limit <= 0 or self.workers < 0 or self.memory_mb < 0:
            raise InputError(
                f"verifier: limit={self.limit}, workers={self.workers}, memory_mb={self.memory_mb}:"
                " the first must be more than 0, the others at least 0"
            )

    @property
    def processes(self) -> int:
        """Workers on this host."""
        return self.workers or max(1, min(8, len(os.sched_getaffinity(0)) // 2))


class Judgement(NamedTuple):
    """What the verifier says of a response.

    Attributes:
        outcome: "correct", "wrong", "no_answer", "limit" (an answer too long to compare),
            "timeout", "crash" or "error" (of the worker, or of the library in it).
        form: the reference's normal form where the response is correct, else None.
        fast: no worker was asked.
    """

    outcome: str
    form: str | None
    fast: bool


class Verifier:
    """Judges responses; may be used from any number of threads.

    Args:
        config: the settings.
    """

    def __init__(self, config: VerifierConfig | None = None):
        self.config = config or VerifierConfig()
        self.pool = WorkerPool(
            FUNCTION,
            workers=self.config.processes,
            limit=self.config.limit,
            memory=self.config.memory_mb << 20,
        )

    def judge(self, response: str, answer: str) -> Judgement:
        """Returns whether a response states the reference answer; never raises on what it says.

        Args:
            response: what the policy wrote.
            answer: the reference answer.

        Raises:
            InputError: a comparison needs a worker and math-verify is not installed.
        """
        found = extract(response)
        if found is None:
            return Judgement("no_answer", None, True)
        if len(found) > answers.LONGEST or len(answer) > answers.LONGEST:
            return Judgement("limit", None, True)
        known = answers.compare(answer, found, answers.plain_leaf)
        fast = known is not None
        if known is None:
            status, value = self.pool.call([answer, found])
            if status != "ok":
                return Judgement(status, None, False)
            known = value
        if known:
            return Judgement("correct", answers.normal_form(answer), fast)
        return Judgement("wrong", None, fast)

    def close(self) -> None:
        """Ends the workers."""
        self.pool.close()


def grade(response: str, answer: str, *, right: float = 1.0, wrong: float = -1.0) -> float:
    """Returns the reward of a response by a verifier that this process shares.

    Args:
        response: what the policy wrote.
        answer: the reference answer.
        right: the reward of a response with this answer.
        wrong: the reward of any other response.
    """
    return right if _shared().judge(response, answer).outcome == "correct" else wrong


@functools.cache
def _shared() -> Verifier:
    return Verifier()
