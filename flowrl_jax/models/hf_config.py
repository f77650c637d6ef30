"""A Hugging Face config.json to a `TransformerConfig`, and back."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import LoraConfig, TransformerConfig
from flowrl_jax.models.families import FAMILIES, Family
from flowrl_jax.models.hf_fields import NEUTRAL, Fields

# How a decoder is computed and held; config.json says nothing of it.
_NOT_SAVED: dict[str, Any] = {
    "family": "",
    "dtype": jnp.float32,
    "param_dtype": jnp.float32,
    "remat": "none",
    "attention": "xla",
    "decode_kernel": "auto",
    "vocab_multiple": 1,
    "num_tokens": 0,
    "lora": LoraConfig(),
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
    return dataclasses.replace(
        _read(Fields(folder / "config.json")), dtype=dtype, param_dtype=dtype
    )


def _read(fields: Fields) -> TransformerConfig:
    name = fields.take("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise fields.error(
            "model_type", name, f"is not supported; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    found = fields.take("architectures", [family.architecture])
    if found not in ([], [family.architecture]):
        raise fields.error(
            "architectures", found, f"is not supported; give a {family.architecture}"
        )
    try:
        config = family.read(fields)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{fields.file}: {error}") from error
    fields.finish()
    return dataclasses.replace(config, family=name)


@functools.lru_cache(maxsize=64)
def family_of(config: TransformerConfig) -> Family:
    """The family that a decoder is saved as: its own, or the first that can express it.

    Raises:
        InputError: `config.family` cannot express what the decoder computes, or none can.
    """
    own = config.family
    if own and own not in FAMILIES:
        raise InputError(f"model.family={own!r}: not known; known: {', '.join(FAMILIES)}")
    for family in [FAMILIES[own]] if own else FAMILIES.values():
        try:
            back = _read(Fields(Path("config.json"), family.write(config)))
        except InputError:
            continue
        if _computed(back) == _computed(config):
            return family
    raise InputError(
        f"no config.json of {own or ' or '.join(FAMILIES)} describes this decoder: change"
        " model.family, or the fields that the family does not have"
    )


def _computed(config: TransformerConfig) -> TransformerConfig:
    """The config without what makes no difference to the numbers."""
    changes: dict[str, Any] = dict(_NOT_SAVED)
    if not any(config.windows):
        changes |= {"window": 0, "local_rope_theta": 0.0, "local_rope_scaling": None}
    elif not config.local_rope_theta:
        changes |= {
            "local_rope_theta": config.rope_theta,
            "local_rope_scaling": config.rope_scaling,
        }
    changes["windowed_layers"] = config.windows
    # A root and its square need not meet exactly.
    changes["query_scale"] = round(config.query_scale or config.head_dim**-0.5, 12)
    return dataclasses.replace(config, **changes)


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
        InputError: no family can express the decoder, or `fields` names something that the
            decoder itself determines.
    """
    own = json.loads(json.dumps(family_of(config).write(config))) | {"torch_dtype": dtype}
    neutral: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    for name, value in (fields or {}).items():
        if name in own or name not in NEUTRAL:
            raise InputError(
                f"field {name}: not free to choose on export; the decoder's config determines it"
            )
        neutral[name] = value
    return {**own, **neutral}
