"""Weights for what the sampler and the trainer disagree about.

Both compute the log-probability of a sampled token from the same weights, by other programs and
perhaps in another precision, and the sampler's may be of a truncated distribution (top-k, top-p).
With `m` the mask and `l` the trainer's minus the sampler's log-probability at the time of
sampling, what was drawn from the sampler stands for the trainer's policy with the weights

    token:      min(e^l, high) m          sequence:      min(e^(sum m l), high)
    token_mask: e^l m, or 0 outside       sequence_mask: e^(sum m l), or 0 outside [low, high]

Source: truncated and masked importance sampling as in verl (`rollout_corr_helper.py`) and TRL
(`grpo_trainer.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_mean, masked_sum
from flowrl_jax.objectives.shapes import check_shapes

PER_TOKEN = ("token", "token_mask")
PER_RESPONSE = ("sequence", "sequence_mask")
# Bounds of a log-ratio, of a token or a response, before it is exponentiated (verl, ibidem).
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class CorrectionConfig:
    """Which weight, and where it is cut.

    Attributes:
        kind: "none"; "token" or "sequence", which cut the weight of a token or of a whole
            response at `high`; "token_mask" or "sequence_mask", which leave out what lies outside
            `[low, high]` and keep the weight of the rest.
        low: least weight that a mask lets through, in [0, 1]; only masks have one.
        high: greatest weight, from 1 on; 2 as in verl.
    """

    kind: str = "none"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self):
        known = ("none", *PER_TOKEN, *PER_RESPONSE)
        if self.kind not in known:
            raise ValueError(
                f"rollout.correction.kind={self.kind!r} is not known: use one of {known}"
            )
        if not 0.0 <= self.low <= 1.0 <= self.high:
            raise ValueError(
                f"rollout.correction.low={self.low} must be in [0, 1] and"
                f" rollout.correction.high={self.high} at least 1: 1 is the weight of agreement"
            )
        if self.low and self.kind in ("token", "sequence"):
            raise ValueError(
                f"rollout.correction.low={self.low} is for masks, but kind={self.kind!r} cuts"
                f" weights above alone: set low=0, or kind='{self.kind}_mask'"
            )


def _log_ratio(old_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    check_shapes(
        old_logprobs,
        per_token={"sampler_logprobs": sampler_logprobs, "mask": mask},
        per_response={},
    )
    difference = jnp.where(mask.astype(bool), old_logprobs - sampler_logprobs, 0.0)
    return jax.lax.stop_gradient(difference)


def sampler_agreement(
    old_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """How far the sampler's distribution was from the trainer's, from what was sampled.

    Args:
        old_logprobs: `[B, T]` float32, the trainer's log-probabilities when it was sampled.
        sampler_logprobs: `[B, T]` float32, the sampler's own.
        mask: `[B, T]`, 1 on response tokens.

    Returns:
        Scalars over all response tokens: the greatest and the mean size of the difference, and the
        estimates k1 (mean of `-l`, unbiased and of either sign) and k3 (mean of `e^l - 1 - l`,
        unbiased and never negative) of KL(sampler || trainer) per token, in nats.

    Raises:
        ValueError: if shapes do not fit.
    """
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs, mask)
    bounded = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "sampler_logprob_diff_max": jnp.max(jnp.abs(log_ratio)),
        "sampler_logprob_diff_mean": masked_mean(jnp.abs(log_ratio), mask),
        "sampler_kl_k1": masked_mean(-log_ratio, mask),
        "sampler_kl_k3": masked_mean(jnp.expm1(bounded) - bounded, mask),
    }


def correction_weights(
    old_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array, config: CorrectionConfig
) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    """The weights that a config asks for; a row's depend on nothing but the row.

    Args:
        old_logprobs: `[B, T]` float32, the trainer's log-probabilities when it was sampled.
        sampler_logprobs: `[B, T]` float32, the sampler's own.
        mask: `[B, T]`, 1 on response tokens. Values where it is 0 never matter, not even NaN.
        config: names the weight.

    Returns:
        Float32 weights without gradient, `[B, T]` (0 where masked) or, of whole responses, `[B]`;
        None for "none". And scalars over all tokens or responses: mean, maximum, effective sample
        size as a share, `(sum w)² / (n sum w²)`, and the share that was cut or left out.

    Raises:
        ValueError: if shapes do not fit.
    """
    if config.kind == "none":
        return None, {}
    log_ratio = _log_ratio(old_logprobs, sampler_logprobs, mask)
    counted = mask.astype(bool)
    if config.kind in PER_RESPONSE:
        log_ratio, counted = log_ratio.sum(axis=1), counted.any(axis=1)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    outside = ratio > config.high
    if config.kind.endswith("_mask"):
        outside |= ratio < config.low
        weight = jnp.where(outside, 0.0, ratio)
    else:
        weight = jnp.minimum(ratio, config.high)
    if config.kind in PER_TOKEN:
        weight = jnp.where(counted, weight, 0.0)
    return weight, _weight_metrics(weight, outside, counted)


def _weight_metrics(weight: jax.Array, outside: jax.Array, counted: jax.Array):
    total, squares = masked_sum(weight, counted), masked_sum(weight**2, counted)
    number = jnp.maximum(counted.astype(jnp.float32).sum(), 1.0)
    return {
        "correction_mean": total / number,
        "correction_max": jnp.max(jnp.where(counted, weight, 0.0)),
        # Where everything is left out nothing is effective, and nothing may be divided by.
        "correction_ess": jnp.where(
            squares == 0.0, 0.0, total**2 / (number * jnp.where(squares == 0.0, 1.0, squares))
        ),
        "correction_clipped": masked_mean(outside.astype(jnp.float32), counted),
    }
