"""python -m flowrl_jax.experiments.frontier: every objective at equal cost, accuracy by diversity.

Two tasks whose responses can all be listed, so that nothing that is reported is an estimate from
samples: integer paths, measured on the prompts that are learned from, and routes through a graph,
measured on pairs of nodes that are not. Each arm of `arms.py` is run at three settings and three
learning rates with three seeds; the one that ends with most distinct solutions among those of a
given accuracy is then run with nine fresh seeds. What is done is kept in the folder, and not done
again.
"""

import argparse
import concurrent.futures
import csv
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.errors import InputError, require
from flowrl_jax.experiments import analysis
from flowrl_jax.experiments.arms import ARMS, STALE_ARMS, STALENESS
from flowrl_jax.experiments.figures import frontier_figure
from flowrl_jax.experiments.tables import cell, numbers, write_csv
from flowrl_jax.experiments.trials import (
    LANES,
    RATES,
    TASKS,
    Trial,
    base_at_temperatures,
    prepared,
    run_trial,
)
from flowrl_jax.progress import Progress
from flowrl_jax.tasks.base import nearest

_CHOOSING, _MEASURING = (0, 1, 2), tuple(range(100, 100 + LANES))
_POINTS = 30
_SMOKE_ARMS = ("grpo", "flowrl_paper", "flowrl", "rloo_kl")
_SMOKE_ROLLOUTS = 60
_OURS, _TWIN = "flowrl", "rloo_kl"
# What ours is tested against: the paper's method and baselines, DAPO, and the controls. Few, since
# nine seeds give no p-value below 0.0039; the other arms have intervals.
_RIVALS = (
    *("flowrl_paper", "reinforce_pp", "ppo", "grpo", "dapo"),
    *("rloo_kl", "grpo_kl", "grpo_unclipped"),
)
_MARGIN = 0.1  # of the twin's mean: how far apart two arms may be that are called equal
_SHOWN = ("distinct_64", "strategies_64", "effective", "kl_to_reference")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line about a wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m flowrl_jax.experiments.frontier", description=__doc__
    )
    parser.add_argument("--workdir", required=True, help="folder of trials and results")
    parser.add_argument("--smoke", action="store_true", help="four arms, short runs: some minutes")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--arms", default="", help="names, comma between; default: all")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)"
    )
    parser.add_argument("--compare", help="a frontier.csv: say which of its intervals are left")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    tasks = _names("--tasks", options.tasks, TASKS)
    arms = _names("--arms", options.arms, ARMS) or list(_SMOKE_ARMS if options.smoke else ARMS)
    require(options.workers >= 1, f"--workers={options.workers}: give 1 or more")
    compared = _committed(options.compare) if options.compare else None
    workdir = Path(options.workdir)
    (workdir / "trials").mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for task in tasks:
        prepared(task, str(workdir))
    with _pool(options.workers) as pool:
        first = _choosing(tasks, arms, smoke=options.smoke)
        _all(pool, first, workdir, "settings")
        chosen = _chosen(tasks, arms, workdir, first)
        stale = [] if options.smoke else list(_stale(chosen, arms))
        second = list(_measuring(chosen, smoke=options.smoke))
        _all(pool, list(dict.fromkeys(second + stale)), workdir, "fresh seeds")
    rows = [row for task in tasks for row in _table(task, arms, chosen, second, workdir)]
    _write(workdir, tasks, rows, _stale_rows(stale, workdir), first, time.perf_counter() - began)
    print((workdir / "table.md").read_text(encoding="utf-8"))
    if compared is not None:
        _compare(rows, compared)


def _names(flag: str, given: str, known: Mapping[str, Any]) -> list[str]:
    names = [name for name in given.split(",") if name]
    for name in names:
        require(name in known, f"{flag}={given}: {name} is unknown; {nearest(name, known)}")
    return names


def _pool(workers: int) -> concurrent.futures.Executor:
    if workers > 1:
        # A worker has a core: many small programs side by side, none of them on several cores.
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
            " intra_op_parallelism_threads=1"
        )
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)


def _all(
    pool: concurrent.futures.Executor, trials: Sequence[Trial], workdir: Path, title: str
) -> None:
    with Progress(len(trials), title) as progress:
        running = {pool.submit(run_trial, trial, str(workdir)): trial for trial in trials}
        for done in concurrent.futures.as_completed(running):
            done.result()
            progress.update(last=running[done].name)


def _budget(task: str, smoke: bool) -> dict[str, int]:
    rollouts = _SMOKE_ROLLOUTS if smoke else TASKS[task].rollouts
    return {"rollouts": rollouts, "points": _POINTS}


