"""A Hugging Face config.json to a `TransformerConfig`, and back.

Fields are taken one at a time. What is left at the end must be known to leave the decoder's
numbers alone, or be switched off; so a field that this decoder does not know stops the import
instead of being ignored.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flowrl_jax.errors import InputError
from flowrl_jax.models.transformer import TransformerConfig

# Say nothing about what the decoder computes: names, sizes of tables that no longer exist, hints
# for text generation, and what transformers wrote for every model before its version 5. Attention
# dropout and `pretraining_tp` are among them: the first acts only in transformers' own training,
# the second cuts the same matrix products into parts.
_NEUTRAL_TEXT = """
    _name_or_path attention_dropout dtype max_position_embeddings pretraining_tp torch_dtype
    transformers_version use_cache unsloth_fixed unsloth_version bos_token_id eos_token_id
    pad_token_id sep_token_id unk_token_id decoder_start_token_id add_cross_attention
    chunk_size_feed_forward cross_attention_hidden_size finetuning_task id2label is_decoder
    is_encoder_decoder label2id num_labels output_attentions output_hidden_states prefix
    problem_type pruned_heads return_dict task_specific_params tf_legacy_loss
    tie_encoder_decoder tokenizer_class torchscript use_bfloat16 bad_words_ids
    begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
_NEUTRAL = frozenset(_NEUTRAL_TEXT.split())

