"""Policies into Hugging Face checkpoint folders (config.json and safetensors).

Tensors come to the host one at a time, in every process of a run, and the first process writes
them. Neither torch nor transformers takes part.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_config import write_config
from flowrl_jax.models.hf_fields import read_json
from flowrl_jax.models.hf_files import INDEX, SINGLE
from flowrl_jax.models.hf_names import Leaf, leaves
from flowrl_jax.models.transformer import TransformerConfig
from flowrl_jax.new_folder import in_first_process, new_folder

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5 * 2**30
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)
# Entries of config.json about the files themselves, which export writes anew.
_ABOUT_FILES = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


def save_policy(
    path: str | os.PathLike[str], config: TransformerConfig, params: Any, **options: Any
) -> None:
    """Makes a checkpoint folder that transformers loads and that gives the same logits.

    The folder appears whole or not at all.

    Args:
        path: the folder to make; one that holds something is never touched.
        config: the decoder.
        params: its parameters, see `write_policy`.
        **options: further arguments of `write_policy`.

    Raises:
        InputError: the folder exists or cannot be written, or as `write_policy` says.
    """
    with new_folder(path) as folder:
        write_policy(folder, config, params, **options)


def write_policy(
    folder: Path,
    config: TransformerConfig,
    params: Any,
    *,
    tokenizer_path: str | os.PathLike[str] | None = None,
    fields: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[], object] = lambda: None,
) -> None:
    """Writes the files of a checkpoint; every process of the run takes part.

    Args:
        folder: to write into; see `new_folder`.
        config: the decoder. Rows of the embedding beyond its `vocab_size` are not written.
        params: its parameters, boxed or not, wherever they live.
        tokenizer_path: a tokenizer's file (.model or .json), or a folder whose tokenizer files
            and generation_config.json are copied.
        fields: further entries of config.json, such as `eos_token_id` and
            `max_position_embeddings`, which the decoder itself does not know.
        generation: entries of generation_config.json, which is then not copied.
        dtype: one of `DTYPES`, to which tensors are rounded. By default they keep the dtype of
            their leaf, so that loading them in that dtype gives every bit back.
        shard_bytes: size at which a file ends and the next one begins.
        on_tensor: called for each of the `count_tensors` tensors.

    Raises:
        InputError: the parameters do not belong to the config or are not finite in the dtype, the
            dtype is unknown, the tokenizer is missing, or `fields` names what the decoder
            determines.
        OSError: a file cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: not known; give one of {', '.join(DTYPES)}")
    tokenizer_files = _tokenizer_files(tokenizer_path)
    arrays = _check_params(config, nn.meta.unbox(params))
    kept = np.dtype(arrays["embedding", "tokens"].dtype)
    entries = write_config(config, dtype or kept.name, fields)
    _write_tensors(folder, config, arrays, dtype, shard_bytes, on_tensor)

    def write_small_files() -> None:
        for name, source in tokenizer_files.items():
            shutil.copyfile(source, folder / name)
        if generation is not None:
            write_json(folder / GENERATION_FILE, generation)
        write_json(folder / CONFIG_FILE, entries)

    in_first_process(write_small_files)


def count_tensors(config: TransformerConfig) -> int:
    """Number of tensors in a decoder's checkpoint."""
    return sum(1 for _ in _places(config))


def carried_fields(folder: Path, config: TransformerConfig) -> dict[str, Any]:
    """Entries of a checkpoint's config.json that its decoder does not determine.

    Args:
        folder: of the checkpoint.
        config: read from it.

    Returns:
        Ids of special tokens, lengths and the like, for `write_policy` to write again.

    Raises:
        InputError: config.json is missing or no JSON.
    """

    def determined(name: str, value: Any) -> bool:
        try:
            write_config(config, DTYPES[0], {name: value})
        except InputError:
            return True
        return False

    entries = read_json(folder / CONFIG_FILE)
    return {
        name: value
        for name, value in entries.items()
        if name not in _ABOUT_FILES and not determined(name, value)
    }


