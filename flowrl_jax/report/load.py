"""Reads runs and files of judged samples for a report."""

from __future__ import annotations

import fnmatch
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluation import Summary, bootstrap, summarize
from flowrl_jax.evaluation.judgements import read_judged, scores_path
from flowrl_jax.evaluation.results import graded_values
from flowrl_jax.graded import read_records, samples_from_records
from flowrl_jax.log_z_points import read_points
from flowrl_jax.metrics import read_metrics
from flowrl_jax.report.data import (
    HELD_OUT,
    SERIES,
    Curve,
    Evaluation,
    ReportData,
    Run,
    Sample,
    SampleGroup,
)

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
BENCHMARKS = "benchmarks"
PROBLEMS = 20

_K = 16  # samples that the figures of a run's own evaluation speak of

Record = Mapping[str, Any]
_Key = tuple[int, str]
_Records = Mapping[str, Sequence[Record]]


def load(paths: Sequence[str | Path], *, problems: int = PROBLEMS) -> ReportData:
    """Reads runs and evaluations.

    Args:
      paths: each the folder of a run (with `metrics.jsonl`, `samples.jsonl` or `benchmarks/`), a
        folder of runs, a file of judged samples that `evaluate` wrote, or a folder of those. If
        there is only one, and it is a folder with `summary.json`, that file's "policies" are
        `ReportData.results` and its other fields those of `ReportData`.
      problems: of how many problems of each evaluation the samples are kept.

    Returns:
      The data of the report. Results that no summary gives are of the runs' `samples.jsonl`.

    Raises:
      InputError: there is nothing to show at a path, or a file is damaged.
    """
    require(bool(paths), "a report needs a run: name its folder, or a file of judged samples")
    require(problems >= 0, f"problems={problems} must be at least 0")
    runs, files = _find([Path(path) for path in paths])
    fields: dict[str, Any] = {"title": _title([Path(path) for path in paths])}
    if len(paths) == 1:
        fields |= _summary(Path(paths[0]))
    names = _names(runs)
    order = [name for name in fields.get("results", {}) if name in names]
    names = {name: names[name] for name in dict.fromkeys([*order, *names])}
    read = {
        name: _read_run(folder)
        for name, folder in names.items()
        if (folder / METRICS_FILE).is_file()
    }
    sources = _sources(names, files)
    evaluations, samples = {}, []
    results = dict(fields.pop("results", {}))
    for evaluation, policies in sources.items():
        light = {policy: list(_light(path)) for policy, path in policies.items()}
        evaluations[evaluation] = _evaluation(light, evaluation, _judged(policies))
        samples += _groups(policies, _chosen(light, evaluation, problems), evaluation)
        if evaluation == HELD_OUT:
            for policy in [name for name in light if name not in results]:
                graded = samples_from_records(light[policy])
                results[policy] = summarize(graded, k=min(_K, graded.num_samples))
    # A supervised warm-up among the runs logs none of these metrics; nothing at all is an error.
    shown = {name: run for name, run in read.items() if run.curves}
    require(bool(shown) or bool(sources), _no_curves(paths[0]))
    return ReportData(
        runs=shown,
        results=results,
        evaluations=evaluations,
        samples=samples,
        **fields,
    )


def load_run(path: str | Path) -> Run:
    """Reads the learning curves of a run.

    Args:
      path: the run's folder, or its metrics.jsonl.

    Returns:
      The curves of `SERIES` that the run logged, its alarms and its points of log Z.

    Raises:
      InputError: there is no metrics file, it is damaged, or it holds none of the metrics of
        `SERIES`.
    """
    run = _read_run(Path(path))
    require(bool(run.curves), _no_curves(path))
    return run


def _no_curves(path: str | Path) -> str:
    return (
        f"{path} holds none of the metrics a report shows ({', '.join(s.key for s in SERIES)});"
        " train with this version or add the names to SERIES of flowrl_jax/report/data.py"
    )


def _read_run(path: Path) -> Run:
    records = read_metrics(path)
    folder = path if path.is_dir() else path.parent
    return Run(curves=_curves(records), log_z_points=read_points(folder), alarms=_alarms(records))


def _alarms(records: Sequence[Record]) -> list[tuple[str, int, int]]:
    """Each stretch of steps over which an alarm was on, by its first step."""
    found: list[tuple[str, int, int]] = []
    for key in sorted({key for record in records for key in record if key.startswith("alarm/")}):
        name, first, last = key.removeprefix("alarm/"), None, 0
        for record in [*(record for record in records if key in record), {key: 0, "step": 0}]:
            if record[key]:
                first = record["step"] if first is None else first
                last = record["step"]
            elif first is not None:
                found.append((name, first, last))
                first = None
    return sorted(found, key=lambda stretch: stretch[1])


