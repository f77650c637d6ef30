"""The arrays that travel between sampler, verifier and trainer.

B = prompts x group size; the samples of one prompt are adjacent (group-major). P is the padded
prompt length, T the padded response length. Prompts are padded on the left and responses on the
right, so that every response starts at column P.
"""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class PromptBatch:
    """Prompts, one row per sample to draw.

    Attributes:
        tokens: `[B, P]` int32, padded on the left.
        mask: `[B, P]` bool, true on the prompt's own tokens.
        prompt_id: `[B]` int32, identifies the prompt in its data set; the prompt's place in the
            batch if None.
        sample_id: `[B]` int32, identifies the sample among those of its prompt; its place in the
            group if None.
    """

    tokens: jax.Array
    mask: jax.Array
    prompt_id: jax.Array | None = None
    sample_id: jax.Array | None = None


@struct.dataclass
class Rollout:
    """What the sampler returns.

    Attributes:
        tokens: `[B, P + T]` int32, prompt and response in one row.
        prompt_mask: `[B, P]` bool.
        response_mask: `[B, T]` bool, true up to and including the end-of-sequence token.
        sampler_logprobs: `[B, T]` float32, under the distribution that was sampled from (after
            temperature, top-k, top-p and min-p); 0 where `response_mask` is false.
        policy_logprobs: `[B, T]` float32, of the same tokens under the policy itself: at
            temperature 1, nothing left out.
        truncated: `[B]` bool, true where no end-of-sequence token was drawn within T tokens.
    """

    tokens: jax.Array
    prompt_mask: jax.Array
    response_mask: jax.Array
    sampler_logprobs: jax.Array
    policy_logprobs: jax.Array
    truncated: jax.Array


@struct.dataclass
class TrainBatch:
    """What one optimiser step learns from.

    Attributes:
        tokens: `[B, P + T]` int32.
        prompt_mask: `[B, P]` bool.
        response_mask: `[B, T]` bool, the response tokens to learn from.
        old_logprobs: `[B, T]` float32, of the policy that sampled.
        ref_logprobs: `[B, T]` float32, of the reference policy.
        reward: `[B]` float32, as the objective wants it (normalised within its group or not); of
            objectives with an advantage per token, `[B, T]`.
        prompt_id: `[B]` int32, row of the log Z table; nothing else reads it.
        row_id: `[B]` int32, the row's place in the rollout; seeds per-row dropout, so that the
            result does not depend on how the batch is cut. The row's place in this batch if None.
        correction: float32 weights of `[B, T]` tokens or of `[B]` responses, see
            `objectives.correction`; all 1 if None.
        old_values: `[B, T]` float32, the value of the state before each response token when it was
            sampled; None for objectives that do not read it.
        returns: `[B, T]` float32, what the values are to become; None likewise.
    """

    tokens: jax.Array
    prompt_mask: jax.Array
    response_mask: jax.Array
    old_logprobs: jax.Array
    ref_logprobs: jax.Array
    reward: jax.Array
    prompt_id: jax.Array | None = None
    row_id: jax.Array | None = None
    correction: jax.Array | None = None
    old_values: jax.Array | None = None
    returns: jax.Array | None = None


@struct.dataclass
class TrainState:
    """Everything an optimiser step reads and writes.

    Attributes:
        step: scalar int32, optimiser steps taken or skipped.
        params: `{"policy": tree, "log_z": tree}` and, where the objective has a value head,
            "value"; float32 master weights.
        opt_state: the optimiser's state over `params`.
        skipped: scalar int32, steps skipped because their loss or gradient was not finite.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
