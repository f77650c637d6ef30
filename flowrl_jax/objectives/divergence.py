"""Trajectory balance for other divergences: what is paid for a residual, and the group's constant.

With `u = pi / p` the ratio of the policy to its target, trajectory balance's residual is `log u` at
the true log Z, and a convex `l` with `l'(log u) = f'(u)`, up to a constant, makes the expected
gradient on policy, `E[l'(residual) grad log pi]`, that of the divergence `sum p f(u)`:

    reverse_kl        l = x^2 / 2                                     KL(pi || p)
    forward_kl        l = e^-x + x - 1                                KL(p || pi)
    jensen_shannon    l' = log(2 u / (1 + u)) = log 2 - log(1 + e^-x)  2 JS(pi, p)

Here all are doubled, so that the first is the square that FlowRL has always had. Source: arXiv
2605.15417 (f-trajectory balance); `tests/objectives_theory_test.py` holds the gradients.
"""

import math

import jax
import jax.numpy as jnp

from flowrl_jax.objectives.log_z import group_mean

DIVERGENCES = ("reverse_kl", "forward_kl", "jensen_shannon")
# Where e^-residual stops growing: from there on forward_kl's loss goes on along its tangent, so
# that nothing overflows and a response that is e^20 times too unlikely is still pulled up.
MAX_EXPONENT = 20.0
# Newton's steps to the constant of jensen_shannon; see `group_constant`.
NEWTON_STEPS = 24
# Odd coefficients, from x^11 down to x^3, of jensen_shannon's l around 0; its even part is x^2 / 4.
_SERIES = (-31 / 159667200, 17 / 5806080, -1 / 20160, 1 / 960, -1 / 24)


def divergence_loss(residual: jax.Array, divergence: str) -> jax.Array:
    """What a residual costs: `2 l(residual)`; 0 at 0 and convex.

    Args:
        residual: any shape, in nats; positive where the policy is above its target.
        divergence: one of `DIVERGENCES`.

    Returns:
        The same shape.

    Raises:
        ValueError: for another divergence.
    """
    if divergence == "reverse_kl":
        return residual**2
    if divergence == "forward_kl":
        bounded = jnp.maximum(residual, -MAX_EXPONENT)
        # Chosen, not added: a sum of both would lose the curve's gradient to rounding.
        tangent = math.expm1(MAX_EXPONENT) * (1.0 - MAX_EXPONENT - residual) - MAX_EXPONENT
        loss = jnp.where(residual <= -MAX_EXPONENT, tangent, jnp.expm1(-bounded) + bounded)
        return 2.0 * loss
    if divergence == "jensen_shannon":
        return 2.0 * _jensen_shannon(residual)
    raise ValueError(f"divergence={divergence!r} is not known: use one of {DIVERGENCES}")


@jax.custom_jvp
def _jensen_shannon(x: jax.Array) -> jax.Array:
    """The integral of `log 2 - softplus(-x)` from 0: `x log 2 - Li2(-e^-x) - pi^2 / 12`.

    Both sides of 0 take the dilogarithm of `-e^-|x|`, where it is between -pi^2 / 12 and 0: the
    other side follows from its inversion formula. Near 0, where all terms cancel, a series.
    """
    size = jnp.abs(x)
    # Spence's function of z is Li2(1 - z).
    dilogarithm = jax.scipy.special.spence(1.0 + jnp.exp(-size))
    rest = dilogarithm + math.pi**2 / 12
    far = x * math.log(2) + jnp.where(x < 0, 0.5 * x**2 + rest, -rest)
    square = jnp.minimum(x**2, 1.0)  # the series' other side may not overflow
    odd = jnp.polyval(jnp.array(_SERIES, x.dtype), square)
    return jnp.where(size < 0.5, square * (1 / 4 + x * odd), far)


@_jensen_shannon.defjvp
def _(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _jensen_shannon(x), _jensen_shannon_slope(x) * tangent


def _jensen_shannon_slope(x: jax.Array) -> jax.Array:
    """`log(2 u / (1 + u))` of `u = e^x`: at most log 2 above the target, `x + log 2` far below."""
    return math.log(2) - jax.nn.softplus(-x)


def group_constant(target: jax.Array, group_size: int, divergence: str) -> jax.Array:
    """The log Z at which a group's loss is least, in place of each sample's own estimate.

    It is the root C of `sum l'(C - target)`: the mean of the estimates for reverse_kl, the
    logarithm of the mean of their exponentials for forward_kl, and for jensen_shannon a number
    between the two, by Newton's method from the mean. `l'` is concave, so that every step falls
    short of the root and none overshoots; after 24 steps what is left is rounding (1e-12 of the
    estimates' spread in float64, 2e-7 of it or of 1 in float32, for groups of up to 1024).

    Args:
        target: `[B]` float32, estimates of log Z (see `flowrl.log_z_target`).
        group_size: samples per prompt; divides B.
        divergence: one of `DIVERGENCES`.

    Returns:
        `[B]` float32, constant within a group and without gradient.

    Raises:
        ValueError: for another divergence.
    """
    mean = group_mean(target, group_size)
    if divergence == "reverse_kl":
        return mean
    groups = jax.lax.stop_gradient(target - mean).reshape(-1, group_size)
    if divergence == "forward_kl":
        above = jax.nn.logsumexp(groups, axis=1) - math.log(group_size)
    elif divergence == "jensen_shannon":
        above = _newton(groups)
    else:
        raise ValueError(f"divergence={divergence!r} is not known: use one of {DIVERGENCES}")
    return mean + jnp.repeat(above, group_size)


def _newton(groups: jax.Array) -> jax.Array:
    """Roots, one a row, of the mean of `_jensen_shannon_slope(C - row)`; rows have mean 0."""

    def step(_, constant):
        x = constant[:, None] - groups
        # The slope's derivative is 1 - sigmoid(x); around the root some of a row's is near 1.
        rise = jax.nn.sigmoid(-x).mean(axis=1)
        return constant - _jensen_shannon_slope(x).mean(axis=1) / rise

    return jax.lax.fori_loop(0, NEWTON_STEPS, step, jnp.zeros_like(groups[:, 0]))
