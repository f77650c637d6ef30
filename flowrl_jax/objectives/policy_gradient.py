"""The policy-gradient family: one loss whose parts are named choices.

With `rho` a ratio `pi / pi_old` and `A` an advantage, a token's loss is

    c surrogate(rho, A) + kl_coef k(pi, pi_ref) + entropy_coef (log pi)^2 / 2

Dr.GRPO, DAPO, ProRL, RLOO, REINFORCE++, GSPO, GMPO and CISPO are rows of `presets.py`; formulas and
sources are in `docs/objective.md`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_mean, masked_sum
from flowrl_jax.objectives.advantages import (
    group_center,
    leave_one_out,
    normalize_rewards,
    overlong_punishment,
    whiten,
)
from flowrl_jax.objectives.flowrl import Metrics
from flowrl_jax.objectives.grpo import MAX_LOG_RATIO, aggregate_tokens
from flowrl_jax.objectives.kl import ESTIMATORS, kl_estimate
from flowrl_jax.objectives.shapes import check_shapes

_KNOWN = {
    "ratio": ("token", "sequence", "geometric", "geometric_token"),
    "clip": ("ppo", "cispo", "log", "none"),
    "aggregation": ("sequence", "token", "constant"),
    "reward_norm": ("group", "center", "leave_one_out", "batch", "center_batch", "none"),
    "kl_estimator": ESTIMATORS,
    "kl_in": ("loss", "reward"),
}


@dataclasses.dataclass(frozen=True)
class PolicyGradientConfig:
    """The parts of a policy-gradient loss; the defaults are GRPO's.

    Attributes:
        reward_norm: what becomes of rewards: "group" (mean 0, deviation 1 in the group of a
            prompt; GRPO), "center" (mean 0; Dr.GRPO), "leave_one_out" (relative to the mean of the
            others; RLOO), "batch" (a return per token, whitened over the rollout's tokens;
            REINFORCE++), "center_batch" ("center", then whitened likewise) or "none".
        ratio: whose probabilities `rho` compares: "token", "sequence" (the whole response),
            "geometric" (the geometric mean over its tokens; GSPO) or "geometric_token" (the same
            number, with the gradient of each token's own; GSPO-token).
        clip: "ppo", `max(-A rho, -A clip(rho))`; "cispo", `-sg(clip(rho)) A log pi`; "log", each
            token's log-ratio is stopped at the bound that A pushes it to, before they are joined
            (GMPO); "none", `-A rho`.
        clip_low: rho is clipped to `[1 - clip_low, 1 + clip_high]`, with "log" a token's log-ratio
            to `[-clip_low, clip_high]`.
        clip_high: see `clip_low`.
        dual_clip: for negative A, "ppo" gives at most `-A dual_clip`; 0: no such bound.
        aggregation: "sequence" (mean over tokens, then over responses), "token" (mean over all
            tokens) or "constant" (sum over tokens by `length`, mean over responses; Dr.GRPO).
        length: tokens that "constant" divides by; 0: as many as a response may have.
        kl_coef: of the penalty for leaving the reference; 0: there is none.
        kl_estimator: "k1", "k2" or "k3", see `kl.kl_estimate`.
        kl_in: whether the penalty is part of the "loss", or of the "reward", where it is taken of
            the policy that sampled and comes before `reward_norm`.
        entropy_coef: of a bonus for entropy, estimated from the sampled tokens alone: on policy
            the expected gradient of `(log pi)^2 / 2` is that of minus the entropy of each token.
        mask_truncated: leave out responses that were cut at the limit (DAPO's overlong filtering);
            their rewards still count in their group.
        overlong_buffer: tokens before the limit over which `overlong_penalty` sets in; 0: none.
        overlong_penalty: taken from the reward of a response that reaches the limit.
    """

    reward_norm: str = "group"
    ratio: str = "token"
    clip: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    aggregation: str = "sequence"
    length: int = 0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_in: str = "loss"
    entropy_coef: float = 0.0
    mask_truncated: bool = False
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0

    def __post_init__(self):
        for field, known in _KNOWN.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"loss.{field}={getattr(self, field)!r} is not known: use one of {known}"
                )
        for field in (
            *("kl_coef", "entropy_coef", "clip_low", "clip_high"),
            *("length", "overlong_buffer", "overlong_penalty"),
        ):
            if getattr(self, field) < 0:
                raise ValueError(f"loss.{field}={getattr(self, field)} must not be negative")
        if self.clip in ("ppo", "cispo") and self.clip_low > 1.0:
            raise ValueError(
                f"loss.clip_low={self.clip_low} must be at most 1: ratios are positive"
            )
        if self.dual_clip and (self.dual_clip <= 1.0 + self.clip_high or self.clip != "ppo"):
            raise ValueError(
                f"loss.dual_clip={self.dual_clip} must be 0, or with clip='ppo' above 1 + clip_high"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are read."""
        return self.kl_coef > 0.0

    @property
    def token_advantages(self) -> bool:
        """Whether advantages are `[B, T]`, not `[B]`."""
        return self.reward_norm in ("batch", "center_batch")


def policy_gradient_advantages(
    config: PolicyGradientConfig,
    reward: jax.Array,
    *,
    group_size: int,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    truncated: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Advantages of a whole rollout, and the tokens to learn from.

    Args:
        config: the choices.
        reward: `[B]`, as judged; samples of one prompt adjacent.
        group_size: samples per prompt.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        ref_logprobs: `[B, T]` float32 of the reference.
        mask: `[B, T]`, 1 on response tokens; T is the number that a response may have.
        truncated: `[B]` bool, responses that were cut there.

    Returns:
        Float32 advantages, `[B, T]` where `config.token_advantages`, else `[B]`; and `[B, T]` bool.

    Raises:
        ValueError: if shapes do not fit.
    """
    check_shapes(
        mask,
        per_token={"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs},
        per_response={"reward": reward, "truncated": truncated},
    )
    mask, reward = mask.astype(bool), reward.astype(jnp.float32)
    learned = mask & ~truncated[:, None] if config.mask_truncated else mask
    if config.overlong_buffer:
        punishment = overlong_punishment(mask.sum(axis=1), mask.shape[1], config.overlong_buffer)
        reward = reward + config.overlong_penalty * punishment
    penalty = jnp.zeros(mask.shape, jnp.float32)
    if config.kl_in == "reward" and config.needs_reference:
        delta = jnp.where(mask, old_logprobs - ref_logprobs, 0.0)
        penalty = config.kl_coef * kl_estimate(delta, config.kl_estimator)
    if config.reward_norm == "batch":
        to_come = jnp.flip(jnp.cumsum(jnp.flip(penalty, axis=1), axis=1), axis=1)
        return whiten(reward[:, None] - to_come, learned), learned
    reward = reward - penalty.sum(axis=1)
    if config.reward_norm == "center_batch":
        centred = group_center(reward, group_size)[:, None]
        return whiten(jnp.broadcast_to(centred, mask.shape), learned), learned
    if config.reward_norm == "leave_one_out":
        return leave_one_out(reward, group_size), learned
    return normalize_rewards(reward, group_size, config.reward_norm), learned


def _join(log_ratio: jax.Array, mask: jax.Array, level: str) -> jax.Array:
    """The log-ratio that each token is weighed by, `[B, T]`, from the tokens' own (0 if masked)."""
    if level == "token":
        return log_ratio
    joined = log_ratio.sum(axis=1, keepdims=True)
    if level != "sequence":
        joined /= jnp.maximum(mask.astype(jnp.float32).sum(axis=1, keepdims=True), 1.0)
    if level == "geometric_token":
        return jax.lax.stop_gradient(joined) + log_ratio - jax.lax.stop_gradient(log_ratio)
    return jnp.broadcast_to(joined, log_ratio.shape)


def _surrogate(
    logprobs: jax.Array,
    log_ratio: jax.Array,
    advantage: jax.Array,
    mask: jax.Array,
    config: PolicyGradientConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, ratio before clipping and whether a bound was met, `[B, T]` each."""
    low, high = config.clip_low, config.clip_high
    ratio_of = lambda x: jnp.exp(  # noqa: E731
        jnp.clip(_join(x, mask, config.ratio), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    )
    ratio = ratio_of(log_ratio)
    if config.clip == "log":
        # A positive advantage pushes a token up, so that only the upper bound can stop it.
        stopped = jnp.where(
            advantage >= 0.0, jnp.minimum(log_ratio, high), jnp.maximum(log_ratio, -low)
        )
        return -advantage * ratio_of(stopped), ratio, stopped != log_ratio
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    if config.clip == "cispo":
        weight = jax.lax.stop_gradient(clipped)
        return -weight * advantage * logprobs, ratio, clipped != ratio
    if config.clip == "none":
        return -advantage * ratio, ratio, jnp.zeros_like(mask)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped)
    bound = -advantage * clipped > -advantage * ratio
    if config.dual_clip:
        most = jnp.where(advantage < 0.0, -advantage * config.dual_clip, jnp.inf)
        bound |= loss > most
        loss = jnp.minimum(loss, most)
    return loss, ratio, bound


def policy_gradient_loss(
    *,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    old_logprobs: jax.Array,
    reward: jax.Array,
    mask: jax.Array,
    config: PolicyGradientConfig,
    correction: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of each response token, not yet averaged.

    Args:
        logprobs: `[B, T]` float32 of the policy being trained; carries the gradient.
        ref_logprobs: `[B, T]` float32 of the reference.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        reward: `[B]` or `[B, T]` float32, from `policy_gradient_advantages`.
        mask: `[B, T]`, 1 on the tokens to learn from. Values where it is 0 never matter.
        config: the choices.
        correction: `[B, T]` or `[B]` float32, `correction_weights` of tokens or of whole responses;
            None: all 1. They spare penalty and bonus, and the metrics know nothing of them.

    Returns:
        `[B, T]` float32 losses (0 where masked), and scalar metrics (means over responses of
        means over their tokens; names ending in `_max` are maxima).

    Raises:
        ValueError: if shapes do not fit.
    """
    per_token = {"ref_logprobs": ref_logprobs, "old_logprobs": old_logprobs, "mask": mask}
    per_response = {}
    weights = {"reward": reward} | ({} if correction is None else {"correction": correction})
    for name, array in weights.items():
        (per_token if array.ndim == 2 else per_response)[name] = array
    check_shapes(logprobs, per_token=per_token, per_response=per_response)
    mask = mask.astype(bool)
    logprobs = jnp.where(mask, logprobs, 0.0)
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    advantage = jnp.where(mask, reward if reward.ndim == 2 else reward[:, None], 0.0)
    loss, ratio, bound = _surrogate(logprobs, log_ratio, advantage, mask, config)
    if correction is not None:
        correction = jax.lax.stop_gradient(correction)
        loss *= correction if correction.ndim == 2 else correction[:, None]
    if config.needs_reference and config.kl_in == "loss":
        delta = jnp.where(mask, logprobs - ref_logprobs, 0.0)
        loss += config.kl_coef * kl_estimate(delta, config.kl_estimator)
    if config.entropy_coef:
        loss += config.entropy_coef * 0.5 * logprobs**2
    metrics = {
        "ratio": jnp.mean(masked_mean(ratio, mask, axis=1)),
        "ratio_clipped": jnp.mean(masked_mean(bound.astype(jnp.float32), mask, axis=1)),
        "ratio_max": jnp.max(jnp.where(mask, ratio, 0.0)),
    }
    metrics = jax.tree.map(jax.lax.stop_gradient, metrics)
    return jnp.where(mask, loss, 0.0), metrics


def aggregate_responses(
    loss: jax.Array, mask: jax.Array, config: PolicyGradientConfig
) -> tuple[jax.Array, jax.Array]:
    """Splits the mean of token losses into sums and denominators, as `grpo.aggregate_tokens`.

    A response without a token to learn from counts in no mean; "constant" is no mean over tokens
    and counts it.

    Args:
        loss: `[B, T]` float32.
        mask: `[B, T]`, 1 on the tokens to learn from.
        config: names the aggregation.

    Returns:
        `[B]` numerators and `[B]` denominators.
    """
    if config.aggregation == "constant":
        length = float(config.length or mask.shape[1])
        return masked_sum(loss, mask, axis=1) / length, jnp.ones(loss.shape[0], jnp.float32)
    total, weight = aggregate_tokens(loss, mask, config.aggregation)
    return total, weight * mask.any(axis=1)
