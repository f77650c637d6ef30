"""Judging beside sampling: many at one time, in order, and one that is stuck delays nobody."""

import threading
import types
from typing import Any

import numpy as np
import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.grading import Grading
from flowrl_jax.sampler import Response
from flowrl_jax.tasks import Verdict

ROWS = [{"prompt_id": 7}, {"prompt_id": 9}]


def response(number: int) -> Response:
    return Response(np.array([number, 0]), np.zeros(2), np.zeros(2), truncated=False)


def grading(judge, parallel: int) -> Grading:
    """Of two rows with three responses each; a response is the number that it is."""
    tokenizer = types.SimpleNamespace(decode=lambda ids: str(ids[0]))
    task = types.SimpleNamespace(name="odd", parallel=parallel, judge=judge)
    parts: Any = types.SimpleNamespace(tokenizer=tokenizer, task=task, eos_ids=(0,))
    return Grading(parts, ROWS, 3)


def test_one_that_is_stuck_delays_nobody():
    gate, done = threading.Event(), [threading.Event() for _ in range(6)]

    def judge(text, row):
        if text == "0":
            assert gate.wait(20)
        done[int(text)].set()
        return Verdict(float(text), None, "wrong" if int(text) < 2 else "correct")

    judged = grading(judge, parallel=2)
    for place in (5, 0, 3, 1, 4, 2):  # as they end
        judged(place, response(place))
    assert all(event.wait(20) for event in done[1:])
    assert not done[0].is_set()
    gate.set()
    assert judged.rewards().tolist() == [0, 1, 2, 3, 4, 5]
    assert judged.texts() == list("012345")
    assert judged.outcomes() == {"wrong": 2, "correct": 4}
    assert set(judged.metrics()) == {"time/judging", "time/judging_waited"}


def test_rows_get_their_own_responses():
    judged = grading(lambda text, row: Verdict(row["prompt_id"], None, "wrong"), parallel=3)
    for place in range(6):
        judged(place, response(place))
    assert judged.rewards().tolist() == [7, 7, 7, 9, 9, 9]


def test_errors_of_a_task_come_out():
    def judge(text, row):
        raise InputError("no tests")

    judged = grading(judge, parallel=1)
    for place in range(6):
        judged(place, response(place))
    with pytest.raises(InputError, match="no tests"):
        judged.verdicts()
