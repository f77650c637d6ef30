"""A run that is stopped anywhere and resumed is, number for number, the run that never stopped."""

import os
import random
import shutil
import signal
import time

import pytest

from flowrl_jax import train as train_module
from flowrl_jax.assembly import CHECKPOINTS
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.metrics import read_metrics
from flowrl_jax.train import Loop, train
from tests.tiny_runs import (
    final_state,
    metrics,
    one_device,
    scratch,
    start,
    tiny_arguments,
    tiny_run,
    warmup,
)

# Whole runs, several of them in processes of their own.
pytestmark = pytest.mark.slow

# Each rollout is cut in two and passed over twice: four updates a step. A peer counts updates
# where it should count rollouts, and a resumed run skips data.
SHORT = {
    "steps": 8, "checkpoint__every": 3, "eval__every": 4, "train__epochs": 2,
    "metrics__table": False,
}  # fmt: skip


@pytest.fixture
def single():
    with one_device():
        yield


def short_run():
    return tiny_run(model__start_from=warmup(), **SHORT)


@pytest.fixture(scope="module")
def uninterrupted():
    workdir = scratch() / "resume_test" / "uninterrupted"
    with one_device():
        train(short_run(), workdir)
    return workdir


def assert_same_run(workdir, other):
    """Metrics of every step, position, and every bit of policy, log Z and optimiser."""
    assert metrics(workdir) == metrics(other)
    assert final_state(workdir) == final_state(other)


def at_step(monkeypatch, step, action):
    """Does something when a run is about to sample for a step."""
    plain = Loop.collect

    def collect(self, policy, now, *others, **named):
        if now == step:
            action()
        return plain(self, policy, now, *others, **named)

    monkeypatch.setattr(Loop, "collect", collect)


def test_the_comparison_sees_differences(uninterrupted):
    """What the tests below compare depends on the seed, and is not all zeros."""
    records = metrics(uninterrupted)
    assert [record["step"] for record in records] == list(range(9))
    assert len({record["train/loss"] for record in records[1:]}) == 8
    assert any(record["rollout/reward_mean"] for record in records[1:])
    assert final_state(uninterrupted)["host"] == {"position": 8 * 8}
    assert {"eval/pass_at_1"} <= records[4].keys() & records[8].keys()


# Before the first checkpoint, right after one, two steps after one, and after the last step.
@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_after_a_fault(step, uninterrupted, single, monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("a fault")

    with monkeypatch.context() as patch:
        at_step(patch, step, fail)
        with pytest.raises(RuntimeError, match="a fault"):
            train(short_run(), tmp_path / "run")
    saved = saved_steps(tmp_path / "run" / CHECKPOINTS)
    assert saved == [3] * (step > 3)
    train(short_run(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_resuming_a_finished_run_changes_nothing(uninterrupted, single, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    train(short_run(), workdir, resume=True)
    assert_same_run(workdir, uninterrupted)


def test_longer_run_continues_a_finished_one(uninterrupted, single, tmp_path):
    """With a constant learning rate two more steps are those of a run of ten."""
    longer = tiny_run(model__start_from=warmup(), **(SHORT | {"steps": 10, "eval__every": 0}))
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    train(longer, workdir, resume=True)
    assert [r["step"] for r in metrics(workdir)] == list(range(11))
    train(longer, tmp_path / "whole")
    assert metrics(workdir)[-2:] == metrics(tmp_path / "whole")[-2:]
    assert final_state(workdir) == final_state(tmp_path / "whole")


def test_sigterm_saves_and_says_so(uninterrupted, single, monkeypatch, tmp_path, capsys):
    """Clusters send it before they take a machine; the step under way is finished and saved."""
    arguments = [*tiny_arguments(model__start_from=warmup(), **SHORT), f"--workdir={tmp_path}/run"]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train_module.main(arguments) == 75
    assert signal.getsignal(signal.SIGTERM) is before
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "preempted: saved step 5; start again with --resume"
    assert saved_steps(tmp_path / "run" / CHECKPOINTS)[-1] == 5
    assert train_module.main([*arguments, "--resume"]) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_sigterm_at_the_last_step_is_success(single, monkeypatch, tmp_path):
    settings = SHORT | {"steps": 2, "eval__every": 0}
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(tiny_run(model__start_from=warmup(), **settings), tmp_path / "run")
    assert final_state(tmp_path / "run")["step"] == 2


def test_best_checkpoints_are_those_that_were_evaluated(single, tmp_path):
    """A checkpoint between two evaluations has no score: the one before is not its own."""
    settings = SHORT | {
        "steps": 5, "checkpoint__every": 1, "checkpoint__keep": 1, "checkpoint__keep_best": 4,
        "checkpoint__best_metric": "eval/mean_length", "eval__every": 2,
    }  # fmt: skip
    train(tiny_run(model__start_from=warmup(), **settings), tmp_path / "run")
    assert saved_steps(tmp_path / "run" / CHECKPOINTS) == [2, 4, 5]


# What follows kills processes, and so needs processes of its own.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all 40 steps in a process of its own, and the programs that it compiled."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(
        "train", *tiny_arguments(model__start_from=warmup()), f"--workdir={folder}/run",
        cache_dir=folder / "programs",
    )  # fmt: skip
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return folder


def attempt(whole, tmp_path, number, *more):
    """Starts the run, or goes on with it; each attempt with its own copy of the programs."""
    # A process that is killed may leave half an entry in its cache.
    programs = tmp_path / f"programs_{number}"
    shutil.copytree(whole / "programs", programs)
    arguments = tiny_arguments(model__start_from=warmup())
    return start("train", *arguments, f"--workdir={tmp_path}/run", *more, cache_dir=programs)


def steps_done(workdir):
    try:
        return read_metrics(workdir)[-1]["step"]
    except (ValueError, IndexError):  # not begun
        return -1


def wait_for_step(process, workdir, step):
    while steps_done(workdir) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def test_a_fresh_process_compiles_little(whole):
    """Peers compile 88 programs for a run; every program here is one that we wrote."""
    records = [r for r in read_metrics(whole / "run") if "time/compilations" in r]
    assert [record["step"] for record in records] == list(range(1, 41))
    # Nine of them sample, and evaluation has most of these in sizes of its own.
    assert records[-1]["time/compilations"] <= 20


def test_killed_at_random(whole, tmp_path):
    """SIGKILL three times, at no particular moment of a step or of a checkpoint in writing."""
    delays = random.Random(0)
    for number, step in enumerate((3, 12, 25)):
        process = attempt(whole, tmp_path, number, *(["--resume"] if number else []))
        wait_for_step(process, tmp_path / "run", step + delays.randrange(5))
        time.sleep(delays.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = attempt(whole, tmp_path, 3, "--resume")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "run", whole / "run")


def test_preempted_process(whole, tmp_path):
    """SIGTERM to a process: code 75 and one line, nothing else on stderr but progress."""
    process = attempt(whole, tmp_path, 0)
    wait_for_step(process, tmp_path / "run", 7)
    process.terminate()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 75
    assert "Traceback" not in err
    assert "start again with --resume" in err.strip().splitlines()[-1]
    process = attempt(whole, tmp_path, 1, "--resume")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "run", whole / "run")
