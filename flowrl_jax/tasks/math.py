"""Math problems with one answer each, judged by the release's string rule or as mathematics."""

from __future__ import annotations

import dataclasses

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.rewards import math as released
from flowrl_jax.rewards.answers import normal_form
from flowrl_jax.rewards.compose import ComposeConfig, Composer
from flowrl_jax.rewards.extraction import extract
from flowrl_jax.rewards.verify import Verifier, VerifierConfig
from flowrl_jax.tasks import templates
from flowrl_jax.tasks.base import Row, Task, Verdict, nearest

VERIFIERS = ("released", "semantic", "none")


@dataclasses.dataclass(frozen=True)
class MathConfig(ComposeConfig):
    """Settings of the task; those of `ComposeConfig` add other rewards to that of correctness.

    Attributes:
        template: what stands around the problem: "dapo" asks for the "Answer:" line that the
            released rule looks for, "boxed" for \\boxed; "plain" adds nothing, for prompts that
            have an instruction already, as those of the released training file do; or a wording of
            your own with {problem} in it.
        verifier: "released", the string rule that the release trains with; "semantic", equality as
            mathematics, as in the paper's evaluation; "none", correctness is not asked.
        reward_correct: reward of a right answer; 1 as released.
        reward_wrong: reward of anything else; -1 as released.
        time_limit: seconds for one comparison of the semantic verifier, which counts as wrong if it
            takes more.
        workers: processes of the semantic verifier; 0 for half of this host's cores, at most 8.
        worker_memory_mb: MiB of address space of each.
    """

    template: str = "dapo"
    verifier: str = "released"
    reward_correct: float = 1.0
    reward_wrong: float = -1.0
    time_limit: float = 5.0
    workers: int = 0
    worker_memory_mb: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        templates.check(self.template)
        if self.verifier not in VERIFIERS:
            raise InputError(
                f"task math: verifier={self.verifier!r} is unknown;"
                f" {nearest(self.verifier, VERIFIERS)}"
            )
        if self.verifier == "none" and not self.function:
            raise InputError(
                "task math: verifier='none' leaves no reward; name one of your own in function"
            )


class Math(Task):
    """The math task; rows have `prompt` (the problem) and `answer`, and may have `solution`.

    Args:
        config: the settings.

    Raises:
        InputError: the function that the config names cannot be loaded.
    """

    name = "math"

    def __init__(self, config: MathConfig):
        self.config = config
        self.parallel = 1
        self._compose = Composer(config)
        self._verifier: Verifier | None = None
        if config.verifier == "semantic":
            settings = VerifierConfig(
                limit=config.time_limit,
                workers=config.workers,
                memory_mb=config.worker_memory_mb,
            )
            self._verifier = Verifier(settings)
            # Twice the workers: while one half waits, the other reads responses.
            self.parallel = 2 * settings.processes

    def prompt(self, row: Row) -> str:
        """Returns the problem, with the instruction around it where the config says so.

        Raises:
            InputError: the row has no answer; better now than when a response is there to judge.
        """
        self._answer(row)
        return templates.render(self.config.template, row["prompt"])

    def judge(self, response: str, row: Row) -> Verdict:
        """Returns whether a response has the answer.

        The form is the normalised answer: a problem has one, so all correct responses count as one
        solution. The outcome is "correct", "wrong", "no_answer" where the response states none,
        "judged" without a verifier, and those of `verify.Judgement` where an answer could not be
        compared; these count as wrong.

        Raises:
            InputError: the row has no answer, a function of the user fails, or the semantic
                verifier's workers cannot be started.
        """
        outcome, form = self._correctness(response, self._answer(row))
        reward = 0.0
        if outcome != "judged":
            reward = (
                self.config.reward_correct if outcome == "correct" else self.config.reward_wrong
            )
        return Verdict(reward + self._compose(response, row), form, outcome)

    def _correctness(self, response: str, answer: str) -> tuple[str, str | None]:
        if self._verifier is not None:
            judgement = self._verifier.judge(response, answer)
            return judgement.outcome, judgement.form
        if self.config.verifier == "none":
            return "judged", None
        form = released.matched(response, answer)
        if form is not None:
            return "correct", form
        return "no_answer" if released.extract(response) is None else "wrong", None

    def answer(self, response: str, row: Row) -> str | None:
        """Returns the normalised answer of a response, right or wrong; None if it states none."""
        del row  # A response says what it answers.
        if self._verifier is None:
            found = released.extract(response)
            return None if found is None else released.normalize(found)
        found = extract(response)
        return None if found is None else normal_form(found)

    def demonstration(self, row: Row, rng: np.random.Generator) -> str:
        """Returns the row's `solution`, with an "Answer:" line where it has none that is right.

        Raises:
            InputError: the row has no solution, or no answer that a response can end with.
        """
        del rng  # There is one solution.
        solution, answer = row.get("solution"), self._answer(row)
        if not isinstance(solution, str) or not solution.strip():
            raise InputError(
                f"math prompt {row.get('prompt_id')}: no 'solution' to imitate; add this field to"
                " the data, or train without demonstrations"
            )
        for shown in (solution, f"{solution.rstrip()}\nAnswer: {answer}"):
            if self._correctness(shown, answer)[0] in ("correct", "judged"):
                return shown
        raise InputError(
            f"math prompt {row.get('prompt_id')}: answer={answer!r} is found in no response; write"
            f" it in one line of at most {released.TAIL - len('Answer: ')} characters"
        )

    def close(self) -> None:
        """Ends the verifier's workers."""
        if self._verifier is not None:
            self._verifier.close()

    def _answer(self, row: Row) -> str:
        answer = row.get("answer")
        if self.config.verifier == "none" and answer is None:
            return ""
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(
                f"math prompt {row.get('prompt_id')}: answer={answer!r} is not text to compare"
                " with; give every row an answer, and name its field in data.options.answer_field"
            )
        return answer
