"""PPO: clipped policy gradient whose advantages come from a learned value of each state.

With r_t the reward of token t and V_t the value of the state before it, as the head gave it when
the response was sampled (V is 0 after the last token),

    delta_t = r_t + gamma V_(t+1) - V_t      A_t = delta_t + gamma lam A_(t+1)
    return_t = A_t + V_t                     loss of V: max((V - return)^2, (V' - return)^2) / 2

and V' is V no further than `value_clip` from what it was. Sources: arXiv 1707.06347, arXiv
1506.02438; defaults as in verl.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_mean
from flowrl_jax.objectives.advantages import whiten
from flowrl_jax.objectives.flowrl import Metrics
from flowrl_jax.objectives.kl import kl_estimate
from flowrl_jax.objectives.policy_gradient import PolicyGradientConfig, policy_gradient_loss
from flowrl_jax.objectives.shapes import check_shapes
from flowrl_jax.objectives.values import ValueConfig, last_token, next_values


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """Switches of PPO; the defaults are verl's, but for its dual clip.

    Attributes:
        clip_low: a token's ratio is clipped to `[1 - clip_low, 1 + clip_high]`.
        clip_high: see `clip_low`.
        dual_clip: the loss for a negative advantage A is at most `-A dual_clip`; 0: no such bound.
        gamma: discount of what comes a token later.
        lam: of generalised advantage estimation; 1: what came minus the value, 0: one step ahead.
        value_clip: how far a value may move from the one at sampling before its loss stops
            rewarding it; 0: as far as it likes.
        value_coef: of the value's loss.
        kl_coef: of the penalty for leaving the reference: k1 of each token, taken from its reward.
        entropy_coef: of a bonus for entropy, see `PolicyGradientConfig`.
        reward_norm: rewards are taken as they are and advantages whitened; always "none".
        value: the head.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    gamma: float = 1.0
    lam: float = 1.0
    value_clip: float = 0.5
    value_coef: float = 1.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    reward_norm: str = "none"
    value: ValueConfig = ValueConfig()

    def __post_init__(self):
        _ = self.policy_loss  # checks the fields that it is made of
        for field in ("gamma", "lam"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"loss.{field}={getattr(self, field)} must be in [0, 1]")
        for field in ("value_clip", "value_coef"):
            if getattr(self, field) < 0.0:
                raise ValueError(f"loss.{field}={getattr(self, field)} must not be negative")
        if self.reward_norm != "none":
            raise ValueError(
                f"loss.reward_norm={self.reward_norm!r} must be 'none' in PPO: the values are its"
                " baseline"
            )

    @property
    def policy_loss(self) -> PolicyGradientConfig:
        """The policy's part of the loss."""
        return PolicyGradientConfig(
            reward_norm="none",
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            aggregation="token",
            kl_coef=self.kl_coef,
            kl_estimator="k1",
            kl_in="reward",
            entropy_coef=self.entropy_coef,
        )


