"""Llama 2 and 3.x (and DeepSeek-R1-Distill-Llama), and Mistral: Llama with a window."""

from typing import Any

from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.families.common import (
    Family,
    read_decoder,
    read_rope,
    read_windows,
    write_decoder,
    write_rope,
)
from flowrl_jax.models.hf_fields import Fields


def _read_llama(fields: Fields) -> TransformerConfig:
    bias = fields.flag("attention_bias")
    return read_decoder(
        fields,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        **read_rope(fields),
    )


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    own = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    rope = write_rope(config.rope_theta, config.rope_scaling)
    return write_decoder(config, "llama", "LlamaForCausalLM") | rope | own


def _read_mistral(fields: Fields) -> TransformerConfig:
    window = fields.nullable("sliding_window", 4096)
    windows = read_windows(
        fields, window, (window is not None,) * fields.peek_count("num_hidden_layers")
    )
    return read_decoder(fields, kv_heads=8, **windows, **read_rope(fields))


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    own = {"sliding_window": config.window or None}
    rope = write_rope(config.rope_theta, config.rope_scaling)
    return write_decoder(config, "mistral", "MistralForCausalLM") | rope | own


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral)
