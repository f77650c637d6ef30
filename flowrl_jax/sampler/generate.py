"""Autoregressive sampling over a KV cache.

A prompt is read once for all the samples of its group. The cache grows in segments, each a loop of
its own over a cache of fixed size, so that a token attends to little more than what has been
generated and the number of programs stays logarithmic in the response length. A loop ends as soon
as every row has ended.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from flowrl_jax.masking import positions_from_mask
from flowrl_jax.models.attention import Columns
from flowrl_jax.models.decode import (
    decode_params,
    forward_cached,
    grow_caches,
    read_prompts,
    unembed,
)
from flowrl_jax.models.transformer import Cache, Transformer, TransformerConfig
from flowrl_jax.sampler.sampling import draw
from flowrl_jax.sharding import Layout, constrain
from flowrl_jax.types import PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How responses are drawn.

    Attributes:
        max_response_length: tokens, the end-of-sequence token included.
        eos_ids: tokens that end a response; they are part of it.
        pad_id: fills the row after the end; never read.
        group_size: samples per prompt; rows of one prompt are adjacent and read it once.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this share; 1 keeps all.
        first_segment: response tokens in the first segment of the cache; each further segment
            doubles the response's room.
    """

    max_response_length: int
    eos_ids: tuple[int, ...]
    pad_id: int = 0
    group_size: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    first_segment: int = 64

    def __post_init__(self):
        for field in ("max_response_length", "group_size", "first_segment"):
            if getattr(self, field) < 1:
                raise ValueError(f"sampler.{field}={getattr(self, field)} must be at least 1")
        if self.temperature < 0.0:
            raise ValueError(
                f"sampler.temperature={self.temperature} must not be negative; 0 is greedy"
            )
        if self.top_k < 0:
            raise ValueError(f"sampler.top_k={self.top_k} must not be negative; 0 keeps all")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"sampler.top_p={self.top_p} must be in (0, 1]; 1 keeps all")


@jax.jit
def rollout_key(seed: int, step: int) -> jax.Array:
    """The key of a rollout step; prompts, samples and positions are folded in by `generate`."""
    return jax.random.fold_in(jax.random.key(seed), step)


def _uniforms(key: jax.Array, prompts: PromptBatch, length: int) -> jax.Array:
    """`[B, T]` uniforms in [0, 1), each a function of (key, prompt id, sample id, position)."""

    def row(prompt_id, sample_id):
        row_key = jax.random.fold_in(jax.random.fold_in(key, prompt_id), sample_id)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, jnp.arange(length))
        return jax.vmap(jax.random.uniform)(keys)

    return jax.vmap(row)(prompts.prompt_id, prompts.sample_id)


def _segment_ends(config: SamplerConfig) -> list[int]:
    """Response tokens that each segment's cache has room for."""
    ends = [min(config.first_segment, config.max_response_length)]
    while ends[-1] < config.max_response_length:
        ends.append(min(2 * ends[-1], config.max_response_length))
    return ends


@struct.dataclass
class _State:
    """The loop's state after `count` tokens of every row have been drawn.

    `tokens` and `logprobs` are `[T, B]`: a step writes one contiguous row. `done` is `[B]` bool,
    `length` `[B]` int32 counts a row's tokens including its end.
    """

    count: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    done: jax.Array
    length: jax.Array
    caches: tuple[Cache, ...]


def _record(state: _State, token, logprob, caches, config: SamplerConfig) -> _State:
    """Writes the drawn token of rows that are still going; the others get padding."""
    token = jnp.where(state.done, config.pad_id, token)
    logprob = jnp.where(state.done, 0.0, logprob)
    ended = jnp.isin(token, jnp.array(config.eos_ids, jnp.int32))
    return _State(
        count=state.count + 1,
        tokens=state.tokens.at[state.count].set(token),
        logprobs=state.logprobs.at[state.count].set(logprob),
        done=state.done | ended,
        length=state.length + ~state.done,
        caches=caches,
    )


def generate(
    params: Any,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    model: Transformer,
    config: SamplerConfig,
    layout: Layout | None = None,
    sampling_layout: Layout | None = None,
) -> Rollout:
    """Samples one response per row.

    A row's response depends on its prompt, the policy, `key`, its prompt id and its sample id,
    and on nothing else: not on the other rows, the batch size or the mesh (up to the rounding of
    the logits).

    Args:
        params: the policy's parameters, unboxed.
        prompts: B rows; each `config.group_size` adjacent rows hold the same prompt.
        key: from `rollout_key`, consumed.
        model: the policy's architecture.
        config: how to sample.
        layout: where parameters, prompts and the rollout live; without one they are where the
            inputs' shardings lead.
        sampling_layout: where weights, cache and activations live in the meantime; `layout` by
            default.

    Returns:
        A `Rollout` with T = `config.max_response_length`.

    Raises:
        ValueError: if the rows do not divide into groups.
    """
    if prompts.tokens.shape[0] % config.group_size:
        raise ValueError(
            f"{prompts.tokens.shape[0]} rows do not divide into groups of"
            f" sampler.group_size={config.group_size}: pass every prompt that many times, in"
            " adjacent rows"
        )
    options = layout.compiler_options if layout else None
    compiled = _compiled(tuple((options or {}).items()))
    return compiled(
        params,
        prompts,
        key,
        model=model,
        config=config,
        layout=layout,
        sampling_layout=sampling_layout,
    )


