"""Gemma, Gemma 2, and the text models of Gemma 3."""

import dataclasses
import math
from typing import Any

from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.families.common import (
    LLAMA_NAMES,
    Family,
    read_decoder,
    read_one_rope,
    read_rope,
    read_windows,
    write_decoder,
    write_layer_types,
    write_rope,
    write_scaling,
)
from flowrl_jax.models.hf_fields import Fields

_NAMES = LLAMA_NAMES | {
    "layers/attention_out_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers/mlp_out_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}
_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0  # Gemma 3's, where config.json has none
_WINDOW = 4096  # Gemma 2's and 3's, likewise


def _read_gemma1(fields: Fields) -> TransformerConfig:
    fields.only("use_bidirectional_attention", False)
    fields.take("hidden_activation", None)  # transformers reads hidden_act alone
    bias = fields.flag("attention_bias")
    config = read_decoder(
        fields,
        activation=("hidden_act", "gelu_pytorch_tanh"),
        kv_heads=16,
        tied=True,
        head_dim=fields.count("head_dim", 256),
        norm_offset=1.0,
        qkv_bias=bias,
        out_bias=bias,
        embed_scale=math.sqrt(fields.peek_count("hidden_size")),
        **read_rope(fields),
    )
    # The first release says "gelu" and means the approximation, as it was trained with.
    tanh = "gelu_tanh" if config.activation == "gelu" else config.activation
    return dataclasses.replace(config, activation=tanh)


def _write_gemma1(config: TransformerConfig) -> dict[str, Any]:
    own = {"attention_bias": config.qkv_bias}
    rope = write_rope(config.rope_theta, config.rope_scaling)
    return write_decoder(config, "gemma", "GemmaForCausalLM") | rope | own


def _read_gemma(fields: Fields, every: int, **own: Any) -> TransformerConfig:
    """What both have; every n-th layer is without a window."""
    fields.only("use_bidirectional_attention", False)
    fields.take("hidden_act", None)  # transformers reads hidden_activation alone
    bias = fields.flag("attention_bias")
    layers = range(fields.peek_count("num_hidden_layers"))
    window = fields.nullable("sliding_window", _WINDOW)
    return read_decoder(
        fields,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        kv_heads=4,
        tied=True,
        head_dim=fields.count("head_dim", 256),
        norm_offset=1.0,
        sandwich_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        embed_scale=math.sqrt(fields.peek_count("hidden_size")),
        query_scale=fields.positive("query_pre_attn_scalar", 256) ** -0.5,
        **read_windows(fields, window, tuple((i + 1) % every != 0 for i in layers)),
        **own,
    )


def _write_gemma(config: TransformerConfig, family: str, architecture: str) -> dict[str, Any]:
    scalar = (config.query_scale or config.head_dim**-0.5) ** -2
    # It is a whole number in config.json, which its root's root need not give back exactly.
    scalar = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
    return write_decoder(config, family, architecture, activation="hidden_activation") | {
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": scalar,
        # transformers asks for one also where no layer has it.
        "sliding_window": config.window or _WINDOW,
        "layer_types": write_layer_types(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }


def _read_gemma2(fields: Fields) -> TransformerConfig:
    return _read_gemma(
        fields,
        every=2,
        attention_softcap=fields.cap("attn_logit_softcapping", 50.0),
        logit_softcap=fields.cap("final_logit_softcapping", 30.0),
        **read_rope(fields),
    )


def _write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config.rope_theta, config.rope_scaling)
    return _write_gemma(config, "gemma2", "Gemma2ForCausalLM") | rope


def _read_gemma3(fields: Fields) -> TransformerConfig:
    fields.take("attn_logit_softcapping", None)  # transformers' Gemma 3 does not cap scores
    pattern = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
    return _read_gemma(
        fields,
        every=fields.check_count("sliding_window_pattern", pattern),
        qk_norm=True,
        logit_softcap=fields.cap("final_logit_softcapping", None),
        **_read_two_ropes(fields),
    )


def _read_two_ropes(fields: Fields) -> dict[str, Any]:
    """Positions of layers with and without a window.

    transformers 5 writes `rope_parameters` with an object for each, transformers 4 `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`; `rope_scaling` is of the layers without a window.
    """
    both = fields.mapping("rope_parameters")
    if not set(both) <= {"full_attention", "sliding_attention"}:
        raise fields.error(
            "rope_parameters",
            both,
            "must have an object each for full_attention and sliding_attention",
        )
    old = {"full_attention": fields.mapping("rope_scaling"), "sliding_attention": {}}
    read = {}
    for prefix, name, theta, default in (
        ("", "full_attention", "rope_theta", _GLOBAL_THETA),
        ("local_", "sliding_attention", "rope_local_base_freq", _LOCAL_THETA),
    ):
        own = fields.check_mapping(f"rope_parameters.{name}", both.get(name) or {})
        inner, scaling = read_one_rope(fields, f"rope_parameters.{name}", {**own, **old[name]})
        outer = fields.take(theta, default)
        read[f"{prefix}rope_theta"] = fields.check_positive(
            theta, outer if inner is None else inner
        )
        read[f"{prefix}rope_scaling"] = scaling
    return read


def _write_gemma3(config: TransformerConfig) -> dict[str, Any]:
    entries = _write_gemma(config, "gemma3_text", "Gemma3ForCausalLM")
    del entries["attn_logit_softcapping"]
    theta, scaling = config.local_rope_theta, config.local_rope_scaling
    if not theta:
        theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is None:
        rope = write_rope(config.rope_theta, config.rope_scaling)
        return entries | rope | {"rope_local_base_freq": theta}
    # Only transformers 5 can say this.
    both = {
        "full_attention": (config.rope_theta, config.rope_scaling),
        "sliding_attention": (theta, scaling),
    }
    plain = {"rope_type": "default"}
    return entries | {
        "rope_parameters": {
            name: (write_scaling(scaling) or plain) | {"rope_theta": theta}
            for name, (theta, scaling) in both.items()
        }
    }


GEMMA = Family("gemma", "GemmaForCausalLM", _read_gemma1, _write_gemma1)
GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2, _NAMES)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, _NAMES)
