"""Which tensors of a Hugging Face checkpoint each leaf of the parameter tree is made of."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.models.architecture import TransformerConfig
from flowrl_jax.models.hf_config import family_of
from flowrl_jax.models.transformer import init_params

Index = tuple[slice, ...]

# A linear layer of torch is `[out, in]`, ours `[in, out]`; either side may be several axes here.
_INPUT_AXES = {"out": 2}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree and the tensors it holds, one per layer.

    Attributes:
        path: keys into the parameter tree.
        tensor: name of the tensor; `{}` stands for the layer where the leaf is stacked.
        shape: of the leaf, without the axis of layers.
        saved: the part of `shape` that tensors have; rows that pad the vocabulary are not saved.
        groups: for each axis of the tensor the axes of the leaf that it merges, major first. A
            query projection `[D, N, H]` is the tensor `[N * H, D]`: `((1, 2), (0,))`.
    """

    path: tuple[str, ...]
    tensor: str
    shape: tuple[int, ...]
    saved: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading axis of layers."""
        return "{}" in self.tensor

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the tensor of one layer."""
        return self._merged(self.saved)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape of the tensor of one layer, with the rows that pad the vocabulary."""
        return self._merged(self.shape)

    def _merged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(math.prod(shape[axis] for axis in group) for group in self.groups)

    @property
    def _order(self) -> tuple[int, ...]:
        """Axes of the leaf in the order in which the tensor has them."""
        return tuple(axis for group in self.groups for axis in group)

    def name(self, layer: int) -> str:
        """Name of the tensor of a layer; the layer is ignored where the leaf is not stacked."""
        return self.tensor.format(layer)

    def from_tensor(self, tensor: Any) -> Any:
        """One layer of the leaf.

        Args:
            tensor: of the shape `padded_shape`; a numpy or a jax array.
        """
        split = tensor.reshape([self.shape[axis] for axis in self._order])
        return split.transpose([self._order.index(axis) for axis in range(len(self.shape))])

    def write(self, part: np.ndarray) -> np.ndarray:
        """The tensor of one layer, contiguous, from that layer's part of the leaf."""
        saved = part[tuple(slice(size) for size in self.saved)]
        return np.ascontiguousarray(saved.transpose(self._order).reshape(self.tensor_shape))


@functools.lru_cache(maxsize=64)
def leaves(config: TransformerConfig) -> tuple[Leaf, ...]:
    """The leaves of a decoder's parameter tree, with the names that its family gives them.

    Raises:
        InputError: no family can express the decoder, or it has no name for one of the leaves.
    """
    family = family_of(config)
    shapes = nn.meta.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    found = []
    for keys, value in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        path = tuple(str(key.key) for key in keys)
        name = family.names.get("/".join(path))
        if name is None:
            raise InputError(
                f"model_type {family.model_type} has no tensor for the parameter {'/'.join(path)}:"
                " name it in the family's names"
            )
        shape = value.shape[1:] if "{}" in name else value.shape
        padded = path[0] == "embedding" and config.vocab_rows != config.vocab_size
        rows = {config.vocab_rows: config.vocab_size} if padded else {}
        vocabulary = 0 if path[-1] == "tokens" else len(shape) - 1
        saved = tuple(
            rows.get(size, size) if axis == vocabulary else size for axis, size in enumerate(shape)
        )
        found.append(Leaf(path, name, shape, saved, _groups(path, len(shape))))
    return tuple(found)


def _groups(path: tuple[str, ...], rank: int) -> tuple[tuple[int, ...], ...]:
    """Axes of a leaf that each axis of its tensor merges."""
    axes = tuple(range(rank))
    if path[-1] == "tokens":
        return ((0,), (1,))
    if path[-1] == "scale" or path[-1].endswith("_bias"):
        return (axes,)
    into = _INPUT_AXES.get(path[-1], 1)
    return axes[into:], axes[:into]
