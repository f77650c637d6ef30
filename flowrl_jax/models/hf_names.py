"""Which tensors of a Hugging Face checkpoint each leaf of the parameter tree is made of."""

import dataclasses
import functools
import math
from collections.abc import Callable

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
_PIECE_ELEMENTS = 2**19


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
        return tuple(math.prod(self.saved[axis] for axis in group) for group in self.groups)

    @property
    def _order(self) -> tuple[int, ...]:
        """Axes of the leaf in the order in which the tensor has them."""
        return tuple(axis for group in self.groups for axis in group)

    def name(self, layer: int) -> str:
        """Name of the tensor of a layer; the layer is ignored where the leaf is not stacked."""
        return self.tensor.format(layer)

    def read(
        self, read_tensor: Callable[[Index], np.ndarray], index: Index, dtype: np.dtype
    ) -> np.ndarray:
        """A part of one layer of the leaf, read in pieces that stay in the processor's cache.

        Args:
            read_tensor: gives a part of the tensor for one slice per axis, zeros beyond its end.
            index: one slice with start and stop per axis of `shape`.
            dtype: that the part is cast to.
        """
        part = np.empty([s.stop - s.start for s in index], dtype)
        (first, *inner), *others = self.groups
        unit = math.prod(self.shape[axis] for axis in inner)
        columns = [self._span(group, index) for group in others]
        width = math.prod(s.stop - s.start for s in columns)
        count = max(_PIECE_ELEMENTS // (unit * width), 1)
        for start in range(index[first].start, index[first].stop, count):
            stop = min(start + count, index[first].stop)
            piece = read_tensor((slice(start * unit, stop * unit), *columns))
            target = [slice(None)] * part.ndim
            target[first] = slice(start - index[first].start, stop - index[first].start)
            # The axis that is cut into pieces, and those first in a group, are cut already.
            done = {group[0] for group in self.groups}
            shape = [stop - start] + [
                part.shape[axis] if axis in done else self.shape[axis] for axis in self._order[1:]
            ]
            rest = tuple(slice(None) if axis in done else index[axis] for axis in self._order)
            piece = _cast(piece, dtype).reshape(shape)[rest]
            _raw(part)[tuple(target)] = _raw(piece).transpose(np.argsort(self._order))
        return part

    def _span(self, group: tuple[int, ...], index: Index) -> slice:
        """What a part takes of the axis of the tensor that a group merges into."""
        unit = math.prod(self.shape[axis] for axis in group[1:])
        return slice(index[group[0]].start * unit, index[group[0]].stop * unit)

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
        saved = list(shape)
        if path[0] == "embedding":
            saved[0 if path[-1] == "tokens" else 1] = config.vocab_size
        found.append(Leaf(path, name, shape, tuple(saved), _groups(path, len(shape))))
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


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype, copy=False)


def _raw(x: np.ndarray) -> np.ndarray:
    """The array as integers of its width: numpy copies them several times faster than bfloat16."""
    return x.view(f"u{x.dtype.itemsize}")
