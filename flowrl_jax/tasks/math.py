"""Math problems with one answer each, asked and judged as the released FlowRL does in training."""

from __future__ import annotations

import dataclasses

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.rewards import math as reward
from flowrl_jax.tasks.base import Row, Task, Verdict


@dataclasses.dataclass(frozen=True)
class MathConfig:
    """Settings of the task.

    Attributes:
        wrap: put the instruction that the reward relies on around the prompt; False for prompts
            that have one already, as those of the released training file do.
        reward_correct: reward of a right answer; 1 as released.
        reward_wrong: reward of anything else; -1 as released.
    """

    wrap: bool = True
    reward_correct: float = 1.0
    reward_wrong: float = -1.0


class Math(Task):
    """The math task; rows have `prompt` (the problem) and `answer`, and may have `solution`.

    Args:
        config: the settings.
    """

    name = "math"

    def __init__(self, config: MathConfig):
        self.config = config

    def prompt(self, row: Row) -> str:
        """Returns the problem, with the instruction around it where the config says so.

        Raises:
            InputError: the row has no answer; better now than when a response is there to judge.
        """
        _answer(row)
        return question(row["prompt"]) if self.config.wrap else row["prompt"]

    def judge(self, response: str, row: Row) -> Verdict:
        """Returns whether the response's last "Answer:" line has the answer.

        The form is the normalised answer: a problem has one, so all correct responses count as one
        solution. The outcome is "no_answer" where the response has no such line.

        Raises:
            InputError: the row has no answer.
        """
        answer = _answer(row)
        form = reward.matched(response, answer)
        if form is not None:
            return Verdict(self.config.reward_correct, form, "correct")
        outcome = "no_answer" if reward.extract(response) is None else "wrong"
        return Verdict(self.config.reward_wrong, None, outcome)

    def demonstration(self, row: Row, rng: np.random.Generator) -> str:
        """Returns the row's `solution`, with an "Answer:" line where it has none that is right.

        Raises:
            InputError: the row has no solution, or no answer that a response can end with.
        """
        del rng  # There is one solution.
        solution, answer = row.get("solution"), _answer(row)
        if not isinstance(solution, str) or not solution.strip():
            raise InputError(
                f"math prompt {row.get('prompt_id')}: no 'solution' to imitate; add this field to"
                " the data, or train without demonstrations"
            )
        for shown in (solution, f"{solution.rstrip()}\nAnswer: {answer}"):
            if reward.matched(shown, answer) is not None:
                return shown
        raise InputError(
            f"math prompt {row.get('prompt_id')}: answer={answer!r} is found in no response; write"
            f" it in one line of at most {reward.TAIL - len('Answer: ')} characters"
        )


def question(problem: str) -> str:
    """Returns a problem with an instruction before it and a reminder after it.

    The structure is that of DAPO's template (arXiv 2503.14476), the wording is ours; the
    literal `Answer: $Answer` is what the reward looks for.
    """
    return (
        "Work through the math problem below one step at a time. The response must end with a line"
        " of the form Answer: $Answer, where $Answer stands for the solution of the problem."
        f"\n\n{problem.strip()}\n\n"
        'The last line, which begins with "Answer:", must not be forgotten.\n'
    )


def _answer(row: Row) -> str:
    answer = row.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(
            f"math prompt {row.get('prompt_id')}: answer={answer!r} is not text to compare with;"
            " give every row an answer, and name its field in data.options.answer_field"
        )
    return answer
