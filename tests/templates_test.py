"""Wordings around a problem."""

import pytest

from flowrl_jax import tasks
from flowrl_jax.errors import InputError
from flowrl_jax.rewards import math as reward
from flowrl_jax.tasks import templates

PROBLEM = " Find {x} in \\boxed{x} + 1 = 2. "


@pytest.mark.parametrize("name", ["dapo", "boxed"])
def test_a_problem_stands_whole_in_its_wording(name):
    text = templates.render(name, PROBLEM)
    assert f"\n\n{PROBLEM.strip()}\n\n" in f"\n\n{text}"
    assert templates.PLACE not in text


def test_plain_changes_nothing():
    assert templates.render("plain", PROBLEM) == PROBLEM


def test_dapo_is_the_wording_of_the_math_task():
    row = {"prompt": PROBLEM, "answer": "1"}
    assert tasks.build(tasks.TaskConfig("math")).prompt(row) == templates.render("dapo", PROBLEM)
    assert reward.grade("Answer: $1$", "1", right=1.0, wrong=-1.0) == 1.0


def test_boxed_asks_for_a_box():
    assert templates.render("boxed", "p").endswith("within \\boxed{}.\n")


def test_own_wording():
    assert templates.render("Q: {problem} {x} A:", PROBLEM) == f"Q: {PROBLEM.strip()} {{x}} A:"
    # What a problem holds is not taken for a place.
    assert templates.render("[{problem}]", "a {problem}") == "[a {problem}]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("boxd", "did you mean 'boxed'"),
        ("", "neither a known name"),
        ("{problem} {problem}", "more than once"),
    ],
)
def test_no_wording(template, message):
    with pytest.raises(InputError, match=message) as error:
        templates.render(template, "p")
    assert "\n" not in str(error.value)
