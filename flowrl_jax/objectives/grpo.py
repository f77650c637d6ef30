"""GRPO: clipped policy gradient with group-normalised advantages (arXiv 2402.03300)."""

import dataclasses

import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_mean, masked_sum
from flowrl_jax.objectives.flowrl import Metrics
from flowrl_jax.objectives.kl import kl_estimate
from flowrl_jax.objectives.shapes import check_shapes

# Bounds of a token's log-ratio before it is exponentiated (verl, core_algos.py).
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Switches of GRPO; the defaults are the paper's.

    Attributes:
        clip_low: the token ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        clip_high: see `clip_low`.
        kl_coef: coefficient of the k3 estimate of KL(policy || reference), added to the loss.
        aggregation: "sequence" (mean over a response's tokens, then over responses; the paper) or
            "token" (mean over all response tokens of the batch; DAPO).
        reward_norm: "group", "center" (Dr.GRPO) or "none".
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 1e-3
    aggregation: str = "sequence"
    reward_norm: str = "group"

    def __post_init__(self):
        if self.aggregation not in ("sequence", "token"):
            raise ValueError(
                f"loss.aggregation={self.aggregation!r} is not known: use 'sequence' or 'token'"
            )
        if self.reward_norm not in ("group", "center", "none"):
            raise ValueError(
                f"loss.reward_norm={self.reward_norm!r} is not known: use 'group', 'center' or"
                " 'none'"
            )
        if self.kl_coef < 0.0:
            raise ValueError(f"loss.kl_coef={self.kl_coef} must not be negative")
        if not 0.0 <= self.clip_low <= 1.0 or self.clip_high < 0.0:
            raise ValueError(
                f"loss.clip_low={self.clip_low} must be in [0, 1] and"
                f" loss.clip_high={self.clip_high} not negative"
            )


def grpo_loss(
    *,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    old_logprobs: jax.Array,
    reward: jax.Array,
    mask: jax.Array,
    config: GRPOConfig,
    correction: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of each response token, not yet averaged.

    `c max(-A rho, -A clip(rho)) + kl_coef (e^-delta + delta - 1)` with `rho = pi / pi_old`,
    `delta = log pi - log pi_ref` and `c` the correction; it spares the penalty, as in TRL.

    Args:
        logprobs: `[B, T]` float32 of the policy being trained; carries the gradient.
        ref_logprobs: `[B, T]` float32 of the reference.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        reward: `[B]` float32, the advantage: already normalised as `config.reward_norm` says.
        mask: `[B, T]`, 1 on response tokens including the end-of-sequence token.
        config: switches.
        correction: `[B, T]` or `[B]` float32, `correction_weights` of tokens or of whole responses;
            None: all 1. The metrics know nothing of it.

    Returns:
        `[B, T]` float32 losses (0 where masked), and scalar metrics (means over responses of
        means over their tokens; names ending in `_max` are maxima).

    Raises:
        ValueError: if shapes do not fit.
    """
    per_token = {"ref_logprobs": ref_logprobs, "old_logprobs": old_logprobs, "mask": mask}
    per_response = {"reward": reward}
    if correction is not None:
        (per_token if correction.ndim == 2 else per_response)["correction"] = correction
    check_shapes(logprobs, per_token=per_token, per_response=per_response)
    mask = mask.astype(bool)
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    advantage = reward[:, None]
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    if correction is not None:
        correction = jax.lax.stop_gradient(correction)
        loss *= correction if correction.ndim == 2 else correction[:, None]
    if config.kl_coef:
        delta = jnp.where(mask, logprobs - ref_logprobs, 0.0)
        loss += config.kl_coef * kl_estimate(delta, "k3")
    bound = (-advantage * clipped > -advantage * ratio) & mask
    metrics = {
        "ratio": jnp.mean(masked_mean(ratio, mask, axis=1)),
        "ratio_clipped": jnp.mean(masked_mean(bound.astype(jnp.float32), mask, axis=1)),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
    }
    metrics = jax.tree.map(jax.lax.stop_gradient, metrics)
    return jnp.where(mask, loss, 0.0), metrics


def aggregate_tokens(
    loss: jax.Array, mask: jax.Array, aggregation: str
) -> tuple[jax.Array, jax.Array]:
    """Splits the mean of token losses into a sum and its denominator, both per response.

    Args:
        loss: `[B, T]` float32.
        mask: `[B, T]`.
        aggregation: "sequence" or "token", see `GRPOConfig`.

    Returns:
        `[B]` numerators and `[B]` denominators; the loss of any set of responses is the sum of
        the first over the sum of the second.
    """
    if aggregation == "token":
        return masked_sum(loss, mask, axis=1), mask.astype(jnp.float32).sum(axis=1)
    return masked_mean(loss, mask, axis=1), jnp.ones(loss.shape[0], jnp.float32)
