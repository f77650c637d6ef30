"""What the kernels of decoding are compared with: loops in numpy."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowrl_jax.models.cache import KVCache
from flowrl_jax.sharding import MeshConfig, make_layout, make_mesh

SCALE = 0.3  # of the scores
CLOSE = 3e-6  # sums of a hundred products in float32, and an exponential to about its last bit
HEADS_OF_SHARDS = [  # query heads and key heads, of four shards
    (8, 4),  # a key head for each shard
    (8, 2),  # shards share key heads
    (20, 5),  # a shard's five query heads straddle two key heads or three
]


def loops(query, key, value, column, length, *, window=0, softcap=0.0) -> np.ndarray:
    """Attention slot by slot and head by head, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    group = query.shape[1] // key.shape[1]
    for slot, head in np.ndindex(*query.shape[:2]):
        seen = min(length[slot], window or length[slot])
        columns = slice(column + 1 - seen, column + 1)
        if seen:
            scores = key[slot, head // group, columns] @ query[slot, head] * SCALE
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            out[slot, head] = weights @ value[slot, head // group, columns] / weights.sum()
    return out


def draw(slots, heads, kv_heads, columns, head_dim, dtype: Any = jnp.float32, seed=0):
    """Queries `[S, N, H]` and a cache `[S, K, C, H]`, of normal numbers."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(0, 1, shape), dtype)  # noqa: E731
    kv = (slots, kv_heads, columns, head_dim)
    return make(slots, heads, head_dim), KVCache(make(*kv), make(*kv))


def attend_on_devices(kernel: Callable, heads: int, kv_heads: int) -> tuple[Any, np.ndarray]:
    """What eight devices make, two for slots by four for heads, and what the loops make."""
    query, cache = draw(4, heads, kv_heads, 256, 16)
    length = np.array([100, 0, 3, 77])
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    layout = make_layout(mesh, {"heads": heads, "kv_heads": kv_heads})
    run = layout.jit(functools.partial(kernel, scale=SCALE, window=90))
    out = run(query, cache, 99, jnp.asarray(length))
    return out, loops(query, *cache[:2], 99, length, window=90)
