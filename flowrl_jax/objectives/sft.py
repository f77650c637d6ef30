"""Supervised fine-tuning: the negative log-likelihood of demonstrations."""

import dataclasses

import jax
import jax.numpy as jnp

from flowrl_jax.objectives.flowrl import Metrics


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning has no switch; every response token of the batch weighs the same.

    Attributes:
        reward_norm: demonstrations have no reward; always "none".
    """

    reward_norm: str = "none"

    def __post_init__(self):
        if self.reward_norm != "none":
            raise ValueError(f"loss.reward_norm={self.reward_norm!r} must be 'none' in fine-tuning")


def sft_loss(*, logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, Metrics]:
    """The loss of each response token, not yet averaged.

    Args:
        logprobs: `[B, T]` float32 of the policy being trained; carries the gradient.
        mask: `[B, T]`, 1 on demonstration tokens including the end-of-sequence token.

    Returns:
        `[B, T]` float32 in nats (0 where masked), and no metrics: the mean is the loss itself.
    """
    return jnp.where(mask.astype(bool), -logprobs, 0.0), {}
