"""Estimates of a divergence from the reference out of what was sampled, token by token."""

import jax
import jax.numpy as jnp

ESTIMATORS = ("k1", "k2", "k3")
# How far a token may lie below the reference before k3 stops growing (verl, core_algos.py).
MAX_KL_LOG_RATIO = 10.0


def kl_estimate(delta: jax.Array, estimator: str) -> jax.Array:
    """One of three estimates of KL(policy || reference), for tokens that the policy sampled.

    As a value k1 and k3 are unbiased and k2 nearly so. As a loss, on policy, the expected gradient
    of k1 is zero, that of k2 the gradient of KL(policy || reference) and that of k3 the gradient
    of KL(reference || policy).

    Args:
        delta: log-probabilities under the policy minus those under the reference, any shape.
        estimator: "k1", `delta`; "k2", `delta^2 / 2`; "k3", `e^-delta + delta - 1`.

    Returns:
        The same shape, in nats.

    Raises:
        ValueError: for another estimator.
    """
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return 0.5 * delta**2
    if estimator == "k3":
        # Bounded as a whole: with only the exponential bounded, the rest would push a token that
        # has fallen far below the reference further down.
        delta = jnp.maximum(delta, -MAX_KL_LOG_RATIO)
        return jnp.exp(-delta) + delta - 1.0
    raise ValueError(f"estimator={estimator!r} is not known: use one of {ESTIMATORS}")
