"""The decoder over a KV cache: the same blocks as training.

Prompts are read with the layers scanned, as in training. Tokens are decoded with the layers
unrolled: a scan would carry the stacked cache through itself and copy it at every token. The slices
of the stacked weights are taken once, together with the cast to the compute dtype that decoding
wants anyway.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flowrl_jax.logprobs import finish_logits, vocabulary_logits
from flowrl_jax.models.architecture import ATTENTION_TARGETS, MLP_TARGETS
from flowrl_jax.models.attention import Columns
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode_attention import Held
from flowrl_jax.models.decode_native import in_panels, native_products, panels_name, takes_panels
from flowrl_jax.models.lora import init_lora, with_adapters
from flowrl_jax.models.native_block import native_block, native_norm
from flowrl_jax.models.rotary import Rotation
from flowrl_jax.models.transformer import (
    Block,
    Embedding,
    RMSNorm,
    TransformerConfig,
    View,
    init_params,
    rotations,
)
from flowrl_jax.sharding import Layout

_EMBEDDING, _UNEMBEDDING = "tokens", "output"  # keys; the second only where it is not the first


def decode_params(params: Any, config: TransformerConfig, layout: Layout | None = None) -> Any:
    """Weights as decoding wants them: in the compute dtype, `layers` a tuple of one tree each.

    Where a CPU's kernels are to multiply with them, they are in panels.

    Args:
        params: the policy, as `Transformer` holds it.
        config: its shape.
        layout: that they are to be cut by, whatever way `params` are.
    """
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    layers = [
        jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
        for i in range(config.num_layers)
    ]
    params = {**params, "layers": tuple(layers)}
    if takes_panels(config.decode_kernel, config.dtype, layout):
        params = _with_panels(params, _panels)
    if layout is None:
        return params
    # Layer by layer: a stack of all of them may have to be gathered whole to be cut another way.
    return jax.lax.with_sharding_constraint(params, decode_shardings(config, layout))


def _panels(name: str, weight: jax.Array) -> jax.Array:
    """Of a kernel, or of what multiplies final hidden states.

    Args:
        name: its key.
        weight: as it is stored: the embedding with a row of each token.
    """
    if name == _EMBEDDING:
        return in_panels(weight.T)
    shape = (-1, weight.shape[-1]) if name == "out" else (weight.shape[0], -1)
    return in_panels(weight.reshape(shape))


def _with_panels(params: Any, panels: Callable[[str, Any], Any]) -> Any:
    """Weights with panels in place of what is only multiplied with, and beside the embedding.

    Args:
        params: `layers` a tuple of one tree each; of anything.
        panels: of a weight's key and what is there.
    """

    def module(weights, names):
        rest = {name: value for name, value in weights.items() if name not in names}
        return rest | {panels_name(name): panels(name, weights[name]) for name in names}

    kernels = {"attention": ATTENTION_TARGETS, "mlp": MLP_TARGETS}
    layers = tuple(
        layer | {part: module(layer[part], names) for part, names in kernels.items()}
        for layer in params["layers"]
    )
    embedding = dict(params["embedding"])
    name = _UNEMBEDDING if _UNEMBEDDING in embedding else _EMBEDDING
    unembedding = {panels_name(_UNEMBEDDING): panels(name, embedding[name])}
    embedding.pop(_UNEMBEDDING, None)
    return {**params, "embedding": embedding | unembedding, "layers": layers}


def decode_shardings(config: TransformerConfig, layout: Layout) -> Any:
    """How a layout cuts the weights of `decode_params`.

    Args:
        config: the decoder's shape.
        layout: of sampling.
    """

    def boxed():
        key = jax.random.key(0)
        adapters = init_lora(config, key) if config.lora.rank else {}
        return with_adapters(init_params(config, key), adapters)

    def one_layer(sharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    shardings = layout.tree_shardings(jax.eval_shape(boxed))
    layer = jax.tree.map(one_layer, shardings["layers"])
    shardings = {**shardings, "layers": (layer,) * config.num_layers}
    if takes_panels(config.decode_kernel, config.dtype, layout):
        return _with_panels(shardings, lambda *_: layout.replicated)
    return shardings


def read_prompts(
    params: Any, config: TransformerConfig, tokens: jax.Array, positions: jax.Array, mask: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Keys and values of whole prompts.

    Args:
        params: the policy, as `Transformer` holds it.
        config: its shape.
        tokens: `[B, P]` int32.
        positions: `[B, P]` int32.
        mask: `[B, P]` bool, true on real tokens.

    Returns:
        Keys and values `[B, K, P, H]` of each layer.
    """
    x = Embedding(config).apply({"params": params["embedding"]}, tokens)
    view = View(rotations(config, positions), Columns(mask))

    def layer(x, inputs):
        params, windowed = inputs
        if len(view.rotations) == 1:
            (windowed,) = view.rotations
        return Block(config).apply({"params": params}, x, view, windowed)

    kept: Any
    _, kept = jax.lax.scan(layer, x, (params["layers"], jnp.array(config.windows)))
    keys, values = kept
    return tuple((keys[i], values[i]) for i in range(config.num_layers))


