"""Tiny models, prompts and batches that several tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowrl_jax.learner import Learner, TrainStepConfig
from flowrl_jax.models.log_z import init_log_z
from flowrl_jax.models.transformer import Transformer, TransformerConfig, init_params
from flowrl_jax.models.value import init_value
from flowrl_jax.sharding import Layout, MeshConfig, make_mesh
from flowrl_jax.train_step import abstract_state
from flowrl_jax.types import PromptBatch, TrainBatch, TrainState


def tiny_config(**changes: Any) -> TransformerConfig:
    """Two layers, grouped heads, an odd vocabulary; weights large enough for logits that differ."""
    fields: dict[str, Any] = {
        "vocab_size": 17,
        "num_layers": 2,
        "embed_dim": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "mlp_dim": 24,
        "init_std": 0.3,
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
def full_logits(config: TransformerConfig, params: Any, tokens: Any, mask: Any = None) -> Any:
    """Logits `[B, T, V]` of the whole rows at once, without a cache."""
    return Transformer(config).apply({"params": params}, tokens, mask, method="logits")


def left_padded(lengths: list[int], width: int, vocab: int, seed: int = 0) -> tuple[Any, Any]:
    """Random prompts `[B, width]` padded on the left with token 0, and their mask."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    tokens = np.where(mask, rng.integers(1, vocab, mask.shape), 0).astype(np.int32)
    return tokens, mask


def prompt_batch(lengths: list[int], group_size: int, width: int, vocab: int, seed: int = 0) -> Any:
    """A `PromptBatch` of prompts of these lengths, each `group_size` times."""
    tokens, mask = left_padded(lengths, width, vocab, seed)
    count = len(lengths)
    return PromptBatch(
        tokens=jnp.asarray(np.repeat(tokens, group_size, 0)),
        mask=jnp.asarray(np.repeat(mask, group_size, 0)),
        prompt_id=jnp.asarray(np.repeat(np.arange(count, dtype=np.int32) + 100, group_size)),
        sample_id=jnp.asarray(np.tile(np.arange(group_size, dtype=np.int32), count)),
    )


def train_batch(
    config: TransformerConfig,
    rows: int,
    group_size: int,
    *,
    prompt: int = 5,
    response: int = 7,
    temperature: float = 0.9,
    seed: int = 0,
) -> Any:
    """A `TrainBatch` of rows of uneven lengths, on the host.

    Its old and reference policies are near the one of `tiny_params`.
    """
    rng = np.random.default_rng(seed)
    groups = rows // group_size
    prompts, prompt_mask = left_padded(
        list(rng.integers(1, prompt + 1, groups)), prompt, config.vocab_size, seed
    )
    prompts, prompt_mask = (np.repeat(x, group_size, 0) for x in (prompts, prompt_mask))
    mask = np.arange(response) < rng.integers(1, response + 1, rows)[:, None]
    responses = np.where(mask, rng.integers(1, config.vocab_size, mask.shape), 0)
    tokens = np.concatenate([prompts, responses], 1).astype(np.int32)
    logprobs = teacher_forced(config, tiny_params(config), tokens, prompt_mask, mask, temperature)
    near = lambda spread: np.where(mask, logprobs + rng.normal(0, spread, mask.shape), 0.0)  # noqa: E731
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "prompt_mask": prompt_mask,
        "response_mask": mask,
        "old_logprobs": near(0.15).astype(np.float32),
        "ref_logprobs": near(0.5).astype(np.float32),
        "reward": rng.normal(0, 1, rows).astype(np.float32),
        "prompt_id": np.repeat(np.arange(groups, dtype=np.int32), group_size),
        "row_id": np.arange(rows, dtype=np.int32),
    }
    return TrainBatch(**arrays)


def teacher_forced(
    config: TransformerConfig, params: Any, tokens, prompt_mask, response_mask, temperature: float
) -> np.ndarray:
    """`[B, T]` log-probabilities of the responses from the whole logits, 0 in the padding."""
    logits = full_logits(config, params, tokens, np.concatenate([prompt_mask, response_mask], 1))
    width = prompt_mask.shape[1]
    logprobs = np.asarray(jax.nn.log_softmax(logits[:, width - 1 : -1] / temperature))
    chosen = np.take_along_axis(logprobs, np.asarray(tokens)[:, width:, None], 2)[..., 0]
    return np.where(response_mask, chosen, 0.0)


def gradient_recorder() -> optax.GradientTransformation:
    """An optimiser that moves nothing and keeps the last gradient as its state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return jax.tree.map(jnp.zeros_like, updates), updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def make_learner(
    config: TransformerConfig,
    objective: Any,
    *,
    mesh: tuple[int, ...] = (1, 1, 1),
    optimizer: optax.GradientTransformation | None = None,
    micro_batch_size: int = 0,
    group_size: int = 2,
    temperature: float = 0.9,
) -> Learner:
    """A learner over the first devices that a (data, fsdp, tensor, context) mesh asks for."""
    devices = jax.devices()[: int(np.prod(mesh))]
    return Learner(
        model=Transformer(config),
        objective=objective,
        optimizer=gradient_recorder() if optimizer is None else optimizer,
        group_size=group_size,
        temperature=temperature,
        config=TrainStepConfig(micro_batch_size=micro_batch_size, logprob_chunk=3),
        layout=Layout(make_mesh(MeshConfig(*mesh), devices)),
    )  # fmt: skip


def make_state(learner: Learner, num_prompts: int = 8, seed: int = 0) -> Any:
    """A fresh `TrainState` with `tiny_params` and numpy-drawn log Z; its buffers may be donated."""
    _, shardings = abstract_state(learner, num_prompts)
    config = learner.model.config
    log_z = jax.eval_shape(
        lambda: init_log_z(learner.log_z, config.embed_dim, num_prompts, jax.random.key(0))
    )
    rng = np.random.default_rng(seed + 1)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)  # noqa: E731
    params = {"policy": tiny_params(config), "log_z": jax.tree.map(draw, log_z)}
    if learner.value is not None:
        make = partial(init_value, learner.value, config.embed_dim)
        params["value"] = jax.tree.map(draw, jax.eval_shape(make, jax.random.key(0)))
    if "visits" in log_z:
        params["log_z"]["visits"] = jnp.arange(num_prompts) % 2.0
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero, params=params, opt_state=learner.optimizer.init(params), skipped=zero
    )
    return jax.device_put(jax.tree.map(np.array, state), shardings)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Yields a list that grows with everything that is traced, lowered or compiled inside."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        del duration_secs, kwargs
        if "compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
