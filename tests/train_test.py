"""Training from a config to metrics and checkpoints: every objective, one mesh or another."""

import itertools
import math

import jax
import numpy as np
import pytest

from flowrl_jax.assembly import CHECKPOINTS
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.train import train
from tests.tiny_runs import metrics, one_device, scratch, tiny_run, warmup

# From the warmed-up policy, a few steps, no files but the final checkpoint.
SHORT = {"steps": 3, "checkpoint__every": 0, "eval__every": 0, "metrics__table": False}


def run(name, objective="flowrl", **changes):
    """Metrics of a run by step; each name is another folder."""
    workdir = scratch() / "train_test" / name
    settings = SHORT | {"model__start_from": warmup()} | changes
    train(tiny_run(objective, **settings), workdir)
    return metrics(workdir)


@pytest.fixture(scope="module")
def flowrl():
    with one_device():
        return run("flowrl")


@pytest.fixture
def single():
    with one_device():
        yield


def assert_close(records, others, tolerance):
    assert len(records) == len(others)
    for record, other in zip(records, others, strict=True):
        assert record.keys() == other.keys()
        for key, value in record.items():
            assert other[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


def test_a_step_tells_what_happened(flowrl):
    """Metrics that reports, tables and people read; all finite, from data that has signal."""
    assert [record["step"] for record in flowrl] == [1, 2, 3]
    assert [record["data/position"] for record in flowrl] == [8, 16, 24]
    for record in flowrl:
        assert all(math.isfinite(value) for value in record.values())
        assert 0.0 <= record["rollout/reward_mean"] <= 1.0
        assert 1 <= record["rollout/length_mean"] <= record["rollout/length_max"] <= 10
        assert record["train/skipped_steps"] == 0
        low, high = record["log_z/monte_carlo_low"], record["log_z/monte_carlo_high"]
        assert low <= record["log_z/monte_carlo_mean"] <= high
    assert any(record["rollout/groups_with_signal"] > 0 for record in flowrl)
    assert {"train/loss", "train/grad_norm", "rollout/entropy", "log_z/mean"} <= flowrl[0].keys()
    # The reference is the start: at the first step the policy is it, later it is not.
    assert flowrl[0]["rollout/kl_to_reference"] == 0.0
    assert flowrl[2]["rollout/kl_to_reference"] != 0.0


def test_sampler_and_trainer_agree(flowrl):
    """The log-probabilities of the cached and of the whole forward pass, in float32."""
    for record in flowrl:
        assert 0.0 < record["rollout/sampler_logprob_diff_max"] < 1e-5
        # And the policy that learns is the one that sampled.
        assert record["train/old_logprob_diff_max"] < 1e-5


def test_only_the_final_checkpoint_is_written(flowrl):
    assert saved_steps(scratch() / "train_test" / "flowrl" / CHECKPOINTS) == [3]


KINDS = ["zero", *(pytest.param(k, marks=pytest.mark.slow) for k in ("table", "group"))]


@pytest.mark.parametrize("kind", KINDS)
def test_other_sources_of_log_z(kind, flowrl, single):
    found = run(f"log_z_{kind}", loss__log_z__kind=kind)
    assert all(math.isfinite(value) for record in found for value in record.values())
    # The first rollout does not know the objective, what is learned from it does.
    assert found[0]["rollout/reward_mean"] == flowrl[0]["rollout/reward_mean"]
    assert found[0]["train/loss"] != flowrl[0]["train/loss"]
    assert (kind == "zero") == (found[2]["log_z/mean"] == 0.0)


def test_grpo(flowrl, single):
    found = run("grpo", "grpo")
    assert found[0]["rollout/reward_mean"] == flowrl[0]["rollout/reward_mean"]
    assert not any(key.startswith("log_z/") for key in found[0])
    assert all(math.isfinite(value) for record in found for value in record.values())
    # Advantages are centred and the ratio is 1 to rounding, so the first loss is near 0.
    assert found[0]["train/grad_norm"] > 0.0


@pytest.mark.slow
def test_the_samplers_logprobs_serve_as_well(flowrl, single):
    """They save a forward pass, and differ from the trainer's by rounding."""
    found = run("old_logprobs", rollout__old_logprobs="sampler")
    for record in found:
        assert record["rollout/sampler_logprob_diff_max"] == 0.0
        assert 0.0 < record["train/old_logprob_diff_max"] < 1e-5
    names = ("rollout/reward_mean", "rollout/length_mean", "train/loss", "log_z/mean")
    pick = lambda records: [{name: r[name] for name in names} for r in records]  # noqa: E731
    assert_close(pick(found), pick(flowrl), 1e-4)


@pytest.mark.slow
def test_rollouts_in_pieces_are_the_same(flowrl, single):
    """Two prompts at a time, and micro-batches of 8 responses in the learner."""
    found = run("pieces", rollout__prompts_per_batch=2, train__micro_batch_size=8)
    assert_close(found, flowrl, 1e-4)


@pytest.mark.slow
def test_mesh_does_not_matter(flowrl):
    """On 2 x 2 x 2 devices the same responses earn the same rewards and lead to the same losses."""
    assert len(jax.devices()) == 8
    found = run("mesh", mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    names = ("rollout/reward_mean", "rollout/length_mean", "train/loss", "log_z/mean")
    for name, (record, other) in itertools.product(names, zip(found, flowrl, strict=True)):
        assert record[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


def test_nothing_compiles_after_the_second_step(single):
    """With an evaluation and a checkpoint at every other step, the first ones included."""
    workdir = scratch() / "train_test" / "compilations"
    settings = SHORT | {"steps": 7, "checkpoint__every": 2, "eval__every": 2}
    result = train(tiny_run(model__start_from=warmup(), **settings), workdir)
    from flowrl_jax.metrics import read_metrics

    counts = [r["time/compilations"] for r in read_metrics(workdir) if r["step"] >= 3]
    assert len(counts) == 5
    assert set(counts) == {result["compilations"]}
    assert 0 < result["compilations"] <= 12


def test_skipped_steps_are_counted(single, monkeypatch):
    """A step that is not finite changes nothing but the count, and the run goes on."""
    from flowrl_jax import train as module

    plain = module.grade

    def one_overflow(parts, rows, texts):
        rewards = plain(parts, rows, texts)
        return rewards * np.float32(1e30) + np.arange(len(rewards)) * np.float32(1e30)

    monkeypatch.setattr(module, "grade", one_overflow)
    found = run("skipped", loss__reward_norm="none", loss__beta=1e12)
    assert [record["train/skipped_steps"] for record in found] == [2, 4, 6]
    # Nothing was learned: the policy is still the reference.
    assert all(record["rollout/kl_to_reference"] == 0.0 for record in found)
