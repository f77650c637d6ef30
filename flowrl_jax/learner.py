"""What is fixed about learning: model, objective, optimiser, sizes and where arrays live."""

import dataclasses
from typing import Any

import optax

from flowrl_jax.models.transformer import Transformer
from flowrl_jax.objectives import objective_of
from flowrl_jax.objectives.correction import CorrectionConfig
from flowrl_jax.objectives.log_z import LogZConfig
from flowrl_jax.objectives.values import ValueConfig
from flowrl_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class TrainStepConfig:
    """How an optimiser step is computed; nothing here changes its result beyond rounding.

    Attributes:
        micro_batch_size: responses whose activations are held at one time, over all devices; 0
            means all, -1 one for each part that the mesh cuts the batch into.
        logprob_chunk: logits held at one time, counted in tokens of each response.
        length_buckets: lengths that responses are cut to, see `buckets`; the longest that may be
            sampled is always one more.
    """

    micro_batch_size: int = 0
    logprob_chunk: int = 256
    length_buckets: tuple[int, ...] = ()

    def __post_init__(self):
        if [*self.length_buckets] != sorted({n for n in self.length_buckets if n > 0}):
            raise ValueError(
                f"train.length_buckets={self.length_buckets} must be lengths from 1 token on, each"
                " greater than the one before it"
            )
        if self.micro_batch_size < -1 or self.logprob_chunk < 1:
            raise ValueError(
                f"train.micro_batch_size={self.micro_batch_size} must be a number of responses, 0"
                f" or -1, and train.logprob_chunk={self.logprob_chunk} must be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Learner:
    """All that is fixed about learning: model, objective, optimiser and sizes.

    Attributes:
        model: the policy's architecture.
        objective: config of the objective, e.g. `FlowRLConfig`.
        optimizer: over `{"policy": ..., "log_z": ...}` and, where there is a head, `"value"`.
        group_size: samples per prompt.
        temperature: at which responses are sampled; log-probabilities are taken at it.
        config: how steps are computed.
        layout: where arrays live.
        correction: weights for what sampler and trainer disagree about.
    """

    model: Transformer
    objective: Any
    optimizer: optax.GradientTransformation
    group_size: int
    temperature: float
    config: TrainStepConfig
    layout: Layout
    correction: CorrectionConfig = CorrectionConfig()

    @property
    def log_z(self) -> LogZConfig | None:
        """How log Z is obtained; None for objectives without one."""
        return getattr(self.objective, "log_z", None)

    @property
    def value(self) -> ValueConfig | None:
        """The head that gives a value per state; None for objectives without one."""
        needed = objective_of(self.objective).needs_values(self.objective)
        return self.objective.value if needed else None

    @property
    def unit(self) -> int:
        """Responses that a micro-batch may not part: a group where log Z is found from it."""
        return self.group_size if getattr(self.objective, "whole_groups", False) else 1

    def micro_batch(self, rows: int) -> int:
        """Responses, out of `rows`, whose activations are held at one time, over all devices."""
        size = self.config.micro_batch_size
        return self.layout.batch_shards if size == -1 else size or rows


def check_batch(learner: Learner, rows: int) -> None:
    """Refuses sizes that do not divide.

    Args:
        learner: names the micro-batch, the group and the mesh.
        rows: responses in an optimiser step, over all hosts.

    Raises:
        ValueError: with the sizes, the rule and the remedy.
    """
    size = learner.micro_batch(rows)
    shards = learner.layout.batch_shards
    if rows % size:
        raise ValueError(
            f"train.micro_batch_size={size} does not divide the {rows} responses of an optimiser"
            " step (prompts x group size / updates): choose a divisor"
        )
    if size % shards:
        raise ValueError(
            f"{size} responses of a micro-batch do not divide over the mesh's {shards} batch"
            " shards (data x fsdp): choose a multiple"
        )
    if size % learner.unit:
        raise ValueError(
            f"train.micro_batch_size={size} cuts groups of {learner.group_size}, but the loss finds"
            " log Z from whole ones: choose a multiple of the group size"
        )