def _curves(records: Sequence[Record]) -> dict[str, Curve]:
    known = {key for record in records for key in record}
    curves = {}
    for series in SERIES:
        # The shortest match, so that a `*` does not take "..._16_low" for "..._16".
        key = min(fnmatch.filter(known, series.key), key=lambda k: (len(k), k), default=None)
        if key is not None:
            rows = [record for record in records if key in record]
            low, high = series.low or f"{key}_low", series.high or f"{key}_high"
            band = low in known and high in known
            nan = math.nan
            curves[series.name] = Curve(
                steps=[record["step"] for record in rows],
                values=[record[key] for record in rows],
                low=[record.get(low, nan) for record in rows] if band else (),
                high=[record.get(high, nan) for record in rows] if band else (),
            )
    return curves


def _is_run(folder: Path) -> bool:
    return (
        (folder / METRICS_FILE).is_file()
        or (folder / SAMPLES_FILE).is_file()
        or (folder / BENCHMARKS).is_dir()
    )


def _evaluation_files(folder: Path) -> list[Path]:
    """Files of judged samples; those that `judge` writes beside them are not."""
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return [file for file in files if not file.name.endswith(".judge.jsonl")]


def _find(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders of runs, and files of judged samples that are in none of them; each once."""
    runs: dict[Path, Path] = {}
    files: dict[Path, Path] = {}
    for path in paths:
        require(path.exists(), f"{path} does not exist; name a run's folder or a file of samples")
        if path.name == METRICS_FILE:
            path = path.parent
        if path.is_file():
            files[path.resolve()] = path
        elif _is_run(path):
            runs[path.resolve()] = path
        else:
            inside = [child for child in sorted(path.iterdir()) if _is_run(child)]
            listed = _evaluation_files(path)
            require(
                bool(inside or listed),
                f"{path} holds no {METRICS_FILE} and no judged samples, nor does a folder in it;"
                f" train with --workdir={path}, or name the folder of a run",
            )
            runs |= {child.resolve(): child for child in inside}
            files |= {file.resolve(): file for file in listed}
    return list(runs.values()), list(files.values())


def _names(runs: Sequence[Path]) -> dict[str, Path]:
    """Names of runs: their folders', with those of parents as far as that tells them apart."""
    depth = 1
    whole = [folder.resolve().parts for folder in runs]
    while len({parts[-depth:] for parts in whole}) < len(runs):
        depth += 1
    return {"/".join(p[-depth:]): folder for p, folder in zip(whole, runs, strict=True)}


def _title(paths: Sequence[Path]) -> str:
    """Names of folders and of evaluations, each once."""
    names = list(
        dict.fromkeys(p.resolve().stem if p.is_file() else p.resolve().name for p in paths)
    )
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _summary(folder: Path) -> dict[str, Any]:
    """Fields of `ReportData` that a job wrote into its folder."""
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fields = {"results": dict(found.pop("policies", {}))}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not JSON of a job ({error}); run the job again") from error
    wanted = ReportData.__dataclass_fields__.keys() - {"runs", "samples", "results", "evaluations"}
    return fields | {key: value for key, value in found.items() if key in wanted}


def _sources(names: Mapping[str, Path], files: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Evaluation -> policy -> file; a run's own evaluation first, then benchmarks by name."""
    found: dict[str, dict[str, Path]] = {HELD_OUT: {}}
    for name, folder in names.items():
        if (folder / SAMPLES_FILE).is_file():
            found[HELD_OUT][name] = folder / SAMPLES_FILE
        for file in _evaluation_files(folder / BENCHMARKS):
            found.setdefault(file.stem, {})[name] = file
    for file in files:
        evaluation, policy = _origin(file)
        policies = found.setdefault(evaluation, {})
        policies[policy if policy not in policies else f"{policy} ({file})"] = file
    return {name: found[name] for name in (HELD_OUT, *sorted(found)) if found[name]}


def _origin(file: Path) -> tuple[str, str]:
    """(evaluation, policy) of a file, as its first record says, else as it is called."""
    stamp = _completed(file)[0].get("settings")
    if isinstance(stamp, dict) and "benchmark" in stamp:
        return str(stamp["benchmark"]), str(stamp.get("run") or "policy")
    return HELD_OUT, file.resolve().parent.name if file.name == SAMPLES_FILE else file.stem


def _completed(path: Path) -> list[dict[str, Any]]:
    """The records of a file, with verdicts where an older version wrote none."""
    try:
        records = read_records(path)
        for record in records:
            correct = record["correct"]
            words = ["correct" if right else "wrong" for right in correct]
            for name, default in (
                ("outcome", words),
                ("reward", [float(right) for right in correct]),
                ("answer", [None] * len(correct)),
            ):
                record.setdefault(name, default)
                if len(record[name]) != len(correct):
                    raise ValueError(f"{name} has {len(record[name])} of {len(correct)} samples")
        samples_from_records(records)
        numbers = Counter((record["prompt_id"], record.get("prompt")) for record in records)
        (number, _), times = numbers.most_common(1)[0]
        if times > 1:
            raise ValueError(f"prompt_id {number} is there {times} times")
    except (LookupError, TypeError, ValueError, OSError, RecursionError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, InputError) and str(path) in line:
            raise
        raise InputError(
            f"{path} does not hold judged samples ({type(error).__name__}: {line}); name a file"
            " that `evaluate` wrote, or evaluate again"
        ) from error
    return records


def _light(path: Path) -> Iterator[dict[str, Any]]:
    """Records without the texts of responses, of which a page needs few and memory would not
    hold all.
    """
    for record in _completed(path):
        yield {name: value for name, value in record.items() if name != "responses"}


def _key(record: Record, evaluation: str) -> _Key:
    """What is the same problem: of a run's own data, which may be others', that of equal words."""
    return record["prompt_id"], str(record.get("prompt", "")) if evaluation == HELD_OUT else ""


def _judged(files: Mapping[str, Path]) -> dict[str, Summary]:
    """The judge's score of each policy whose samples were judged."""
    found = {}
    for policy, path in files.items():
        # Whole records are read only where there are judgements, which are of the responses.
        judged = read_judged(path, _completed(path)) if scores_path(path).is_file() else None
        if judged and len(judged.scores):
            found[policy] = bootstrap({"judge_score": judged.scores})
    return found


def _evaluation(found: _Records, evaluation: str, more: Mapping[str, Summary]) -> Evaluation:
    rates: dict[str, dict[_Key, float]] = {}
    for policy, records in found.items():
        rates[policy] = {
            _key(r, evaluation): sum(map(bool, r["correct"])) / len(r["correct"]) for r in records
        }
    keys = list(dict.fromkeys(key for each in rates.values() for key in each))
    return Evaluation(
        problems=[number for number, _ in keys],
        rates={name: [each.get(key, math.nan) for key in keys] for name, each in rates.items()},
        samples={name: len(records[0]["correct"]) for name, records in found.items()},
        figures={
            name: bootstrap(graded_values(records)) | more.get(name, {})
            for name, records in found.items()
        },
    )


@dataclass
class _Problem:
    """What decides whether a problem's samples are shown."""

    policies: int = 0
    solved: bool = False


def _chosen(found: _Records, evaluation: str, count: int) -> list[_Key]:
    """Problems whose samples are shown.

    The first ones that all policies were given and one solved; then others. Nothing about how the
    policies compare enters the choice, so the picture is not a selected one.
    """
    problems: dict[_Key, _Problem] = {}
    for records in found.values():
        for record in records:
            problem = problems.setdefault(_key(record, evaluation), _Problem())
            problem.policies += 1
            problem.solved |= any(record["correct"])
    order = sorted(problems, key=lambda key: (-problems[key].policies, not problems[key].solved))
    return order[:count]


def _groups(
    files: Mapping[str, Path], chosen: Sequence[_Key], evaluation: str
) -> list[SampleGroup]:
    """The responses to the chosen problems."""
    prompts: dict[_Key, str] = {}
    samples: dict[_Key, dict[str, list[Sample]]] = {key: {} for key in chosen}
    for policy, path in files.items():
        for record in _completed(path) if chosen else ():
            key = _key(record, evaluation)
            if key in samples and "responses" in record:
                prompts.setdefault(key, str(record.get("prompt", "")))
                samples[key][policy] = [
                    Sample(
                        response=str(response),
                        correct=bool(correct),
                        form=form,
                        truncated=bool(cut),
                        outcome=str(outcome),
                    )
                    for response, correct, form, cut, outcome in zip(
                        record["responses"],
                        record["correct"],
                        record["form"],
                        record["truncated"],
                        record["outcome"],
                        strict=False,
                    )
                ]
    return [
        SampleGroup(prompt=prompts[key], samples=found, problem=key[0], evaluation=evaluation)
        for key, found in samples.items()
        if found
    ]
