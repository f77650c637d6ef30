"""Which tensors of a Hugging Face checkpoint each leaf of the parameter tree is made of."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from flowrl_jax.models.transformer import TransformerConfig

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree and the tensors it holds, one per layer.

    Attributes:
        path: keys into the parameter tree.
        tensor: name of the tensor; `{}` stands for the layer where the leaf is stacked.
        shape: of the leaf, without the axis of layers.
        groups: for each axis of the tensor the axes of the leaf that it merges, major first. A
            linear layer of torch is `[out, in]`, so that a query projection `[D, N, H]` is the
            tensor `[N * H, D]`: `((1, 2), (0,))`.
    """

    path: tuple[str, ...]
    tensor: str
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading axis of layers."""
        return "{}" in self.tensor

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the tensor of one layer."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.groups)

    @property
    def _order(self) -> tuple[int, ...]:
        """Axes of the leaf in the order in which the tensor has them."""
        return tuple(axis for group in self.groups for axis in group)

    def name(self, layer: int) -> str:
        """Name of the tensor of a layer; the layer is ignored where the leaf is not stacked."""
        return self.tensor.format(layer)

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """Reads a part of the leaf, and no more of the tensor than it needs.

        Args:
            tensor: of the shape `tensor_shape`; indexed once, with one slice per axis.
            index: one slice with start and stop per axis of `shape`.

        Returns:
            The part in the leaf's own layout, in the dtype of the tensor.
        """
        where, shape = [], []
        for major, *rest in self.groups:
            step = math.prod(self.shape[axis] for axis in rest)
            where.append(slice(index[major].start * step, index[major].stop * step))
            shape += [index[major].stop - index[major].start, *(self.shape[a] for a in rest)]
        part = tensor[tuple(where)].reshape(shape)
        majors = {group[0] for group in self.groups}
        inner = tuple(slice(None) if axis in majors else index[axis] for axis in self._order)
        return part[inner].transpose(np.argsort(self._order))

    def write(self, part: np.ndarray) -> np.ndarray:
        """The tensor of one layer, contiguous, from that layer's part of the leaf."""
        tensor = part.transpose(self._order).reshape(self.tensor_shape)
        return np.ascontiguousarray(tensor)


def leaves(config: TransformerConfig) -> Iterator[Leaf]:
    """The leaves of the Llama family's parameter tree (Llama, Qwen2)."""
    width, head_dim, mlp, vocab = (
        config.embed_dim,
        config.head_dim,
        config.mlp_dim,
        config.vocab_size,
    )
    linear = ((1,), (0,))
    yield Leaf(("embedding", "tokens"), "model.embed_tokens.weight", (vocab, width), ((0,), (1,)))
    if not config.tie_embeddings:
        yield Leaf(("embedding", "output"), "lm_head.weight", (width, vocab), linear)
    yield Leaf(("final_norm", "scale"), "model.norm.weight", (width,), ((0,),))

    block = "model.layers.{}."
    for ours, theirs in (("attention_norm", "input"), ("mlp_norm", "post_attention")):
        name = f"{block}{theirs}_layernorm.weight"
        yield Leaf(("layers", ours, "scale"), name, (width,), ((0,),))
    for ours, heads in (
        ("query", config.num_heads),
        ("key", config.num_kv_heads),
        ("value", config.num_kv_heads),
    ):
        name = f"{block}self_attn.{ours[0]}_proj"
        shape = (width, heads, head_dim)
        yield Leaf(("layers", "attention", ours), f"{name}.weight", shape, ((1, 2), (0,)))
        if config.qkv_bias:
            path = ("layers", "attention", f"{ours}_bias")
            yield Leaf(path, f"{name}.bias", (heads, head_dim), ((0, 1),))
    out = (config.num_heads, head_dim, width)
    name = f"{block}self_attn.o_proj.weight"
    yield Leaf(("layers", "attention", "out"), name, out, ((2,), (0, 1)))
    for ours, shape in (("gate", (width, mlp)), ("up", (width, mlp)), ("down", (mlp, width))):
        yield Leaf(("layers", "mlp", ours), f"{block}mlp.{ours}_proj.weight", shape, linear)
