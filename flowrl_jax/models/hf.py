"""Policies in and out of Hugging Face checkpoint folders (config.json and safetensors).

Reading goes leaf by leaf and, on a mesh, shard by shard: each device's part is cut out of the
files, so that the host never holds much more than one leaf and every host of a pod reads what its
own devices hold. Neither torch nor transformers takes part.
"""

import json
import os
import re
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
from jax.sharding import Mesh

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_config import read_config, write_config
from flowrl_jax.models.hf_files import INDEX, SINGLE, Checkpoint, open_checkpoint
from flowrl_jax.models.hf_names import Leaf, leaves
from flowrl_jax.models.transformer import TransformerConfig, init_params
from flowrl_jax.sharding import Layout

# Rotary tables that old checkpoints carry; they follow from config.json.
_ROTARY_TABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_UNEMBEDDING, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
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
_COMPARED_ROWS = 4096


def load_policy(
    path: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[TransformerConfig, Any]:
    """Loads a checkpoint of the Llama family (`model_type` llama or qwen2).

    Args:
        path: folder with config.json and model.safetensors, or several files under
            model.safetensors.index.json.
        mesh: devices over which the parameters are cut as `Layout` says; one device without it.
        dtype: that the parameters are cast to. The config has it too, for parameters and
            activations; `dataclasses.replace` makes float32 parameters compute in bfloat16.

    Returns:
        The decoder's config, and its parameters as `Transformer` takes them (not boxed).

    Raises:
        InputError: the folder, a file or a tensor is missing, damaged, superfluous, of another
            shape or not finite in `dtype`; config.json asks for something that this decoder does
            not compute; or the mesh does not divide the model.
    """
    folder = Path(path)
    config = read_config(folder, dtype)
    params: dict[str, Any] = {}
    with open_checkpoint(folder) as checkpoint:
        _check_tensors(checkpoint, config)
        shardings = None if mesh is None else _shardings(config, mesh)
        for leaf in leaves(config):
            sharding = None if shardings is None else _at(shardings, leaf.path)
            node = params
            for key in leaf.path[:-1]:
                node = node.setdefault(key, {})
            node[leaf.path[-1]] = _load_leaf(checkpoint, leaf, config, sharding)
    return config, params


def check_vocabulary(tokenizer_vocab: int, config: TransformerConfig) -> None:
    """Checks that every id of a tokenizer has a row in the model's embedding.

    A model may have more rows than the tokenizer has ids: they pad it to a round size.

    Args:
        tokenizer_vocab: number of ids of the tokenizer.
        config: of the model.

    Raises:
        InputError: the tokenizer has more ids than the model has rows.
    """
    if tokenizer_vocab > config.vocab_size:
        raise InputError(
            f"tokenizer has {tokenizer_vocab} ids, the model {config.vocab_size} rows; give the"
            " tokenizer that belongs to the model"
        )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _check_tensors(checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Checks names, shapes and dtypes of all tensors before any of them is read."""
    known = set()
    for leaf in leaves(config):
        for layer in range(config.num_layers if leaf.stacked else 1):
            # Checked one by one: a wrong number of layers ends here before it costs memory.
            checkpoint.check(leaf.name(layer), leaf.tensor_shape)
            known.add(leaf.name(layer))
    for name in sorted(set(checkpoint) - known):
        if name == _UNEMBEDDING and config.tie_embeddings:
            _check_tied(checkpoint, config)
        elif not _ROTARY_TABLE.fullmatch(name):
            raise checkpoint.error(
                name, "is not part of the model that config.json describes; remove it"
            )


def _check_tied(checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """A tied model may hold its unembedding too, as long as it is the embedding."""
    checkpoint.check(_UNEMBEDDING, (config.vocab_size, config.embed_dim))
    views = checkpoint.view(_UNEMBEDDING), checkpoint.view(_EMBEDDING)
    for start in range(0, config.vocab_size, _COMPARED_ROWS):
        rows = slice(start, min(start + _COMPARED_ROWS, config.vocab_size))
        if not np.array_equal(views[0][rows], views[1][rows]):
            raise checkpoint.error(
                _UNEMBEDDING,
                f"differs from {_EMBEDDING} although config.json says"
                " tie_word_embeddings=true; set it to false, or remove the tensor",
            )


def _shardings(config: TransformerConfig, mesh: Mesh) -> Any:
    """The sharding of every leaf.

    Raises:
        InputError: an axis of the mesh does not divide an axis of the model.
    """
    boxed = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    shardings = Layout(mesh).tree_shardings(boxed)
    shapes = nn.meta.unbox(boxed)
    for leaf in leaves(config):
        shape, sharding = _at(shapes, leaf.path).shape, _at(shardings, leaf.path)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise InputError(
                f"mesh {dict(mesh.shape)}: does not divide the parameter {'/'.join(leaf.path)} of"
                f" shape {shape}, cut as {sharding.spec}; choose other sizes"
            ) from error
    return shardings


def _load_leaf(
    checkpoint: Checkpoint, leaf: Leaf, config: TransformerConfig, sharding: Any
) -> jax.Array:
    """Reads one leaf, all layers of it, into its devices."""
    dtype = np.dtype(config.param_dtype)
    shape = (config.num_layers, *leaf.shape) if leaf.stacked else leaf.shape
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        if bounds not in parts:  # several devices may hold the same part
            parts[bounds] = _read_part(checkpoint, leaf, bounds, dtype)
        return parts[bounds]

    whole = (slice(None),) * len(shape)
    if sharding is None:
        return jnp.asarray(part(whole))
    return jax.make_array_from_callback(shape, sharding, part)


def _read_part(
    checkpoint: Checkpoint, leaf: Leaf, bounds: tuple[tuple[int, int], ...], dtype: np.dtype
) -> np.ndarray:
    """Reads the part of a leaf within these bounds, cast, one tensor at a time."""
    layers = range(*bounds[0]) if leaf.stacked else range(1)
    inner = tuple(slice(*b) for b in (bounds[1:] if leaf.stacked else bounds))
    part = np.empty((len(layers), *(s.stop - s.start for s in inner)), dtype)
    for place, layer in enumerate(layers):
        name = leaf.name(layer)
        with np.errstate(over="ignore", invalid="ignore"):
            part[place] = leaf.read(checkpoint.view(name), inner)
        if not np.isfinite(part[place]).all():
            raise checkpoint.error(
                name,
                f"holds numbers that are not finite in {dtype}; download it again, or load"
                " it in a wider dtype",
            )
    return part if leaf.stacked else part[0]


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
