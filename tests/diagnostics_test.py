"""What a step says about itself, against loops over its rows, however they are cut."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.distributed import RowShare
from flowrl_jax.grading import response_metrics
from flowrl_jax.learning_batch import _metrics
from flowrl_jax.objectives.diagnostics import (
    EffectiveShare,
    LogZRows,
    Quotient,
    merge,
    update_diagnostics,
)
from flowrl_jax.objectives.flowrl import FlowRLConfig
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.objectives.sft import SFTConfig
from flowrl_jax.types import TrainBatch

ROWS, WIDTH = 12, 5
RNG = np.random.default_rng(3)
MASK = np.arange(WIDTH) < RNG.integers(1, WIDTH + 1, ROWS)[:, None]
OLD = RNG.normal(-1.0, 0.5, (ROWS, WIDTH)).astype(np.float32)
NEW = (OLD + RNG.normal(0.0, 0.6, (ROWS, WIDTH))).astype(np.float32)
FLOW, SCALED = RNG.uniform(0, 1, ROWS), RNG.uniform(0, 3, ROWS)


def merged(config: Any, size: int, mask: np.ndarray = MASK) -> dict[str, float]:
    """The diagnostics of a step cut into micro-batches of `size` rows."""
    seen = []
    for start in range(0, ROWS, size):
        rows = slice(start, start + size)
        metrics = {"flow_abs": FLOW[rows].mean(), "scaled_reward_abs": SCALED[rows].mean()}
        arrays = {"logprobs": NEW[rows], "old_logprobs": OLD[rows], "mask": mask[rows]}
        seen.append(
            update_diagnostics(config, metrics, **jax.tree.map(jnp.asarray, arrays))
            | {
                "loudest_max": jnp.asarray(FLOW[rows].max()),
                "plain": jnp.asarray(FLOW[rows].mean()),
            }
        )
    return {k: float(v) for k, v in merge(jax.tree.map(lambda *x: jnp.stack(x), *seen)).items()}


def share_of(weights: list[float]) -> float:
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


def ratios(mask: np.ndarray = MASK) -> list[float]:
    """pi / pi_old of each response that has a token."""
    return [
        float(np.exp(sum(NEW[i, t] - OLD[i, t] for t in range(WIDTH) if mask[i, t])))
        for i in range(ROWS)
        if mask[i].any()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", [12, 4, 1])
def test_shares_and_quotients_do_not_depend_on_the_cut(size):
    found = merged(FlowRLConfig(), size)
    clipped = [min(max(ratio, 0.8), 1.2) for ratio in ratios()]
    assert clipped != ratios()
    expected = {
        "ratio_ess": share_of(ratios()),
        "weight_ess": share_of(clipped),
        "flow_to_reward": sum(FLOW) / sum(SCALED),
        "loudest_max": max(FLOW),
        "plain": FLOW.mean(),
    }
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("preset", ["grpo", "dapo", "rloo"])
def test_policy_gradients_have_the_share_of_whole_responses(preset):
    """A response without a token to learn from has no ratio."""
    mask = MASK.copy()
    mask[[2, 7]] = False
    found = merged(PRESETS[preset], 3, mask)
    assert found["ratio_ess"] == pytest.approx(share_of(ratios(mask)), rel=1e-5)
    assert "weight_ess" not in found and "flow_to_reward" not in found


def test_demonstrations_have_no_ratio():
    assert merged(SFTConfig(), 4).keys() == {"loudest_max", "plain"}


def test_extremes_are_finite():
    one = jnp.ones(())
    assert EffectiveShare.of(jnp.zeros(3), jnp.ones(3, bool)).value() == 0.0
    assert EffectiveShare.of(jnp.ones(3), jnp.zeros(3, bool)).value() == 0.0
    assert EffectiveShare.of(jnp.array([0.0, 0.0, 7.0]), jnp.ones(3, bool)).value() == 1 / 3
    assert Quotient(0.0 * one, 0.0 * one).value() == jnp.inf
    assert Quotient(one, 0.0 * one).value() == jnp.inf
    # Nothing overflows: what lies beyond e^20 counts as that.
    far = {"logprobs": jnp.full((2, 3), 90.0), "old_logprobs": jnp.zeros((2, 3))}
    config = FlowRLConfig(weight="none")
    metrics = {"flow_abs": one, "scaled_reward_abs": one}
    found = update_diagnostics(config, metrics, mask=jnp.ones((2, 3)), **far)
    assert found["weight_ess"].value() == found["ratio_ess"].value() == 1.0


def test_rows_of_log_z_come_in_one_order():
    prompt, target = np.array([3, 1, 3, 1]), np.array([0.4, 0.3, 0.1, 0.2], np.float32)
    rows = LogZRows(*map(jnp.asarray, (prompt, target, 10 * target)))
    cut = jax.tree.map(lambda x: x[jnp.array([2, 1, 0, 3])].reshape(2, 2), rows)
    expected = [[1, 0.2, 2], [1, 0.3, 3], [3, 0.1, 1], [3, 0.4, 4]]
    for found in (jax.tree.map(lambda x: x[None], rows), cut):
        np.testing.assert_allclose(merge({"log_z_rows": found})["log_z_rows"], expected, rtol=1e-6)


@pytest.mark.parametrize("objective", [PRESETS["flowrl"], PRESETS["grpo"], PRESETS["dapo"]])
def test_a_rollout_measures_kl_where_there_is_a_reference(objective):
    learner: Any = types.SimpleNamespace(objective=objective, group_size=3)
    rollout: Any = types.SimpleNamespace(
        response_mask=jnp.asarray(MASK), truncated=jnp.zeros(ROWS, bool), sampler_logprobs=OLD
    )
    scored = {"old_logprobs": jnp.asarray(NEW), "ref_logprobs": jnp.asarray(OLD)}
    unread: Any = {"tokens": None, "prompt_mask": None, "response_mask": None}
    batch = TrainBatch(**unread, **scored, reward=jnp.arange(12.0))
    found = _metrics(learner, rollout, batch, jnp.arange(12.0))
    difference = [
        sum(float(NEW[i, t] - OLD[i, t]) for t in range(WIDTH) if MASK[i, t]) for i in range(ROWS)
    ]
    names = ("rollout/kl_to_reference", "rollout/kl_to_reference_token")
    if objective is PRESETS["dapo"]:  # keeps none, and 0 would be no measurement
        assert not set(names) & found.keys()
        return
    assert found[names[0]] == pytest.approx(np.mean(difference), rel=1e-5)
    assert found[names[1]] == pytest.approx(sum(difference) / MASK.sum(), rel=1e-5)
    assert ("log_z/monte_carlo_mean" in found) == (objective is PRESETS["flowrl"])


def test_right_and_wrong_responses():
    share = RowShare(0, (0,))
    correct = np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)
    lengths = np.array([3, 5, 9, 4, 6, 6, 7, 8])
    assert response_metrics(share, correct, lengths, 2) == {
        "rollout/groups_all_correct": 0.25,
        "rollout/groups_none_correct": 0.5,
        "rollout/length_correct": 4.0,
        "rollout/length_wrong": 36 / 5,
    }
    assert "rollout/length_wrong" not in response_metrics(share, correct[:2], lengths[:2], 2)
    assert "rollout/length_correct" not in response_metrics(share, correct[4:], lengths[4:], 2)


def test_right_and_wrong_responses_of_all_processes(monkeypatch):
    """Another process has other rows, of which this one knows nothing."""
    other = [1, 10, 0, 1, 4, 30]  # correct, their tokens, groups all and none, responses, tokens
    monkeypatch.setattr(RowShare, "gather", lambda self, value: [value, other])
    found = response_metrics(RowShare(0, (0, 1)), np.array([1, 1], bool), np.array([2, 3]), 2)
    assert found == {
        "rollout/groups_all_correct": 2 / 6,
        "rollout/groups_none_correct": 2 / 6,
        "rollout/length_correct": 15 / 3,
        "rollout/length_wrong": 20 / 3,
    }
