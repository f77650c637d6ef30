"""Weights for what sampler and trainer disagree about: against loops, and through a whole step."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowrl_jax.buckets import make_update
from flowrl_jax.learning_batch import make_learning_batch, make_minibatch
from flowrl_jax.metrics import read_metrics
from flowrl_jax.objectives import OBJECTIVES, check_correction
from flowrl_jax.objectives.correction import (
    PER_RESPONSE,
    PER_TOKEN,
    CorrectionConfig,
    correction_weights,
    sampler_agreement,
)
from flowrl_jax.objectives.flowrl import FlowRLConfig, flowrl_loss
from flowrl_jax.objectives.grpo import GRPOConfig, aggregate_tokens, grpo_loss
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.planning.programs import planned_learner, programs
from flowrl_jax.train import train
from flowrl_jax.train_step import make_train_step
from flowrl_jax.types import Rollout
from tests.mesh_test import assert_same
from tests.tiny import make_learner, make_state, tiny_config, train_batch
from tests.tiny_runs import one_device, tiny_run

CONFIG = tiny_config(remat="full")
KINDS = PER_TOKEN + PER_RESPONSE
LENGTHS = [1, 2, 3, 5, 7, 7]
# Sums over a response of the trainer's minus the sampler's log-probabilities: weights below 0.5,
# inside, above 2, and so far out that their exponential would overflow.
SUMS = [-0.2, 0.3, -2.0, 1.5, 200.0, 0.1]
KEY = jax.random.key(3)


def of(kind: str) -> CorrectionConfig:
    return CorrectionConfig(kind, low=0.5 if kind.endswith("_mask") else 0.0, high=2.0)


def example(padding: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Six responses: the trainer's and the sampler's log-probabilities and the mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < np.array(LENGTHS)[:, None]
    noise = rng.normal(0, 0.8, mask.shape) * mask
    noise -= mask * (noise.sum(1) / mask.sum(1))[:, None]
    old = -rng.exponential(1.0, mask.shape)
    sampler = old - noise - mask * (np.array(SUMS) / mask.sum(1))[:, None]
    old, sampler = (np.where(mask, x, padding).astype(np.float32) for x in (old, sampler))
    return old, sampler, mask


def cut(log_ratio: float, config: CorrectionConfig) -> tuple[float, bool]:
    """One weight, and whether it met a bound."""
    ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
    if config.kind.endswith("_mask"):
        outside = ratio < config.low or ratio > config.high
        return (0.0 if outside else ratio), outside
    return min(ratio, config.high), ratio > config.high


def reference(old, sampler, mask, config) -> tuple[np.ndarray, dict[str, float]]:
    """Section by section of the formulas, in float64: the weights and what is logged of them."""
    rows, length = mask.shape
    per_response = config.kind in PER_RESPONSE
    weights = np.ones(rows) if per_response else np.zeros((rows, length))
    found = []
    for i in range(rows):
        inside = [t for t in range(length) if mask[i, t]]
        ratios = {t: float(old[i, t]) - float(sampler[i, t]) for t in inside}
        if per_response:
            found.append(cut(sum(ratios.values()), config))
            weights[i] = found[-1][0]
        else:
            for t, ratio in ratios.items():
                found.append(cut(ratio, config))
                weights[i, t] = found[-1][0]
    w = np.array([weight for weight, _ in found])
    return weights, {
        "correction_mean": w.mean(),
        "correction_max": w.max(),
        "correction_ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "correction_clipped": np.mean([outside for _, outside in found]),
    }


@pytest.mark.parametrize("padding", [0.0, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_formula(kind, padding):
    arrays = example(padding)
    expected, logged = reference(*arrays, of(kind))
    weights, metrics = correction_weights(*map(jnp.asarray, arrays), of(kind))
    assert weights is not None and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert metrics.keys() == logged.keys()
    for name, value in logged.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert 0.0 < logged["correction_clipped"] < 1.0 and logged["correction_ess"] < 1.0


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_agreement_is_that_of_the_formula(padding):
    old, sampler, mask = example(padding)
    metrics = sampler_agreement(*map(jnp.asarray, (old, sampler, mask)))
    log_ratio = old[mask].astype(np.float64) - sampler[mask]
    # Seven log-ratios lie above 20, and are cut for the exponential of k3 alone.
    assert (log_ratio > 20.0).sum() == 7
    bounded = np.clip(log_ratio, -20.0, 20.0)
    for name, value in {
        "sampler_logprob_diff_max": np.abs(log_ratio).max(),
        "sampler_logprob_diff_mean": np.abs(log_ratio).mean(),
        "sampler_kl_k1": -log_ratio.mean(),
        "sampler_kl_k3": (np.exp(bounded) - 1 - bounded).mean(),
    }.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_both_estimates_are_the_divergence_on_average():
    """Over all tokens of a vocabulary, weighed by the sampler's probabilities."""
    rng = np.random.default_rng(0)
    trainer, sampler = (jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1, 9))) for _ in range(2))
    each = jax.vmap(lambda old, new: sampler_agreement(old[None, None], new[None, None], ONE))
    found = each(trainer, sampler)
    divergence = jnp.sum(jnp.exp(sampler) * (sampler - trainer))
    assert divergence > 0.1
    for name in ("sampler_kl_k1", "sampler_kl_k3"):
        np.testing.assert_allclose(
            jnp.sum(jnp.exp(sampler) * found[name]), divergence, rtol=1e-5, err_msg=name
        )


