"""The FlowRL objective: trajectory balance with length normalisation and importance weights.

With `d` the response's log-ratio to the reference, `n` its length and `r` its reward,

    residual = log Z(x) + d / n - beta r(x, y)          loss = w residual^2

Source: arXiv 2509.15207, equation of section 3, and three releases that differ from it and from
each other; `docs/objective.md` lists how. The switches of `FlowRLConfig` cover all of them, and the
rest of the family: trajectory balance, that of other divergences, GVPO and GFlowRL.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_sum
from flowrl_jax.objectives.divergence import DIVERGENCES, divergence_loss, group_constant
from flowrl_jax.objectives.log_z import GROUP_KINDS, LogZConfig
from flowrl_jax.objectives.shapes import check_shapes

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class FlowRLConfig:
    """Switches of the FlowRL objective; the defaults are the paper's.

    Attributes:
        beta: inverse temperature of the reward, in nats per unit of (normalised) reward. The
            released code hard-codes 15.
        weight: the detached importance weight `pi / pi_old` of a whole response: "two_sided"
            clips it to `[1 - clip_low, 1 + clip_high]` (paper), "max" to at most `weight_max`
            (verl recipe), "none" leaves it unclipped (first release), "unit" replaces it by 1,
            "geometric" clips the geometric mean of the tokens' ratios like "two_sided".
        clip_low: used by "two_sided" and "geometric".
        clip_high: used by "two_sided" and "geometric".
        weight_max: used by "max".
        length_normalize: divide the log-ratio to the reference by the response's length. Without
            it the zero of the loss is `pi_ref exp(beta r) / Z`, the target of trajectory balance.
        reward_norm: "group" (mean 0, deviation 1 in the group of a prompt), "center" or "none".
        reference: what the log-ratio is to: the "reference", or the "old" policy that sampled.
        divergence: what a residual costs: "reverse_kl", its square; "forward_kl" or
            "jensen_shannon", see `divergence`.
        gap_low: the residual that a response had when it was sampled is clipped to
            `[-gap_low, gap_high]` (GFlowRL); both 0: it is not.
        gap_high: see `gap_low`.
        log_z: where log Z comes from.
    """

    beta: float = 15.0
    weight: str = "two_sided"
    clip_low: float = 0.2
    clip_high: float = 0.2
    weight_max: float = 10.0
    length_normalize: bool = True
    reward_norm: str = "group"
    reference: str = "reference"
    divergence: str = "reverse_kl"
    gap_low: float = 0.0
    gap_high: float = 0.0
    log_z: LogZConfig = LogZConfig()

    def __post_init__(self):
        for field, known in (
            ("weight", ("two_sided", "max", "none", "unit", "geometric")),
            ("reward_norm", ("group", "center", "none")),
            ("reference", ("reference", "old")),
            ("divergence", DIVERGENCES),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"loss.{field}={getattr(self, field)!r} is not known: use one of {known}"
                )
        if self.beta <= 0.0:
            raise ValueError(f"loss.beta={self.beta} must be positive")
        if not 0.0 <= self.clip_low < 1.0 or self.clip_high < 0.0:
            raise ValueError(
                f"loss.clip_low={self.clip_low} must be in [0, 1) and"
                f" loss.clip_high={self.clip_high} not negative"
            )
        if self.weight_max <= 0.0:
            raise ValueError(f"loss.weight_max={self.weight_max} must be positive")
        if min(self.gap_low, self.gap_high) < 0.0 or (self.gap_low > 0.0) != (self.gap_high > 0.0):
            raise ValueError(
                f"loss.gap_low={self.gap_low} and loss.gap_high={self.gap_high} must both be"
                " positive, or both 0 for no bounds"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are read."""
        return self.reference == "reference"

    @property
    def whole_groups(self) -> bool:
        """Whether log Z is found from all samples of a group at once."""
        found = self.log_z.kind == "table" and self.divergence != "reverse_kl"
        return found or self.log_z.kind in GROUP_KINDS


def importance_weight(log_ratio: jax.Array, config: FlowRLConfig) -> jax.Array:
    """The detached weight of a response.

    Bounds are applied to the logarithm, where nothing overflows; only "none" can reach infinity,
    as it does in the release, and then the optimiser step is skipped and counted.

    Args:
        log_ratio: `[B]` float32, `log pi(y|x) - log pi_old(y|x)`: summed over the response, or its
            mean over tokens for "geometric".
        config: names the clipping.

    Returns:
        `[B]` float32 without gradient.
    """
    return jnp.exp(_bounded(jax.lax.stop_gradient(log_ratio), config))


def sampled_log_ratio(
    logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array, config: FlowRLConfig
) -> jax.Array:
    """What `importance_weight` takes, `[B]`, from log-probabilities and mask `[B, T]`."""
    log_ratio = masked_sum(logprobs - old_logprobs, mask, axis=1)
    return log_ratio / _lengths(mask) if config.weight == "geometric" else log_ratio


def _bounded(log_ratio: jax.Array, config: FlowRLConfig) -> jax.Array:
    """The logarithm of the importance weight."""
    if config.weight == "unit":
        return jnp.zeros_like(log_ratio)
    if config.weight in ("two_sided", "geometric"):
        low, high = jnp.log1p(-config.clip_low), jnp.log1p(config.clip_high)
        return jnp.clip(log_ratio, low, high)
    if config.weight == "max":
        return jnp.minimum(log_ratio, jnp.log(config.weight_max))
    return log_ratio


