"""Rewards beside correctness, a user's own, and how the math task adds them up."""

import math
import re
from pathlib import Path

import pytest

from flowrl_jax import tasks
from flowrl_jax.errors import InputError
from flowrl_jax.rewards.compose import (
    ComposeConfig,
    Composer,
    format_reward,
    length_reward,
    load_function,
    repetition_reward,
)

ROW = {"prompt_id": 3, "prompt": "What is 6 x 7?", "answer": "42", "source": "hand"}


def build(**options):
    return tasks.build(tasks.TaskConfig("math", options))


def own(tmp_path: Path, body: str, name: str = "own.py") -> str:
    path = tmp_path / name
    path.write_text(body, encoding="utf-8")
    return f"{path}:reward"


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("So.\nAnswer: 42", 1.0),
        ("So.\n**Answer:** 42\n", 1.0),
        ("answer: 42", 1.0),
        ("Answer: 42\nBut why?", 0.0),
        ("Answer:", 0.0),
        ("The answer is 42", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, value):
    assert format_reward(response, re.compile(ComposeConfig().format_pattern)) == value


@pytest.mark.parametrize(
    ("length", "value"), [(0, 0.0), (60, 0.0), (70, -0.25), (80, -0.5), (100, -1.0), (500, -1.0)]
)
def test_length(length, value):
    assert length_reward("x" * length, limit=100, buffer=40) == value


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("", 0.0),
        ("a b", 0.0),  # no trigram
        ("a b c d e", 0.0),
        ("a b c a b c", -0.25),  # abc bca cab abc: one of four has come before
        ("a " * 102, -0.99),
    ],
)
def test_repetition(response, value):
    assert repetition_reward(response, ngram=3) == pytest.approx(value)


def test_nothing_is_added_by_default():
    assert Composer(ComposeConfig())("a " * 100_000, ROW) == 0.0


def test_weights_add_up(tmp_path):
    name = own(
        tmp_path, "def reward(response, row):\n    return len(response) / row['prompt_id']\n"
    )
    task = build(
        format_weight=0.5,
        length_weight=2,
        length_limit=20,
        length_buffer=10,
        repetition_weight=1.0,
        repetition_ngram=1,
        function=name,
        function_weight=0.1,
    )
    response = "go go\nAnswer: 42"  # 16 characters, 4 words of which 3 differ
    added = 0.5 - 2 * 0.6 - 0.25 + 0.1 * 16 / 3
    verdict = task.judge(response, ROW)
    assert verdict.reward == pytest.approx(1.0 + added)
    assert (verdict.form, verdict.outcome) == ("42", "correct")
    assert task.judge(response.replace("42", "41"), ROW).reward == pytest.approx(-1.0 + added)


def test_own_reward_alone(tmp_path):
    name = own(tmp_path, "def reward(response, row):\n    return row['source'] in response\n")
    task = build(verifier="none", function=name)
    row = {k: v for k, v in ROW.items() if k != "answer"}
    assert task.prompt(row)
    assert task.judge("by hand", row) == (1.0, None, "judged")
    assert task.judge("by foot", row) == (0.0, None, "judged")
    with pytest.raises(InputError, match="name one of your own in function"):
        build(verifier="none")


def test_function_of_a_module():
    assert load_function("math:hypot") is math.hypot
    assert load_function("os.path:join")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reward", "write it as module:function or path.py:function"),
        (":reward", "write it as"),
        ("no_such_module:reward", "importing it fails: ModuleNotFoundError"),
        ("math:no_such_name", "math has no function 'no_such_name'"),
        ("math:pi", "has no function 'pi'"),
        ("nowhere/own.py:reward", "no file nowhere/own.py"),
    ],
)
def test_function_that_is_not_there(name, message):
    with pytest.raises(InputError, match=message) as caught:
        build(function=name)
    assert "\n" not in str(caught.value)


def test_file_that_does_not_run(tmp_path):
    with pytest.raises(InputError, match="importing it fails: SyntaxError") as caught:
        build(function=own(tmp_path, "def reward(response row):\n    return 0\n"))
    assert "own.py" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("row['nothing']", "KeyError: 'nothing'"),
        ("return 'much'", "ValueError"),
        ("return None", "TypeError"),
        ("return float('nan')", "returned nan; rewards must be finite"),
    ],
)
def test_function_that_fails_stops_with_its_name(body, message, tmp_path):
    name = own(tmp_path, f"def reward(response, row):\n    {body}\n")
    with pytest.raises(InputError) as caught:
        build(function=name).judge("Answer: 42", ROW)
    assert name in str(caught.value)
    assert "prompt 3" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format_weight": math.inf}, "weights must be finite"),
        ({"length_buffer": 0}, "length_buffer=0"),
        ({"length_limit": 10, "length_buffer": 11}, "at most length_limit=10"),
        ({"repetition_ngram": 0}, "at least 1"),
        ({"format_pattern": "("}, "no regular expression"),
        ({"verifier": "semantik"}, "did you mean 'semantic'"),
        ({"time_limit": 0.0, "verifier": "semantic"}, "limit=0.0"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)
