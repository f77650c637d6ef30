"""What the kernels of decoding share: slots and heads over devices, whole blocks of columns."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flowrl_jax.models.cache import KVCache
from flowrl_jax.sharding import active_layout


def on_devices(
    run: Any,
    query: jax.Array,
    cache: KVCache,
    column: jax.Array | int,
    *slots: jax.Array,
    new: tuple[jax.Array, ...] = (),
) -> Any:
    """A kernel on every device for its own slots and heads; XLA cannot cut a kernel by itself.

    Where key heads are fewer than shards, each shard is given the whole cache that it holds.

    Args:
        run: the kernel, of `query`, what is `new`, and the arguments after it. Where these are a
            part of the model's it is told too `first_head`, where the query heads begin among the
            model's, scalar int32, and `group`, how many of the model's share a key head.
        query: `[S, N, H]`.
        cache: of one layer, S slots.
        column: scalar int32, the newest column.
        slots: `[S]` arrays, of what the kernel is told of each slot.
        new: keys and values `[S, K, H]`, if the kernel is to write them to the cache.

    Returns:
        `[S, N, H]`, and the cache if the kernel writes to it.
    """
    layout = active_layout()
    if layout is None or layout.mesh.size == 1:
        return run(query, *new, cache, column, *slots)
    group = query.shape[1] // cache.key.shape[1]
    query_spec = layout.sharding("batch", "heads", "head_dim").spec
    kv_spec = layout.sharding("batch", "kv_heads", None, "head_dim").spec
    specs = (kv_spec, kv_spec, PartitionSpec(*kv_spec[:3]), PartitionSpec(*kv_spec[:3]))
    whole = kv_spec[1] != query_spec[1]

    cache_spec = KVCache(
        *(None if x is None else spec for x, spec in zip(cache, specs, strict=True))
    )

    def local(query, *arguments):
        first = jax.lax.axis_index(query_spec[1]) * query.shape[1] if whole else 0
        return run(query, *arguments, first_head=first, group=group)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(
            query_spec,
            *(PartitionSpec(*kv_spec[:2]),) * len(new),
            cache_spec,
            PartitionSpec(),
            *(layout.sharding("batch").spec,) * len(slots),
        ),
        out_specs=(query_spec, cache_spec) if new else query_spec,
        check_vma=False,
    )(query, *new, cache, jnp.asarray(column, jnp.int32), *slots)


def padded(cache: KVCache, multiple: int) -> KVCache:
    """The cache with columns of zeros up to a multiple, which reads and writes all of it.

    Args:
        cache: of one layer.
        multiple: of columns, that a kernel wants; a cache that has it is returned as it is.
    """
    missing = -cache.key.shape[2] % multiple
    if not missing:
        return cache
    pad = ((0, 0), (0, 0), (0, missing), (0, 0))
    return KVCache(*(x if x is None else jnp.pad(x, pad[: x.ndim]) for x in cache))
