"""Token log-probabilities from hidden states, without ever holding `[B, T, V]`.

For a vocabulary of 152k and 10k tokens the logits of one sequence are 6 GB in float32. Here the
sequence is cut into chunks; a chunk's logits live only while its log-probabilities are computed,
and the backward pass computes them again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from flowrl_jax.sharding import active_layout, constrain


def _chunks(x: jax.Array, size: int, parts: int) -> jax.Array:
    """`[B, T, ...]` to `[N, B, C, size, ...]` with T = C x N x size, padding T with zeros.

    Rows that are cut into C parts over devices are cut into chunks within each part.
    """
    batch, length = x.shape[:2]
    pad = -length % (parts * size)
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, parts, -1, size, *x.shape[2:]), 2, 0)


def _unchunk(x: jax.Array, length: int) -> jax.Array:
    """Inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[4:])[:, :length]


def vocabulary_logits(
    hidden: jax.Array, unembedding: jax.Array, softcap: float = 0.0, num_tokens: int = 0
) -> jax.Array:
    """Logits of the next token.

    Args:
        hidden: `[..., D]`, final (normalised) hidden states.
        unembedding: `[D, V]`, in the dtype of `hidden`.
        softcap: logits z become `softcap * tanh(z / softcap)`; 0 leaves them.
        num_tokens: ids from this one on do not exist and get minus infinity; 0 means V.

    Returns:
        `[..., V]` float32.
    """
    logits = jnp.einsum("...d,dv->...v", hidden, unembedding, preferred_element_type=jnp.float32)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if 0 < num_tokens < logits.shape[-1]:
        logits = jnp.where(jnp.arange(logits.shape[-1]) < num_tokens, logits, -jnp.inf)
    return logits


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    temperature: float = 1.0,
    chunk_size: int = 512,
    softcap: float = 0.0,
    num_tokens: int = 0,
) -> jax.Array:
    """Log-probability of each target token under the policy.

    Args:
        hidden: `[B, T, D]`, the final (normalised) hidden state that predicts `targets`.
        unembedding: `[D, V]`, in the dtype of `hidden`.
        targets: `[B, T]` int32 in `[0, V)`.
        temperature: logits are divided by it, as they were when the tokens were sampled.
        chunk_size: tokens of a row whose logits are held at one time.
        softcap: see `vocabulary_logits`.
        num_tokens: see `vocabulary_logits`.

    Returns:
        `[B, T]` float32.
    """
    return _forward(hidden, unembedding, targets, temperature, chunk_size, softcap, num_tokens)[0]


def _forward(hidden, unembedding, targets, temperature, chunk_size, softcap, num_tokens):
    length = hidden.shape[1]
    cut = _cutting(length, chunk_size)
    weight = _gathered(unembedding)

    def chunk(_, inputs):
        hidden_chunk, targets_chunk = inputs
        logits = vocabulary_logits(hidden_chunk, weight, softcap, num_tokens) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        # A sum rather than a look-up, which would gather logits that are cut over the vocabulary.
        own = jnp.arange(logits.shape[-1]) == targets_chunk[..., None]
        chosen = jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
        return None, (chosen - normaliser, normaliser)

    _, (logprobs, normaliser) = jax.lax.scan(
        chunk, None, (_chunks(hidden, *cut), _chunks(targets, *cut))
    )
    residuals = (hidden, unembedding, targets, normaliser)
    return _unchunk(logprobs, length), residuals


def _backward(temperature, chunk_size, softcap, num_tokens, residuals, cotangent):
    hidden, unembedding, targets, normaliser = residuals
    batch, length = hidden.shape[:2]
    cut = _cutting(length, chunk_size)
    weight = _gathered(unembedding)
    shards = _batch_shards(batch)
    by_shard = lambda x: x.reshape(shards, -1, *x.shape[1:])  # noqa: E731

    def chunk(weight_grad, inputs):
        hidden_chunk, targets_chunk, normaliser_chunk, cotangent_chunk = inputs
        logits = vocabulary_logits(hidden_chunk, weight, softcap, num_tokens)
        probs = jnp.exp(logits / temperature - normaliser_chunk[..., None])
        own = jnp.arange(logits.shape[-1]) == targets_chunk[..., None]
        logits_grad = (own - probs) * (cotangent_chunk / temperature)[..., None]
        if softcap:
            # Ids that do not exist have no gradient, and minus infinity must not make it NaN.
            slope = 1.0 - (logits / softcap) ** 2
            logits_grad *= jnp.where(jnp.isfinite(slope), slope, 0.0)
        logits_grad = logits_grad.astype(hidden.dtype)
        hidden_grad = jnp.einsum("bctv,dv->bctd", logits_grad, weight)
        # The sum over chunks is kept in float32: in bfloat16 it would lose the small terms.
        weight_grad += jnp.einsum(
            "sbctd,sbctv->scdv",
            by_shard(hidden_chunk),
            by_shard(logits_grad),
            preferred_element_type=jnp.float32,
        )
        return constrain(weight_grad, *axes), hidden_grad

    # Every part of the batch has a sum of its own, so that they are reduced once, not per chunk.
    axes = ("batch", "seq", "activation_embed", "vocab")
    zeros = jnp.zeros((shards, cut[1], *unembedding.shape), jnp.float32)
    weight_grad, hidden_grad = jax.lax.scan(
        chunk,
        constrain(zeros, *axes),
        (_chunks(hidden, *cut), _chunks(targets, *cut), normaliser, _chunks(cotangent, *cut)),
    )
    weight_grad = weight_grad.sum(axis=(0, 1)).astype(unembedding.dtype)
    return _unchunk(hidden_grad, length), weight_grad, None


def _gathered(unembedding: jax.Array) -> jax.Array:
    """Cut over the vocabulary alone: gathered once, before the loop over chunks."""
    return constrain(unembedding, "activation_embed", "vocab")


def _cutting(length: int, chunk_size: int) -> tuple[int, int]:
    """Size of chunks, and parts that a row is cut into over devices."""
    layout = active_layout()
    parts = 1 if layout is None else layout.context_shards
    return min(chunk_size, -(-length // parts)), parts


def _batch_shards(batch: int) -> int:
    """Parts that the rows of a batch are cut into."""
    layout = active_layout()
    shards = 1 if layout is None else layout.batch_shards
    return shards if batch % shards == 0 else 1


token_logprobs.defvjp(_forward, _backward)