def prior_logprobs(
    ref_logprobs: jax.Array, old_logprobs: jax.Array, config: FlowRLConfig
) -> jax.Array:
    """The `[B, T]` log-probabilities that the policy's are compared with: `config.reference`'s."""
    return ref_logprobs if config.needs_reference else old_logprobs


def _lengths(mask: jax.Array) -> jax.Array:
    return jnp.maximum(mask.astype(jnp.float32).sum(axis=1), 1.0)


def reference_log_ratio(
    logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array, config: FlowRLConfig
) -> jax.Array:
    """`d / n` (or `d`, without length normalisation) of each response, `[B]` float32 in nats."""
    log_ratio = masked_sum(logprobs - ref_logprobs, mask, axis=1)
    return log_ratio / _lengths(mask) if config.length_normalize else log_ratio


def log_z_target(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    reward: jax.Array,
    mask: jax.Array,
    config: FlowRLConfig,
) -> jax.Array:
    """Each sample's Monte-Carlo estimate of log Z: the value at which its residual is 0.

    Its mean over samples of the policy is `log Z - KL(policy || target)`, so it approaches log Z
    from below as training converges. Arguments as in `flowrl_loss`, `ref_logprobs` from
    `prior_logprobs`; `[B]` without gradient.
    """
    log_ratio = reference_log_ratio(logprobs, ref_logprobs, mask, config)
    return jax.lax.stop_gradient(config.beta * reward - log_ratio)


def log_z_estimate(
    *,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    old_logprobs: jax.Array,
    reward: jax.Array,
    mask: jax.Array,
    config: FlowRLConfig,
    group_size: int,
) -> jax.Array:
    """What "group" and "group_old" take for log Z, and a table moves to.

    Arguments as in `log_z_target` and `flowrl_loss`; where `config.whole_groups`, the samples of a
    prompt are adjacent. `[B]` without gradient.
    """
    if config.log_z.kind == "group_old":
        # GFlowRL's mean is of whole log-ratios, although its residual may divide them by n.
        logprobs, config = old_logprobs, dataclasses.replace(config, length_normalize=False)
    target = log_z_target(logprobs, ref_logprobs, reward, mask, config)
    return group_constant(target, group_size, config.divergence) if config.whole_groups else target


def flowrl_loss(
    *,
    log_z: jax.Array,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    old_logprobs: jax.Array,
    reward: jax.Array,
    mask: jax.Array,
    config: FlowRLConfig,
    correction: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of each response, not yet averaged.

    With the square, its gradients, for the mean over B responses, are `2 w residual mask / (B n)`
    by each log-probability and `2 w residual / B` by log Z; `w` is the importance weight times
    `correction`. Other divergences have twice their slope `l'(residual)` in place of `2 residual`.

    Args:
        log_z: `[B]` float32.
        logprobs: `[B, T]` float32 of the policy being trained; carries the gradient.
        ref_logprobs: `[B, T]` float32 of the reference; not read where this is the old policy.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        reward: `[B]` float32, already normalised as `config.reward_norm` says.
        mask: `[B, T]`, 1 on response tokens including the end-of-sequence token. Values where it
            is 0 never matter, not even NaN.
        config: switches.
        correction: `[B]` float32, `correction_weights` of whole responses; None: all 1. The
            metrics know nothing of it.

    Returns:
        `[B]` float32 losses, and scalar metrics (means over responses; `_max`: maxima).

    Raises:
        ValueError: if shapes do not fit.
    """
    check_shapes(
        logprobs,
        per_token={"ref_logprobs": ref_logprobs, "old_logprobs": old_logprobs, "mask": mask},
        per_response={"log_z": log_z, "reward": reward}
        | ({} if correction is None else {"correction": correction}),
    )
    prior = prior_logprobs(ref_logprobs, old_logprobs, config)
    flow = log_z + reference_log_ratio(logprobs, prior, mask, config)
    scaled_reward = config.beta * reward
    residual = flow - scaled_reward
    log_ratio = sampled_log_ratio(logprobs, old_logprobs, mask, config)
    weight = importance_weight(log_ratio, config)

    metrics = {
        "residual": residual,
        "residual_abs": jnp.abs(residual),
        "flow_abs": jnp.abs(flow),
        "scaled_reward_abs": jnp.abs(scaled_reward),
        "importance_weight": weight,
        "weight_clipped": jnp.abs(log_ratio - _bounded(log_ratio, config)) > 1e-6,
    }
    if config.gap_high:
        # The policy's own move since it sampled is left whole: that carries the gradient.
        moved = reference_log_ratio(logprobs, old_logprobs, mask, config)
        gap = residual - moved
        bounded = jnp.clip(gap, -config.gap_low, config.gap_high)
        metrics["gap_clipped"] = bounded != gap
        residual = bounded + moved
    metrics = {name: jnp.mean(value.astype(jnp.float32)) for name, value in metrics.items()}
    metrics["importance_weight_max"] = jnp.max(weight)
    metrics = jax.tree.map(jax.lax.stop_gradient, metrics)
    if correction is not None:
        weight = weight * jax.lax.stop_gradient(correction)
    return weight * divergence_loss(residual, config.divergence), metrics
