"""An alarm that says what a run is dying of, while it can still be mended.

It looks at the finished metrics of each step and at nothing else, so that what it knows after a
resumption is what the run's own lines of metrics say. `docs/objective.md` has the conditions.
"""

import dataclasses
import math
import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flowrl_jax.errors import require


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
    """When to call. A threshold of 0 watches for nothing.

    Attributes:
        enabled: whether anything is watched.
        stop: whether a new alarm ends the run, with a checkpoint.
        window: steps that a mean is over, that a reward must stand still for, and that a condition
            must be absent for before it may be called again.
        entropy: least `rollout/entropy`, as a share of its mean over the first window.
        length: least `rollout/length_mean`, as a share of its mean over the first window.
        groups: least `rollout/groups_with_signal`.
        truncated: greatest `rollout/truncated`.
        kl: greatest `rollout/kl_to_reference_token`, in nats.
        ess: least `train/weight_ess` and `rollout/correction_ess`.
        diversity: least distinct correct solutions of an evaluation, as a share of the most so
            far, where accuracy has risen since.
        reward: whether a mean reward that stands still is called.
        skipped: optimiser steps skipped within the window that are called.
    """

    enabled: bool = True
    stop: bool = False
    window: int = 10
    entropy: float = 0.2
    length: float = 0.25
    groups: float = 0.05
    truncated: float = 0.5
    kl: float = 0.5
    ess: float = 0.1
    diversity: float = 0.8
    reward: bool = True
    skipped: int = 1

    def __post_init__(self):
        require(self.window >= 1, f"alarm.window={self.window} must be at least 1 step")
        for field in ("entropy", "length", "groups", "truncated", "ess", "diversity"):
            value = getattr(self, field)
            require(
                0.0 <= value < 1.0, f"alarm.{field}={value} must be a share in [0, 1); 0 is never"
            )
        for field in ("kl", "skipped"):
            value = getattr(self, field)
            require(value >= 0, f"alarm.{field}={value} must not be negative; 0 is never")


class _Level(NamedTuple):
    """A mean over the window that should stay on one side of a threshold.

    Attributes:
        name: of the condition.
        metric: that is averaged.
        field: of the config, which has the threshold.
        above: whether it is the mean above the threshold that is called.
        relative: whether the threshold is a share of the mean over the first window.
        hint: what it may mean.
    """

    name: str
    metric: str
    field: str
    above: bool
    relative: bool
    hint: str


_LEVELS = (
    _Level(
        *("entropy", "rollout/entropy", "entropy", False, True),
        "the policy says the same again and again: give the reference more weight (a lower"
        " loss.beta, a higher kl_coef), or lower the learning rate",
    ),
    _Level(
        *("length", "rollout/length_mean", "length", False, True),
        "responses shrink to almost nothing: read some, the reward may be had without an answer",
    ),
    _Level(
        *("groups", "rollout/groups_with_signal", "groups", False, False),
        "nearly all groups have one reward, so nothing is left to learn from: other prompts, or"
        " a larger rollout.group_size",
    ),
    _Level(
        *("truncated", "rollout/truncated", "truncated", True, False),
        "responses run into rollout.max_response_length: raise it, or read whether they ramble",
    ),
    _Level(
        *("kl", "rollout/kl_to_reference_token", "kl", True, False),
        "the policy is far from where it began: give the reference more weight, or stop earlier",
    ),
    _Level(
        *("weights", "train/weight_ess", "ess", False, False),
        "few responses carry the step: fewer train.epochs and updates per rollout, or"
        " loss.weight='two_sided'",
    ),
    _Level(
        *("correction", "rollout/correction_ess", "ess", False, False),
        "sampler and trainer disagree: see docs/objective.md, or rollout.correction.kind='token'",
    ),
)
_DISTINCT = re.compile(r"eval/distinct_correct_\d+")
# Condition holds, and what was seen; None where the metrics do not say.
_Finding = tuple[bool, str] | None


