"""Objectives: what a rollout's log-probabilities and rewards say about the policy.

Every objective is one file with a frozen config and a pure loss. `OBJECTIVES` is the seam to the
trainer: a new algorithm is one file and one entry here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowrl_jax.objectives.advantages import normalize_rewards
from flowrl_jax.objectives.correction import PER_RESPONSE, PER_TOKEN, CorrectionConfig
from flowrl_jax.objectives.flowrl import FlowRLConfig, Metrics, flowrl_loss
from flowrl_jax.objectives.grpo import GRPOConfig, aggregate_tokens, grpo_loss
from flowrl_jax.objectives.policy_gradient import (
    PolicyGradientConfig,
    aggregate_responses,
    policy_gradient_advantages,
    policy_gradient_loss,
)
from flowrl_jax.objectives.ppo import PPOConfig, ppo_advantages, ppo_loss, ppo_returns
from flowrl_jax.objectives.sft import SFTConfig, sft_loss
from flowrl_jax.objectives.subtb import SubTBConfig, subtb_loss

# Numerator and denominator of the loss, `[B]` float32 each, and scalar metrics. They travel apart
# and are divided once, over the global batch, so that no cut of the batch changes the result.
LossTerms = tuple[jax.Array, jax.Array, Metrics]


def _normalized(
    config: Any, reward: jax.Array, *, group_size: int, mask: jax.Array, **arrays
) -> tuple[jax.Array, jax.Array]:
    """Rewards normalised as `config.reward_norm` says; every token is learned from."""
    del arrays
    return normalize_rewards(reward, group_size, config.reward_norm), mask


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the trainer knows of an algorithm.

    Attributes:
        config_class: its frozen config; has a `reward_norm` field.
        terms: `(config, *, log_z, logprobs, ref_logprobs, old_logprobs, reward, mask, correction)`
            to `LossTerms`; shapes as in `flowrl_loss`.
        needs_reference: whether this config reads `ref_logprobs`.
        corrections: kinds of `CorrectionConfig`, "none" aside, whose weights the loss can take.
        advantages: from a rollout's rewards to what `terms` takes for `reward`, and the mask of
            the tokens to learn from; arguments as in `policy_gradient_advantages`.
        token_advantages: whether this config's advantages are `[B, T]`, not `[B]`.
        needs_values: whether this config has a value head, settings of which are its field
            `value`. `terms` is then given `values`, `old_values` and `returns` as well, `[B, T]`
            each, and `advantages` the `values` as they were when the responses were sampled.
        returns: what the values are to become, arguments as in `ppo_returns`; None: the objective
            reads no values of the time of sampling, and is given None for them and for `returns`.
    """

    config_class: type
    terms: Callable[..., LossTerms]
    needs_reference: Callable[[Any], bool]
    corrections: tuple[str, ...] = ()
    advantages: Callable[..., tuple[jax.Array, jax.Array]] = _normalized
    token_advantages: Callable[[Any], bool] = lambda config: False
    needs_values: Callable[[Any], bool] = lambda config: False
    returns: Callable[..., jax.Array] | None = None


def _flowrl_terms(config: FlowRLConfig, **arrays) -> LossTerms:
    loss, metrics = flowrl_loss(config=config, **arrays)
    return loss, jnp.ones_like(loss), metrics


def _grpo_terms(config: GRPOConfig, *, log_z, mask, **arrays) -> LossTerms:
    del log_z
    loss, metrics = grpo_loss(config=config, mask=mask, **arrays)
    return *aggregate_tokens(loss, mask, config.aggregation), metrics


def _policy_gradient_terms(config: PolicyGradientConfig, *, log_z, mask, **arrays) -> LossTerms:
    del log_z
    loss, metrics = policy_gradient_loss(config=config, mask=mask, **arrays)
    return *aggregate_responses(loss, mask, config), metrics


def _ppo_terms(config: PPOConfig, *, log_z, mask, **arrays) -> LossTerms:
    del log_z
    loss, metrics = ppo_loss(config=config, mask=mask, **arrays)
    return *aggregate_tokens(loss, mask, "token"), metrics


def _subtb_terms(config: SubTBConfig, *, log_z, old_values, returns, **arrays) -> LossTerms:
    del log_z, old_values, returns
    loss, metrics = subtb_loss(config=config, **arrays)
    return loss, jnp.ones_like(loss), metrics


def _sft_terms(config: SFTConfig, *, logprobs, mask, **arrays) -> LossTerms:
    del config, arrays
    loss, metrics = sft_loss(logprobs=logprobs, mask=mask)
    return *aggregate_tokens(loss, mask, "token"), metrics


OBJECTIVES: dict[str, Objective] = {
    "flowrl": Objective(
        FlowRLConfig, _flowrl_terms, lambda config: config.needs_reference, PER_RESPONSE
    ),
    "grpo": Objective(
        GRPOConfig, _grpo_terms, lambda config: config.kl_coef > 0.0, PER_TOKEN + PER_RESPONSE
    ),
    "policy_gradient": Objective(
        PolicyGradientConfig,
        _policy_gradient_terms,
        lambda config: config.needs_reference,
        PER_TOKEN + PER_RESPONSE,
        policy_gradient_advantages,
        lambda config: config.token_advantages,
    ),
    "ppo": Objective(
        PPOConfig,
        _ppo_terms,
        lambda config: config.kl_coef > 0.0,
        PER_TOKEN + PER_RESPONSE,
        ppo_advantages,
        token_advantages=lambda config: True,
        needs_values=lambda config: True,
        returns=ppo_returns,
    ),
    "subtb": Objective(
        SubTBConfig,
        _subtb_terms,
        lambda config: True,
        PER_RESPONSE,
        needs_values=lambda config: True,
    ),
    "sft": Objective(SFTConfig, _sft_terms, lambda config: False),
}


def objective_of(config: Any) -> Objective:
    """The objective that a config belongs to.

    Raises:
        TypeError: if no objective has this kind of config.
    """
    for objective in OBJECTIVES.values():
        if type(config) is objective.config_class:
            return objective
    raise TypeError(f"{type(config).__name__} is the config of no objective in OBJECTIVES")


def balance_of(config: Any) -> FlowRLConfig | None:
    """The trajectory balance whose log Z a config's objective has; None: it has no log Z.

    Args:
        config: of the objective.
    """
    if isinstance(config, SubTBConfig):
        return config.balance
    return config if isinstance(config, FlowRLConfig) else None


def for_length(config: Any, max_response_length: int) -> Any:
    """A config whose loss knows how long responses may be, whatever a batch is cut to.

    Args:
        config: of the objective.
        max_response_length: tokens that a response may have.
    """
    if isinstance(config, PolicyGradientConfig) and not config.length:
        return dataclasses.replace(config, length=max_response_length)
    return config


def check_correction(config: Any, correction: CorrectionConfig) -> None:
    """Refuses weights that an objective's loss cannot take.

    Args:
        config: of the objective.
        correction: names the weights.

    Raises:
        ValueError: with the kind, the reason and the kinds that are left.
    """
    known = ("none", *objective_of(config).corrections)
    if correction.kind in known:
        return
    name = next(name for name, found in OBJECTIVES.items() if type(config) is found.config_class)
    reason = "one number per response and no sum over tokens, which could be weighed one by one"
    if len(known) == 1:
        reason = "of demonstrations, which no policy sampled"
    raise ValueError(
        f"rollout.correction.kind={correction.kind!r} does not fit loss.objective={name!r}, whose"
        f" loss is {reason}: use one of {known}"
    )
