"""Token log-probabilities from hidden states, without ever holding `[B, T, V]`.

For a vocabulary of 152k and 10k tokens the logits of one sequence are 6 GB in float32. Here the
sequence is cut into chunks; a chunk's logits live only while its log-probabilities are computed,
and the backward pass computes them again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from flowrl_jax.sharding import active_layout, constrain


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """`[B, T, ...]` to `[T / size, B, size, ...]`, padding T with zeros."""
    batch, length = x.shape[:2]
    pad = -length % size
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, (length + pad) // size, size, *x.shape[2:]), 1, 0)


def _unchunk(x: jax.Array, length: int) -> jax.Array:
    """Inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


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
    size = min(chunk_size, length)
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
        chunk, None, (_chunks(hidden, size), _chunks(targets, size))
    )
    residuals = (hidden, unembedding, targets, normaliser)
    return _unchunk(logprobs, length), residuals


def _backward(temperature, chunk_size, softcap, num_tokens, residuals, cotangent):
    hidden, unembedding, targets, normaliser = residuals
    batch, length, width = hidden.shape
    size = min(chunk_size, length)
    weight = _gathered(unembedding)
    shards = _batch_shards(batch)

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
        hidden_grad = jnp.einsum("btv,dv->btd", logits_grad, weight)
        # The sum over chunks is kept in float32: in bfloat16 it would lose the small terms.
        weight_grad += jnp.einsum(
            "srd,srv->sdv",
            hidden_chunk.reshape(shards, -1, width),
            logits_grad.reshape(shards, -1, weight.shape[1]),
            preferred_element_type=jnp.float32,
        )
        return constrain(weight_grad, "batch", "activation_embed", "vocab"), hidden_grad

    # Every shard of the batch has a sum of its own, so that they are reduced once, not per chunk.
    zeros = jnp.zeros((shards, *unembedding.shape), jnp.float32)
    weight_grad, hidden_grad = jax.lax.scan(
        chunk,
        constrain(zeros, "batch", "activation_embed", "vocab"),
        (_chunks(hidden, size), _chunks(targets, size), normaliser, _chunks(cotangent, size)),
    )
    weight_grad = weight_grad.sum(axis=0).astype(unembedding.dtype)
    return _unchunk(hidden_grad, length), weight_grad, None


def _gathered(unembedding: jax.Array) -> jax.Array:
    """Cut over the vocabulary alone: gathered once, before the loop over chunks."""
    return constrain(unembedding, "activation_embed", "vocab")


def _batch_shards(batch: int) -> int:
    """Parts that the rows of a batch are cut into."""
    layout = active_layout()
    shards = 1 if layout is None else layout.batch_shards
    return shards if batch % shards == 0 else 1


token_logprobs.defvjp(_forward, _backward)
