"""What the families' config.json have in common: sizes, activations, rotary positions, windows."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.hf_fields import Fields
from flowrl_jax.models.rotary import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

_BLOCK = "model.layers.{}."
LLAMA_NAMES: dict[str, str] = {
    "embedding/tokens": "model.embed_tokens.weight",
    "embedding/output": "lm_head.weight",
    "final_norm/scale": "model.norm.weight",
    "layers/attention_norm/scale": f"{_BLOCK}input_layernorm.weight",
    "layers/mlp_norm/scale": f"{_BLOCK}post_attention_layernorm.weight",
    "layers/attention/query": f"{_BLOCK}self_attn.q_proj.weight",
    "layers/attention/query_bias": f"{_BLOCK}self_attn.q_proj.bias",
    "layers/attention/query_norm/scale": f"{_BLOCK}self_attn.q_norm.weight",
    "layers/attention/key": f"{_BLOCK}self_attn.k_proj.weight",
    "layers/attention/key_bias": f"{_BLOCK}self_attn.k_proj.bias",
    "layers/attention/key_norm/scale": f"{_BLOCK}self_attn.k_norm.weight",
    "layers/attention/value": f"{_BLOCK}self_attn.v_proj.weight",
    "layers/attention/value_bias": f"{_BLOCK}self_attn.v_proj.bias",
    "layers/attention/out": f"{_BLOCK}self_attn.o_proj.weight",
    "layers/attention/out_bias": f"{_BLOCK}self_attn.o_proj.bias",
    "layers/mlp/gate": f"{_BLOCK}mlp.gate_proj.weight",
    "layers/mlp/gate_bias": f"{_BLOCK}mlp.gate_proj.bias",
    "layers/mlp/up": f"{_BLOCK}mlp.up_proj.weight",
    "layers/mlp/up_bias": f"{_BLOCK}mlp.up_proj.bias",
    "layers/mlp/down": f"{_BLOCK}mlp.down_proj.weight",
    "layers/mlp/down_bias": f"{_BLOCK}mlp.down_proj.bias",
}
"""Leaf of the parameter tree -> tensor of the checkpoint; `{}` stands for the layer."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type` of Hugging Face.

    Attributes:
        model_type: as config.json names it.
        architecture: the class that transformers makes of it.
        read: takes the family's fields and says what the decoder computes.
        write: says the same as fields of config.json; where it cannot, reading them back gives
            another decoder, which `hf_config.write_config` notices.
        names: leaf of the parameter tree -> tensor; `{}` stands for the layer.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: LLAMA_NAMES)


