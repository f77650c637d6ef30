"""What a policy does on a listed problem: exact numbers for each prompt."""

import jax
import jax.numpy as jnp

from flowrl_jax.exact.problem import Problem

DRAWS = 64
Measures = dict[str, jax.Array]


def total_variation(first: jax.Array, second: jax.Array) -> jax.Array:
    """Half the absolute difference of two distributions `[..., N]`, summed: 0 to 1."""
    return 0.5 * jnp.abs(first - second).sum(axis=-1)


def divergence(logprobs: jax.Array, target: jax.Array) -> jax.Array:
    """KL(first || second) in nats, of log-probabilities `[..., N]`."""
    probability = jnp.exp(logprobs)
    return jnp.where(probability > 0, probability * (logprobs - target), 0.0).sum(axis=-1)


def perplexity(probability: jax.Array) -> jax.Array:
    """How many equally likely outcomes have the entropy of `[..., N]` probabilities."""
    terms = jnp.where(probability > 0, probability * jnp.log(jnp.maximum(probability, 1e-38)), 0.0)
    return jnp.exp(-terms.sum(axis=-1))


def expected_distinct(probability: jax.Array, draws: int) -> jax.Array:
    """Expected number of different outcomes among so many draws, of `[..., N]` probabilities.

    What is missing from a sum of 1 is no outcome at all.
    """
    never = draws * jnp.log1p(-jnp.clip(probability, 0.0, 1.0 - 1e-7))
    return -jnp.expm1(never).sum(axis=-1)


def measure(problem: Problem, logprobs: jax.Array, reference: jax.Array) -> Measures:
    """Accuracy, diversity of what is correct, and distance to the reference.

    Args:
        problem: says what is correct.
        logprobs: `[P, responses]` of the policy.
        reference: likewise.

    Returns:
        `[P]` float32 each: `accuracy`; `pass_64`; `distinct_64` and `strategies_64`, different
        correct responses and strategies expected in 64 draws; `effective` and
        `effective_strategies`, the exponential of their entropy among correct responses;
        `correct_variation`, the total variation to the reference among correct responses;
        `kl_to_reference` in nats, and the mean `length` in tokens.
    """
    probability = jnp.exp(logprobs)
    solved = jnp.where(problem.correct, probability, 0.0)
    accuracy = solved.sum(axis=1)
    among = solved / jnp.maximum(accuracy, 1e-30)[:, None]
    prior = jnp.where(problem.correct, jnp.exp(reference), 0.0)
    prior /= jnp.maximum(prior.sum(axis=1), 1e-30)[:, None]
    by_kind = jax.vmap(lambda x, kind: jax.ops.segment_sum(x, kind, problem.kinds))
    return {
        "accuracy": accuracy,
        "pass_64": -jnp.expm1(DRAWS * jnp.log1p(-jnp.minimum(accuracy, 1.0 - 1e-7))),
        "distinct_64": expected_distinct(solved, DRAWS),
        "strategies_64": expected_distinct(by_kind(solved, problem.kind), DRAWS),
        "effective": perplexity(among),
        "effective_strategies": perplexity(by_kind(among, problem.kind)),
        "correct_variation": total_variation(among, prior),
        "kl_to_reference": divergence(logprobs, reference),
        "length": probability @ jnp.asarray(problem.language.sizes, jnp.float32),
    }
