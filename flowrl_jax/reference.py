"""When the reference policy is reset to the policy as it is, as ProRL does (arXiv 2505.24864)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from flowrl_jax.errors import require
from flowrl_jax.learner import Learner
from flowrl_jax.optimizer import reset_moments
from flowrl_jax.tasks.base import nearest
from flowrl_jax.train_step import abstract_state
from flowrl_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """When the policy becomes its own reference; never, by default.

    Attributes:
        reset_every: rollout steps between resets; 0: not by the clock.
        on_plateau: evaluations in a row without a new best after which it is reset; 0: not by
            evaluations.
        metric: of evaluations, higher is better.
        reset_optimizer: whether the optimiser's moments start anew with it.
    """

    reset_every: int = 0
    on_plateau: int = 0
    metric: str = "eval/pass_at_1"
    reset_optimizer: bool = True

    def __post_init__(self):
        for field in ("reset_every", "on_plateau"):
            require(
                getattr(self, field) >= 0,
                f"reference.{field}={getattr(self, field)} must not be negative: 0 is never",
            )

    @property
    def moves(self) -> bool:
        """Whether the reference may become another one."""
        return bool(self.reset_every or self.on_plateau)


def check_metric(config: ReferenceConfig, known: Sequence[str]) -> None:
    """Refuses a metric that no evaluation gives.

    Args:
        config: names it.
        known: names of metrics.

    Raises:
        InputError: with the nearest name.
    """
    require(
        config.metric in known,
        f"reference.metric={config.metric!r}: unknown; {nearest(config.metric, known)}",
    )


@struct.dataclass
class AnchoredState(TrainState):
    """What a checkpoint holds of a run whose reference is not the policy that it started from.

    Attributes:
        reference: the policy's parameters, or its adapters, at the last reset.
    """

    reference: Any

    @property
    def trained(self) -> TrainState:
        """The state alone."""
        fields = dataclasses.fields(TrainState)
        return TrainState(**{field.name: getattr(self, field.name) for field in fields})


def anchored(state: TrainState, reference: Any) -> AnchoredState:
    """A state together with its reference.

    Args:
        state: of the run.
        reference: parameters.
    """
    return AnchoredState(**vars(state), reference=reference)


def abstract_anchored(learner: Learner, state: TrainState) -> AnchoredState:
    """Shapes of a state and its reference, and where each array lives.

    Args:
        learner: what is fixed.
        state: from `abstract_state`.
    """
    dtype = learner.model.config.dtype
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)  # noqa: E731
    return anchored(state, jax.tree.map(shape, state.params["policy"]))


def make_reset(learner: Learner, num_prompts: int) -> dict[str, Callable]:
    """The jitted programs of a reset.

    Args:
        learner: what is fixed.
        num_prompts: size of a log Z table.

    Returns:
        `snapshot`, from the policy's parameters, or its adapters, to a copy in the dtype that
        blocks would cast it to; and `restart`, from a state, which is donated, to the same one with
        the optimiser's moments as new.
    """
    _, shardings = abstract_state(learner, num_prompts)

    def snapshot(policy: Any) -> Any:
        # A copy: the state is donated at every step.
        return jax.tree.map(lambda x: jnp.copy(x.astype(learner.model.config.dtype)), policy)

    def restart(state: TrainState) -> TrainState:
        opt_state = reset_moments(learner.optimizer, state.opt_state, state.params)
        return dataclasses.replace(state, opt_state=opt_state)

    return {
        "snapshot": jax.jit(snapshot, out_shardings=shardings.params["policy"]),
        "restart": jax.jit(restart, donate_argnums=0, out_shardings=shardings),
    }


class Resets:
    """Counts steps and evaluations until a reset is due.

    Args:
        config: when it is.
        record: of a run that is continued, from `record`.

    Attributes:
        count: resets so far.
    """

    def __init__(self, config: ReferenceConfig, record: Mapping[str, Any] | None = None):
        record = record or {"count": 0, "best": None, "last": None, "stale": 0}
        self._config = config
        self.count: int = record["count"]
        self._best: float | None = record["best"]
        self._last: float | None = record["last"]
        self._stale: int = record["stale"]

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Takes note of an evaluation.

        Args:
            metrics: by name.
        """
        value = self._last = float(metrics[self._config.metric])
        better = self._best is None or value > self._best
        self._stale = 0 if better else self._stale + 1
        self._best = value if better else self._best

    def due(self, step: int) -> str:
        """Whether the reference is to be reset after a step.

        Args:
            step: that is done.

        Returns:
            The reason, in words; empty if it is not.
        """
        config = self._config
        if config.on_plateau and self._stale >= config.on_plateau:
            return f"{config.metric} has not exceeded {self._best:.4g} in {self._stale} evaluations"
        if config.reset_every and step % config.reset_every == 0:
            return f"as at every {config.reset_every} steps"
        return ""

    def done(self) -> None:
        """Takes note of a reset: what counts from here on is to get better than now."""
        self.count += 1
        self._best, self._stale = self._last, 0

    def record(self) -> dict[str, Any]:
        """What a run that is continued must know, for JSON."""
        counted = {"count": self.count, "stale": self._stale}
        return counted | {"best": self._best, "last": self._last}