def read_decoder(
    fields: Fields,
    *,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    kv_heads: int | None = None,
    tied: bool = False,
    head_dim: int = 0,
    **own: Any,
) -> TransformerConfig:
    """What every family has; further fields of `TransformerConfig` are the family's own.

    Args:
        fields: of config.json.
        activation: the field with the activation, and its value where it is absent.
        kv_heads: key heads where the field is absent; None means as many as query heads.
        tied: whether the embeddings are tied where the field is absent.
        head_dim: width of a head, where the family has taken it already.
        own: fields of `TransformerConfig`.

    Raises:
        InputError: a field is missing, malformed or asks for what no decoder here computes.
    """
    heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    groups = fields.nullable("num_key_value_heads", kv_heads)
    name = fields.take(*activation)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise fields.error(
            activation[0], name, f"is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    return TransformerConfig(
        vocab_size=fields.count("vocab_size"),
        num_layers=fields.count("num_hidden_layers"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=heads if groups is None else fields.check_count("num_key_value_heads", groups),
        head_dim=head_dim or _read_head_dim(fields, heads, width),
        mlp_dim=fields.count("intermediate_size"),
        activation=_ACTIVATIONS[name],
        norm_eps=fields.positive("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings", tied),
        init_std=fields.positive("initializer_range", 0.02),
        **own,
    )


def _read_head_dim(fields: Fields, heads: int, width: int) -> int:
    """Width of a head: the field, or the stream's share."""
    head_dim = fields.take("head_dim", None)
    if head_dim is not None:
        return fields.check_count("head_dim", head_dim)
    if width % heads:
        raise fields.error(
            "hidden_size",
            width,
            f"must be a multiple of num_attention_heads={heads}, or head_dim must be given",
        )
    return width // heads


def write_decoder(
    config: TransformerConfig, family: str, architecture: str, *, activation: str = "hidden_act"
) -> dict[str, Any]:
    """The entries of config.json that every family has."""
    name = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    return {
        "architectures": [architecture],
        "model_type": family,
        activation: name,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def read_rope(fields: Fields) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, however the version of transformers wrote them."""
    values = {"rope_theta": fields.take("rope_theta", None)}
    scalings = []
    for name in ("rope_parameters", "rope_scaling"):
        theta, scaling = read_one_rope(fields, name, fields.mapping(name))
        values[f"{name}.rope_theta"] = theta
        scalings += [] if scaling is None else [scaling]
    given = {k: fields.check_positive(k, v) for k, v in values.items() if v is not None}
    if len(set(given.values())) > 1:
        raise InputError(f"{fields.file}: {given} contradict each other; keep one of them")
    if len(set(scalings)) > 1:
        raise InputError(
            f"{fields.file}: rope_parameters and rope_scaling contradict each other; keep one"
        )
    fields.take("original_max_position_embeddings", None)
    return {
        "rope_theta": next(iter(given.values()), 10_000.0),
        "rope_scaling": scalings[0] if scalings else None,
    }


def read_one_rope(
    fields: Fields, name: str, rope: Mapping[str, Any]
) -> tuple[Any, RopeScaling | None]:
    """Base, or None, and scaling of one object of rotary parameters.

    Raises:
        InputError: it is malformed, or asks for a scaling that is not known here.
    """
    if any(isinstance(value, dict) for value in rope.values()):
        raise fields.error(name, rope, "is not supported: this family has one kind of positions")
    inner = Fields(fields.file, {f"{name}.{key}": value for key, value in rope.items()})
    take = lambda key, default=None: inner.take(f"{name}.{key}", default)  # noqa: E731
    number = lambda key: inner.positive(f"{name}.{key}")  # noqa: E731
    kind = take("type", "default")
    kind = take("rope_type", kind)
    theta = take("rope_theta")
    inner.only(f"{name}.partial_rotary_factor", 1.0)
    # Outside the object it goes first, as in transformers.
    length = fields.peek("original_max_position_embeddings")
    own_length = take("original_max_position_embeddings", fields.peek("max_position_embeddings"))
    length = own_length if length is None else length
    scaling: RopeScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(number("factor"))
    elif kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise fields.error(name, rope, "must have high_freq_factor above low_freq_factor")
        scaling = Llama3Scaling(number("factor"), low, high, _length(fields, name, length))
    elif kind == "yarn":
        scaling = _read_yarn(fields, inner, name, _length(fields, name, length))
    elif kind != "default":
        raise fields.error(
            name, rope, "is not supported; supported are the types default, linear, llama3, yarn"
        )
    inner.finish()
    return theta, scaling


def _length(fields: Fields, name: str, value: Any) -> float:
    return fields.check_positive(f"{name}.original_max_position_embeddings", value)


def _read_yarn(fields: Fields, inner: Fields, name: str, length: float) -> YarnScaling:
    """YaRN's settings with transformers' defaults; without a factor it is the ratio of lengths."""
    longest = fields.peek("max_position_embeddings")
    default = longest / length if isinstance(longest, int) else None
    factor = inner.check_positive(f"{name}.factor", inner.take(f"{name}.factor", default))

    def share(scale: float) -> float:
        """The paper's amplitude, `0.1 scale ln(factor) + 1`."""
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    scales = [inner.take(f"{name}.{key}", 0.0) for key in ("mscale", "mscale_all_dim")]
    amplitude = share(scales[0]) / share(scales[1]) if all(scales) else share(1.0)
    amplitude = inner.positive(f"{name}.attention_factor", amplitude)
    return YarnScaling(
        factor,
        length,
        inner.positive(f"{name}.beta_fast", 32.0),
        inner.positive(f"{name}.beta_slow", 1.0),
        amplitude,
        inner.flag(f"{name}.truncate", True),
    )


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which transformers 4 and 5 read."""
    return {"rope_theta": theta, "rope_scaling": write_scaling(scaling)}


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The object of rotary parameters, without its base; None for plain positions."""
    match scaling:
        case None:
            return None
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": _whole(scaling.original_length),
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "attention_factor": scaling.amplitude,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "original_max_position_embeddings": _whole(scaling.original_length),
                "truncate": scaling.truncate,
            }


def _whole(length: float) -> int | float:
    return int(length) if length == int(length) else length


def read_windows(fields: Fields, window: Any, default: tuple[bool, ...]) -> dict[str, Any]:
    """`window` and `windowed_layers`, from `layer_types` where they are given.

    Args:
        fields: of config.json.
        window: its `sliding_window`, or None where none is in use.
        default: which layers have a window where `layer_types` is absent.
    """
    kinds = fields.take("layer_types", None)
    if kinds is not None:
        known = isinstance(kinds, list) and all(kind in (_SLIDING, _FULL) for kind in kinds)
        if not known or len(kinds) != len(default):
            raise fields.error(
                "layer_types",
                kinds,
                f"is not supported: give {_FULL} or {_SLIDING} for each of {len(default)} layers",
            )
        default = tuple(kind == _SLIDING for kind in kinds)
    if not any(default):
        return {}
    if window is None:
        raise fields.error("layer_types", kinds, "has windows, but no sliding_window is in use")
    window = fields.check_count("sliding_window", window)
    return {"window": window, "windowed_layers": () if all(default) else default}


def write_layer_types(config: TransformerConfig) -> list[str]:
    """The `layer_types` of a decoder."""
    return [_SLIDING if windowed else _FULL for windowed in config.windows]
