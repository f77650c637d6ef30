"""What a report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import Summary

HELD_OUT = "held-out problems"
"""Name of the evaluation on a run's own data."""

LABELS = {"warmup": "warm-up", "flowrl": "FlowRL", "grpo": "GRPO"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve of a run: where it stands in metrics.jsonl and how it is drawn.

    Attributes:
      name: the curve's name in `Run.curves`.
      key: metric, may hold one `*` (the k of a statistic).
      low: metric of the lower edge of its band, or "" for the key with `_low` at its end.
      high: metric of the upper edge, or "" for the key with `_high`.
      title: heading of its panel, or "" if it has none of its own.
      note: said below the title: what it is a mean of, or its unit.
      style: see `plot.Line`.
      bounds: limits of its y axis.
    """

    name: str
    key: str
    low: str = ""
    high: str = ""
    title: str = ""
    note: str = ""
    style: str = "smooth"
    bounds: tuple[float, float] = (-math.inf, math.inf)


# The order of the panels. To show another metric of metrics.jsonl, add a line.
SERIES: tuple[Series, ...] = (
    Series(
        name="reward",
        key="rollout/reward_mean",
        title="Mean reward",
        note="of the training samples",
    ),
    Series(
        name="pass_at_1",
        key="eval/pass_at_1",
        title="pass@1",
        note="on held-out problems",
        style="marks",
        bounds=(0.0, 1.0),
    ),
    Series(
        name="distinct_correct",
        key="eval/distinct_correct_*",
        title="Distinct correct solutions",
        note="per problem",
        style="marks",
        bounds=(0.0, math.inf),
    ),
    Series(
        name="entropy",
        key="rollout/entropy",
        title="Entropy of the policy",
        note="nats per token",
        bounds=(0.0, math.inf),
    ),
    Series(
        name="kl",
        key="eval/kl_to_reference",
        title="KL to the reference",
        note="nats per response",
        style="marks",
    ),
    Series(
        name="length",
        key="rollout/length_mean",
        title="Response length",
        note="tokens",
        bounds=(0.0, math.inf),
    ),
    Series(name="log_z", key="log_z/mean"),
    Series(
        name="log_z_monte_carlo",
        key="log_z/monte_carlo_mean",
        low="log_z/monte_carlo_low",
        high="log_z/monte_carlo_high",
    ),
    Series(name="residual", key="train/residual"),
    Series(name="residual_abs", key="train/residual_abs"),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values of one metric over training.

    Attributes:
      steps: [n] training steps, increasing.
      values: [n] values, NaN where the metric was not finite.
      low: [n] lower edge of a band, or empty.
      high: [n] upper edge of a band, or empty.
    """

    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """The learning curves of one policy.

    Attributes:
      curves: from `Series.name`; those the run did not log are absent.
      log_z_points: per prompt (Monte-Carlo estimate of log Z, low and high of its 95 % interval,
        learned log Z), may be empty.
      alarms: (condition, first step, last step) of each stretch over which one was on.
    """

    curves: Mapping[str, Curve]
    log_z_points: Sequence[tuple[float, float, float, float]] = ()
    alarms: Sequence[tuple[str, int, int]] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response as shown in the report.

    Attributes:
      response: its text.
      correct: whether it solves the prompt.
      form: canonical form of a correct response; equal forms are shown as the same solution.
      truncated: whether it was cut at the token limit.
      outcome: what the task said of it, one word, or "".
    """

    response: str
    correct: bool
    form: str | None = None
    truncated: bool = False
    outcome: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleGroup:
    """Samples of several policies for one prompt.

    Attributes:
      prompt: its text.
      samples: policy name to its responses.
      problem: its id, as `Evaluation.problems` has it.
      evaluation: name of the evaluation it is from.
    """

    prompt: str
    samples: Mapping[str, Sequence[Sample]]
    problem: int | None = None
    evaluation: str = HELD_OUT


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What policies did on the problems of one data set.

    Attributes:
      problems: [P] id of each problem.
      rates: policy name -> [P] share of its samples that are correct, NaN where it was not given
        the problem.
      samples: policy name -> samples of each problem.
      figures: policy name -> metric -> interval, see `evaluation.results.graded_values`.
    """

    problems: Sequence[int]
    rates: Mapping[str, Sequence[float]]
    samples: Mapping[str, int]
    figures: Mapping[str, Summary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for policy, rates in self.rates.items():
            if len(rates) != len(self.problems):
                raise InputError(
                    f"{policy} has {len(rates)} pass rates for {len(self.problems)} problems; give"
                    " one for each, NaN where there is none"
                )


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report shows; parts that are empty are left out of the page.

    Attributes:
      title: heading.
      summary: one or two sentences under it.
      settings: name to value, shown in this order.
      results: policy name -> metric -> {"mean", "low", "high"} (95 % interval), as
        `evaluation.summarize` gives it; the order of policies is that of columns and colours.
      start: the policy in `results` from which the others were trained, drawn as the common start.
      differences: heading (e.g. "FlowRL minus GRPO") -> metric -> interval of the paired
        difference, as `evaluation.paired_difference` gives it.
      runs: policy name -> learning curves.
      evaluations: name of a data set (`HELD_OUT` for the runs' own) -> what policies did on it.
      samples: prompts with the responses of the policies.
      labels: policy name -> display name, besides `LABELS`.
      command: the command that reproduces the run.
      versions: package -> version.
      seed: seed of the run.
      seconds: wall-clock time of the whole job.
    """

    title: str
    summary: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Summary] = field(default_factory=dict)
    start: str | None = None
    differences: Mapping[str, Summary] = field(default_factory=dict)
    runs: Mapping[str, Run] = field(default_factory=dict)
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    samples: Sequence[SampleGroup] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.start is not None and self.start not in self.results:
            raise InputError(
                f"report start={self.start!r} is not among the results ({', '.join(self.results)});"
                " name one of them or None"
            )
        for policy, metrics in self.results.items():
            for metric, interval in metrics.items():
                if not {"mean", "low", "high"} <= interval.keys():
                    raise InputError(
                        f"results of {policy}, {metric} lack mean, low or high; give all three"
                    )

    @property
    def policies(self) -> list[str]:
        """Names of all policies, in the order that fixes their colours."""
        shown = [name for group in self.samples for name in group.samples]
        evaluated = [name for found in self.evaluations.values() for name in found.rates]
        return list(dict.fromkeys([*self.results, *self.runs, *evaluated, *shown]))

    def label(self, policy: str) -> str:
        """Display name of a policy."""
        return self.labels.get(policy, LABELS.get(policy, policy))


def to_dict(data: ReportData) -> dict[str, Any]:
    """The report's data as plain dicts, lists and numbers, ready for JSON; `from_dict` inverts
    it.
    """
    return asdict(data)


def from_dict(values: Mapping[str, Any]) -> ReportData:
    """Builds `ReportData` from what `to_dict` gives (after a journey through JSON).

    Args:
      values: field name to value; fields left out take their defaults.

    Returns:
      The data.

    Raises:
      InputError: a field is unknown or misses a part.
    """
    values = dict(values)
    try:
        runs = {
            name: Run(
                curves={key: Curve(**curve) for key, curve in run["curves"].items()},
                log_z_points=[tuple(point) for point in run.get("log_z_points", ())],
                alarms=[tuple(stretch) for stretch in run.get("alarms", ())],
            )
            for name, run in values.pop("runs", {}).items()
        }
        groups = [
            SampleGroup(
                **{
                    **group,
                    "samples": {
                        name: [Sample(**sample) for sample in listed]
                        for name, listed in group["samples"].items()
                    },
                }
            )
            for group in values.pop("samples", ())
        ]
        evaluations = {
            name: Evaluation(**found) for name, found in values.pop("evaluations", {}).items()
        }
        return ReportData(runs=runs, evaluations=evaluations, samples=groups, **values)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"report data do not fit ReportData: {error}; see its docstring"
        ) from error
