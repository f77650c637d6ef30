"""Drawing one token per row, without sorting the vocabulary."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Bit patterns of non-negative floats order as the floats do; weights lie in [0, 1].
_BITS_OF_ONE = 0x3F800000
_FAN = 8
_BLOCK = 128


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _threshold(
    weights: jax.Array,
    values: Callable[[jax.Array], jax.Array],
    total: jax.Array,
    wanted: jax.Array,
    least: Callable[[jax.Array], jax.Array],
    low: jax.Array,
) -> jax.Array:
    """A float t that parts each row as the largest t does whose kept values reach `wanted`.

    A pass cuts every row's bracket, an interval of bit patterns, into eight. Its seven sums are
    one reduction, which reads the arrays once; and a reduction of integers, whose sum depends on
    no order, is one that XLA's CPU backend writes with vector instructions. The loop ends when no
    bracket has room for two tokens, long before its ends meet unless there are ties.

    Args:
        weights: `[B, V]` float32 in [0, 1], the largest of each row 1.
        values: maps the kept set `[B, V]` bool (weights >= t) to `[B, V]` int32, 0 where not kept.
        total: `[B]` int32, the sum of the values of the tokens >= `low`.
        wanted: `[B]` int32, from 1 to `total`.
        least: maps `[B]` float32 weights to `[B]` int32, the least value of tokens as likely.
        low: `[B]` float32, known to be kept.

    Returns:
        `[B, 1]` float32.
    """

    def sums(thresholds):
        kept = tuple(values(weights >= _float(t)[:, None]) for t in thresholds)
        zeros = (jnp.int32(0),) * len(kept)
        return jax.lax.reduce(kept, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), (1,))

    def unsettled(bracket):
        low, high, at_low, at_high = bracket
        return jnp.any((high - low > 1) & (at_low - at_high >= 2 * least(_float(low))))

    def cut(bracket):
        low, high, at_low, at_high = bracket
        step = (high - low + _FAN - 1) // _FAN
        cuts = [jnp.minimum(low + i * step, high) for i in range(1, _FAN)]
        found = list(zip(cuts, sums(cuts), strict=True))
        for place, value in found:
            low = jnp.where(value >= wanted, place, low)
            at_low = jnp.where(value >= wanted, value, at_low)
        for place, value in reversed(found):
            high = jnp.where(value >= wanted, high, place)
            at_high = jnp.where(value >= wanted, at_high, value)
        return low, high, at_low, at_high

    above = jnp.full_like(total, _BITS_OF_ONE + 1)
    bracket = (_bits(low), above, total, jnp.zeros_like(total))
    return _float(jax.lax.while_loop(unsettled, cut, bracket)[0])[:, None]


def _top_k_bound(weights: jax.Array, top_k: int) -> jax.Array:
    batch, vocab = weights.shape
    return _threshold(
        weights,
        lambda kept: kept.astype(jnp.int32),
        total=jnp.full(batch, vocab, jnp.int32),
        wanted=jnp.full(batch, top_k, jnp.int32),
        least=lambda w: jnp.ones(w.shape, jnp.int32),
        low=jnp.zeros(batch),
    )


def _top_p_bound(weights: jax.Array, top_p: float) -> jax.Array:
    # Shares in units of 2^-30 to 2^-29 of the row's sum S >= 1, by a power of two, so that weights
    # above 2^-7 of it are exact: with e the exponent of S, w becomes w 2^(29 - e).
    exponent = (_bits(_total(weights)) >> 23) - 127
    scale = _float((127 + 29 - exponent) << 23)
    share = lambda w, scale: jnp.round(w * scale).astype(jnp.int32)  # noqa: E731
    shares = share(weights, scale[:, None])
    total = shares.sum(axis=1, dtype=jnp.int32)
    # What may go is worked out, not what must stay: it is the smaller number and is rounded less.
    spare = jnp.floor(total.astype(jnp.float32) * (1.0 - top_p))
    # Tokens that could all go together, were each of the vocabulary as likely.
    low = jnp.maximum(spare / weights.shape[1] - 1.0, 0.0) / scale
    return _threshold(
        weights,
        lambda kept: jnp.where(kept, shares, 0),
        total=total,
        wanted=jnp.maximum(total - spare.astype(jnp.int32), 1),
        least=lambda w: share(w, scale),
        low=low,
    )


def truncate(weights: jax.Array, top_k: int, top_p: float, min_p: float = 0.0) -> jax.Array:
    """Zeroes the tokens outside top-k, of what is left those outside top-p, then those of min-p.

    The order is that of Hugging Face transformers (vLLM applies min-p first, which differs where
    top-p counts the share of what min-p leaves). Ties at a boundary are all kept, so the result
    does not depend on the order of tokens. A share is a sum of integers, whole units of at most
    2^-29 of the row's sum: the same on every device, off by half a unit a token at most.

    Args:
        weights: `[B, V]` float32, unnormalised probabilities with a row maximum of 1.
        top_k: 0 keeps all.
        top_p: 1 keeps all; otherwise the smallest set of most likely tokens whose share reaches it.
        min_p: 0 keeps all; otherwise the tokens at least this many times as likely as the
            likeliest.

    Returns:
        `weights` with zeros; the very array where all is kept.
    """
    if 0 < top_k < weights.shape[1]:
        weights = jnp.where(weights >= _top_k_bound(weights, top_k), weights, 0.0)
    if top_p < 1.0:
        weights = jnp.where(weights >= _top_p_bound(weights, top_p), weights, 0.0)
    if min_p > 0.0:
        weights = jnp.where(weights >= min_p, weights, 0.0)
    return weights


def _blocks(weights: jax.Array) -> jax.Array:
    """`[B, V / 128, 128]`, padded with zeros."""
    batch, vocab = weights.shape
    return jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(batch, -1, _BLOCK)


def _total(weights: jax.Array) -> jax.Array:
    return _blocks(weights).sum(axis=2).sum(axis=1)


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


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws an index with probability proportional to its weight.

    In two levels, blocks and then places within the block, so that only one block per row is
    summed cumulatively.

    Args:
        weights: `[B, V]` float32, not negative, with a positive sum.
        uniform: `[B]` float32 in [0, 1).

    Returns:
        The index `[B]` int32 and the sum of the weights `[B]` float32.
    """
    blocks = _blocks(weights)
    sums = blocks.sum(axis=2)
    cumulative = jnp.cumsum(sums, axis=1)
    total = cumulative[:, -1]
    target = uniform * total
    block = _first_above(cumulative, sums, target)
    before = jnp.take_along_axis(cumulative - sums, block[:, None], axis=1)[:, 0]
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place = _first_above(jnp.cumsum(within, axis=1), within, target - before)
    return (block * _BLOCK + place).astype(jnp.int32), total


