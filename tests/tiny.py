"""Tiny models, prompts and batches that several tests share."""

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flowrl_jax.models.transformer import Transformer, TransformerConfig, init_params
from flowrl_jax.types import PromptBatch, TrainBatch


def tiny_config(**changes: Any) -> TransformerConfig:
    """Two layers, grouped heads, an odd vocabulary; weights large enough for logits that differ."""
    fields: dict[str, Any] = {
        "vocab_size": 17, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 4, "mlp_dim": 24, "init_std": 0.3,
    }
    return TransformerConfig(**(fields | changes))


# One model of 8 heads that every mesh of 8 devices can cut: rows by 8, vocabulary, heads and
# width by 8.
MESH_CONFIG = tiny_config(
    vocab_size=32, embed_dim=16, num_heads=8, num_kv_heads=8, head_dim=2, mlp_dim=24
)


@cache
def tiny_params(config: TransformerConfig, seed: int = 0) -> Any:
    """A policy with norms and biases away from 1 and 0; drawn by numpy, so nothing compiles."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    rng = np.random.default_rng(seed)

    def fill(path, shape):
        name = path[-1].key
        if name == "scale" or name.endswith("bias"):
            values = (name == "scale") + rng.normal(0, 0.1, shape.shape)
        else:
            values = rng.normal(0, config.init_std, shape.shape)
        return jnp.asarray(values, shape.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@partial(jax.jit, static_argnums=0)
def full_logits(
    config: TransformerConfig, params: Any, tokens: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Logits `[B, T, V]` of the whole rows at once, without a cache."""
    return Transformer(config).apply({"params": params}, tokens, mask, method="logits")


def left_padded(lengths: list[int], width: int, vocab: int, seed: int = 0) -> tuple[Any, Any]:
    """Random prompts `[B, width]` padded on the left with token 0, and their mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    tokens = np.where(mask, rng.integers(1, vocab, mask.shape), 0).astype(np.int32)
    return tokens, mask


def prompt_batch(
    lengths: list[int], group_size: int, width: int, vocab: int, seed: int = 0
) -> PromptBatch:
    """Prompts of these lengths, each `group_size` times."""
    tokens, mask = left_padded(lengths, width, vocab, seed)
    count = len(lengths)
    return PromptBatch(
        tokens=jnp.asarray(np.repeat(tokens, group_size, 0)),
        mask=jnp.asarray(np.repeat(mask, group_size, 0)),
        prompt_id=jnp.asarray(np.repeat(np.arange(count, dtype=np.int32) + 100, group_size)),
        sample_id=jnp.asarray(np.tile(np.arange(group_size, dtype=np.int32), count)),
    )


def train_batch(
    rows: int, group_size: int, prompt: int, response: int, vocab: int, seed: int = 0
) -> TrainBatch:
    """Random rows of uneven lengths; old and reference log-probabilities of a plausible size."""
    rng = np.random.default_rng(seed)
    groups = rows // group_size
    prompts, prompt_mask = left_padded(
        list(rng.integers(2, prompt + 1, groups)), prompt, vocab, seed
    )
    lengths = rng.integers(1, response + 1, rows)
    response_mask = np.arange(response) < lengths[:, None]
    responses = np.where(response_mask, rng.integers(1, vocab, response_mask.shape), 0)
    old = -rng.exponential(2.0, response_mask.shape) - 0.5
    ref = old + rng.normal(0, 0.3, response_mask.shape)
    return TrainBatch(
        tokens=np.concatenate([np.repeat(prompts, group_size, 0), responses], 1).astype(np.int32),
        prompt_mask=np.repeat(prompt_mask, group_size, 0),
        response_mask=response_mask,
        old_logprobs=np.where(response_mask, old, 0.0).astype(np.float32),
        ref_logprobs=np.where(response_mask, ref, 0.0).astype(np.float32),
        reward=rng.normal(0, 1, rows).astype(np.float32),
        prompt_id=np.repeat(np.arange(groups, dtype=np.int32), group_size),
        row_id=np.arange(rows, dtype=np.int32),
    )  # fmt: skip
