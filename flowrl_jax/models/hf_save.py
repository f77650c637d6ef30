"""Policies into Hugging Face checkpoint folders (config.json and safetensors)."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_config import write_config
from flowrl_jax.models.hf_files import INDEX, SINGLE
from flowrl_jax.models.hf_names import leaves
from flowrl_jax.models.transformer import TransformerConfig

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def save_policy(
    path: str | os.PathLike[str],
    config: TransformerConfig,
    params: Any,
    *,
    tokenizer_path: str | os.PathLike[str] | None = None,
    fields: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes a checkpoint folder that transformers loads and that gives the same logits.

    The folder appears whole or not at all. Tensors keep the dtype of their leaf, so that loading
    them in that dtype gives every bit back.

    Args:
        path: the folder to make; one that holds something is never touched.
        config: the decoder.
        params: its parameters, boxed or not; every array must be addressable from this process.
        tokenizer_path: a tokenizer's file (.model or .json), or a folder whose tokenizer files
            and generation_config.json are copied.
        fields: further entries of config.json, such as `eos_token_id` and
            `max_position_embeddings`, which the decoder itself does not know.
        shard_bytes: size at which a file ends and the next one begins.

    Raises:
        InputError: the folder exists, the parameters do not belong to the config, the tokenizer
            is missing, or `fields` names what the decoder determines.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target}: exists already; give a folder that is new or empty")
    tokenizer_files = _tokenizer_files(tokenizer_path)
    params = nn.meta.unbox(params)
    _check_params(config, params)
    embedding = _at(params, ("embedding", "tokens"))
    entries = write_config(config, np.dtype(embedding.dtype).name, fields)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise InputError(
            f"{target}: cannot be made ({error.strerror}); give a folder that can be written"
        ) from error
    try:
        _write_tensors(temporary, config, params, shard_bytes)
        _write_json(temporary / "config.json", entries)
        for name, source in tokenizer_files.items():
            shutil.copyfile(source, temporary / name)
        _settle(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_params(config: TransformerConfig, params: Any) -> None:
    """Checks that the parameters are those of the config."""
    expected = {
        leaf.path: (config.num_layers, *leaf.shape) if leaf.stacked else leaf.shape
        for leaf in leaves(config)
    }
    flat = {
        tuple(str(getattr(key, "key", key)) for key in path): jnp.shape(value)
        for path, value in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    for key in sorted(expected.keys() | flat.keys()):
        if expected.get(key) != flat.get(key):
            raise InputError(
                f"parameter {'/'.join(key)}: has shape {flat.get(key)} where the model's config"
                f" asks for {expected.get(key)}; give the config that belongs to the parameters"
            )


def _tokenizer_files(path: str | os.PathLike[str] | None) -> dict[str, Path]:
    """Names in the new folder, and the files to copy."""
    if path is None:
        return {}
    source = Path(path)
    if source.is_file() and source.suffix in (".model", ".json"):
        return {f"tokenizer{source.suffix}": source}
    found = {name: source / name for name in _TOKENIZER_FILES if (source / name).is_file()}
    if "tokenizer.model" not in found and "tokenizer.json" not in found:
        raise InputError(
            f"tokenizer {source}: no tokenizer there; give a .model or .json file, or a folder with"
            " tokenizer.model or tokenizer.json"
        )
    return found


def _tensors(config: TransformerConfig, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of all tensors; one leaf at a time comes to the host."""
    for leaf in leaves(config):
        value = np.asarray(_at(params, leaf.path))
        for layer in range(config.num_layers if leaf.stacked else 1):
            yield leaf.name(layer), leaf.write(value[layer] if leaf.stacked else value)


def _plan_files(config: TransformerConfig, params: Any, shard_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in the order of `_tensors`."""
    files: list[list[str]] = [[]]
    size = 0
    for leaf in leaves(config):
        count = config.num_layers if leaf.stacked else 1
        nbytes = int(np.prod(leaf.shape)) * _at(params, leaf.path).dtype.itemsize
        for layer in range(count):
            if files[-1] and size + nbytes > shard_bytes:
                files.append([])
                size = 0
            files[-1].append(leaf.name(layer))
            size += nbytes
    return files


def _write_tensors(folder: Path, config: TransformerConfig, params: Any, shard_bytes: int) -> None:
    """Writes one file, or several and their index."""
    tensors = _tensors(config, params)
    files = _plan_files(config, params, shard_bytes)
    place: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        held = dict(next(tensors) for _ in names)
        # transformers refuses files that do not say which framework's layout they have.
        safetensors.numpy.save_file(held, folder / name, metadata={"format": "pt"})
        place |= dict.fromkeys(held, name)
        total += sum(tensor.nbytes for tensor in held.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        _write_json(folder / INDEX, index)


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settle(folder: Path) -> None:
    """Gives the files ordinary rights and has them on the disk before the folder gets its name."""
    folder.chmod(0o755)  # tempfile and safetensors make theirs for the owner alone
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
