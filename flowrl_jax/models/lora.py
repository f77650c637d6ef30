"""Low-rank adapters (LoRA, arXiv 2106.09685): a small tree beside the weights of a frozen policy.

The adapter of a kernel W `[in, out]` is A `[in, rank]` and B `[rank, out]`; a layer that finds them
among its parameters computes `x W + alpha / rank (x A) B`. Without them it computes `x W`: the
frozen policy is the reference, and no second copy of it is needed.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowrl_jax.models.architecture import ATTENTION_TARGETS, LoraConfig, TransformerConfig


def a_name(target: str) -> str:
    """Key of A in the parameter tree."""
    return f"{target}_lora_a"


def b_name(target: str) -> str:
    """Key of B in the parameter tree."""
    return f"{target}_lora_b"


def has_adapter(weights: Mapping[str, Any], target: str) -> bool:
    """Whether a kernel has one.

    Args:
        weights: parameters of the module that holds the kernel.
        target: name of the kernel.
    """
    return a_name(target) in weights


def lora_term(
    config: TransformerConfig, weights: Mapping[str, Any], target: str, x: jax.Array
) -> jax.Array | float:
    """What a kernel's adapter adds to its product; 0 where the kernel has none.

    Args:
        config: of the decoder.
        weights: parameters of the module that holds the kernel.
        target: name of the kernel.
        x: `[rows, in]`, in the compute dtype.

    Returns:
        `[rows, out]` in the compute dtype, or 0.
    """
    if not has_adapter(weights, target):
        return 0.0
    rank = config.lora.rank
    a = weights[a_name(target)].astype(config.dtype).reshape(-1, rank)
    b = weights[b_name(target)].astype(config.dtype).reshape(rank, -1)
    return (x @ a) @ b * config.lora.scale


def init_lora(config: TransformerConfig, key: jax.Array) -> Any:
    """Fresh adapters, boxed with the names of their axes: A normal, B zero.

    Args:
        config: of the decoder, with `lora`.
        key: consumed.

    Returns:
        A tree of the shape of the policy's, with the adapters' leaves alone. A's standard deviation
        is `in ** -0.5`, so that `x A` is of the size of x.
    """
    width, mlp, head_dim = config.embed_dim, config.mlp_dim, config.head_dim
    heads = (config.num_heads, head_dim), ("heads", "head_dim")
    kv_heads = (config.num_kv_heads, head_dim), ("kv_heads", "head_dim")
    embed, hidden = ((width,), ("embed",)), ((mlp,), ("mlp",))
    ends = {
        "query": (embed, heads),
        "key": (embed, kv_heads),
        "value": (embed, kv_heads),
        "out": (heads, embed),
        "gate": (embed, hidden),
        "up": (embed, hidden),
        "down": (hidden, embed),
    }
    lora = config.lora
    layers: dict[str, dict[str, Any]] = {}
    for target, target_key in zip(
        lora.targets, jax.random.split(key, len(lora.targets)), strict=True
    ):
        (into, into_axes), (out, out_axes) = ends[target]
        fan_in = 1
        for size in into:
            fan_in *= size
        a = jax.random.normal(target_key, (config.num_layers, *into, lora.rank), config.param_dtype)
        b = jnp.zeros((config.num_layers, lora.rank, *out), config.param_dtype)
        part = layers.setdefault("attention" if target in ATTENTION_TARGETS else "mlp", {})
        part[a_name(target)] = _box(a * fan_in**-0.5, ("layers", *into_axes, "lora"))
        part[b_name(target)] = _box(b, ("layers", "lora", *out_axes))
    return {"layers": layers}


def _box(value: jax.Array, axes: tuple[str, ...]) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(value, axes)


def with_adapters(base: Mapping[str, Any] | None, trained: Mapping[str, Any]) -> Any:
    """The policy: frozen weights with their adapters beside them.

    Args:
        base: frozen weights, or None where all weights are trained.
        trained: adapters, or all weights.
    """
    if base is None:
        return trained
    merged = dict(base)
    for name, value in trained.items():
        merged[name] = with_adapters(base[name], value) if name in base else value
    return merged


def without_adapters(policy: Mapping[str, Any]) -> Any:
    """The frozen weights of a policy from `with_adapters`."""
    return {
        name: without_adapters(value) if isinstance(value, Mapping) else value
        for name, value in policy.items()
        if not name.endswith(("_lora_a", "_lora_b"))
    }


def merged(policy: Mapping[str, Any], config: LoraConfig) -> Any:
    """A policy whose adapters have been added to their kernels.

    Args:
        policy: from `with_adapters`.
        config: of the adapters.

    Returns:
        Weights in the adapters' dtype where a kernel had one, and as they were elsewhere: what
        serves without adapters, up to rounding.
    """
    result = {}
    for name, value in without_adapters(policy).items():
        if isinstance(value, Mapping):
            value = merged(policy[name], config)
        elif a_name(name) in policy:
            value = _add(value, policy[a_name(name)], policy[b_name(name)], config.scale)
        result[name] = value
    return result


@jax.jit
def _add(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """`W + scale A B` of stacked layers, in the dtype of A."""
    layers, rank = a.shape[0], a.shape[-1]
    product = a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)
    return kernel.astype(a.dtype) + scale * product.reshape(kernel.shape)
