"""Qwen2 and Qwen2.5 (and DeepSeek-R1-Distill-Qwen), and Qwen3 without experts."""

from typing import Any

from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.families.common import (
    Family,
    read_decoder,
    read_rope,
    read_windows,
    write_decoder,
    write_layer_types,
    write_rope,
)
from flowrl_jax.models.hf_fields import Fields


def _read_qwen_windows(fields: Fields) -> dict[str, Any]:
    """Every Qwen mentions a window; it counts only where `use_sliding_window` says so."""
    window = fields.nullable("sliding_window", 4096)
    window = window if fields.flag("use_sliding_window") else None
    first = fields.nullable("max_window_layers", 28)
    layers = range(fields.peek_count("num_hidden_layers"))
    if window is not None and type(first) is not int:
        raise fields.error("max_window_layers", first, "must be an integer")
    return read_windows(fields, window, tuple(window is not None and i >= first for i in layers))


def _write_qwen_windows(config: TransformerConfig) -> dict[str, Any]:
    if not any(config.windows):
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": config.window,
        "max_window_layers": config.windows.index(True),
        "layer_types": write_layer_types(config),
    }


def _read_qwen2(fields: Fields) -> TransformerConfig:
    windows = _read_qwen_windows(fields)
    return read_decoder(fields, kv_heads=32, qkv_bias=True, **windows, **read_rope(fields))


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config.rope_theta, config.rope_scaling)
    common = write_decoder(config, "qwen2", "Qwen2ForCausalLM")
    return common | rope | _write_qwen_windows(config)


def _read_qwen3(fields: Fields) -> TransformerConfig:
    bias = fields.flag("attention_bias")
    return read_decoder(
        fields,
        kv_heads=32,
        head_dim=fields.count("head_dim", 128),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        **_read_qwen_windows(fields),
        **read_rope(fields),
    )


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    own = {"attention_bias": config.qkv_bias}
    rope = write_rope(config.rope_theta, config.rope_scaling)
    common = write_decoder(config, "qwen3", "Qwen3ForCausalLM")
    return common | rope | _write_qwen_windows(config) | own


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3)
