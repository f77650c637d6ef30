"""Token log-probabilities from hidden states, without ever holding `[B, T, V]`.

For a vocabulary of 152k and 10k tokens the logits of one sequence are 6 GB in float32. Here the
vocabulary is cut into blocks; a block's logits live only until they are added to the sums that the
log-probabilities are made of, and the backward pass computes them again. So every block of the
unembedding has the whole of its gradient from one matrix product, over all tokens.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from flowrl_jax.sharding import active_layout, constrain

_LANES = 128  # blocks of a multiple of it, where the vocabulary has such a divisor


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
    return finish_logits(logits, softcap, num_tokens)


def finish_logits(logits: jax.Array, softcap: float, num_tokens: int) -> jax.Array:
    """What the products of hidden states with the unembedding become.

    Args:
        logits: `[..., V]` float32.
        softcap: see `vocabulary_logits`.
        num_tokens: see `vocabulary_logits`.
    """
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
        chunk_size: logits are held at one time that are as many as those of this number of tokens
            of each row.
        softcap: see `vocabulary_logits`.
        num_tokens: see `vocabulary_logits`.

    Returns:
        `[B, T]` float32.
    """
    return _forward(hidden, unembedding, targets, temperature, chunk_size, softcap, num_tokens)[0]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """A vocabulary in blocks; of each of its parts on devices a block has `size` ids.

    Attributes:
        weight: `[D, parts, count x size]`, not cut along D: gathered once, not at every block.
        count: of blocks.
        tokens: ids that exist.
    """

    weight: jax.Array
    count: int
    tokens: int

    @property
    def size(self) -> int:
        """Ids of a block in each part."""
        return self.weight.shape[2] // self.count

    def block(self, i: jax.Array) -> jax.Array:
        """`[D, parts, size]`."""
        return jax.lax.dynamic_slice_in_dim(self.weight, i * self.size, self.size, axis=2)

    def ids(self, i: jax.Array) -> jax.Array:
        """`[parts, size]` int32."""
        first = jnp.arange(self.weight.shape[1])[:, None] * self.weight.shape[2]
        return first + i * self.size + jnp.arange(self.size)

    def logits(self, i: jax.Array, hidden: jax.Array, softcap: float) -> jax.Array:
        """`[B, T, parts, size]` float32; minus infinity for ids that do not exist."""
        logits = jnp.einsum(
            "btd,dps->btps", hidden, self.block(i), preferred_element_type=jnp.float32
        )
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        return jnp.where(self.ids(i) < self.tokens, logits, -jnp.inf)


def _blocks(unembedding: jax.Array, length: int, chunk_size: int, num_tokens: int) -> _Blocks:
    width, vocab = unembedding.shape
    layout = active_layout()
    parts = 1 if layout is None else layout.shards("vocab")
    wanted = -(-length // chunk_size)
    smooth = (n for n in range(wanted, 2 * wanted) if vocab % (parts * n * _LANES) == 0)
    count = next(smooth, min(wanted, vocab))
    size = -(-vocab // (parts * count))
    weight = constrain(unembedding, "activation_embed", "vocab")
    weight = jnp.pad(weight, ((0, 0), (0, parts * count * size - vocab)))
    return _Blocks(weight.reshape(width, parts, count * size), count, num_tokens or vocab)


def _forward(hidden, unembedding, targets, temperature, chunk_size, softcap, num_tokens):
    blocks = _blocks(unembedding, hidden.shape[1], chunk_size, num_tokens)

    def add(sums, i):
        largest, total, chosen = sums
        logits = blocks.logits(i, hidden, softcap) / temperature
        # A sum rather than a look-up, which would gather logits that are cut over the vocabulary.
        own = blocks.ids(i) == targets[..., None, None]
        chosen += jnp.sum(jnp.where(own, logits, 0.0), axis=(2, 3))
        # Block 0 holds id 0, so that the largest so far is finite from there on.
        new = jnp.maximum(largest, jnp.max(logits, axis=(2, 3)))
        block = jnp.sum(jnp.exp(logits - new[..., None, None]), axis=(2, 3))
        return (new, total * jnp.exp(largest - new) + block, chosen), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    sums, _ = jax.lax.scan(add, (zeros - jnp.inf, zeros, zeros), jnp.arange(blocks.count))
    largest, total, chosen = sums
    normaliser = largest + jnp.log(total)
    return chosen - normaliser, (hidden, unembedding, targets, normaliser)


def _backward(temperature, chunk_size, softcap, num_tokens, residuals, cotangent):
    hidden, unembedding, targets, normaliser = residuals
    blocks = _blocks(unembedding, hidden.shape[1], chunk_size, num_tokens)

    def add(hidden_grad, i):
        logits = blocks.logits(i, hidden, softcap)
        probs = jnp.exp(logits / temperature - normaliser[..., None, None])
        own = blocks.ids(i) == targets[..., None, None]
        logits_grad = (own - probs) * (cotangent / temperature)[..., None, None]
        if softcap:
            # Ids that do not exist have no gradient, and minus infinity must not make it NaN.
            slope = 1.0 - (logits / softcap) ** 2
            logits_grad *= jnp.where(jnp.isfinite(slope), slope, 0.0)
        logits_grad = logits_grad.astype(hidden.dtype)
        # Sums over blocks are kept in float32: in bfloat16 they would lose the small terms.
        hidden_grad += jnp.einsum(
            "btps,dps->btd", logits_grad, blocks.block(i), preferred_element_type=jnp.float32
        )
        weight_grad = jnp.einsum("btd,btps->dps", hidden, logits_grad)
        return hidden_grad, constrain(weight_grad, "embed", "vocab", None)

    hidden_grad, weight_grad = jax.lax.scan(
        add, jnp.zeros(hidden.shape, jnp.float32), jnp.arange(blocks.count)
    )
    width, vocab = unembedding.shape
    weight_grad = jnp.moveaxis(weight_grad, 0, 2).reshape(width, -1)[:, :vocab]
    return hidden_grad.astype(hidden.dtype), weight_grad.astype(unembedding.dtype), None


token_logprobs.defvjp(_forward, _backward)