_REQUIRED = object()


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing, is not JSON or holds something else than an object.
    """
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); give a Hugging Face checkpoint folder"
        ) from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
        raise InputError(f"{file}: not JSON ({_one_line(error)}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{file}: holds a {type(value).__name__}, not a JSON object; download it again"
        )
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _Fields:
    """The fields of one config.json that have not been taken yet."""

    def __init__(self, file: Path):
        self.file = file
        self._left = read_json(file)

    def error(self, name: str, value: Any, rule: str) -> InputError:
        """An error that names the field, the rule and the remedy."""
        return InputError(f"{self.file}: {name}={json.dumps(value)[:120]} {rule}")

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Takes a field; null counts as absent."""
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise InputError(f"{self.file}: lacks the field {name}; download the checkpoint again")
        return default

    def require(self, name: str) -> None:
        """Checks that a field is there, and leaves it."""
        self._left[name] = self.take(name)

    def count(self, name: str, default: Any = _REQUIRED) -> int:
        """Takes a positive integer."""
        value = self.take(name, default)
        if type(value) is not int or value < 1:
            raise self.error(name, value, "must be a positive integer")
        return value

    def positive(self, name: str, default: Any = _REQUIRED) -> float:
        """Takes a positive, finite number."""
        return self.check_positive(name, self.take(name, default))

    def check_positive(self, name: str, value: Any) -> float:
        """Checks a number that was taken already; the bounds keep out NaN and infinity."""
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.error(name, value, "must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """Takes true or false; false where absent."""
        value = self.take(name, False)
        if type(value) is not bool:
            raise self.error(name, value, "must be true or false")
        return value

    def only(self, name: str, allowed: Any) -> None:
        """Takes a field for which one value alone is supported, also where it is absent."""
        value = self.take(name, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise self.error(
                name, value, f"is not supported: this decoder has {name}={json.dumps(allowed)}"
            )

    def finish(self) -> None:
        """Checks that nothing which could change the decoder's numbers is left."""
        for name, value in self._left.items():
            off = value is None or value is False or value in ([], {}, "")
            if name not in _NEUTRAL and not off:
                raise self.error(
                    name,
                    value,
                    "is not known to this decoder; remove the field if it does not change what"
                    " the model computes",
                )


def _rope_theta(fields: _Fields) -> float:
    """The rotary base, from `rope_theta` or, as transformers 5 writes it, `rope_parameters`.

    Any scaling of the frequencies is refused: only plain rotary positions are supported.
    """
    values = {"rope_theta": fields.take("rope_theta", None)}
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.take(name, {})
        if not isinstance(rope, dict):
            raise fields.error(name, rope, "must be an object or null")
        known = {"rope_type", "type", "rope_theta"}
        scaled = any(v is not None for k, v in rope.items() if k not in known)
        if scaled or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise fields.error(
                name, rope, "is not supported: this decoder has unscaled rotary positions"
            )
        values[f"{name}.rope_theta"] = rope.get("rope_theta")
    given = {k: fields.check_positive(k, v) for k, v in values.items() if v is not None}
    if len(set(given.values())) > 1:
        raise InputError(f"{fields.file}: {given} contradict each other; keep one of them")
    return next(iter(given.values()), 10_000.0)


def _decoder(fields: _Fields, *, qkv_bias: bool, dtype: Any) -> TransformerConfig:
    """What the Llama family has in common; defaults are transformers' own."""
    fields.only("hidden_act", "silu")
    heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    head_dim = fields.take("head_dim", None)
    if head_dim is None and width % heads:
        raise fields.error(
            "hidden_size",
            width,
            f"must be a multiple of num_attention_heads={heads}, or head_dim must be given",
        )
    if head_dim is not None and type(head_dim) is not int:
        raise fields.error("head_dim", head_dim, "must be a positive integer")
    try:
        return TransformerConfig(
            vocab_size=fields.count("vocab_size"),
            num_layers=fields.count("num_hidden_layers"),
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", heads),
            head_dim=width // heads if head_dim is None else head_dim,
            mlp_dim=fields.count("intermediate_size"),
            rope_theta=_rope_theta(fields),
            norm_eps=fields.positive("rms_norm_eps"),
            tie_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=qkv_bias,
            init_std=fields.positive("initializer_range", 0.02),
            dtype=dtype,
            param_dtype=dtype,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{fields.file}: {error}") from error


def _llama(fields: _Fields, dtype: Any) -> TransformerConfig:
    """Llama 2 and 3 without scaled rotary positions."""
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    return _decoder(fields, qkv_bias=False, dtype=dtype)


def _qwen2(fields: _Fields, dtype: Any) -> TransformerConfig:
    """Qwen2 and Qwen2.5: Llama with biases on query, key and value."""
    # Where it is absent transformers takes 32 key heads, whatever the number of query heads.
    fields.require("num_key_value_heads")
    config = _decoder(fields, qkv_bias=True, dtype=dtype)
    _refuse_sliding_window(fields, config.num_layers)
    return config


def _refuse_sliding_window(fields: _Fields, num_layers: int) -> None:
    """Allows a sliding window to be mentioned, as every Qwen2 does, but not to be used."""
    window, first = fields.take("sliding_window", None), fields.take("max_window_layers", 0)
    used = fields.flag("use_sliding_window") and window is not None
    kinds = fields.take("layer_types", None)
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if kinds is not None and not (full and len(kinds) == num_layers):
        raise fields.error(
            "layer_types",
            kinds,
            f"is not supported: this decoder has {num_layers} layers of full_attention",
        )
    if kinds is None and used and not (type(first) is int and first >= num_layers):
        raise fields.error("sliding_window", window, "is not supported: use a model without one")


_Reader = Callable[[_Fields, Any], TransformerConfig]
_FAMILIES: dict[str, tuple[str, _Reader]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
}


def read_config(folder: Path, dtype: Any = jnp.float32) -> TransformerConfig:
    """Reads the config.json of a checkpoint folder.

    Args:
        folder: holds config.json.
        dtype: of the parameters and of the activations.

    Raises:
        InputError: the folder or the file is missing, the family is not supported, a field is
            malformed, or a field asks for something that this decoder does not compute.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(
            f"{folder}: {what}; give a downloaded Hugging Face checkpoint folder, with config.json"
            " and model.safetensors"
        )
    fields = _Fields(folder / "config.json")
    family = fields.take("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise fields.error(
            "model_type", family, f"is not supported; supported are {', '.join(_FAMILIES)}"
        )
    architecture, reader = _FAMILIES[family]
    found = fields.take("architectures", [architecture])
    if found not in ([], [architecture]):
        raise fields.error("architectures", found, f"is not supported; give a {architecture}")
    config = reader(fields, dtype)
    fields.finish()
    return config


def write_config(
    config: TransformerConfig, dtype: str, fields: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of a decoder, as transformers 4 and 5 read it.

    Args:
        config: the decoder.
        dtype: name of the tensors' dtype, such as "float32".
        fields: further entries, such as `eos_token_id` and `max_position_embeddings`. Those that
            only generation uses are null here unless given, so that transformers does not fill in
            another model's ids.

    Raises:
        InputError: `fields` names something that the decoder itself determines.
    """
    family = "qwen2" if config.qkv_bias else "llama"
    own = {
        "architectures": [_FAMILIES[family][0]],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
    }
    if family == "llama":
        own |= {"attention_bias": False, "mlp_bias": False}
    else:
        own |= {"use_sliding_window": False, "sliding_window": None}
    neutral: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    for name, value in (fields or {}).items():
        if name in own or name not in _NEUTRAL:
            raise InputError(
                f"field {name}: not free to choose on export; the decoder's config determines it"
            )
        neutral[name] = value
    return {**own, **neutral}
