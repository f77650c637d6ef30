"""The math reward by hand-worked cases and on real answers, and the task around it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from flowrl_jax import tasks
from flowrl_jax.errors import InputError
from flowrl_jax.rewards.math import TAIL, extract, grade, matched, normalize

ROW = {"prompt_id": 3, "prompt": "What is 6 x 7?", "answer": "42"}


def build(**options):
    return tasks.build(tasks.TaskConfig("math", options))


# Worked out by hand from the published rule; one line per step of it.
NORMAL_FORMS = [
    ("42", "42"),
    (" 42 ", "42"),
    ("x = y = 5", "5"),  # the last equals sign
    ("an apple", "apple"),
    ("a b", "b"),
    ("banana split", "banansplit"),  # "a " goes wherever it stands
    ("1 000", "1000"),
    ("1\\ 000", "1000"),
    ("\\$5", "5"),
    ("$5.$", "5"),
    ("5.", "5."),  # but a bare full stop stays
    ("x\\text{and}y", "x,y"),
    ("x,\\text{and}y", "x,y"),
    ("\\mbox{east}", "east"),
    ("5\\text{m}", "5"),
    ("5\\text{ m}", "5"),
    ("5\\text{s}", "5"),
    ("5\\text{}^2", "5"),
    ("12 square units", "12"),
    ("7 hours", "7"),
    ("7 ft", "7ft"),  # in Minerva's list, not in the release's
    ("30^\\circ", "30"),
    ("30^{\\circ}", "30"),
    ("90 degrees", "90"),
    ("5\\mathrm{th}", "5"),
    ("1\\;2", "12"),
    ("1,\\!000", "1000"),
    ("1{,}000", "1000"),
    ('"yes"', "yes"),
    ("x,\\ldots,y", "x,,y"),
    ("so $x$ and $y$", "x"),  # the first formula alone
    ("$5", "5"),
    ("\\text{blue}", "blue"),
    ("\\textbf{blue}", "blue"),
    ("\\overline{AB}", "AB"),
    ("\\boxed{42}", "42"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\frac123", "\\frac{1}{2}3"),
    ("\\frac{1}{2}", "\\frac{1}{2}"),
    ("\\sqrt2", "\\sqrt{2}"),
    ("\\sqrt23", "\\sqrt{2}3"),
    ("\\sqrt{2}", "\\sqrt{2}"),
    ("1,234,567", "1234567"),
    ("1, 2", "12"),  # a list of numbers is taken for one number
    ("(1,2)", "(1,2)"),  # a comma goes only where nothing but digits is left
    ("1,234.5", "1,234.5"),
    ("", ""),
]


@pytest.mark.parametrize(("answer", "form"), NORMAL_FORMS)
def test_normal_form(answer, form):
    assert normalize(answer) == form


def test_units_and_the_like_are_dropped():
    words = (
        "square ways integers dollars mph inches hours km units points feet minutes digits cents"
        " degrees cm gm pounds meters meals edges students multiples sue children tickets"
    )
    for word in (
        *words.replace("children tickets", "childrentickets").split(),
        "\\dots",
        "\\ldots",
    ):
        assert normalize(f"5 {word}") == "5", word
        assert normalize(f"{word} 5") == "5", word
    assert normalize("5 miles") == "5miles"
    assert normalize("5\\text{}^3") == normalize("5\\text{.}") == normalize("5\\text{\n}") == "5"


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("Answer: 42", "42"),
        ("ANSWER : 42", "42"),
        ("the answer:42", "42"),
        ("Answer: 1\nAnswer: 2", "2"),
        ("Answer: 2 Answer: 3", "2 Answer: 3"),  # one line holds one answer
        ("Answer:\n\n42\nmore", "42"),
        ("Answer: 42\nand that is all.", "42"),
        ("Final Answer: 42", "42"),
        ("42", None),
        ("The answer is 42", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_extract(response, found):
    assert extract(response) == found


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("6 x 7 = 42.\nAnswer: 42", "42", 1.0),
        ("Answer: $42$", "42", 1.0),
        ("Answer: \\boxed{42}", "42", 1.0),
        ("Answer: x = 42", "42", 1.0),
        ("Answer: 42.", "42", -1.0),  # the rule is strict
        ("Answer: 42.0", "42", -1.0),
        ("Answer: 0.5", "\\frac{1}{2}", -1.0),
        ("Answer: \\frac12", "\\frac{1}{2}", 1.0),
        ("Answer: 10,000", "10000", 1.0),
        ("Answer: 41\nAnswer: 42", "42", 1.0),
        ("Answer: 42\nAnswer: 41", "42", -1.0),
        ("\\boxed{42}", "42", -1.0),
        ("42", "42", -1.0),
        ("", "42", -1.0),
        ("[INVALID]", "[INVALID]", -1.0),
    ],
)
def test_grade(response, answer, reward):
    assert grade(response, answer) == reward


def test_only_the_end_of_a_response_counts():
    line = "Answer: 42"
    assert grade(line + "\n" + "." * (TAIL - len(line) - 1), "42") == 1.0
    assert grade(line + "\n" + "." * (TAIL - len(line)), "42") == -1.0
    assert TAIL == 300


def test_rewards_are_settings():
    assert grade("Answer: 42", "42", right=2.0, wrong=0.5) == 2.0
    assert grade("Answer: 41", "42", right=2.0, wrong=0.5) == 0.5
    task = build(reward_correct=1, reward_wrong=0)
    assert (task.judge("Answer: 42", ROW).reward, task.judge("Answer: 41", ROW).reward) == (
        1.0,
        0.0,
    )
    assert (build().judge("Answer: 42", ROW).reward, build().judge("41", ROW).reward) == (1.0, -1.0)


def test_all_right_responses_are_one_solution():
    task = build()
    row = ROW | {"answer": "$\\frac12$"}
    right = ("\\frac{1}{2}", "x=\\frac12", "$\\frac12$")
    forms = {task.judge(f"Answer: {answer}", row).form for answer in right}
    assert forms == {"\\frac{1}{2}"}
    assert task.judge("Answer: \\frac13", row).form is None
    assert task.judge("\\frac12", row).form is None


def test_answers_for_votes_are_read_right_or_wrong():
    task = build()
    assert task.answer("so\nAnswer: $1{,}000$", ROW) == "1000"
    assert task.answer("Answer: 42 ", ROW) == task.judge("Answer: 42", ROW).form
    assert task.answer("42", ROW) is None


def test_prompt():
    asked = build().prompt(ROW)
    instruction, problem, reminder = asked.split("\n\n")
    assert "Answer: $Answer" in instruction
    assert problem == ROW["prompt"]
    assert '"Answer:"' in reminder
    assert build(template="plain").prompt(ROW) == ROW["prompt"]


def test_the_prompt_itself_is_no_right_answer():
    # A policy that repeats the question must not be paid for it.
    assert extract(build().prompt(ROW)) is not None
    assert build().judge(build().prompt(ROW), ROW).reward == -1.0


def test_demonstration():
    rng = np.random.default_rng(0)
    task, row = build(), ROW | {"solution": "6 x 7 is 42.\n"}
    shown = task.demonstration(row, rng)
    assert shown == "6 x 7 is 42.\nAnswer: 42"
    assert task.judge(shown, row).reward == 1.0
    finished = row | {"solution": "So\nAnswer: $42$"}
    assert task.demonstration(finished, rng) == finished["solution"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "prompt 3: no 'solution'"),
        ({"solution": " "}, "prompt 3: no 'solution'"),
        ({"solution": "s", "answer": "1\n2"}, "is found in no response"),
        ({"solution": "s", "answer": "1" * 400}, "is found in no response"),
        ({"solution": "s", "answer": ""}, "data.options.answer_field"),
    ],
)
def test_demonstration_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        build().demonstration(ROW | changes, np.random.default_rng(0))


@pytest.mark.parametrize("row", [{"prompt": "?"}, {"prompt": "?", "answer": " "}, {"answer": 42}])
def test_row_without_an_answer_is_refused(row):
    for ask in (build().prompt, lambda row: build().judge("Answer: 42", row).reward):
        with pytest.raises(InputError, match=r"data\.options\.answer_field"):
            ask(row)


def test_unknown_option_is_refused():
    with pytest.raises(InputError, match="did you mean 'template'"):
        build(templat="dapo")


PIECES = (
    *("$", "\\$", "=", "{", "}", "\\text{", "\\textbf{", "\\overline{", "\\boxed{", "mbox", "\\"),
    *("\\frac", "\\frac1", "\\sqrt", "frac", "sqrt", ",", ".", ".$", "1", "23", "x", "-", "a "),
    *(
        "^\\circ",
        "\\;",
        "{,}",
        ",\\!",
        "cm",
        "units",
        "Answer:",
        "answer",
        ":",
        " ",
        "\n",
        "\t",
        "\r",
    ),
    *("\x00", "\u2028", "\u0663", "\u017f", "\U0001f40d", "\ud800"),
)


def test_fuzz_never_raises():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 60)))
        answer = "".join(rng.choices(PIECES, k=rng.randint(0, 4)))
        form = matched(text, answer)
        assert grade(text, answer) == (-1.0 if form is None else 1.0)
        assert form in (None, normalize(answer))


def _answers(folder: Path) -> list[str]:
    def lines(name):
        return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]

    gsm8k = [row["answer"].rpartition("####")[2].strip() for row in lines("gsm8k/test.jsonl")]
    math = [row["answer"] for row in lines("math500/test.jsonl")]
    train = json.loads((folder / "math_train_7474" / "train.json").read_text("utf-8"))
    return [*gsm8k, *math, *(row["answer"] for row in train if row["answer"])]


def test_real_answers(shared_data):
    answers = _answers(shared_data)
    assert len(answers) > 9000
    response = "First I note that the answer: is not obvious.\nThen it follows.\nAnswer: {}".format
    refused = [answer for answer in answers if grade(response(answer), answer) != 1.0]
    assert not refused
    boxed = [a for a in answers if grade(response(f"$\\boxed{{{a}}}$"), a) != 1.0 and "$" not in a]
    assert len(boxed) < 0.01 * len(answers)


def test_real_answers_with_another_number_are_wrong(shared_data):
    for answer in map(str.strip, _answers(shared_data)):
        changed = f"{answer}7" if answer[-1].isdigit() else f"{answer} + 7"
        assert grade(f"Answer: {changed}", answer) == -1.0, answer
        assert grade(answer, answer) == -1.0 or "nswer" in answer