def _choosing(tasks: Iterable[str], arms: Iterable[str], *, smoke: bool) -> list[Trial]:
    """Trials of all settings and rates, the longest first, so that no process waits for long."""
    return [
        Trial(task, arm, setting, 1, RATES, _CHOOSING, **_budget(task, smoke))
        for task in sorted(tasks, key=lambda name: -TASKS[name].rollouts)
        for arm in arms
        for setting in ARMS[arm].settings
    ]


Chosen = dict[tuple[str, str], tuple[str, float]]


def _chosen(
    tasks: Iterable[str], arms: Iterable[str], workdir: Path, trials: Sequence[Trial]
) -> Chosen:
    """Setting and rate of each arm on each task."""
    chosen = {}
    for task in tasks:
        for arm in arms:
            mine = [x for x in trials if (x.task, x.arm) == (task, arm)]
            arrays = {trial.setting: _load(trial, workdir) for trial in mine}
            chosen[task, arm] = analysis.choose(arrays, RATES, TASKS[task].levels[-1])
    return chosen


def _measuring(chosen: Chosen, *, smoke: bool) -> Iterable[Trial]:
    for (task, arm), (setting, rate) in chosen.items():
        yield Trial(task, arm, setting, 2, (rate,), _MEASURING, **_budget(task, smoke))


def _stale(chosen: Chosen, arms: Sequence[str]) -> Iterable[Trial]:
    for arm, setting in STALE_ARMS.items():
        if ("path", arm) in chosen and arm in arms:
            rate = chosen["path", arm][1]
            for age in STALENESS:
                budget = _budget("path", smoke=False)
                yield Trial("path", arm, setting, 2, (rate,), _MEASURING, **budget, staleness=age)


def _load(trial: Trial, workdir: Path) -> dict[str, np.ndarray]:
    with np.load(workdir / "trials" / f"{trial.name}.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def _table(
    task: str, arms: Sequence[str], chosen: Chosen, trials: Sequence[Trial], workdir: Path
) -> list[dict[str, Any]]:
    """Rows of the result: an arm each, and the reference at the temperature that keeps most."""
    runs = {x.arm: _load(x, workdir) for x in trials if x.task == task}
    runs = {arm: {name: x[0] for name, x in arrays.items()} for arm, arrays in runs.items()}
    rows = []
    for arm in arms:
        setting, rate = chosen[task, arm]
        row = {"task": task, "arm": arm, "family": ARMS[arm].family, "setting": setting}
        row |= {"learning_rate": rate} | numbers("end", {k: x[:, -1] for k, x in runs[arm].items()})
        for level in TASKS[task].levels:
            found = analysis.at_level(runs[arm], level)
            row |= numbers(f"at_{level:g}", found) if found else {}
        rows.append(row)
    _test(task, rows, runs)
    for temperature, measures in base_at_temperatures(task, str(workdir)).items():
        row = {"task": task, "arm": "base", "family": "control"}
        row |= {"setting": f"temperature={temperature:g}"}
        rows.append(row | numbers("end", {name: x[None] for name, x in measures.items()}))
    return rows


def _test(task: str, rows: list[dict[str, Any]], runs: Mapping[str, Any]) -> None:
    """Ours against every other arm at the last level, paired by seed; p-values for `_RIVALS`."""
    level = TASKS[task].levels[-1]
    found = {row["arm"]: analysis.at_level(runs[row["arm"]], level) for row in rows}
    distinct = {arm: x["distinct_64"] for arm, x in found.items() if x is not None}
    if _OURS not in distinct:
        return
    others = [row for row in rows if row["arm"] in distinct and row["arm"] != _OURS]
    differences = [distinct[_OURS] - distinct[row["arm"]] for row in others]
    tested = [i for i, row in enumerate(others) if row["arm"] in _RIVALS]
    p_values = [analysis.sign_flip(differences[i].mean(axis=1)) for i in tested]
    for i, p in zip(tested, analysis.holm(p_values), strict=True):
        others[i]["p_holm"] = p
    for row, difference in zip(others, differences, strict=True):
        mean, low, high = analysis.interval(difference)
        row |= {"ours_minus_it": mean, "ours_minus_it_low": low, "ours_minus_it_high": high}
        if row["arm"] == _TWIN:
            margin = _MARGIN * float(distinct[_TWIN].mean())
            row["equivalent_to_ours"] = analysis.equivalent(difference.mean(axis=1), margin)


