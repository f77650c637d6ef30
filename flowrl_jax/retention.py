"""When checkpoints are written, and which of them stay."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flowrl_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which of them stay.

    Attributes:
        every: rollout steps between checkpoints; 0 writes only the final one.
        keep: latest checkpoints that stay.
        keep_best: checkpoints of highest `best_metric` that stay as well.
        best_metric: name of a metric, e.g. "eval/pass_at_1"; higher is better. Checkpoints whose
            metrics lack it are not among the best.
        asynchronous: whether training goes on while files are written.
    """

    every: int = 50
    keep: int = 2
    keep_best: int = 0
    best_metric: str = ""
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1 or self.keep_best < 0:
            raise InputError(
                f"checkpoint.every={self.every} and checkpoint.keep_best={self.keep_best} must not"
                f" be negative and checkpoint.keep={self.keep} must be at least 1"
            )
        if self.keep_best and not self.best_metric:
            raise InputError(
                f"checkpoint.keep_best={self.keep_best} needs to know which metric is meant: set"
                " checkpoint.best_metric, e.g. 'eval/pass_at_1'"
            )


class Retention:
    """Orbax's question which checkpoints stay, answered: the latest and the best.

    Args:
        keep: latest ones.
        keep_best: ones of highest score, besides those.
        scores: of checkpoints by step; whoever makes the checkpoints adds to it.
    """

    def __init__(self, keep: int, keep_best: int, scores: Mapping[int, float]) -> None:
        self._keep = keep
        self._keep_best = keep_best
        self._scores = scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Says of each checkpoint, in any order, whether it stays."""
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        scored = [step for step in steps if step in self._scores]
        # Of equals the later is better.
        scored.sort(key=lambda step: (self._scores[step], step), reverse=True)
        kept = {*steps[-self._keep :], *scored[: self._keep_best]}
        return [checkpoint.step in kept for checkpoint in checkpoints]
