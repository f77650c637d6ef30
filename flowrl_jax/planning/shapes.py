"""The shape of a policy that is to be planned for, whether or not it has been downloaded."""

import dataclasses
from pathlib import Path
from typing import Any

from flowrl_jax.config import DTYPES, ModelConfig
from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.hf_config import read_config


def _qwen(sizes: tuple[int, int, int, int, int, int, int], theta: float) -> TransformerConfig:
    shape = TransformerConfig(*sizes, tie_embeddings=False, qkv_bias=True, rope_theta=theta)
    return dataclasses.replace(shape, family="qwen2")


# Vocabulary, layers, width, query heads, key heads, head, mlp: from the published config.json.
PUBLISHED = {
    "Qwen2.5-7B": _qwen((152_064, 28, 3584, 28, 4, 128, 18_944), 1e6),
    "Qwen2.5-32B": _qwen((152_064, 64, 5120, 40, 8, 128, 27_648), 1e6),
    "DeepSeek-R1-Distill-Qwen-7B": _qwen((152_064, 28, 3584, 28, 4, 128, 18_944), 1e4),
}


def planned_shape(model: ModelConfig, vocab_multiple: int) -> TransformerConfig:
    """The decoder of a config: its folder's, a published one by the folder's name, or its own.

    Args:
        model: the config's section.
        vocab_multiple: as in `TransformerConfig`.

    Raises:
        InputError: the folder is missing and its name is not one of `PUBLISHED`, or the shape is
            none that a decoder can have.
    """
    try:
        return _planned_shape(model, vocab_multiple)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _planned_shape(model: ModelConfig, vocab_multiple: int) -> TransformerConfig:
    computing: dict[str, Any] = {
        "dtype": DTYPES[model.dtype],
        "remat": model.remat,
        "attention": model.attention,
        "decode_kernel": model.decode_kernel,
        "lora": model.lora,
        "vocab_multiple": vocab_multiple,
    }
    if not model.path:
        fields = {field.name for field in dataclasses.fields(TransformerConfig)}
        given = {name: value for name, value in vars(model).items() if name in fields}
        given["vocab_size"] = model.vocab_size or 1024  # no tokenizer is asked
        return TransformerConfig(**(given | computing))
    name = Path(model.path).name
    if Path(model.path).is_dir():
        shape = read_config(Path(model.path))
    elif name in PUBLISHED:
        shape = PUBLISHED[name]
    else:
        raise InputError(
            f"model.path={model.path}: no such folder, and no shape is known by the name {name};"
            f" download its config.json, or name one of {', '.join(PUBLISHED)}"
        )
    return dataclasses.replace(shape, **computing)
