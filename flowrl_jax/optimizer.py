"""AdamW for the policy and for log Z, each in its own group."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move.

    Attributes:
        learning_rate: peak rate of the policy.
        log_z_learning_rate: peak rate of log Z; 0 means the policy's, as released.
        schedule: "constant", "linear" or "cosine" (to 0 at the last rollout step), after warm-up.
        warmup_steps: rollout steps over which the rate rises linearly. Step k (from 0) has
            `(k + 1) / warmup_steps` of it; the released code has `k / 10`, an idle first step.
        b1: AdamW's decay of the first moment.
        b2: AdamW's decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on all parameters, as released.
        clip_norm: largest global norm of the gradient; 0 does not clip.
        clip_jointly: whether one norm is taken over policy and log Z together, as released, or
            one over each.
    """

    learning_rate: float = 1e-6
    log_z_learning_rate: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 10
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    clip_jointly: bool = True

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"optimizer.schedule={self.schedule!r} is not known: use 'constant', 'linear' or"
                " 'cosine'"
            )
        for field in (
            "learning_rate",
            "log_z_learning_rate",
            "warmup_steps",
            "weight_decay",
            "clip_norm",
        ):
            if getattr(self, field) < 0:
                raise ValueError(f"optimizer.{field}={getattr(self, field)} must not be negative")


def make_schedule(
    config: OptimizerConfig, peak: float, rollout_steps: int, updates_per_rollout: int
) -> optax.Schedule:
    """Learning rate by optimiser update; constant within a rollout step.

    Args:
        config: shape of the schedule.
        peak: rate after warm-up.
        rollout_steps: length of the run.
        updates_per_rollout: optimiser updates per rollout step.
    """
    decay_steps = max(rollout_steps - config.warmup_steps, 1)

    def rate(count):
        step = count // updates_per_rollout
        warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
        if config.schedule == "linear":
            decay = 1.0 - progress
        elif config.schedule == "cosine":
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            decay = 1.0
        return peak * warmup * decay

    return rate


def make_optimizer(
    config: OptimizerConfig, rollout_steps: int, updates_per_rollout: int, *, train_log_z: bool
) -> optax.GradientTransformation:
    """The optimiser over `{"policy": ..., "log_z": ...}`.

    Args:
        config: hyper-parameters.
        rollout_steps: length of the run, for the schedule.
        updates_per_rollout: optimiser updates per rollout step.
        train_log_z: whether log Z follows its gradient; a table does not, it is a running mean.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def group(peak: float) -> optax.GradientTransformation:
        schedule = make_schedule(config, peak, rollout_steps, updates_per_rollout)
        adamw = optax.adamw(
            schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay
        )
        return adamw if config.clip_jointly else optax.chain(clip, adamw)

    log_z_rate = config.log_z_learning_rate or config.learning_rate
    groups: dict[Hashable, optax.GradientTransformation] = {
        "policy": group(config.learning_rate),
        "log_z": group(log_z_rate) if train_log_z else optax.set_to_zero(),
    }
    partitioned = optax.partition(groups, _labels)
    return optax.chain(clip, partitioned) if config.clip_jointly else partitioned


def _labels(params: dict[str, Any]) -> dict[str, str]:
    return {name: name for name in params}
