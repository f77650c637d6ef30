"""Drawing one token per row, without sorting the vocabulary."""

import jax
import jax.numpy as jnp

# Bit patterns of non-negative floats order as the floats do; weights lie in [0, 1].
_BITS_OF_ONE = 0x3F800000
_BISECTIONS = 30
_BLOCK = 128


def _threshold(weights: jax.Array, enough) -> jax.Array:
    """Largest float t with `enough(weights >= t)`, exact, by bisection on bit patterns.

    Args:
        weights: `[B, V]` float32 in [0, 1], the largest of each row 1.
        enough: maps the kept set `[B, V]` bool to `[B]` bool, true for the whole vocabulary and
            monotone in the set.

    Returns:
        `[B, 1]` float32.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        ok = enough(weights >= threshold[:, None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    low = jnp.zeros(weights.shape[0], jnp.int32)
    low, _ = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, low + _BITS_OF_ONE))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]


def truncate(weights: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Zeroes the tokens outside top-k, then those outside top-p of what is left.

    Ties at the boundary are all kept, so the result does not depend on the order of tokens.

    Args:
        weights: `[B, V]` float32, unnormalised probabilities with a row maximum of 1.
        top_k: 0 keeps all.
        top_p: 1 keeps all; otherwise the smallest set of most likely tokens whose share reaches it.
    """
    if 0 < top_k < weights.shape[1]:
        bound = _threshold(weights, lambda kept: kept.sum(axis=1) >= top_k)
        weights = jnp.where(weights >= bound, weights, 0.0)
    if top_p < 1.0:
        wanted = top_p * weights.sum(axis=1)
        bound = _threshold(
            weights, lambda kept: jnp.where(kept, weights, 0.0).sum(axis=1) >= wanted
        )
        weights = jnp.where(weights >= bound, weights, 0.0)
    return weights


def _first_above(cumulative: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """First index of each row whose cumulative sum exceeds `target`, of positive weight always.

    Rounding differs between the partial sums of a parallel scan, so a sum may rise where the
    weight is 0, and the target may lie below 0 or beyond the row's sum: the next positive weight
    is meant, or the last one.
    """
    index = jnp.sum(cumulative <= target[:, None], axis=1, keepdims=True)
    places, size = jnp.arange(weights.shape[1]), weights.shape[1]
    following = jnp.where((weights > 0.0) & (places >= index), places, size).min(axis=1)
    last = jnp.max(jnp.where(weights > 0.0, places, 0), axis=1)
    return jnp.minimum(following, last)


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Draws an index with probability proportional to its weight.

    In two levels, blocks and then places within the block, so that only one block per row is
    summed cumulatively.

    Args:
        weights: `[B, V]` float32, not negative, with a positive sum.
        uniform: `[B]` float32 in [0, 1).

    Returns:
        `[B]` int32.
    """
    batch, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(batch, -1, _BLOCK)
    sums = blocks.sum(axis=2)
    cumulative = jnp.cumsum(sums, axis=1)
    target = uniform * cumulative[:, -1]
    block = _first_above(cumulative, sums, target)
    before = jnp.take_along_axis(cumulative - sums, block[:, None], axis=1)[:, 0]
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = _first_above(jnp.cumsum(within, axis=1), within, target - before)
    return (block * _BLOCK + place).astype(jnp.int32)


def draw(
    logits: jax.Array, uniform: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
        logits: `[B, V]` float32.
        uniform: `[B]` float32 in [0, 1), the randomness that is consumed.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: see `truncate`.
        top_p: see `truncate`.

    Returns:
        Tokens `[B]` int32 and their log-probabilities `[B]` float32 under the distribution that
        was drawn from: tempered, truncated and renormalised; 0 for temperature 0, where that
        distribution is one token.
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=1).astype(jnp.int32), jnp.zeros(logits.shape[0])
    logits = logits / temperature
    logits = logits - jnp.max(logits, axis=1, keepdims=True)
    weights = truncate(jnp.exp(logits), top_k, top_p)
    token = inverse_cdf(weights, uniform)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - jnp.log(weights.sum(axis=1))
