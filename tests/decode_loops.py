"""What the kernels of decoding are compared with: loops in numpy."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flowrl_jax.models.cache import KVCache

SCALE = 0.3  # of the scores


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
