"""The decoder over a KV cache: the same blocks as training, one layer after the other.

Layers are unrolled here. Scanning them would carry the stacked cache through the scan and copy it
at every token; the slices of the stacked weights are taken once, together with the cast to the
compute dtype that decoding wants anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flowrl_jax.logprobs import vocabulary_logits
from flowrl_jax.models.attention import Columns
from flowrl_jax.models.transformer import (
    Block,
    Cache,
    Embedding,
    RMSNorm,
    TransformerConfig,
    layer_view,
)


def decode_params(params: Any, config: TransformerConfig) -> Any:
    """Weights as decoding wants them: in the compute dtype, `layers` a tuple of one tree each.

    Args:
        params: the policy, as `Transformer` holds it.
        config: its shape.
    """
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    layers = tuple(
        jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
        for i in range(config.num_layers)
    )
    return {**params, "layers": layers}


def forward_cached(
    params: Any,
    config: TransformerConfig,
    tokens: jax.Array,
    positions: jax.Array,
    columns: Columns,
    caches: tuple[Cache, ...] | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Runs the decoder on tokens that follow what the caches hold.

    Args:
        params: from `decode_params`.
        config: the decoder's shape.
        tokens: `[B, T]` int32.
        positions: `[B, T]` int32.
        columns: that the tokens may attend to, and which of them are their own; without caches
            they are the tokens themselves.
        caches: keys and values `[B, K, S, H]` of each layer, or None to start.

    Returns:
        Final hidden states `[B, T, D]`, normalised, and the caches with `tokens` written in.
    """
    x = Embedding(config).apply({"params": params["embedding"]}, tokens)
    view = layer_view(config, positions, columns)
    written = []
    for i, layer in enumerate(params["layers"]):
        cache = None if caches is None else caches[i]
        windowed = config.windows[i]
        x, cache = Block(config).apply({"params": layer}, x, view, windowed, cache)
        written.append(cache)
    hidden: Any = RMSNorm(config).apply({"params": params["final_norm"]}, x)
    return hidden, tuple(written)


def grow_caches(caches: tuple[Cache, ...], length: int) -> tuple[Cache, ...]:
    """Pads every cache with zero columns up to `length`."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))  # noqa: E731
    return jax.tree.map(pad, caches)


def unembed(params: Any, config: TransformerConfig, hidden: jax.Array) -> jax.Array:
    """Logits `[B, V]` float32 of hidden states `[B, D]`."""
    weight: Any = Embedding(config).apply({"params": params["embedding"]}, method="unembedding")
    return vocabulary_logits(hidden, weight, config.logit_softcap, config.drawable)
