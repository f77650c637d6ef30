"""Attention over masked rows, with the kernel that the platform does best."""

import jax
import jax.numpy as jnp

# Large and finite: a row that may attend to nothing (padding) gets the mean of its values rather
# than NaN, and nothing reads it.
MASKED = -1e30


def causal_mask(mask: jax.Array) -> jax.Array:
    """Which column each token may attend to: itself and real tokens before it.

    Args:
        mask: `[B, T]` bool, true on real tokens.

    Returns:
        `[B, T, T]` bool.
    """
    length = mask.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & mask[:, None, :]


def windowed_mask(mask: jax.Array, window: int, first: jax.Array | int = 0) -> jax.Array:
    """Takes away the columns that lie `window` or more before a token's own.

    Args:
        mask: `[B, T, S]` bool.
        window: columns that stay, the token's own included.
        first: column of the first token.

    Returns:
        `[B, T, S]` bool.
    """
    own = first + jnp.arange(mask.shape[1])
    return mask & (jnp.arange(mask.shape[2])[None] > own[:, None] - window)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
    implementation: str = "xla",
) -> jax.Array:
    """Grouped-query attention with softmax in float32.

    Args:
        query: `[B, N, T, H]`; N query heads, a multiple of K.
        key: `[B, K, S, H]`.
        value: `[B, K, S, H]`.
        mask: `[B, T, S]` bool, true where attending is allowed.
        scale: multiplies the scores.
        softcap: scores s become `softcap * tanh(s / softcap)`; 0 leaves them.
        implementation: "xla", or "cudnn" (flash attention on NVIDIA GPUs, bfloat16 or float16).

    Returns:
        `[B, N, T, H]` in the dtype of `query`.
    """
    batch, heads, length, head_dim = query.shape
    if implementation == "cudnn":
        swap = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        out = jax.nn.dot_product_attention(
            swap(query),
            swap(key),
            swap(value),
            mask=mask[:, None],
            scale=scale,
            implementation="cudnn",
        )
        return swap(out)
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, (heads // kv_heads) * length, head_dim)
    if length == 1:
        # Keys are the left factor here, which XLA's CPU backend need not transpose. Were the
        # scores turned before they are masked, XLA would exchange the factors again.
        scores = jnp.einsum("bksh,bkth->bkst", key, grouped, preferred_element_type=jnp.float32)
        scores = jnp.where(
            jnp.swapaxes(mask, 1, 2)[:, None], _capped(scores * scale, softcap), MASKED
        )
        scores = jnp.swapaxes(scores, 2, 3)
    else:
        scores = jnp.einsum("bkth,bksh->bkts", grouped, key, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1)
        scores = jnp.where(mask[:, None, None], _capped(scores * scale, softcap), MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bkts,bksh->bkth", probs.reshape(batch, kv_heads, -1, key.shape[2]), value)
    return out.reshape(batch, heads, length, head_dim)


def _capped(scores: jax.Array, softcap: float) -> jax.Array:
    return softcap * jnp.tanh(scores / softcap) if softcap else scores
