"""What a report shows, and how it is read from run folders."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import Summary
from flowrl_jax.graded import read_records
from flowrl_jax.metrics import read_metrics

SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"

LABELS = {"warmup": "warm-up", "flowrl": "FlowRL", "grpo": "GRPO"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve of a run: where it stands in metrics.jsonl and how it is drawn.

    Attributes:
      name: the curve's name in `Run.curves`.
      key: metric, may hold one `*` (the k of a statistic).
      low: metric of the lower edge of its band, or "".
      high: metric of the upper edge.
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
    """

    curves: Mapping[str, Curve]
    log_z_points: Sequence[tuple[float, float, float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One response as shown in the report.

    Attributes:
      response: its text.
      correct: whether it solves the prompt.
      form: canonical form of a correct response; equal forms are shown as the same solution.
      truncated: whether it was cut at the token limit.
    """

    response: str
    correct: bool
    form: str | None = None
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleGroup:
    """Samples of several policies for one prompt.

    Attributes:
      prompt: its text.
      samples: policy name to its responses.
    """

    prompt: str
    samples: Mapping[str, Sequence[Sample]]


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
        return list(dict.fromkeys([*self.results, *self.runs, *shown]))

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
            )
            for name, run in values.pop("runs", {}).items()
        }
        groups = [
            SampleGroup(
                prompt=group["prompt"],
                samples={
                    name: [Sample(**sample) for sample in listed]
                    for name, listed in group["samples"].items()
                },
            )
            for group in values.pop("samples", ())
        ]
        return ReportData(runs=runs, samples=groups, **values)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"report data do not fit ReportData: {error}; see its docstring"
        ) from error


def load_run(path: str | Path) -> Run:
    """Reads the learning curves of a run.

    Args:
      path: the run's folder, or its metrics.jsonl.

    Returns:
      The curves of `SERIES` that the run logged.

    Raises:
      InputError: there is no metrics file, it is damaged, or it holds none of the metrics of
        `SERIES`.
    """
    curves = _read_curves(Path(path))
    if not curves:
        raise InputError(_no_curves(path))
    return Run(curves=curves)


def _no_curves(path: str | Path) -> str:
    return (
        f"{path} holds none of the metrics a report shows ({', '.join(s.key for s in SERIES)});"
        " train with this version or add the names to SERIES of flowrl_jax/report/data.py"
    )


def _read_curves(path: Path) -> dict[str, Curve]:
    records = read_metrics(path)
    known = {key for record in records for key in record}
    curves = {}
    for series in SERIES:
        # The shortest match, so that a `*` does not take "..._16_low" for "..._16".
        key = min(fnmatch.filter(known, series.key), key=lambda k: (len(k), k), default=None)
        if key is not None:
            rows = [record for record in records if key in record]
            band = series.low in known and series.high in known
            nan = math.nan
            curves[series.name] = Curve(
                steps=[record["step"] for record in rows],
                values=[record[key] for record in rows],
                low=[record.get(series.low, nan) for record in rows] if band else (),
                high=[record.get(series.high, nan) for record in rows] if band else (),
            )
    return curves


def sample_groups(
    records: Mapping[str, Sequence[Mapping[str, Any]]], *, prompts: int = 4, responses: int = 16
) -> list[SampleGroup]:
    """Picks prompts to show side by side: the first ones that at least one policy solved.

    Nothing about how the policies compare enters the choice, so the picture is not a selected one.

    Args:
      records: policy name -> evaluation records (see `graded.samples_from_records`) with "prompt"
        and "responses", on the same prompts.
      prompts: how many to pick.
      responses: how many responses of each policy to list.

    Returns:
      The groups, in the order of the records.
    """
    by_prompt: dict[int, dict[str, Mapping[str, Any]]] = {}
    for policy, rows in records.items():
        for row in rows:
            by_prompt.setdefault(row["prompt_id"], {})[policy] = row
    chosen = [
        rows
        for rows in by_prompt.values()
        if len(rows) == len(records) and any(any(row["correct"]) for row in rows.values())
    ]
    return [
        SampleGroup(
            prompt=next(iter(rows.values()))["prompt"],
            samples={
                policy: [
                    Sample(response=r, correct=c, form=f, truncated=t)
                    for r, c, f, t in zip(
                        row["responses"], row["correct"], row["form"], row["truncated"], strict=True
                    )
                ][:responses]
                for policy, row in rows.items()
            },
        )
        for rows in chosen[:prompts]
    ]


def load_workdir(workdir: str | Path) -> ReportData:
    """Reads the folder of a job: its runs, their evaluations and its summary.

    Args:
      workdir: a run's folder (with metrics.jsonl), or a folder of such folders named by policy.
        Read when there: `summary.json` ("policies" as `ReportData.results`, and any other field of
        `ReportData` but runs and samples), and in each run's folder `samples.jsonl` (evaluation
        records).

    Returns:
      The data of the report.

    Raises:
      InputError: the folder holds no run, or a file in it is damaged.
    """
    workdir = Path(workdir)
    folders = {workdir.name: workdir}
    if not (workdir / "metrics.jsonl").is_file():
        children = sorted(workdir.iterdir()) if workdir.is_dir() else []
        folders = {c.name: c for c in children if (c / "metrics.jsonl").is_file()}
    if not folders:
        raise InputError(
            f"{workdir} holds no metrics.jsonl, nor does a folder in it; train with"
            f" --workdir={workdir}"
        )
    fields: dict[str, Any] = {"title": workdir.name}
    if (workdir / SUMMARY_FILE).is_file():
        try:
            found = json.loads((workdir / SUMMARY_FILE).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{workdir / SUMMARY_FILE} is not JSON ({error}); run the job again"
            ) from error
        fields["results"] = found.pop("policies", {})
        wanted = ReportData.__dataclass_fields__.keys() - {"runs", "samples", "results"}
        fields |= {key: value for key, value in found.items() if key in wanted}
    order = [name for name in fields.get("results", {}) if name in folders]
    folders = {name: folders[name] for name in dict.fromkeys([*order, *folders])}
    records = {
        name: read_records(folder / SAMPLES_FILE)
        for name, folder in folders.items()
        if (folder / SAMPLES_FILE).is_file()
    }
    curves = {name: _read_curves(folder) for name, folder in folders.items()}
    # A supervised warm-up among the runs logs none of these metrics; all runs without any is an
    # error.
    if not any(curves.values()):
        raise InputError(_no_curves(workdir))
    return ReportData(
        runs={name: Run(curves=found) for name, found in curves.items() if found},
        samples=sample_groups(records) if records else (),
        **fields,
    )
