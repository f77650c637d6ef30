"""Copies of some columns of a cache's arrays, wherever those have their axis of columns."""

import functools

import jax
import jax.numpy as jnp

_CHUNK = 128  # columns that are copied at one time


def copy_columns(
    source: tuple, target: tuple, width: int, axis: int, new: jax.Array, old: jax.Array
) -> jax.Array:
    """`old` with some columns of a row of `new`.

    Args:
        source: row of `new` and first column; before column 0 there is nothing that matters.
        target: row of `old` and first column.
        width: how many columns.
        axis: of columns, in both.
        new: rows first.
        old: rows first, otherwise of the shape of `new` but for its columns.
    """

    def at(row, column):
        index = [row] + [0] * (new.ndim - 1)
        index[axis] = column
        return tuple(index)

    sizes = (1, *new.shape[1:axis], width, *new.shape[axis + 1 :])
    row, first = source
    columns = jax.lax.dynamic_slice(new, at(row, jnp.maximum(first, 0)), sizes)
    # Few rows are that short, and rolling copies twice.
    roll = functools.partial(jnp.roll, shift=-first, axis=axis)
    columns = jax.lax.cond(first < 0, roll, lambda columns: columns, columns)
    return jax.lax.dynamic_update_slice(old, columns, at(*target))


def drop_columns(count: jax.Array, axis: int, x: jax.Array) -> jax.Array:
    """`x` without its first columns, a chunk at a time, so that nothing else is as large.

    Args:
        count: scalar int32, how many columns go; as many at the end then hold anything.
        axis: of columns.
        x: of any shape.

    Returns:
        An array of the shape of `x`, in place where that is donated.
    """
    columns, width = x.shape[axis], min(x.shape[axis], _CHUNK)
    place = jnp.arange(width).reshape([-1 if i == axis else 1 for i in range(x.ndim)])

    # What a chunk reads lies behind what those before it have written.
    def chunk(i, x):
        target = jnp.minimum(i * width, columns - width)
        source = jnp.minimum(target + count, columns - width)
        new = jax.lax.dynamic_slice_in_dim(x, source, width, axis)
        new = jnp.roll(new, source - target - count, axis)
        old = jax.lax.dynamic_slice_in_dim(x, target, width, axis)
        new = jnp.where(place >= i * width - target, new, old)
        return jax.lax.dynamic_update_slice_in_dim(x, new, target, axis)

    return jax.lax.fori_loop(0, (columns - count + width - 1) // width, chunk, x)
