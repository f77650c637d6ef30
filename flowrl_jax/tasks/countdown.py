"""Countdown: reach a target with given numbers, each used exactly once, and + - * /.

Two response styles, `(3+5)*(8-5)` and `3+5=8,8-5=3,8*3=24`, and two prompt styles, `3,5,5,8=24:`
for a small symbol vocabulary and plain English for a pretrained model. A problem usually has
several right answers; `countdown_solver` says when two of them are the same solution.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.tasks import countdown_render as render
from flowrl_jax.tasks import countdown_solver as solver
from flowrl_jax.tasks.base import Row, Task, Verdict

STYLES = ("expression", "steps")
PROMPT_STYLES = ("compact", "text")
_OPEN, _CLOSE = "<answer>", "</answer>"


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """Settings of the task.

    Attributes:
        style: the form of a response: "expression" (infix) or "steps" (one operation at a time).
        prompt_style: "compact" (`3,5,5,8=24:`) or "text" (the row's own prompt, else English).
        reward_correct: reward of a right answer.
        reward_wrong: reward of anything else.
        careless: share of demonstrations that follow the rules without aiming at the target. A
            policy that imitates them knows more than it shows, as a pretrained model does.
    """

    style: str = "expression"
    prompt_style: str = "compact"
    reward_correct: float = 1.0
    reward_wrong: float = 0.0
    careless: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.careless <= 1.0:
            raise InputError(f"countdown careless={self.careless}: a share; give 0 to 1")
        for field, known in (("style", STYLES), ("prompt_style", PROMPT_STYLES)):
            if getattr(self, field) not in known:
                raise InputError(
                    f"countdown {field}={getattr(self, field)!r}: unknown; "
                    f"give one of {', '.join(known)}"
                )


class Countdown(Task):
    """The Countdown task; rows have `numbers` and `target`, and may have `solutions` and `prompt`.

    Args:
        config: the settings.
    """

    name = "countdown"

    def __init__(self, config: CountdownConfig):
        self.config = config

    def prompt(self, row: Row) -> str:
        """Returns the question in the configured style."""
        if self.config.prompt_style == "compact":
            return f"{','.join(str(n) for n in row['numbers'])}={row['target']}:"
        return row.get("prompt") or question(row["numbers"], row["target"], self.config.style)

    def judge(self, response: str, row: Row) -> Verdict:
        """Returns whether the answer reaches the target by the rules.

        The form is the canonical expression.
        """
        form = self._form(response, row)
        if form is None:
            return Verdict(self.config.reward_wrong, None, "wrong")
        return Verdict(self.config.reward_correct, solver.render_canonical(form), "correct")

    def demonstration(self, row: Row, rng: np.random.Generator) -> str:
        """Returns a right answer: each solution equally likely, then written in random order.

        Or, for the share `careless` of demonstrations, an attempt that does not aim.

        Raises:
            InputError: the problem has no solution that the style can write.
        """
        if self.config.careless and rng.random() < self.config.careless:
            return self._attempt(row["numbers"], rng)
        solutions = row.get("solutions") or solver.solve(row["numbers"], row["target"])
        # A solution may have no unambiguous writing as steps; then the next one is shown.
        for i in rng.permutation(len(solutions)):
            parsed = solver.parse(solutions[i])
            if parsed is None:
                continue
            if self.config.style == "steps":
                text = render.render_steps(parsed[0], row["numbers"], rng)
            else:
                text = render.render_expression(parsed[0], rng)
            if text is not None:
                return text
        raise InputError(
            f"countdown {list(row['numbers'])} = {row['target']}: no solution to demonstrate as "
            f"{self.config.style}; train only on problems that have one"
        )

    def _attempt(self, numbers: list[int], rng: np.random.Generator) -> str:
        while True:
            steps = render.random_steps(numbers, rng)
            if self.config.style == "steps":
                return steps
            form = render.parse_steps(steps, numbers)
            text = None if form is None else render.render_expression(form, rng)
            if text is not None:
                return text

    def _form(self, response: str, row: Row) -> solver.Form | None:
        """The form of a correct response, or None."""
        text = answer_text(response)
        numbers, target = row["numbers"], row["target"]
        if self.config.style == "steps":
            form = render.parse_steps(text, numbers)
        else:
            form = _parse_expression(text, numbers, target)
        return form if form is not None and form.value == target else None


def answer_text(response: str) -> str:
    """Returns the part of a response that is judged.

    That is the text between the last <answer> and </answer> where both are present in this order,
    otherwise all of it; white space around is dropped.
    """
    end = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, end) if end >= 0 else -1
    return (response[start + len(_OPEN) : end] if start >= 0 else response).strip()


def question(numbers: list[int], target: int, style: str = "expression") -> str:
    """Returns the problem in English, for a pretrained model."""
    listed = ", ".join(str(n) for n in numbers)
    example = "(1+2)/3" if style == "expression" else "1+2=3,3/3=1"
    how = "an expression" if style == "expression" else "steps, each combining two numbers,"
    return (
        f"Using the numbers {listed}, find {how} that equals {target}. Use each number exactly "
        "once, with the operations + - * / and brackets. Put the final answer in <answer> "
        f"</answer> tags, for example <answer>{example}</answer>.\n"
    )


def symbols(max_number: int) -> tuple[str, ...]:
    """Returns the pieces a symbol vocabulary needs for compact prompts and both response styles.

    Every number 0..max_number is one piece; a larger one falls apart into several.

    Args:
        max_number: the largest given number or target (>= 9, so that every digit is a piece).
    """
    if max_number < 9:
        raise InputError(f"max_number={max_number}: leaves digits without a piece; give 9 or more")
    return (*(str(n) for n in range(max_number + 1)), *"+-*/()=,:")


def _parse_expression(text: str, numbers: list[int], target: int) -> solver.Form | None:
    expression, equals, claimed = text.partition("=")
    if equals and claimed.strip() != str(target):
        return None
    parsed = solver.parse(expression)
    if parsed is None or sorted(parsed[1]) != sorted(numbers):
        return None
    return parsed[0]
