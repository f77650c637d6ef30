"""The alarm: each condition on a series made for it, silence on a healthy one, and on resuming."""

import math
from pathlib import Path
from typing import Any

import pytest

from flowrl_jax.alarm import Alarm, AlarmConfig
from flowrl_jax.errors import InputError
from flowrl_jax.metric_sinks import MetricsConfig
from flowrl_jax.metrics import MetricWriter, read_metrics

QUIET = MetricsConfig(tensorboard=False, table=False)
WINDOW = 4
# What a run that learns says at every step but for the reward, which rises.
HEALTHY = {
    "rollout/entropy": 0.4,
    "rollout/length_mean": 18.0,
    "rollout/groups_with_signal": 0.8,
    "rollout/truncated": 0.01,
    "rollout/kl_to_reference_token": 0.1,
    "rollout/correction_ess": 0.95,
    "train/weight_ess": 0.97,
    "train/skipped_steps": 0.0,
}


def healthy(step: int) -> dict[str, float]:
    """A step of a run that learns; entropy halves, KL rises, in the course of 100 steps."""
    late = step / 100
    return HEALTHY | {
        "rollout/reward_mean": 0.1 + 0.3 * late + 0.01 * math.sin(7.0 * step),
        "rollout/entropy": 0.4 * (1 - 0.5 * late),
        "rollout/kl_to_reference_token": 0.2 * late,
        "rollout/groups_with_signal": 0.8 - 0.2 * late,
    }


def run(alarm: Alarm, steps: list[dict[str, float]], first: int = 1) -> list[dict]:
    return [alarm.see(first + i, metrics) for i, metrics in enumerate(steps)]


def listening(**settings) -> tuple[Alarm, list[str]]:
    lines: list[str] = []
    return Alarm(AlarmConfig(window=WINDOW, **settings), lines.append), lines


