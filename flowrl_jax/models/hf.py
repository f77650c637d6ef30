"""Policies out of Hugging Face checkpoint folders (config.json and safetensors).

Reading goes leaf by leaf and, on a mesh, shard by shard: each device's part is cut out of the
files, so that the host never holds much more than one leaf and every host of a pod reads what its
own devices hold. Neither torch nor transformers takes part.
"""

import os
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_config import read_config
from flowrl_jax.models.hf_files import Checkpoint, open_checkpoint
from flowrl_jax.models.hf_names import Leaf, leaves
from flowrl_jax.models.transformer import TransformerConfig, init_params
from flowrl_jax.sharding import Layout

# Rotary tables that old checkpoints carry; they follow from config.json.
_ROTARY_TABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_UNEMBEDDING, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
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