def rotation_tables(config: TransformerConfig, columns: int) -> dict[bool, Rotation]:
    """Sines and cosines of all positions that a cache has room for.

    Worked out once for many tokens: left to a step, XLA's CPU backend works them out again in every
    layer, for every head.

    Args:
        config: the decoder's shape.
        columns: of the cache.
    """
    return rotations(config, jnp.arange(columns)[None])


def decode_token(
    params: Any,
    config: TransformerConfig,
    tokens: jax.Array,
    positions: jax.Array,
    tables: dict[bool, Rotation],
    held: Held,
    caches: tuple[KVCache, ...],
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    """Runs the decoder on the next token of every slot.

    Args:
        params: from `decode_params`.
        config: the decoder's shape.
        tokens: `[S]` int32.
        positions: `[S]` int32.
        tables: from `rotation_tables`.
        held: the column that the tokens are written to, and how many each may attend to.
        caches: of each layer.

    Returns:
        Logits `[S, V]` float32, and the caches with `tokens` written in.
    """
    x: Any = Embedding(config).apply({"params": params["embedding"]}, tokens[:, None])
    turn = jax.tree.map(lambda x: x[0, 0, positions, None, None], tables)
    in_panels = panels_name(_UNEMBEDDING) in params["embedding"]
    written = []
    for layer, windowed, cache in zip(params["layers"], config.windows, caches, strict=True):
        if in_panels:
            out, cache = native_block(config, layer, x[:, 0], turn[windowed], held, windowed, cache)
            x = out[:, None]
        else:
            x, cache = Block(config).apply({"params": layer}, x, View(turn, held), windowed, cache)
        written.append(cache)
    last = _native_logits if in_panels else _logits
    return last(params, config, x[:, 0]), tuple(written)


def _logits(params: Any, config: TransformerConfig, x: jax.Array) -> jax.Array:
    """Logits `[S, V]` of the residual stream `[S, D]`."""
    hidden: Any = RMSNorm(config).apply({"params": params["final_norm"]}, x)
    weight: Any = Embedding(config).apply({"params": params["embedding"]}, method="unembedding")
    return vocabulary_logits(hidden, weight, config.logit_softcap, config.drawable)


def _native_logits(params: Any, config: TransformerConfig, x: jax.Array) -> jax.Array:
    """The same with weights in panels."""
    panels = params["embedding"][panels_name(_UNEMBEDDING)]
    norm = native_norm(config, params["final_norm"])
    (logits,) = native_products(x, (panels,), (config.vocab_rows,), norm=norm)
    return finish_logits(logits, config.logit_softcap, config.drawable)