def _stale_rows(trials: Sequence[Trial], workdir: Path) -> list[dict[str, Any]]:
    """Accuracy and distinct solutions at the end, by how old the rollouts are."""
    rows = []
    for trial in trials:
        ends = {name: x[0, :, -1] for name, x in _load(trial, workdir).items()}
        row = {"arm": trial.arm, "setting": trial.setting, "staleness": trial.staleness}
        rows.append(row | numbers("end", ends))
    return rows


def _write(
    workdir: Path,
    tasks: Sequence[str],
    rows: list[dict[str, Any]],
    stale: list[dict[str, Any]],
    first: Sequence[Trial],
    seconds: float,
) -> None:
    for name, found in (("frontier.csv", rows), ("staleness.csv", stale)):
        write_csv(workdir / name, found)
    (workdir / "seconds.json").write_text(json.dumps({"seconds": seconds}) + "\n")
    text = "\n".join(
        _markdown(task, [row for row in rows if row["task"] == task]) for task in tasks
    )
    (workdir / "table.md").write_text(text + _stale_markdown(stale), encoding="utf-8")
    for task in tasks:
        curves = {}
        for trial in first:
            if trial.task == task:
                ends = _load(trial, workdir)
                curves.setdefault(trial.arm, []).append(ends)
        figure = frontier_figure(TASKS[task].title, curves)
        (workdir / f"frontier-{task}.svg").write_text(figure, encoding="utf-8")


def _markdown(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    level = f"at_{TASKS[task].levels[-1]:g}"
    head = f"at {TASKS[task].levels[-1]:.0%}"
    columns = {
        f"distinct in 64 {head}": f"{level}_distinct_64",
        f"ours minus it {head}": "ours_minus_it",
        f"strategies in 64 {head}": f"{level}_strategies_64",
        "accuracy at the end": "end_accuracy",
        "distinct in 64 at the end": "end_distinct_64",
    }
    titles = ["arm", "setting", "rate", *columns, "p"]
    lines = [
        f"### {TASKS[task].title}",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    warm = max((row for row in rows if row["arm"] == "base"), key=lambda row: row["end_accuracy"])
    shown = [row for row in rows if row["arm"] != "base" or row["setting"] == "temperature=1"]
    order = sorted([*shown, warm], key=lambda row: -row.get(f"{level}_distinct_64", 0.0))
    for row in order:
        label = ARMS[row["arm"]].label if row["arm"] in ARMS else "reference"
        rate = f"{row['learning_rate']:g}" if "learning_rate" in row else "-"
        cells = [cell(row, name) for name in columns.values()]
        p = f"{row['p_holm']:.2g}" if "p_holm" in row else "-"
        lines.append(f"| {' | '.join([label, row['setting'] or '-', rate, *cells, p])} |")
    return "\n".join([*lines, ""])


def _stale_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [
        "",
        "### Staleness, integer paths",
        "",
        "| arm | setting | rollouts old | accuracy | distinct in 64 | effective |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [cell(row, f"end_{name}") for name in ("accuracy", "distinct_64", "effective")]
        label = ARMS[row["arm"]].label
        lines.append(f"| {label} | {row['setting']} | {row['staleness']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


_Key = tuple[str, str, str]


def _key(row: Mapping[str, Any]) -> _Key:
    return row["task"], row["arm"], row["setting"]


def _committed(file: str) -> dict[_Key, dict[str, str]]:
    """The rows of another run's table."""
    require(Path(file).is_file(), f"--compare={file}: no such file; name a frontier.csv")
    with Path(file).open(newline="", encoding="utf-8") as lines:
        return {_key(row): row for row in csv.DictReader(lines)}


def _compare(rows: Sequence[Mapping[str, Any]], others: Mapping[_Key, Mapping[str, str]]) -> None:
    """Says which means of this table lie outside another one's intervals, and what it has not."""
    inside = total = 0
    for row in rows:
        if _key(row) not in others:
            print(f"{' '.join(_key(row))}: not in the other table, which chose another setting")
            continue
        other = others[_key(row)]
        for name in row:
            low, high = other.get(f"{name}_low"), other.get(f"{name}_high")
            if low and high:
                total += 1
                # The file has six digits.
                slack = 1e-5 * max(abs(float(low)), abs(float(high)))
                good = float(low) - slack <= row[name] <= float(high) + slack
                inside += good
                if not good:
                    print(f"{row['task']} {row['arm']} {name}: {row[name]:.4g} is not in"
                          f" [{low}, {high}]")  # fmt: skip
    print(f"{inside} of {total} means lie within the intervals of the other table")


if __name__ == "__main__":
    sys.exit(main())
