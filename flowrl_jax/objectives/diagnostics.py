"""What an optimiser step says about itself, exact however its rows are cut.

A step is computed in micro-batches of equally many rows. Most metrics are means over rows, so that
the mean over micro-batches is the mean over the step; names that end in `_max` are maxima. What is
neither comes as a `Quotient` or an `EffectiveShare`, which carry the sums they are made of, or as
`LogZRows`, which carries the rows themselves; `merge` puts all of them together.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_sum
from flowrl_jax.objectives.flowrl import FlowRLConfig, importance_weight, sampled_log_ratio
from flowrl_jax.objectives.grpo import MAX_LOG_RATIO
from flowrl_jax.objectives.sft import SFTConfig


@flax.struct.dataclass
class Quotient:
    """One sum over another, each over the same rows.

    Attributes:
        top: scalar float32, of some rows.
        bottom: scalar float32, not negative.
    """

    top: jax.Array
    bottom: jax.Array

    def value(self) -> jax.Array:
        """The quotient; infinite where there is nothing to compare with, whatever the upper sum.

        (Else rounding, which makes an upper sum of 0 a small number, would decide.)
        """
        nothing = self.bottom == 0.0
        return jnp.where(nothing, jnp.inf, self.top / jnp.where(nothing, 1.0, self.bottom))


@flax.struct.dataclass
class EffectiveShare:
    """Effective sample size of weights as a share of their number, `(sum w)² / (n sum w²)`.

    It is 1 where all weights are equal and 1 / n where one of n has it all (Kish 1965; Owen 2013,
    section 9.3).

    Attributes:
        total: scalar float32, sum of the weights of some rows.
        squares: scalar float32, sum of their squares.
        count: scalar float32, rows.
    """

    total: jax.Array
    squares: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, weight: jax.Array, counted: jax.Array) -> "EffectiveShare":
        """The sums of some rows.

        Args:
            weight: `[B]` float32, not negative.
            counted: `[B]` bool, rows that have a weight.
        """
        return cls(
            masked_sum(weight, counted),
            masked_sum(weight**2, counted),
            counted.astype(jnp.float32).sum(),
        )

    def value(self) -> jax.Array:
        """The share; 0 where all weights are 0 or there is none."""
        nothing = self.squares == 0.0
        whole = self.count * jnp.where(nothing, 1.0, self.squares)
        return jnp.where(nothing, 0.0, self.total**2 / jnp.maximum(whole, 1e-30))


@flax.struct.dataclass
class LogZRows:
    """What each row says of log Z: arrays `[B]`, which `merge` puts into one `[B, 3]` float32.

    Attributes:
        prompt_id: int32, below 2^24.
        target: float32, the sample's estimate of log Z (`log_z_target`).
        log_z: float32, what the loss used.
    """

    prompt_id: jax.Array
    target: jax.Array
    log_z: jax.Array

    def value(self) -> jax.Array:
        """The rows by prompt and estimate, so that it does not matter how they were cut."""
        columns = [
            x.reshape(-1).astype(jnp.float32) for x in (self.prompt_id, self.target, self.log_z)
        ]
        return jnp.stack(jax.lax.sort(columns, num_keys=2), axis=1)


def update_diagnostics(
    config: Any,
    metrics: dict[str, Any],
    *,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    mask: jax.Array,
) -> dict[str, Any]:
    """What every objective has in common about some rows of an optimiser step.

    Args:
        config: of the objective.
        metrics: that its loss gives of the same rows.
        logprobs: `[B, T]` float32 of the policy being trained.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        mask: `[B, T]`, 1 on the tokens that are learned from.

    Returns:
        For policies that sampled what they learn from, "ratio_ess": the effective share of the
        ratios `pi / pi_old` of whole responses, unclipped; for FlowRL also "weight_ess", of the
        weights that its loss takes, and "flow_to_reward", mean size of `log Z + d / n` over that
        of `beta r`. To be merged by `merge`.
    """
    if isinstance(config, SFTConfig):
        return {}
    counted = mask.astype(bool).any(axis=1)
    log_ratio = jax.lax.stop_gradient(masked_sum(logprobs - old_logprobs, mask, axis=1))
    bounded = jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    found: dict[str, Any] = {"ratio_ess": EffectiveShare.of(jnp.exp(bounded), counted)}
    if isinstance(config, FlowRLConfig):
        own = sampled_log_ratio(logprobs, old_logprobs, mask, config)
        weight = jnp.minimum(importance_weight(own, config), jnp.exp(MAX_LOG_RATIO))
        found["weight_ess"] = EffectiveShare.of(weight, jnp.ones_like(counted))
        found["flow_to_reward"] = Quotient(metrics["flow_abs"], metrics["scaled_reward_abs"])
    return found


def merge(seen: dict[str, Any]) -> dict[str, jax.Array]:
    """The metrics of a step from those of its micro-batches, which have equally many rows.

    Args:
        seen: by name, each with a leading axis of micro-batches.

    Returns:
        Scalars, but for `LogZRows`.
    """

    def merged(name: str, found: Any) -> jax.Array:
        if isinstance(found, LogZRows):
            return found.value()
        if isinstance(found, Quotient | EffectiveShare):
            # Sums divided by the number of micro-batches: it cancels.
            return jax.tree.map(lambda x: x.mean(axis=0), found).value()
        return found.max() if name.endswith("_max") else found.mean()

    return {name: merged(name, found) for name, found in seen.items()}
