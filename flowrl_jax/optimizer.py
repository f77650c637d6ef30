"""AdamW for the policy and for log Z, each in its own group."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move.

    Attributes:
        learning_rate: peak rate of the policy.
        log_z_learning_rate: peak rate of log Z; 0 means the policy's, as released.
        value_learning_rate: peak rate of the value head, where there is one; 0 means the policy's.
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
        moments: dtype that Adam's moments are kept in between steps, "float32" or "bfloat16"; the
            latter takes 8 bytes a parameter for weights and moments instead of 12.
    """

    learning_rate: float = 1e-6
    log_z_learning_rate: float = 0.0
    value_learning_rate: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 10
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    clip_jointly: bool = True
    moments: str = "float32"

    def __post_init__(self):
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(
                f"optimizer.schedule={self.schedule!r} is not known: use 'constant', 'linear' or"
                " 'cosine'"
            )
        if self.moments not in ("float32", "bfloat16"):
            raise ValueError(
                f"optimizer.moments={self.moments!r} is not known: use 'float32' or 'bfloat16'"
            )
        for field in (
            "learning_rate",
            "log_z_learning_rate",
            "value_learning_rate",
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
    config: OptimizerConfig,
    rollout_steps: int,
    updates_per_rollout: int,
    *,
    train_log_z: bool,
    train_value: bool = False,
) -> optax.GradientTransformation:
    """The optimiser over `{"policy": ..., "log_z": ...}` and, where there is one, `"value"`.

    Args:
        config: hyper-parameters.
        rollout_steps: length of the run, for the schedule.
        updates_per_rollout: optimiser updates per rollout step.
        train_log_z: whether log Z follows its gradient; a table does not, it is a running mean.
        train_value: whether there is a value head.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def group(peak: float) -> optax.GradientTransformation:
        schedule = make_schedule(config, peak, rollout_steps, updates_per_rollout)
        adamw = optax.chain(
            _kept_in(config.moments, optax.scale_by_adam(config.b1, config.b2, config.eps)),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
        return adamw if config.clip_jointly else optax.chain(clip, adamw)

    log_z_rate = config.log_z_learning_rate or config.learning_rate
    groups: dict[Hashable, optax.GradientTransformation] = {
        "policy": group(config.learning_rate),
        "log_z": group(log_z_rate) if train_log_z else optax.set_to_zero(),
    }
    if train_value:
        groups["value"] = group(config.value_learning_rate or config.learning_rate)
    partitioned = optax.partition(groups, _labels)
    return optax.chain(clip, partitioned) if config.clip_jointly else partitioned


def reset_moments(
    optimizer: optax.GradientTransformation, opt_state: Any, params: Any
) -> optax.OptState:
    """An optimiser's state as new, but for the place in the schedule.

    Moments are 0 and their bias is corrected for from the start; the learning rate goes on, without
    another warm-up.

    Args:
        optimizer: from `make_optimizer`.
        opt_state: its state.
        params: that it moves.
    """

    def kept(new: Any, old: Any) -> Any:
        return old if isinstance(new, optax.ScaleByScheduleState) else new

    return jax.tree.map(
        kept,
        optimizer.init(params),
        opt_state,
        is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState),
    )


def _kept_in(dtype: str, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments are rounded, at random up or down, when a step has been made.

    Rounded to the nearest, the second moment would stand still: a step moves it by a thousandth
    (1 - b2), and neighbouring numbers in bfloat16 lie four thousandths apart and more.
    """
    if dtype == "float32":
        return adam

    def store(state: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), state.count)
        moments, shape = jax.tree.flatten((state.mu, state.nu))
        rounded = [_round(x, jax.random.fold_in(key, i)) for i, x in enumerate(moments)]
        mu, nu = jax.tree.unflatten(shape, rounded)
        return state._replace(mu=mu, nu=nu)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), (state.mu, state.nu))
        updates, state = adam.update(updates, state._replace(mu=wide[0], nu=wide[1]), params)
        return updates, store(state)

    return optax.GradientTransformation(lambda params: store(adam.init(params)), update)


def _round(x: jax.Array, key: jax.Array) -> jax.Array:
    """Float32 to bfloat16: to one of the two neighbours, by chance, so that the mean is exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    dither = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + dither) & jnp.uint32(0xFFFF0000), jnp.float32)
    return rounded.astype(jnp.bfloat16)


def _labels(params: dict[str, Any]) -> dict[str, str]:
    return {name: name for name in params}
