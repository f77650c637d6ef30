"""A layer of the decoder on CPUs, with kernels of our own: five calls, where XLA makes twenty.

What `transformer.Block` computes, of one token per slot and with weights in panels. Norms, what is
added to the residual stream, and rotations are parts of the calls whose arrays they change: each of
XLA's own would be run on one core, with a pause for the others.
"""

from collections.abc import Mapping
from typing import Any

import jax

from flowrl_jax.models.architecture import ACTIVATIONS, TransformerConfig
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode_attention import Held, attend_next, decode_kernel
from flowrl_jax.models.decode_native import (
    Norm,
    can_gate,
    native_gated_products,
    native_products,
    panels_name,
)
from flowrl_jax.models.lora import has_adapter, lora_term
from flowrl_jax.models.rotary import Rotation
from flowrl_jax.models.transformer import RMSNorm

Weights = Mapping[str, Any]


def native_block(
    config: TransformerConfig,
    weights: Weights,
    x: jax.Array,
    rotation: Rotation,
    held: Held,
    windowed: bool,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Attention and MLP of one token per slot.

    Args:
        config: the decoder's shape.
        weights: of the layer, in panels, from `decode_params`.
        x: `[S, D]` float32, the residual stream.
        rotation: of the slots' positions, `[S, 1, 1, H / 2]` each.
        held: what each slot may attend to.
        windowed: whether the layer has a window.
        cache: of the layer.

    Returns:
        `[S, D]`, and the cache with the tokens written in.
    """
    attention = weights["attention"]
    sizes = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    widths = {name: count * config.head_dim for name, count in sizes.items()}
    outs = _project(
        config, attention, widths, x, norm=native_norm(config, weights["attention_norm"])
    )
    heads = {
        name: out.reshape(x.shape[0], sizes[name], 1, config.head_dim)
        for name, out in zip(sizes, outs, strict=True)
    }
    if config.qk_norm:
        for name in ("query", "key"):
            heads[name] = _normalised(config, attention[f"{name}_norm"], heads[name])
    kernel, scores = decode_kernel(config, cache.key.dtype), config.scores(windowed)
    out, cache = attend_next(
        *heads.values(), rotation=rotation, cache=cache, held=held, kernel=kernel, **scores
    )
    out = out.reshape(x.shape[0], -1)
    x = _add(config, weights, ("attention", "out"), out, x)
    return _add(config, weights, ("mlp", "down"), _hidden(config, weights, x), x), cache


def _hidden(config: TransformerConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """The MLP's hidden layer `[S, F]`."""
    mlp, names, norm = weights["mlp"], ("gate", "up"), native_norm(config, weights["mlp_norm"])
    plain = not config.mlp_bias and not any(has_adapter(mlp, name) for name in names)
    if plain and can_gate(config.activation):
        panels = tuple(mlp[panels_name(name)] for name in names)
        return native_gated_products(x, panels, config.mlp_dim, config.activation, norm=norm)
    widths = dict.fromkeys(names, config.mlp_dim)
    gate, up = _project(config, mlp, widths, x, norm=norm)
    return ACTIVATIONS[config.activation](gate) * up


def _add(
    config: TransformerConfig,
    weights: Weights,
    kernel: tuple[str, str],
    rows: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """The residual stream with rows times a kernel, named by its module and itself, added to it."""
    module, name = kernel
    width = {name: config.embed_dim}
    if not config.sandwich_norm:
        (out,) = _project(config, weights[module], width, rows, onto=x)
        return out
    (out,) = _project(config, weights[module], width, rows)
    return x + _normalised(config, weights[f"{module}_out_norm"], out)


def _project(
    config: TransformerConfig,
    weights: Weights,
    widths: dict[str, int],
    rows: jax.Array,
    *,
    norm: Norm | None = None,
    onto: jax.Array | None = None,
) -> list[jax.Array]:
    """Rows times kernels of a module, with their biases and adapters.

    Args:
        config: the decoder's shape.
        weights: of the module.
        widths: of the products, by the kernels' names.
        rows: `[S, D]`.
        norm: of the rows.
        onto: `[S, F]` that the products are added to.

    Returns:
        `[S, F]` of each kernel.
    """
    if norm and any(has_adapter(weights, name) for name in widths):  # which want the rows as well
        rows, norm = _normalised(config, {"scale": norm.scale}, rows), None
    panels = tuple(weights[panels_name(name)] for name in widths)
    added = tuple(_sum(onto, weights.get(f"{name}_bias")) for name in widths)
    outs = native_products(rows, panels, tuple(widths.values()), norm=norm, onto=added)
    return [
        out + lora_term(config, weights, name, rows) for name, out in zip(widths, outs, strict=True)
    ]


def _sum(onto: jax.Array | None, bias: jax.Array | None) -> jax.Array | None:
    """What a product is added to, of which either may be missing."""
    if bias is None:
        return onto
    bias = bias.reshape(1, -1)
    return bias if onto is None else onto + bias


def native_norm(config: TransformerConfig, weights: Weights) -> Norm:
    """What `transformer.RMSNorm` computes, for a kernel.

    Args:
        config: the decoder's shape.
        weights: of the norm.
    """
    return Norm(weights["scale"], config.norm_eps, config.norm_offset)


def _normalised(config: TransformerConfig, weights: Weights, x: jax.Array) -> jax.Array:
    """By XLA."""
    out: Any = RMSNorm(config).apply({"params": weights}, x)
    return out
