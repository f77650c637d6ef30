"""Sub-trajectory balance and detailed balance: a flow through every state of a response.

With V_t the log-flow through the state before token t (V_0 is log Z of the prompt, and V_n, after
the last of n tokens, is beta r) a token's residual is

    e_t = V_t + log pi_t - log pi_ref_t - V_(t+1)

Detailed balance is the mean of their squares. A window from state i to state j has the residual
e_i + ... + e_(j-1); sub-trajectory balance is the mean over all windows of their squares, weighed
by lam^(j - i): towards 0 that is detailed balance, towards infinity trajectory balance, which is
the longest window alone. All are 0 where pi = pi_ref exp(beta r) / Z and
V_t = log E_ref[exp(beta r) | state t]. Sources: arXiv 2111.09266, arXiv 2209.12782.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flowrl_jax.masking import masked_mean, masked_sum
from flowrl_jax.objectives.flowrl import FlowRLConfig, Metrics, importance_weight
from flowrl_jax.objectives.shapes import check_shapes
from flowrl_jax.objectives.values import ValueConfig, next_values


@dataclasses.dataclass(frozen=True)
class SubTBConfig:
    """Switches of balance over windows.

    Attributes:
        kind: "subtb" (all windows of a response) or "detailed_balance" (single tokens).
        beta: inverse temperature of the reward, in nats per unit of (normalised) reward.
        lam: a window of k tokens weighs `lam^k`; any positive number.
        weight: the detached importance weight of a response: "max", "none" or "unit", see
            `FlowRLConfig`.
        weight_max: used by "max".
        reward_norm: "group", "center" or "none".
        value: the head that gives the log-flows.
    """

    kind: str = "subtb"
    beta: float = 1.0
    lam: float = 1.0
    weight: str = "max"
    weight_max: float = 10.0
    reward_norm: str = "none"
    value: ValueConfig = ValueConfig()

    def __post_init__(self):
        for field, known in (
            ("kind", ("subtb", "detailed_balance")),
            ("weight", ("max", "none", "unit")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"loss.{field}={getattr(self, field)!r} is not known: use one of {known}"
                )
        if self.lam <= 0.0:
            raise ValueError(
                f"loss.lam={self.lam} must be positive: for single tokens set"
                " loss.kind='detailed_balance'"
            )
        _ = self.balance  # checks the fields that it is made of

    @property
    def balance(self) -> FlowRLConfig:
        """Trajectory balance with the same reward and importance weight."""
        return FlowRLConfig(
            beta=self.beta,
            weight=self.weight,
            weight_max=self.weight_max,
            length_normalize=False,
            reward_norm=self.reward_norm,
        )


def window_loss(residual: jax.Array, mask: jax.Array, lam: float) -> jax.Array:
    """Mean of the squared residuals of all windows, in one pass over the tokens.

    For the windows that end with the token at hand it keeps the sums of their weights, of their
    weighted residuals and of their weighted squares.

    Args:
        residual: `[B, T]` float32, of each token.
        mask: `[B, T]` bool, true on response tokens; others are passed over. What lies there never
            matters.
        lam: a window of k tokens weighs `lam^k`.

    Returns:
        `[B]` float32; 0 for a response without tokens.
    """
    # Relative to the longest window's weight; a window of one token weighs 1, not lam.
    shrink = 1.0 / max(lam, 1.0)
    grow = lam * shrink
    residual = jnp.where(mask, residual, 0.0)
    zero = jnp.zeros_like(residual[:, 0])

    def step(carry, token):
        unit, weights, sums, squares, loss, weight = carry
        e, counts = token
        # All windows grow by the token, and one of it alone begins.
        squares = grow * (squares + 2.0 * e * sums + e**2 * weights) + unit * e**2
        sums = grow * (sums + e * weights) + unit * e
        weights = grow * weights + unit
        totals = (shrink * loss + squares, shrink * weight + weights)
        new = (shrink * unit, weights, sums, squares, *totals)
        return tuple(jnp.where(counts, a, b) for a, b in zip(new, carry, strict=True)), None

    start = (zero + 1.0, zero, zero, zero, zero, zero)
    (*_, loss, weight), _ = jax.lax.scan(step, start, (residual.T, mask.T))
    return loss / jnp.where(weight > 0.0, weight, 1.0)


def subtb_loss(
    *,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    old_logprobs: jax.Array,
    reward: jax.Array,
    mask: jax.Array,
    values: jax.Array,
    config: SubTBConfig,
    correction: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss of each response, not yet averaged.

    Args:
        logprobs: `[B, T]` float32 of the policy being trained; carries the gradient.
        ref_logprobs: `[B, T]` float32 of the reference.
        old_logprobs: `[B, T]` float32 of the policy that sampled.
        reward: `[B]` float32, already normalised as `config.reward_norm` says.
        mask: `[B, T]`, 1 on response tokens including the end-of-sequence token. Values where it
            is 0 never matter, not even NaN.
        values: `[B, T]` float32, the log-flow before each token; carries the gradient.
        config: switches.
        correction: `[B]` float32, `correction_weights` of whole responses; None: all 1. The
            metrics know nothing of it.

    Returns:
        `[B]` float32 losses, and scalar metrics (means over the B responses; names ending in
        `_max` are maxima).

    Raises:
        ValueError: if shapes do not fit.
    """
    per_token = {"ref_logprobs": ref_logprobs, "old_logprobs": old_logprobs, "mask": mask}
    check_shapes(
        logprobs,
        per_token=per_token | {"values": values},
        per_response={"reward": reward}
        | ({} if correction is None else {"correction": correction}),
    )
    mask = mask.astype(bool)
    after = next_values(values, mask, (config.beta * reward).astype(values.dtype))
    before = jnp.where(mask, values, 0.0)
    flow = jnp.where(mask, before + (logprobs - ref_logprobs) - after, 0.0)
    if config.kind == "subtb":
        loss = window_loss(flow, mask, config.lam)
    else:
        loss = masked_mean(flow**2, mask, axis=1)
    weight = importance_weight(masked_sum(logprobs - old_logprobs, mask, axis=1), config.balance)
    metrics = {
        "residual": flow.sum(axis=1),
        "residual_abs": jnp.abs(flow.sum(axis=1)),
        "token_residual_abs": masked_mean(jnp.abs(flow), mask, axis=1),
        "importance_weight": weight,
    }
    metrics = {name: jnp.mean(value) for name, value in metrics.items()}
    metrics["importance_weight_max"] = jnp.max(weight)
    metrics = jax.lax.stop_gradient(metrics)
    if correction is not None:
        weight = weight * jax.lax.stop_gradient(correction)
    return weight * loss, metrics
