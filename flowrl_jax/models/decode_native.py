"""Decoding on CPUs with kernels of our own (`native/`): attention, products by panels.

A panel is some columns of a weight, so few that a row of them fits in two registers, one row after
the other. XLA's CPU backend makes such panels of a weight at every product; here decoding is given
panels in place of weights.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flowrl_jax.models.attention import platform_device
from flowrl_jax.models.cache import KVCache
from flowrl_jax.models.decode_layout import on_devices
from flowrl_jax.models.rotary import Rotation
from flowrl_jax.native import library
from flowrl_jax.sharding import Layout, active_layout

_SLOPE = 2 * math.sqrt(2 / math.pi)
# Activations x * sigmoid(slope * x + cubic * x**3), by (slope, cubic); 1 + tanh(y) is
# 2 sigmoid(2 y).
_GATES = {"silu": (1.0, 0.0), "gelu_tanh": (_SLOPE, 0.044715 * _SLOPE)}
_CUT = ("embed", "heads", "kv_heads", "head_dim", "mlp", "vocab")  # axes of weights


def refusal(*, dtype: Any = jnp.float32, kept: Any = None, **_: Any) -> str:
    """Why the kernels cannot decode a model; empty where they can, if the machine compiles them.

    Args:
        dtype: the compute dtype.
        kept: dtype that keys and values are kept in; the compute dtype by default.
        _: what else there is to a model, which they can do.
    """
    for what, one in (("model.dtype", dtype), ("rollout.cache", kept)):
        if one is not None and jnp.dtype(one) != jnp.float32:
            return f"decodes in float32 alone, not with {what}={jnp.dtype(one).name}"
    return ""


class Prompts(NamedTuple):
    """What the rows in slots begin with.

    Attributes:
        number: `[S]` int32. Rows of one number have the same first columns, to the bit, and read
            them from one of them.
        length: `[S]` int32, how many: fewer than a row has.
    """

    number: jax.Array
    length: jax.Array


def native_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache,
    column: jax.Array | int,
    length: jax.Array,
    prompts: Prompts | None = None,
    rotation: Rotation | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[jax.Array, KVCache]:
    """Grouped-query attention of one token per slot, on every device for its own slots and heads.

    Turns the token's queries and key by its position, if they are not yet. Writes the token's key
    and value to the cache, in place where nothing else wants the old one. Reads the columns that a
    slot may attend to and no others; what slots of one prompt have in common from one of them,
    whose columns of the prompt are near by for the others.

    Args:
        query: `[S, N, H]` float32; N query heads, a multiple of K.
        key: `[S, K, H]` float32.
        value: `[S, K, H]` float32.
        cache: of one layer, `[S, K, C, H]` float32 both.
        column: scalar int32, where they are written; the newest column of all slots.
        length: `[S]` int32, columns that a slot may attend to: `(column - length, column]`. 0 is
            an idle slot.
        prompts: of the slots; by default no two have the same.
        rotation: sines and cosines `[S, H / 2]` of the slots' positions (see `rotary`); without
            them queries and keys are as they are.
        scale: multiplies the scores.
        window: columns that a token looks back to, its own included; 0 means all.
        softcap: scores s become `softcap * tanh(s / softcap)`; 0 leaves them.

    Returns:
        `[S, N, H]` float32, zeros in idle slots; and the cache, to whose idle slots nothing is
        written.
    """

    def run(query, key, value, cache, column, *slots, first_head=0, group=0):
        library.panel_columns()
        outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, cache.key, cache.value)]
        out, *kept = jax.ffi.ffi_call(library.ATTENTION, outs, input_output_aliases={3: 1, 4: 2})(
            query,
            key,
            value,
            cache.key,
            cache.value,
            jnp.asarray(column, jnp.int32),
            *slots,
            jnp.asarray(first_head, jnp.int32),
            group=np.int64(group or query.shape[1] // cache.key.shape[1]),
            window=np.int64(window),
            scale=np.float32(scale),
            softcap=np.float32(softcap),
        )
        return out, KVCache(*kept)

    if prompts is None:
        prompts = Prompts(jnp.arange(length.shape[0], dtype=jnp.int32), jnp.zeros_like(length))
    none = jnp.zeros((*length.shape, 0))
    turn = rotation or (none, none)
    return on_devices(run, query, cache, column, length, *prompts, *turn, new=(key, value))


def in_panels(weight: jax.Array) -> jax.Array:
    """A weight as `native_products` wants it.

    Args:
        weight: `[D, F]` float32.

    Returns:
        `[P, D, c]` of P panels of c columns, the last of them filled up with zeros.
    """
    depth, width = weight.shape
    columns = library.panel_columns()
    panels = -(-width // columns)
    weight = jnp.pad(weight, ((0, 0), (0, panels * columns - width)))
    return jnp.swapaxes(weight.reshape(depth, panels, columns), 0, 1)


class Norm(NamedTuple):
    """Divides rows by their root mean square, and scales them.

    Attributes:
        scale: `[D]` float32.
        epsilon: added to the mean square.
        offset: added to the scale.
    """

    scale: jax.Array
    epsilon: float
    offset: float = 0.0


def native_products(
    rows: jax.Array,
    panels: tuple[jax.Array, ...],
    widths: tuple[int, ...],
    *,
    norm: Norm | None = None,
    onto: tuple[jax.Array | None, ...] = (),
) -> tuple[jax.Array, ...]:
    """The same rows times each of some weights, on every device for its own rows.

    Args:
        rows: `[R, D]` float32.
        panels: of each weight, from `in_panels`.
        widths: F of each.
        norm: of the rows; without one they are multiplied as they are.
        onto: what each product is added to: `[R, F]`, `[1, F]` or nothing.

    Returns:
        `[R, F]` for each.
    """
    added = [
        jnp.zeros((0, width)) if one is None else one
        for one, width in zip(onto or (None,) * len(widths), widths, strict=True)
    ]
    pairs = [one for pair in zip(panels, added, strict=True) for one in pair]
    return _rows_on_devices(library.PRODUCTS, rows, norm, pairs, widths)


def can_gate(activation: str) -> bool:
    """Whether `native_gated_products` knows an activation.

    Args:
        activation: of the model.
    """
    return activation in _GATES


def native_gated_products(
    rows: jax.Array,
    panels: tuple[jax.Array, ...],
    width: int,
    activation: str,
    *,
    norm: Norm | None = None,
) -> jax.Array:
    """`activation(rows @ gate) * (rows @ up)`, on every device for its own rows.

    Neither product is written to memory as a whole.

    Args:
        rows: `[R, D]` float32.
        panels: of two weights, the gate's and the other one, from `in_panels`.
        width: F of both.
        activation: of the model; one that it `can_gate`.
        norm: of the rows; without one they are multiplied as they are.

    Returns:
        `[R, F]`.
    """
    slope, cubic = (np.float32(number) for number in _GATES[activation])
    kernel = library.GATED_PRODUCTS
    (out,) = _rows_on_devices(kernel, rows, norm, panels, (width,), slope=slope, cubic=cubic)
    return out


def _rows_on_devices(
    kernel: str,
    rows: jax.Array,
    norm: Norm | None,
    arrays: Sequence[jax.Array],
    widths: tuple[int, ...],
    **numbers: np.float32,
) -> tuple[jax.Array, ...]:
    """What a kernel makes of rows: `[R, F]` of each width F.

    Args:
        kernel: as XLA calls it.
        rows: `[R, D]`, cut over devices.
        norm: of the rows.
        arrays: what else the kernel wants; those of R rows are cut as the rows are.
        widths: of what it makes.
        numbers: its attributes.
    """
    norm = norm or Norm(jnp.zeros(0), 0.0)
    numbers |= {"epsilon": np.float32(norm.epsilon), "offset": np.float32(norm.offset)}

    def run(rows, *arrays):
        outs = [jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype) for width in widths]
        return tuple(jax.ffi.ffi_call(kernel, outs)(rows, *arrays, **numbers))

    layout = active_layout()
    if layout is None or layout.mesh.size == 1:
        return run(rows, norm.scale, *arrays)
    cut = layout.sharding("batch", None).spec
    by_rows = [x.ndim == 2 and x.shape[0] == rows.shape[0] for x in arrays]
    return jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(cut, PartitionSpec(), *(cut if own else PartitionSpec() for own in by_rows)),
        out_specs=(cut,) * len(widths),
        check_vma=False,
    )(rows, norm.scale, *arrays)


def takes_panels(wanted: str, dtype: Any, layout: Layout | None) -> bool:
    """Whether decoding multiplies with panels.

    Args:
        wanted: `decode_kernel` of the model.
        dtype: the compute dtype.
        layout: of sampling; one that cuts weights leaves the products to XLA.
    """
    device = platform_device(layout)
    whole = layout is None or all(layout.shards(axis) == 1 for axis in _CUT)
    wanted_here = wanted in ("auto", "native") and device.platform == "cpu"
    return wanted_here and whole and not refusal(dtype=dtype) and not library.missing()


def panels_name(weight: str) -> str:
    """Key of a weight's panels in a tree of weights, where they stand in its place.

    Args:
        weight: its own key.
    """
    return f"{weight}_panels"
