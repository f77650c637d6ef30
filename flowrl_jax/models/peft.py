"""Adapters as a folder that the PEFT library and serving engines load beside the base model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.hf_names import Leaf, leaves
from flowrl_jax.models.hf_save import held_part, write_json, write_tensors_file
from flowrl_jax.models.lora import a_name, b_name
from flowrl_jax.new_folder import in_first_process

_PROJECTION = re.compile(r"\.(\w+)\.weight$")


def write_adapter(
    folder: Path, config: TransformerConfig, policy: Mapping[str, Any], base_model: str
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; every process takes part.

    Args:
        folder: to write into, see `new_folder`.
        config: of the decoder, with its `lora`.
        policy: with adapters among its parameters.
        base_model: folder or name of the model that they belong to.

    Raises:
        InputError: no family can express the decoder.
        OSError: a file cannot be written.
    """
    tensors: dict[str, np.ndarray] = {}
    projections = set()
    for leaf in leaves(config):
        node: Any = policy
        for key in leaf.path[:-1]:
            node = node[key]
        target = leaf.path[-1]
        if a_name(target) not in node:
            continue
        projections.add(_PROJECTION.findall(leaf.tensor)[0])
        for layer in range(config.num_layers):
            parts = [held_part(node[name(target)], layer) for name in (a_name, b_name)]
            in_first_process(lambda parts=parts, leaf=leaf, layer=layer: tensors.update(
                _tensors(leaf, layer, config.lora.rank, *map(np.asarray, parts))
            ))  # fmt: skip
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(projections),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }

    def write() -> None:
        write_tensors_file(folder / "adapter_model.safetensors", tensors)
        write_json(folder / "adapter_config.json", settings)

    in_first_process(write)


def _tensors(
    leaf: Leaf, layer: int, rank: int, a: np.ndarray, b: np.ndarray
) -> dict[str, np.ndarray]:
    """PEFT's two tensors of one kernel: `[rank, in]` and `[out, rank]`."""
    name = "base_model.model." + leaf.name(layer).removesuffix(".weight")
    pair = {"lora_A": a.reshape(-1, rank).T, "lora_B": b.reshape(rank, -1).T}
    return {f"{name}.{key}.weight": np.ascontiguousarray(x) for key, x in pair.items()}