def write_tensors_file(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file.

    Args:
        file: to write.
        tensors: by name, contiguous.

    Raises:
        OSError: it cannot be written.
    """
    try:
        # transformers refuses files that do not say which framework's layout they have.
        safetensors.numpy.save_file(dict(tensors), file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    file.chmod(0o644)  # safetensors makes files for their owner alone


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file.

    Args:
        file: to write.
        value: plain Python values.

    Raises:
        OSError: it cannot be written.
    """
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_params(config: TransformerConfig, params: Any) -> dict[tuple[str, ...], Any]:
    """The parameters by path, once they prove to be those of the config."""
    arrays = {
        tuple(str(getattr(key, "key", key)) for key in path): value
        for path, value in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    expected = {
        leaf.path: (config.num_layers, *leaf.shape) if leaf.stacked else leaf.shape
        for leaf in leaves(config)
    }
    for key in sorted(expected.keys() | arrays.keys()):
        found = jnp.shape(arrays[key]) if key in arrays else None
        if expected.get(key) != found:
            raise InputError(
                f"parameter {'/'.join(key)}: has shape {found} where the model's config"
                f" asks for {expected.get(key)}; give the config that belongs to the parameters"
            )
    return arrays


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


def _places(config: TransformerConfig) -> Iterator[tuple[Leaf, int]]:
    """Leaf and layer of every tensor, in the order in which they are written."""
    for leaf in leaves(config):
        for layer in range(config.num_layers if leaf.stacked else 1):
            yield leaf, layer


def _plan_files(
    config: TransformerConfig, arrays: Mapping[Any, Any], dtype: str | None, shard_bytes: int
) -> list[list[tuple[Leaf, int]]]:
    """The tensors of each file."""
    files: list[list[tuple[Leaf, int]]] = [[]]
    size = 0
    for leaf, layer in _places(config):
        itemsize = np.dtype(dtype or arrays[leaf.path].dtype).itemsize
        nbytes = math.prod(leaf.tensor_shape) * itemsize
        if files[-1] and size + nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append((leaf, layer))
        size += nbytes
    return files


def _write_tensors(
    folder: Path,
    config: TransformerConfig,
    arrays: Mapping[Any, Any],
    dtype: str | None,
    shard_bytes: int,
    on_tensor: Callable[[], object],
) -> None:
    """Writes one file, or several and their index."""
    files = _plan_files(config, arrays, dtype, shard_bytes)
    place: dict[str, str] = {}
    total = 0
    held: dict[str, np.ndarray] = {}

    def hold(leaf: Leaf, layer: int, part: jax.Array) -> None:
        held[leaf.name(layer)] = _cast(leaf.name(layer), leaf.write(np.asarray(part)), dtype)

    for number, tensors in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        for leaf, layer in tensors:
            part = held_part(arrays[leaf.path], layer if leaf.stacked else None)
            # Each failure is heard of everywhere before the next tensor, or others would wait.
            in_first_process(functools.partial(hold, leaf, layer, part))
            on_tensor()
        in_first_process(functools.partial(write_tensors_file, folder / name, held))
        place |= dict.fromkeys(held, name)
        total += sum(tensor.nbytes for tensor in held.values())
        held.clear()
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        in_first_process(lambda: write_json(folder / INDEX, index))


def held_part(value: Any, layer: int | None) -> Any:
    """One layer of a stacked leaf, or a whole leaf, as an array that this process can read."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        replicated = NamedSharding(value.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        return _gathered(value, layer, replicated)
    return value if layer is None else value[layer]


@functools.partial(jax.jit, static_argnames="sharding")
def _gathered(value: jax.Array, layer: int | None, sharding: NamedSharding) -> jax.Array:
    part = value if layer is None else jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
    return jax.lax.with_sharding_constraint(part, sharding)


def _cast(name: str, tensor: np.ndarray, dtype: str | None) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise InputError(
            f"tensor {name}: holds numbers that are not finite; the run has diverged, export an"
            " earlier step"
        )
    with np.errstate(over="ignore"):
        cast = tensor if dtype is None else tensor.astype(dtype)
    if not np.isfinite(cast).all():
        largest = np.abs(tensor.astype(np.float32)).max()
        raise InputError(
            f"tensor {name}: holds {largest:.4g}, too large for {dtype}; export in bfloat16 or"
            " float32"
        )
    return cast
