"""Reductions and positions under a mask; the only place where padding is dealt with."""

import jax
import jax.numpy as jnp


def masked_sum(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Sums `x` where `mask` is true.

    Masked values are replaced before they are added, so that a NaN in the padding stays there.

    Args:
        x: any shape, float.
        mask: the same shape, bool or {0, 1}.
        axis: the axis to reduce; all of them by default.
    """
    return jnp.sum(jnp.where(mask.astype(bool), x, 0.0), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Means `x` where `mask` is true; 0 where nothing is. Arguments as in `masked_sum`."""
    count = jnp.sum(mask.astype(jnp.float32), axis=axis)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1.0)


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Position of each token among its row's real tokens, 0 at the first.

    Padding on the left takes position 0, so a row's positions do not depend on its padding.

    Args:
        mask: `[B, T]` bool.

    Returns:
        `[B, T]` int32.
    """
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)
