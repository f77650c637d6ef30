"""Policies out of Hugging Face checkpoint folders (config.json and safetensors).

Tensors go one by one from the file to the devices: each device's part is cut out of the files and
written into its place in the stacked parameters there. The host never holds more than a tensor and
a copy beside the parameters of its own devices, and every host of a pod reads what its own devices
hold. Neither torch nor transformers takes part.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.hf_config import read_config
from flowrl_jax.models.hf_files import Checkpoint, open_checkpoint
from flowrl_jax.models.hf_names import Leaf, leaves
from flowrl_jax.models.transformer import init_params
from flowrl_jax.sharding import make_layout

# Rotary tables that old checkpoints carry; they follow from config.json.
_ROTARY_TABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_UNEMBEDDING, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_ROWS = 4096


def load_policy(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    vocab_multiple: int = 1,
    on_tensor: Callable[[], object] = lambda: None,
) -> tuple[TransformerConfig, Any]:
    """Loads a checkpoint of one of `families.FAMILIES`.

    Args:
        path: folder with config.json and model.safetensors, or several files under
            model.safetensors.index.json.
        mesh: devices over which the parameters are cut as `Layout` says; one device without it.
            Where it does not divide the vocabulary, rows of zeros are added.
        dtype: that the parameters are cast to. The config has it too, for parameters and
            activations; `dataclasses.replace` makes float32 parameters compute in bfloat16.
        vocab_multiple: rows of zeros are added to the vocabulary up to a multiple of this.
        on_tensor: called for each tensor that has been read.

    Returns:
        The decoder's config, and its parameters as `Transformer` takes them (not boxed).

    Raises:
        InputError: the folder, a file or a tensor is missing, damaged, superfluous, of another
            shape or not finite in `dtype`; config.json asks for something that this decoder does
            not compute; or the mesh does not divide the model.
    """
    folder = Path(path)
    shards = 1 if mesh is None else mesh.shape["tensor"]
    config = dataclasses.replace(
        read_config(folder, dtype), vocab_multiple=math.lcm(vocab_multiple, shards)
    )
    params: dict[str, Any] = {}
    with open_checkpoint(folder) as checkpoint:
        _check_tensors(checkpoint, config)
        shardings = None if mesh is None else _shardings(config, mesh)
        for leaf in leaves(config):
            sharding = None if shardings is None else _at(shardings, leaf.path)
            node = params
            for key in leaf.path[:-1]:
                node = node.setdefault(key, {})
            node[leaf.path[-1]] = _load_leaf(checkpoint, leaf, config, sharding, on_tensor)
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
    for start in range(0, config.vocab_size, _COMPARED_ROWS):
        rows = slice(start, min(start + _COMPARED_ROWS, config.vocab_size))
        index = rows, slice(0, config.embed_dim)
        unembedding, embedding = (
            checkpoint.read(name, index) for name in (_UNEMBEDDING, _EMBEDDING)
        )
        if not np.array_equal(unembedding, embedding):
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
    return make_layout(mesh, config.axis_sizes).tree_shardings(boxed)


def _load_leaf(
    checkpoint: Checkpoint,
    leaf: Leaf,
    config: TransformerConfig,
    sharding: NamedSharding | None,
    on_tensor: Callable[[], object],
) -> jax.Array:
    """Reads one leaf, all layers of it, into its devices."""
    dtype = np.dtype(config.param_dtype)
    if not leaf.stacked:
        value = _read_layer(checkpoint, leaf, 0, dtype, sharding)
        on_tensor()
        return value
    layer_sharding = None
    if sharding is not None:
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    place = _placer(sharding)
    shape = (config.num_layers, *leaf.shape)
    buffer = jnp.zeros(shape, dtype, device=sharding)
    for layer in range(config.num_layers):
        value = _read_layer(checkpoint, leaf, layer, dtype, layer_sharding)
        # To wait keeps reading from running ahead of the devices' memory.
        buffer = jax.block_until_ready(place(buffer, value, layer))
        on_tensor()
    return buffer


def _read_layer(
    checkpoint: Checkpoint,
    leaf: Leaf,
    layer: int,
    dtype: np.dtype,
    sharding: NamedSharding | None,
) -> jax.Array:
    """One layer of a leaf; each device gets its part.

    Raises:
        InputError: a number is not finite in the dtype, or the file ended early.
    """
    name = leaf.name(layer)
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        if bounds not in parts:  # several devices may hold the same part
            slices = tuple(slice(*b) for b in bounds)
            parts[bounds] = leaf.read(lambda i: checkpoint.read(name, i), slices, dtype)
            if not _all_finite(parts[bounds]):
                raise checkpoint.error(
                    name,
                    f"holds numbers that are not finite in {dtype}; download it again, or load"
                    " it in a wider dtype",
                )
        return parts[bounds]

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(leaf.shape)))
    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _all_finite(x: np.ndarray) -> bool:
    """Whether no number has an exponent of ones; by bits, since ml_dtypes' own test is slow."""
    info = ml_dtypes.finfo(x.dtype)
    ones = ((1 << info.nexp) - 1) << info.nmant
    bits = x.reshape(-1).view(f"u{x.dtype.itemsize}")
    step = 2**20
    return not any(((bits[i : i + step] & ones) == ones).any() for i in range(0, x.size, step))


@functools.lru_cache(maxsize=64)
def _placer(sharding: NamedSharding | None) -> Any:
    """A jitted `(buffer, layer's value, layer) -> buffer` that writes in place.

    It moves bits: XLA's CPU backend copies bfloat16 numbers one by one, integers by the vector.
    """

    def place(buffer, value, layer):
        kind = jnp.dtype(f"u{buffer.dtype.itemsize}")
        bits, new = (jax.lax.bitcast_convert_type(x, kind) for x in (buffer, value))
        bits = jax.lax.dynamic_update_index_in_dim(bits, new, layer, 0)
        return jax.lax.bitcast_convert_type(bits, buffer.dtype)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)