# What begins to go wrong after step 10, the condition, and words of the line.
WRONG: dict[str, tuple[dict[str, float], str, tuple[str, ...]]] = {
    "entropy": ({"rollout/entropy": 0.01}, "entropy", ("alarm.entropy=0.2", "loss.beta")),
    "length": ({"rollout/length_mean": 1.0}, "length", ("alarm.length=0.25 of the 18",)),
    "groups": ({"rollout/groups_with_signal": 0.01}, "groups", ("0.01 over 4 steps",)),
    "truncated": ({"rollout/truncated": 0.9}, "truncated", ("more than alarm.truncated=0.5",)),
    "kl": ({"rollout/kl_to_reference_token": 2.0}, "kl", ("more than alarm.kl=0.5",)),
    "weights": ({"train/weight_ess": 0.02}, "weights", ("train/weight_ess is 0.02",)),
    "correction": ({"rollout/correction_ess": 0.02}, "correction", ("rollout.correction",)),
    "reward": ({"rollout/reward_mean": -1.0}, "reward", ("has been -1 for 4 steps",)),
    "skipped": ({"train/skipped_steps": 3.0}, "skipped", ("3 optimiser steps",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_condition_is_named_once(case):
    change, name, words = WRONG[case]
    alarm, lines = listening()
    found = run(alarm, [healthy(step) for step in range(1, 11)])
    found += run(alarm, [healthy(step) | change for step in range(11, 31)], first=11)
    (line,) = lines
    assert f": {name}: " in line and all(word in line for word in words) and "\n" not in line
    at = int(line.split("step ")[1].split(":")[0])
    assert 11 <= at <= 10 + WINDOW
    flags = [step.get(f"alarm/{name}") for step in found]
    assert flags[at - 2] == 0 and flags[at - 1] == 1
    if name == "skipped":  # the total stands still: they are out of the window, and of the next
        assert flags[-1] == 0
    else:
        assert set(flags[at - 1 :]) == {1}
    others = {k: v for step in found for k, v in step.items() if v and k != f"alarm/{name}"}
    assert not others


def test_a_healthy_run_is_left_alone():
    alarm, lines = listening()
    found = run(alarm, [healthy(step) for step in range(1, 101)])
    assert not lines and alarm.reason is None
    assert found[0] == {"alarm/skipped": 0}  # nothing else is known before the window is full
    assert found[WINDOW - 1].keys() == {f"alarm/{name}" for _, name, _ in WRONG.values()}
    assert not any(value for step in found for value in step.values())


# (pass@1, distinct correct solutions) of the quickstart's FlowRL, seed 0.
MEASURED = [
    *[(0.109, 1.562), (0.234, 2.516), (0.259, 2.336), (0.312, 2.469)],
    *[(0.343, 2.359), (0.375, 2.312), (0.392, 2.359)],
]


def evaluations(values: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [
        {"eval/pass_at_1": a, "eval/distinct_correct_16": d, "eval/distinct_correct_16_low": 0.0}
        for a, d in values
    ]


def test_diversity_that_is_sold_for_accuracy_is_called():
    alarm, lines = listening()
    values = [(0.1, 1.5), (0.2, 2.0), (0.3, 1.7), (0.35, 1.5), (0.4, 1.4), (0.4, 1.9), (0.5, 1.0)]
    found = [step["alarm/diversity"] for step in run(alarm, evaluations(values))]
    assert found == [0, 0, 0, 1, 1, 0, 1]  # again after it had cleared
    assert len(lines) == 2 and "while eval/pass_at_1 rose from 0.2 to 0.35" in lines[0]


@pytest.mark.parametrize("values", [MEASURED, [(0.4, 2.0), (0.3, 1.0), (0.2, 0.5)]])
def test_diversity_that_is_kept_or_lost_with_accuracy_is_not(values):
    alarm, lines = listening()
    run(alarm, evaluations(values))
    assert not lines


def test_it_is_called_again_only_after_a_window_without_it():
    alarm, lines = listening(truncated=0.5)
    cut, whole = {"rollout/truncated": 1.0}, {"rollout/truncated": 0.0}
    found = run(alarm, [cut] * 5 + [whole] * 2 + [cut] * 5 + [whole] * 12 + [cut] * 4)
    flags = [step.get("alarm/truncated") for step in found]
    assert [int(line.split()[3].rstrip(":")) for line in lines] == [4, 27]
    assert flags[3:] == [1] * 13 + [0] * 10 + [1] * 2


def test_what_is_switched_off_is_not_watched():
    alarm, lines = listening(
        entropy=0.0, length=0, groups=0, truncated=0, kl=0, ess=0, reward=False, skipped=0
    )
    bad = {name: value for change, _, _ in WRONG.values() for name, value in change.items()}
    found = run(alarm, [healthy(step) for step in range(1, 5)] + [bad] * 9)
    assert not lines and not any(found)
    alarm, lines = listening(enabled=False)
    assert not any(run(alarm, [bad] * 9)) and not lines


def test_numbers_that_are_none_and_metrics_that_are_missing_say_nothing():
    alarm, lines = listening()
    gap = [{"rollout/truncated": math.nan}, {}, {"rollout/truncated": math.inf}]
    found = run(alarm, [{"rollout/truncated": 0.0}] * 3 + gap * 5)
    assert not lines and not any("alarm/truncated" in step for step in found)


def test_only_where_it_is_asked_to_it_stops():
    for stop in (False, True):
        alarm, lines = listening(stop=stop)
        run(alarm, [{"rollout/truncated": 1.0, "train/skipped_steps": 0.0}] * 3)
        assert alarm.reason is None
        run(alarm, [{"rollout/truncated": 1.0, "train/skipped_steps": 2.0}] * 3, first=4)
        assert len(lines) == 2 and alarm.reason == (lines[0] if stop else None)


def write(folder: Path, first: int, last: int, resume: int | None = None, **settings) -> list[str]:
    """A run's steps, of which truncation is high from step 6 to 9 and from step 20 on."""
    lines: list[str] = []
    alarm = Alarm(AlarmConfig(window=3, **settings), lines.append)
    with MetricWriter(folder, config=QUIET, resume_step=resume, alarm=alarm) as writer:
        for step in range(first, last + 1):
            cut = 1.0 if 6 <= step <= 9 or step >= 20 else 0.0
            writer.write(step, healthy(step) | {"rollout/truncated": cut})
    return lines


@pytest.mark.parametrize("saved", [2, 7, 8, 12, 21])
def test_a_resumed_run_knows_what_it_knew(saved, tmp_path):
    """Killed some steps after the checkpoint at `saved`, then resumed from it."""
    said = write(tmp_path / "whole", 1, 24)
    assert [line.split()[3] for line in said] == ["7:", "21:"]
    write(tmp_path / "run", 1, min(saved + 2, 24))
    after = write(tmp_path / "run", saved + 1, 24, resume=saved, stop=True)
    whole = read_metrics(tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == whole and whole[7]["alarm/truncated"] == 1
    # What had been said by the checkpoint is not said again; what comes later is.
    assert after == [line for line in said if int(line.split()[3].rstrip(":")) > saved]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"window": 0}, "alarm.window=0 must be at least 1"),
        ({"entropy": 1.5}, "alarm.entropy=1.5 must be a share in"),
        ({"kl": -1.0}, "alarm.kl=-1.0 must not be negative"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], words):
    with pytest.raises(InputError, match=words):
        AlarmConfig(**settings)