class Alarm:
    """Watches the metrics of a run; deterministic, and the same for the same lines.

    Args:
        config: the settings.
        print_line: takes one line for each new condition.

    Attributes:
        reason: what was seen first of all that should stop the run, if anything.
    """

    def __init__(self, config: AlarmConfig, print_line: Callable[[str], None] = print):
        self.reason: str | None = None
        self._config, self._print = config, print_line
        self._recent: dict[str, deque[float]] = {}
        self._first: dict[str, list[float]] = {}
        self._skipped = deque([0.0], maxlen=config.window + 1)
        self._peak: tuple[float, float] | None = None
        self._absent: dict[str, int] = {}  # times that a condition which was called did not hold

    def see(self, step: int, metrics: Mapping[str, float], *, quiet: bool = False) -> dict:
        """Takes a step's metrics; steps come in order, each once.

        Args:
            step: of the run.
            metrics: by name.
            quiet: for what a run that is resumed has seen already: print nothing, do not stop.

        Returns:
            "alarm/NAME" of every condition that these metrics say something of: 1 while it has been
            called and not been absent for a window since, else 0.
        """
        if not self._config.enabled:
            return {}
        flags = {}
        for name, finding in self._findings(metrics).items():
            if finding is None:
                continue
            holds, seen = finding
            if holds and name not in self._absent and not quiet:
                self._call(step, name, seen)
            if holds:
                self._absent[name] = 0
            elif name in self._absent:
                self._absent[name] += 1
                # Evaluations are rare, and each of them counts.
                if name == "diversity" or self._absent[name] >= self._config.window:
                    del self._absent[name]
            flags[f"alarm/{name}"] = int(name in self._absent)
        return flags

    def _call(self, step: int, name: str, seen: str) -> None:
        line = f"alarm at step {step}: {name}: {seen}"
        self._print(line)
        if self._config.stop and self.reason is None:
            self.reason = line

    def _findings(self, metrics: Mapping[str, float]) -> dict[str, _Finding]:
        found = {level.name: self._level(level, metrics) for level in _LEVELS}
        found["reward"] = self._standstill(metrics)
        found["skipped"] = self._skips(metrics)
        found["diversity"] = self._narrowing(metrics)
        return found

    def _window(self, metric: str, metrics: Mapping[str, float]) -> deque[float] | None:
        """The last values of a metric, where this step has one and the window is full."""
        value = metrics.get(metric, math.nan)
        if not math.isfinite(value):
            return None
        recent = self._recent.setdefault(metric, deque(maxlen=self._config.window))
        recent.append(value)
        first = self._first.setdefault(metric, [])
        if len(first) < self._config.window:
            first.append(value)
        return recent if len(recent) == self._config.window else None

    def _level(self, level: _Level, metrics: Mapping[str, float]) -> _Finding:
        threshold = getattr(self._config, level.field)
        recent = self._window(level.metric, metrics) if threshold else None
        if recent is None:
            return None
        mean, bound, of = math.fsum(recent) / len(recent), threshold, ""
        if level.relative:
            start = math.fsum(self._first[level.metric]) / self._config.window
            if start <= 0.0:
                return None
            bound, of = threshold * start, f" of the {start:.4g} it began with"
        side = "more" if level.above else "less"
        return (
            mean > bound if level.above else mean < bound,
            f"{level.metric} is {mean:.4g} over {len(recent)} steps, {side} than"
            f" alarm.{level.field}={threshold}{of}; {level.hint}",
        )

    def _standstill(self, metrics: Mapping[str, float]) -> _Finding:
        recent = self._window("rollout/reward_mean", metrics) if self._config.reward else None
        if recent is None:
            return None
        return (
            self._config.window > 1 and max(recent) == min(recent),
            f"rollout/reward_mean has been {recent[-1]:.6g} for {len(recent)} steps; read some"
            " responses and how the task judges them",
        )

    def _skips(self, metrics: Mapping[str, float]) -> _Finding:
        total = metrics.get("train/skipped_steps", math.nan)
        if not self._config.skipped or not math.isfinite(total):
            return None
        self._skipped.append(total)
        skipped = int(self._skipped[-1] - self._skipped[0])
        return (
            skipped >= self._config.skipped,
            f"{skipped} optimiser steps of the last {len(self._skipped) - 1} steps were skipped,"
            f" at least alarm.skipped={self._config.skipped}: loss or gradient was not finite;"
            " bound the importance weights, or lower the learning rate",
        )

    def _narrowing(self, metrics: Mapping[str, float]) -> _Finding:
        name = next(filter(_DISTINCT.fullmatch, sorted(metrics)), "")
        distinct, accuracy = metrics.get(name, math.nan), metrics.get("eval/pass_at_1", math.nan)
        if not self._config.diversity or not math.isfinite(distinct + accuracy):
            return None
        if self._peak is None or distinct > self._peak[0]:
            self._peak = distinct, accuracy
        most, before = self._peak
        return (
            distinct < self._config.diversity * most and accuracy > before,
            f"{name} is {distinct:.4g}, less than alarm.diversity={self._config.diversity} of the"
            f" {most:.4g} it was, while eval/pass_at_1 rose from {before:.4g} to {accuracy:.4g};"
            " accuracy is bought with diversity: lower loss.beta, or stop earlier",
        )
