"""Rewards relative to the group of samples that answer the same prompt."""

import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_mean


def _groups(reward: jax.Array, group_size: int) -> jax.Array:
    if group_size < 1 or reward.shape[0] % group_size:
        raise ValueError(
            f"{reward.shape[0]} rewards do not divide into groups of {group_size}: pass the"
            " samples of each prompt adjacent to each other, the same number for every prompt"
        )
    return reward.astype(jnp.float32).reshape(-1, group_size)


def _centred(groups: jax.Array) -> jax.Array:
    """Deviations from each row's mean; the first entry goes first, so that equal ones give 0."""
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(axis=1, keepdims=True)


def group_normalize(reward: jax.Array, group_size: int, *, eps: float = 1e-6) -> jax.Array:
    """Centres and scales rewards within each group: `(r - mean) / (std + eps)`.

    The standard deviation is the unbiased one (n - 1), as in verl's GRPO advantage that the
    released FlowRL uses. A group of one has no spread to normalise by: mean 0 and deviation 1
    are assumed there, so its reward passes through as `r / (1 + eps)`. Equal rewards give 0.

    Args:
        reward: `[B]`, samples of one prompt adjacent.
        group_size: samples per prompt; divides B.
        eps: added to the standard deviation.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: if B is not a multiple of `group_size`.
    """
    groups = _groups(reward, group_size)
    if group_size == 1:
        return (groups / (1.0 + eps)).reshape(-1)
    centred = _centred(groups)
    deviation = jnp.sqrt((centred**2).sum(axis=1, keepdims=True) / (group_size - 1))
    return (centred / (deviation + eps)).reshape(-1)


def group_center(reward: jax.Array, group_size: int) -> jax.Array:
    """Subtracts each group's mean (Dr.GRPO). Arguments as in `group_normalize`.

    A group of one keeps its reward, as in `group_normalize`.
    """
    groups = _groups(reward, group_size)
    if group_size == 1:
        return groups.reshape(-1)
    return _centred(groups).reshape(-1)


def leave_one_out(reward: jax.Array, group_size: int) -> jax.Array:
    """Subtracts the mean of the other rewards of the group (RLOO, arXiv 2402.14740).

    That is `group_center` times `n / (n - 1)`. A group of one keeps its reward.

    Args:
        reward: `[B]`, samples of one prompt adjacent.
        group_size: samples per prompt, n; divides B.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: if B is not a multiple of `group_size`.
    """
    return group_center(reward, group_size) * (group_size / max(group_size - 1, 1))


def whiten(x: jax.Array, mask: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """Mean 0 and variance 1 over all tokens of a batch (REINFORCE++, as in verl).

    The variance is the unbiased one (n - 1); equal values give 0.

    Args:
        x: `[B, T]`.
        mask: `[B, T]`, 1 on the tokens that count.
        eps: added to the variance.

    Returns:
        `[B, T]` float32, 0 where masked.
    """
    mask = mask.astype(bool)
    # Relative to one of them, so that the mean of equal values is exact.
    largest = jnp.max(x, where=mask, initial=-jnp.inf)
    shifted = jnp.where(mask, x.astype(jnp.float32) - largest, 0.0)
    centred = jnp.where(mask, shifted - masked_mean(shifted, mask), 0.0)
    count = jnp.sum(mask.astype(jnp.float32))
    variance = jnp.sum(centred**2) / jnp.maximum(count - 1.0, 1.0)
    return centred * jax.lax.rsqrt(variance + eps)


def overlong_punishment(length: jax.Array, limit: int, buffer: int) -> jax.Array:
    """DAPO's soft punishment of responses that end within `buffer` tokens of the limit.

    `min(0, (limit - buffer - n) / buffer)`: 0 up to `limit - buffer` tokens, -1 at the limit.
    Source: arXiv 2503.14476, equation 13.

    Args:
        length: `[B]`, tokens of each response.
        limit: tokens that a response may have.
        buffer: tokens, at least 1.

    Returns:
        `[B]` float32 in [-1, 0], to be added to rewards.
    """
    return jnp.minimum((limit - buffer - length.astype(jnp.float32)) / buffer, 0.0)


def normalize_rewards(reward: jax.Array, group_size: int, kind: str) -> jax.Array:
    """Applies the normalisation that an objective names.

    Args:
        reward: `[B]`, samples of one prompt adjacent.
        group_size: samples per prompt.
        kind: "group" (`group_normalize`), "center" (`group_center`) or "none".

    Raises:
        ValueError: for another kind.
    """
    if kind == "group":
        return group_normalize(reward, group_size)
    if kind == "center":
        return group_center(reward, group_size)
    if kind == "none":
        return reward.astype(jnp.float32)
    raise ValueError(f"reward_norm={kind!r} is not known: use 'group', 'center' or 'none'")