def generalized_advantages(
    reward: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> jax.Array:
    """Advantage of each token; a token that the mask leaves out is passed over.

    Args:
        reward: `[B, T]` float32, of each token.
        values: `[B, T]` float32, of the state before each token; after the last one it is 0.
        mask: `[B, T]` bool, true on response tokens. What lies elsewhere never matters.
        gamma: discount.
        lam: weight of what lies further ahead.

    Returns:
        `[B, T]` float32, 0 where masked.
    """
    after = next_values(values, mask, jnp.zeros_like(values[:, 0]))
    delta = jnp.where(mask, reward + gamma * after - values, 0.0)

    def step(ahead, token):
        delta, counts = token
        ahead = jnp.where(counts, delta + gamma * lam * ahead, ahead)
        return ahead, ahead

    start = jnp.zeros_like(delta[:, 0])
    _, advantage = jax.lax.scan(step, start, (delta.T, mask.T), reverse=True)
    return jnp.where(mask, advantage.T, 0.0)


def _advantages(config: PPOConfig, reward, old_logprobs, ref_logprobs, mask, values) -> jax.Array:
    """Advantages before they are whitened, `[B, T]`."""
    check_shapes(
        values,
        per_token={"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "mask": mask},
        per_response={"reward": reward},
    )
    mask = mask.astype(bool)
    of_token = jnp.where(last_token(mask), reward[:, None], 0.0)
    if config.kl_coef:
        delta = jnp.where(mask, old_logprobs - ref_logprobs, 0.0)
        of_token -= config.kl_coef * kl_estimate(delta, "k1")
    return generalized_advantages(of_token, values, mask, gamma=config.gamma, lam=config.lam)


def ppo_advantages(
    config: PPOConfig,
    reward: jax.Array,
    *,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    values: jax.Array,
    **unread,
) -> tuple[jax.Array, jax.Array]:
    """Advantages of a whole rollout, and the tokens to learn from.

    Args:
        config: the choices.
        reward: `[B]`, as judged; it belongs to the last token.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        ref_logprobs: `[B, T]` float32 of the reference.
        mask: `[B, T]`, 1 on response tokens.
        values: `[B, T]` float32, as the head gave them when the response was sampled.
        unread: what other objectives ask for.

    Returns:
        `[B, T]` float32 advantages, whitened over all tokens of the rollout; and `[B, T]` bool.

    Raises:
        ValueError: if shapes do not fit.
    """
    del unread
    advantage = _advantages(config, reward, old_logprobs, ref_logprobs, mask, values)
    return whiten(advantage, mask), mask.astype(bool)


def ppo_returns(
    config: PPOConfig,
    reward: jax.Array,
    *,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    values: jax.Array,
) -> jax.Array:
    """What the values are to become: advantages before whitening plus the values at sampling.

    Arguments as in `ppo_advantages`.

    Returns:
        `[B, T]` float32, 0 where masked.

    Raises:
        ValueError: if shapes do not fit.
    """
    advantage = _advantages(config, reward, old_logprobs, ref_logprobs, mask, values)
    return advantage + jnp.where(mask.astype(bool), values, 0.0)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array]:
    """Half the squared error of each value, at least that of the value held near the old one.

    Args:
        values: `[B, T]` float32; carries the gradient.
        old_values: `[B, T]` float32, as the head gave them when the response was sampled.
        returns: `[B, T]` float32, from `ppo_returns`.
        mask: `[B, T]`, 1 on the tokens to learn from. Values where it is 0 never matter.
        clip: how far from the old value is near; 0: no bound.

    Returns:
        `[B, T]` float32 losses (0 where masked), and `[B, T]` bool, where the bound decided.
    """
    mask = mask.astype(bool)
    zeroed = (jnp.where(mask, x, 0.0) for x in (values, old_values, returns))
    values, old_values, returns = zeroed
    loss = (values - returns) ** 2
    if not clip:
        return 0.5 * loss, jnp.zeros_like(mask)
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    held = (near - returns) ** 2
    return 0.5 * jnp.maximum(loss, held), held > loss


def ppo_loss(
    *,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    old_logprobs: jax.Array,
    reward: jax.Array,
    mask: jax.Array,
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    config: PPOConfig,
    correction: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of each response token, not yet averaged: the policy's and the value's.

    Args:
        logprobs: `[B, T]` float32 of the policy being trained; carries the gradient.
        ref_logprobs: `[B, T]` float32 of the reference.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        reward: `[B, T]` float32, the advantages of `ppo_advantages`.
        mask: `[B, T]`, 1 on the tokens to learn from. Values where it is 0 never matter.
        values: `[B, T]` float32 of the head being trained; carries the gradient.
        old_values: `[B, T]` float32, as the head gave them when the response was sampled.
        returns: `[B, T]` float32, from `ppo_returns`.
        config: the choices.
        correction: `[B, T]` or `[B]` float32, `correction_weights` of tokens or of whole responses;
            None: all 1. They weigh the policy's loss alone.

    Returns:
        `[B, T]` float32 losses (0 where masked), and scalar metrics (means over responses of
        means over their tokens; names ending in `_max` are maxima).

    Raises:
        ValueError: if shapes do not fit.
    """
    check_shapes(
        logprobs,
        per_token={"values": values, "old_values": old_values, "returns": returns},
        per_response={},
    )
    loss, metrics = policy_gradient_loss(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        old_logprobs=old_logprobs,
        reward=reward,
        mask=mask,
        config=config.policy_loss,
        correction=correction,
    )
    of_value, held = value_loss(values, old_values, returns, mask, config.value_clip)
    seen = {"value_loss": of_value, "value": values, "value_clipped": held.astype(jnp.float32)}
    means = {name: jnp.mean(masked_mean(x, mask, axis=1)) for name, x in seen.items()}
    return loss + config.value_coef * of_value, metrics | jax.lax.stop_gradient(means)