ONE = jnp.ones((1, 1), bool)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_depends_on_its_row_alone(kind):
    old, sampler, mask = example()
    whole, _ = correction_weights(*map(jnp.asarray, (old, sampler, mask)), of(kind))
    order = np.random.default_rng(1).permutation(6)[:4]
    wide = [np.pad(x[order], ((0, 0), (0, 3))) for x in (old, sampler, mask)]
    part, _ = correction_weights(*map(jnp.asarray, wide), of(kind))
    assert whole is not None and part is not None
    found = part[:, :7] if part.ndim == 2 else part
    np.testing.assert_allclose(found, whole[order], rtol=1e-6)
    if part.ndim == 2:
        assert not part[:, 7:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_carry_no_gradient(kind):
    old, sampler, mask = map(jnp.asarray, example())

    def total(old):
        weights, _ = correction_weights(old, sampler, mask, of(kind))
        assert weights is not None
        return weights.sum()

    assert not jax.grad(total)(old).any()


def test_agreement_weighs_one_and_disagreement_can_leave_nothing():
    old, _, mask = map(jnp.asarray, example())
    for kind in KINDS:
        weights, metrics = correction_weights(old, old, mask, of(kind))
        expected = mask if kind in PER_TOKEN else np.ones(6)
        np.testing.assert_array_equal(weights, expected)
        logged = {name: float(value) for name, value in metrics.items()}
        assert logged == {
            "correction_mean": 1.0,
            "correction_max": 1.0,
            "correction_ess": 1.0,
            "correction_clipped": 0.0,
        }
    nothing, metrics = correction_weights(old, old + 5.0, mask, of("token_mask"))
    assert nothing is not None and not nothing.any()
    assert metrics["correction_ess"] == 0.0 and metrics["correction_clipped"] == 1.0
    assert correction_weights(old, old, mask, CorrectionConfig()) == (None, {})


def test_shapes_that_would_broadcast_are_refused():
    old, sampler, mask = map(jnp.asarray, example())
    for wrong in ((old, sampler[:, :1], mask), (old, sampler, mask[:, 0])):
        with pytest.raises(ValueError, match="has shape"):
            correction_weights(*wrong, of("token"))
    arrays: dict[str, Any] = {
        "logprobs": old, "ref_logprobs": old, "old_logprobs": old, "reward": old[:, 0], "mask": mask
    }  # fmt: skip
    for wrong in (jnp.ones((6, 1)), jnp.ones(1)):
        with pytest.raises(ValueError, match="correction has shape"):
            grpo_loss(config=GRPOConfig(), correction=wrong, **arrays)
    with pytest.raises(ValueError, match="correction has shape"):
        flowrl_loss(
            config=FlowRLConfig(), log_z=old[:, 0], correction=jnp.ones(old.shape), **arrays
        )


def losses(padding: float = 0.0) -> dict[str, Any]:
    """What an objective reads; its policy is some way from the old one."""
    old, _, mask = example(padding)
    rng = np.random.default_rng(5)
    arrays = {
        "logprobs": old + rng.normal(0, 0.3, old.shape),
        "ref_logprobs": old + rng.normal(0, 0.5, old.shape),
        "old_logprobs": old,
        "reward": rng.normal(0, 1, 6),
    }
    return {name: value.astype(np.float32) for name, value in arrays.items()} | {"mask": mask}


@pytest.mark.parametrize("padding", [0.0, math.nan])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_grpo_weighs_each_token(kind, aggregation, padding):
    """Loss and gradient by hand: the policy's part is weighed, the penalty is not."""
    config = GRPOConfig(clip_low=0.1, clip_high=0.3, kl_coef=0.05, aggregation=aggregation)
    arrays = losses(padding)
    mask = arrays["mask"]
    weights, _ = reference(*example(padding), of(kind))
    correction = np.where(mask, weights if weights.ndim == 2 else weights[:, None], 0.0)
    share = (mask / mask.sum(1)[:, None] / 6) if aggregation == "sequence" else mask / mask.sum()
    given = np.where(mask, weights, padding) if weights.ndim == 2 else weights

    def mean_loss(logprobs, given):
        rest = {k: jnp.asarray(v) for k, v in arrays.items() if k != "logprobs"}
        loss, _ = grpo_loss(logprobs=logprobs, config=config, correction=given, **rest)
        total, count = aggregate_tokens(loss, rest["mask"], aggregation)
        return total.sum() / count.sum()

    found, (grad, by_weight) = jax.value_and_grad(mean_loss, argnums=(0, 1))(
        jnp.asarray(arrays["logprobs"]), jnp.asarray(given, jnp.float32)
    )
    a = arrays["reward"][:, None].astype(np.float64)
    inside = {k: np.where(mask, v, 0.0) for k, v in arrays.items() if v.ndim == 2}
    rho = np.exp(inside["logprobs"] - inside["old_logprobs"])
    delta = inside["logprobs"] - inside["ref_logprobs"]
    clipped = np.clip(rho, 0.9, 1.3)
    loss = correction * np.maximum(-a * rho, -a * clipped) + 0.05 * (np.exp(-delta) + delta - 1)
    np.testing.assert_allclose(found, (loss * share).sum(), rtol=1e-5)
    binds = -a * clipped > -a * rho
    wanted = np.where(binds, 0.0, -a * rho * correction) + 0.05 * (1 - np.exp(-delta))
    np.testing.assert_allclose(grad, wanted * share, rtol=1e-5, atol=1e-7)
    assert not by_weight.any()


@pytest.mark.parametrize("kind", PER_RESPONSE)
def test_flowrl_weighs_each_response(kind):
    config = FlowRLConfig(beta=2.0, weight="max", weight_max=1.5)
    arrays, log_z = losses(math.nan), np.linspace(-1, 1, 6).astype(np.float32)
    mask = arrays["mask"]
    weights, _ = reference(*example(math.nan), of(kind))

    def mean_loss(logprobs, log_z, given):
        rest = {k: jnp.asarray(v) for k, v in arrays.items() if k != "logprobs"}
        rest |= {"log_z": log_z, "correction": given}
        return flowrl_loss(logprobs=logprobs, config=config, **rest)[0].mean()

    found, grads = jax.value_and_grad(mean_loss, argnums=(0, 1, 2))(
        jnp.asarray(arrays["logprobs"]), jnp.asarray(log_z), jnp.asarray(weights, jnp.float32)
    )
    inside = {k: np.where(mask, v, 0.0) for k, v in arrays.items() if v.ndim == 2}
    n = mask.sum(1)
    residual = log_z + (inside["logprobs"] - inside["ref_logprobs"]).sum(1) / n
    residual = residual - 2.0 * arrays["reward"]
    w = np.minimum(np.exp((inside["logprobs"] - inside["old_logprobs"]).sum(1)), 1.5) * weights
    np.testing.assert_allclose(found, (w * residual**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(grads[1], 2 * w * residual / 6, rtol=1e-4, atol=1e-6)
    by_logprob = mask * (2 * w * residual / 6 / n)[:, None]
    np.testing.assert_allclose(grads[0], by_logprob, rtol=1e-4, atol=1e-6)
    assert not grads[2].any()


STEPS = {
    "token": GRPOConfig(kl_coef=0.1),
    "sequence_mask": FlowRLConfig(beta=2.0, log_z=LogZConfig(dropout=0.0)),
}


def weighed_batch(kind: str):
    """A batch of the step's own arrays, and the weights of a sampler that is some way off."""
    batch = train_batch(CONFIG, 8, 2)
    rng = np.random.default_rng(7)
    sampler = batch.old_logprobs + rng.normal(0, 0.4, batch.old_logprobs.shape)
    sampler = np.where(batch.response_mask, sampler, np.nan).astype(np.float32)
    weights, _ = correction_weights(
        *map(jnp.asarray, (batch.old_logprobs, sampler, batch.response_mask)),
        CorrectionConfig(kind, high=1.2),
    )
    return batch, sampler, np.asarray(weights)


def stepped(step, learner, batch):
    """Gradient and metrics of a step."""
    state, found = step(make_state(learner), learner.layout.put_batch(batch), KEY)
    return jax.device_get((state.opt_state, found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_gives_the_same_however_it_is_cut(kind):
    """Whole, in micro-batches, in length buckets and with its rows in another order."""
    batch, _, weights = weighed_batch(kind)
    batch = batch.replace(correction=weights)
    learner = make_learner(CONFIG, STEPS[kind], micro_batch_size=2)
    step = make_train_step(learner, 8)
    expected = stepped(make_train_step(make_learner(CONFIG, STEPS[kind]), 8), learner, batch)
    assert_same(stepped(step, learner, batch), expected)

    order = np.random.default_rng(2).permutation(8)
    assert_same(stepped(step, learner, jax.tree.map(lambda x: x[order], batch)), expected)

    short = dataclasses.replace(learner.config, length_buckets=(3,))
    bucketed = dataclasses.replace(learner, config=short)
    lengths = np.asarray(batch.response_mask).sum(axis=1)
    assert lengths.min() <= 3 < lengths.max()
    update = make_update(bucketed, 8)
    by_length = lambda state, batch, key: update(state, batch, lengths, key)  # noqa: E731
    assert_same(stepped(by_length, learner, batch), expected)

    # And the weights are seen at all: with ones, which are as good as none, it is another step.
    ones = stepped(step, learner, batch.replace(correction=np.ones_like(weights)))
    assert_same(stepped(step, learner, batch.replace(correction=None)), ones)
    assert abs(ones[1]["loss"] - expected[1]["loss"]) > 1e-3


@pytest.mark.parametrize("kind", ["none", *STEPS])
def test_a_rollout_brings_its_weights_along(kind):
    weighing = kind if kind != "none" else "token"
    batch, sampler, weights = weighed_batch(weighing)
    learner = dataclasses.replace(
        make_learner(CONFIG, STEPS[weighing]), correction=CorrectionConfig(kind, high=1.2)
    )
    rollout = Rollout(
        tokens=batch.tokens,
        prompt_mask=batch.prompt_mask,
        response_mask=batch.response_mask,
        sampler_logprobs=sampler,
        policy_logprobs=sampler,
        truncated=np.zeros(8, bool),
    )
    found, metrics = make_learning_batch(learner)(
        rollout, batch.old_logprobs, batch.ref_logprobs, batch.reward, batch.prompt_id
    )
    logged = {name for name in metrics if "correction" in name or "sampler" in name}
    agreement = {
        f"rollout/sampler_{name}" for name in ("logprob_diff_max", "logprob_diff_mean", "kl_k1")
    } | {"rollout/sampler_kl_k3"}
    if kind == "none":
        assert found.correction is None
        assert logged == agreement
        return
    np.testing.assert_allclose(found.correction, weights, rtol=1e-6)
    assert logged == agreement | {
        f"rollout/correction_{name}" for name in ("mean", "max", "ess", "clipped")
    }
    second = make_minibatch(learner, 2)(found, 1)
    np.testing.assert_allclose(second.correction, weights[4:], rtol=1e-6)


def test_a_plan_has_the_weights_too():
    for kind, shape in (("none", None), ("sequence", (16,)), ("sequence_mask", (16,))):
        config = tiny_run(rollout__correction__kind=kind)
        learner = planned_learner(config, jax.devices()[:1])
        step = next(p for p in programs(config, learner) if p.name == "train_step")
        _, (_, batch, *_) = step.build()
        assert (batch.correction and batch.correction.shape) == shape
    config = tiny_run("grpo", rollout__correction__kind="token")
    learner = planned_learner(config, jax.devices()[:1])
    step = next(p for p in programs(config, learner) if p.name == "train_step")
    assert step.build()[1][1].correction.shape == (16, 10)


WEIGHED = {
    **{"flowrl": PER_RESPONSE, "subtb": PER_RESPONSE, "sft": ()},
    **{"grpo": KINDS, "policy_gradient": KINDS, "ppo": KINDS},
}


def test_objectives_refuse_what_they_cannot_weigh():
    for name, objective in OBJECTIVES.items():
        for kind in ("none", *KINDS):
            config = objective.config_class()
            if kind in ("none", *WEIGHED[name]):
                check_correction(config, CorrectionConfig(kind))
            else:
                with pytest.raises(ValueError, match=rf"kind='{kind}' does not fit .*'{name}'"):
                    check_correction(config, CorrectionConfig(kind))


@pytest.mark.slow
@pytest.mark.parametrize("preset, kind", [("flowrl", "sequence"), ("grpo", "token_mask")])
def test_a_run_logs_how_well_both_agree(tmp_path, preset, kind):
    """In float32, at temperature 1, the two programs differ by rounding alone: below 1e-5."""
    config = tiny_run(
        preset, steps=2, checkpoint__every=0, eval__every=0, rollout__correction__kind=kind
    )
    with one_device():
        train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        assert line["rollout/sampler_logprob_diff_mean"] >= 0.0
        assert line["rollout/sampler_logprob_diff_mean"] <= line["rollout/sampler_logprob_diff_max"]
        assert line["rollout/sampler_logprob_diff_max"] < 1e-5
        assert abs(line["rollout/sampler_kl_k1"]) < 1e-5
        assert abs(line["rollout/sampler_kl_k3"]) < 1e-7
        for name in ("mean", "max", "ess"):
            assert line[f"rollout/correction_{name}"] == pytest.approx(1.0, abs=1e-4), name
        assert line["rollout/correction_clipped"] == 0.0
        assert line["train/skipped_steps"] == 0