def draw(
    logits: jax.Array,
    uniform: jax.Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
        logits: `[B, V]` float32; -inf for what must not be drawn, one of a row finite.
        uniform: `[B]` float32 in [0, 1), the randomness that is consumed.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: see `truncate`.
        top_p: see `truncate`.
        min_p: see `truncate`.

    Returns:
        Tokens `[B]` int32; their log-probabilities `[B]` float32 under the distribution that was
        drawn from: tempered, truncated and renormalised; 0 for temperature 0, where that
        distribution is one token; and their log-probabilities `[B]` float32 under the policy: the
        softmax of the logits as they are. The two are one array where they are equal.
    """
    if temperature == 0.0:
        token = jnp.argmax(logits, axis=1).astype(jnp.int32)
        return token, jnp.zeros(logits.shape[0]), _policy_logprob(logits, token)
    tempered = logits / temperature
    tempered = tempered - jnp.max(tempered, axis=1, keepdims=True)
    weights = jnp.exp(tempered)
    kept = truncate(weights, top_k, top_p, min_p)
    token, total = inverse_cdf(kept, uniform)
    logprob = _at(tempered, token) - jnp.log(total)
    if temperature != 1.0:
        return token, logprob, _policy_logprob(logits, token)
    if kept is weights:
        return token, logprob, logprob
    return token, logprob, _at(tempered, token) - jnp.log(_total(weights))


def _policy_logprob(logits: jax.Array, token: jax.Array) -> jax.Array:
    shifted = logits - jnp.max(logits, axis=1, keepdims=True)
    return _at(shifted, token) - jnp.log(_total(jnp.exp(shifted)))


def _at(rows: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(rows, token[:, None], axis=1)[:, 0]