@functools.cache
def _compiled(options: tuple[tuple[str, str], ...]) -> Any:
    static = ("model", "config", "layout", "sampling_layout")
    return jax.jit(_generate, static_argnames=static, compiler_options=dict(options) or None)


def _generate(params, prompts, key, *, model, config, layout, sampling_layout) -> Rollout:
    prompts = _with_ids(prompts, config.group_size)
    within = sampling_layout or layout
    weights = decode_params(params, model.config, within)
    with within.activate() if within else contextlib.nullcontext():
        prompts = jax.tree.map(_by_rows, prompts)
        uniforms = _uniforms(key, prompts, config.max_response_length).T
        state = _prefill(params, prompts, uniforms, model.config, config)
        state = _decode(state, weights, prompts, uniforms, model.config, config)
    response_mask = jnp.arange(config.max_response_length)[None] < state.length[:, None]
    rollout = Rollout(
        tokens=jnp.concatenate([prompts.tokens, state.tokens.T], axis=1),
        prompt_mask=prompts.mask,
        response_mask=response_mask,
        sampler_logprobs=state.logprobs.T,
        truncated=~state.done,
    )
    with layout.activate() if layout else contextlib.nullcontext():
        return jax.tree.map(_by_rows, rollout)


def _by_rows(x: jax.Array) -> jax.Array:
    """Cut over the batch, its first axis, alone."""
    return constrain(x, "batch", *(None for _ in x.shape[1:]))


def _with_ids(prompts: PromptBatch, group_size: int) -> PromptBatch:
    """Prompts that say who they are, by their places where they did not."""
    rows = jnp.arange(prompts.tokens.shape[0], dtype=jnp.int32)
    return dataclasses.replace(
        prompts,
        prompt_id=rows // group_size if prompts.prompt_id is None else prompts.prompt_id,
        sample_id=rows % group_size if prompts.sample_id is None else prompts.sample_id,
    )


def _draw(logits: jax.Array, uniform: jax.Array, config: SamplerConfig):
    return draw(
        logits, uniform, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )


def _prefill(
    params: Any,
    prompts: PromptBatch,
    uniforms: jax.Array,
    shape: TransformerConfig,
    config: SamplerConfig,
) -> _State:
    """Reads every prompt once, hands its cache to its samples and draws their first tokens."""
    batch, width = prompts.tokens.shape
    one_per_group = lambda x: x.reshape(-1, config.group_size, width)[:, 0]  # noqa: E731
    expand = lambda x: jnp.repeat(x, config.group_size, axis=0)  # noqa: E731
    mask = one_per_group(prompts.mask)
    hidden, caches = read_prompts(
        params, shape, one_per_group(prompts.tokens), positions_from_mask(mask), mask
    )
    logits = expand(unembed(params, shape, hidden[:, -1]))
    token, logprob = _draw(logits, uniforms[0], config)
    state = _State(
        count=jnp.int32(0),
        tokens=jnp.full((config.max_response_length, batch), config.pad_id, jnp.int32),
        logprobs=jnp.zeros((config.max_response_length, batch)),
        done=jnp.zeros(batch, bool),
        length=jnp.zeros(batch, jnp.int32),
        caches=jax.tree.map(expand, caches),
    )
    return _record(state, token, logprob, state.caches, config)


def _decode(
    state: _State,
    weights: Any,
    prompts: PromptBatch,
    uniforms: jax.Array,
    shape: TransformerConfig,
    config: SamplerConfig,
) -> _State:
    """Draws the other tokens, one loop per segment of the cache."""
    width = prompts.tokens.shape[1]
    prompt_size = prompts.mask.sum(axis=1, dtype=jnp.int32)

    def step(state: _State) -> _State:
        # Columns after the token's own are not looked at: they may as well be real.
        room = state.caches[0][0].shape[2] - width
        real = jnp.pad(prompts.mask, ((0, 0), (0, room)), constant_values=True)
        hidden, caches = forward_cached(
            weights,
            shape,
            state.tokens[state.count - 1][:, None],
            (prompt_size + state.count - 1)[:, None],
            Columns(real, width + state.count - 1),
            state.caches,
        )
        logits = unembed(weights, shape, hidden[:, 0])
        token, logprob = _draw(logits, uniforms[state.count], config)
        return _record(state, token, logprob, caches, config)

    for end in _segment_ends(config):
        # The last token drawn is never written to the cache, so `end` columns serve `end + 1`.
        limit = min(end + 1, config.max_response_length)
        caches = grow_caches(state.caches, width + end)
        state = jax.lax.while_loop(
            lambda state, limit=limit: (state.count < limit) & ~jnp.all(state.done),
            step,
            dataclasses.replace(state, caches=caches),
        )
    return state
