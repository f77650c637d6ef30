"""From a judged rollout to what the optimiser learns from, in one program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flowrl_jax.learner import Learner
from flowrl_jax.masking import masked_mean, masked_sum
from flowrl_jax.objectives import balance_of, objective_of
from flowrl_jax.objectives.correction import correction_weights, sampler_agreement
from flowrl_jax.objectives.flowrl import log_z_target, prior_logprobs
from flowrl_jax.types import Rollout, TrainBatch


def make_learning_batch(learner: Learner) -> Callable:
    """A jitted `(rollout, old_logprobs, ref_logprobs, reward, prompt_id, values=None)`.

    Args:
        learner: names objective, group size, correction and mesh.

    Returns:
        A function of a `Rollout`, two `[B, T]` float32 arrays, raw rewards `[B]` float32 and
        `[B]` int32 prompt ids, and of values `[B, T]` float32 where the objective reads those of
        the time of sampling; it returns a `TrainBatch` and scalar metrics of the rollout.
    """
    objective = objective_of(learner.objective)

    def build(rollout: Rollout, old_logprobs, ref_logprobs, reward, prompt_id, values=None):
        sampled = {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "mask": rollout.response_mask,
        }
        if learner.value is not None:
            sampled["values"] = values
        advantage, learned = objective.advantages(
            learner.objective,
            reward,
            group_size=learner.group_size,
            truncated=rollout.truncated,
            **sampled,
        )
        returns = None
        if objective.returns is not None:
            returns = objective.returns(learner.objective, reward, **sampled)
        pair = (old_logprobs, rollout.sampler_logprobs, rollout.response_mask)
        correction, seen = correction_weights(*pair, learner.correction)
        seen |= sampler_agreement(*pair)
        batch = TrainBatch(
            tokens=rollout.tokens,
            prompt_mask=rollout.prompt_mask,
            response_mask=learned,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            reward=advantage,
            prompt_id=prompt_id,
            row_id=jnp.arange(reward.shape[0], dtype=jnp.int32),
            correction=correction,
            old_values=values,
            returns=returns,
        )
        metrics = {f"rollout/{name}": value for name, value in seen.items()}
        return batch, metrics | _metrics(learner, rollout, batch, reward)

    layout = learner.layout
    return jax.jit(build, out_shardings=(layout.batch, layout.replicated))


def _metrics(learner: Learner, rollout: Rollout, batch: TrainBatch, reward: jax.Array):
    mask = rollout.response_mask
    length = mask.sum(axis=1)
    groups = reward.reshape(-1, learner.group_size)
    varied = jnp.any(groups != groups[:, :1], axis=1)
    metrics = {
        "rollout/length_mean": jnp.mean(length.astype(jnp.float32)),
        "rollout/length_max": jnp.max(length),
        # What length buckets could spare learning, if there were one for every length.
        "rollout/padding": 1.0 - jnp.mean(mask.astype(jnp.float32)),
        "rollout/truncated": jnp.mean(rollout.truncated.astype(jnp.float32)),
        # The mean surprise of what was sampled: an unbiased estimate of the policy's entropy.
        "rollout/entropy": -masked_mean(rollout.sampler_logprobs, mask),
    }
    # The rewards of a single response never differ, which says nothing of what there is to learn.
    if learner.group_size > 1:
        metrics["rollout/groups_with_signal"] = jnp.mean(varied.astype(jnp.float32))
    # Without a reference the old policy stands in for it, and 0 would be no measurement.
    if objective_of(learner.objective).needs_reference(learner.objective):
        difference = batch.old_logprobs - batch.ref_logprobs
        metrics["rollout/kl_to_reference"] = jnp.mean(masked_sum(difference, mask, axis=1))
        metrics["rollout/kl_to_reference_token"] = masked_mean(difference, mask)
    if batch.returns is not None and batch.old_values is not None:
        metrics |= _value_metrics(batch.returns, batch.old_values, mask)
    balance = balance_of(learner.objective)
    if balance is not None:
        prior = prior_logprobs(batch.ref_logprobs, batch.old_logprobs, balance)
        target = log_z_target(batch.old_logprobs, prior, batch.reward, mask, balance)
        means = target.reshape(groups.shape).mean(axis=1)
        error = 1.96 * jnp.std(means) / jnp.sqrt(means.size)
        metrics["log_z/monte_carlo_mean"] = jnp.mean(means)
        metrics["log_z/monte_carlo_low"] = jnp.mean(means) - error
        metrics["log_z/monte_carlo_high"] = jnp.mean(means) + error
    return metrics


def _value_metrics(returns: jax.Array, values: jax.Array, mask: jax.Array):
    """Means over all tokens, and the share of the returns' variance that the values explain."""

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    unexplained = variance(returns - values) / jnp.maximum(variance(returns), 1e-8)
    return {
        "value/mean": masked_mean(values, mask),
        "value/return_mean": masked_mean(returns, mask),
        "value/explained_variance": 1.0 - unexplained,
    }


def make_minibatch(learner: Learner, count: int) -> Callable:
    """A jitted `(batch, i)` to the i-th of `count` equal cuts of a batch, in the order of rows."""

    def cut(batch: TrainBatch, index):
        def rows(x):
            size = x.shape[0] // count
            return jax.lax.dynamic_slice_in_dim(x, index * size, size)

        return jax.tree.map(rows, batch)

    return jax.jit(cut, out_shardings=learner.layout.batch)
