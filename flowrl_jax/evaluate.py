"""Evaluation of a policy: `python -m flowrl_jax.evaluate --config=FILE --run=DIR --out=FILE`.

With `--benchmarks=aime24,math500,...` it is evaluated on these instead of the config's data, with
16 samples at temperature 0.6 and top-p 0.95 as the paper does, and --out is a folder with a file
for each. Samples are written when a batch of prompts has been judged; the command that is started
again goes on there, and its figures are those of one that was not interrupted.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags

from flowrl_jax import cli
from flowrl_jax.assembly import assemble, configure_jax, load_run_policy, reference_of
from flowrl_jax.benchmarking import run_benchmarks, samples_path
from flowrl_jax.config import Config
from flowrl_jax.distributed import define_flags, join
from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluation import Summary, summarize
from flowrl_jax.evaluation.benchmarks import Benchmark, benchmarks
from flowrl_jax.evaluation.codeforces import load_standings
from flowrl_jax.evaluation.further import further_figures
from flowrl_jax.evaluation.results import benchmark_values, render_benchmarks, summarize_benchmarks
from flowrl_jax.evaluator import Evaluator
from flowrl_jax.graded import samples_from_records, write_records
from flowrl_jax.new_folder import in_first_process
from flowrl_jax.progress import Progress
from flowrl_jax.report import render_table


def evaluate(config: Config, run: str | Path, out: str | Path | None = None) -> Summary:
    """Evaluates the latest policy of a run.

    Args:
        config: the run's settings.
        run: the run's folder; empty for the policy that training would start from.
        out: JSON-lines file for the judged samples.

    Returns:
        name -> {"mean", "low", "high"}, 95 % intervals over prompts.

    Raises:
        InputError: for whatever of the config, data or folder is wrong, before compiling.
    """
    with tempfile.TemporaryDirectory() as scratch:
        parts = assemble(config, Path(run or scratch))
    evaluator = Evaluator(parts, config.eval)
    policy = load_run_policy(parts, run)
    reference = reference_of(parts, policy) if run else policy
    name = f"evaluate {Path(run).name}" if run else "evaluate"
    with (
        contextlib.closing(parts.task),
        Progress(evaluator.num_prompts, name, unit="prompt") as progress,
    ):
        records = evaluator.records(policy, reference, progress)
    if out:
        in_first_process(lambda: _write(Path(out), records))
    return summarize(samples_from_records(records), k=config.eval.k)


def _write(out: Path, records: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_records(out, records)


def _on_benchmarks(config: Config, run: str, values: flags.FlagValues) -> None:
    """Evaluates on the benchmarks that the command line names, and prints tables."""
    out = str(values["out"].value or (run and Path(run) / "benchmarks"))
    require(bool(out), "--out is missing: name a folder for the benchmarks' samples")
    require(
        not out.endswith((".jsonl", ".json")),
        f"--out={out}: with --benchmarks it is a folder, with a file for each; name one",
    )
    given = {name: values[name].value for name in ("samples", "temperature", "top_p", "top_k")}
    changes = {name: value for name, value in given.items() if value is not None}
    chosen: dict[str, Benchmark] = {}
    for name, benchmark in benchmarks(str(values["benchmarks"].value)).items():
        sampling = dataclasses.replace(benchmark.sampling, **changes)
        chosen[name] = dataclasses.replace(benchmark, sampling=sampling)
    folder = str(values["codeforces"].value)
    require(
        not folder or "codeforces" in chosen,
        f"--codeforces={folder}: goes with --benchmarks=codeforces; add it, or leave the flag out",
    )
    standings = load_standings(folder) if folder else None
    records = run_benchmarks(config, run, chosen, Path(out))
    if jax.process_index() != 0:
        return
    figures = {name: benchmark_values(found) for name, found in records.items()}
    samples = {name: samples_path(out, name) for name in records}
    further = further_figures(records, samples, standings)
    summary = summarize_benchmarks(figures)
    for name, found in further.summary.items():
        summary[name] |= found
    print(render_table(summary))
    for note in further.notes:
        print(note)
    paper = render_benchmarks(figures, Path(run).name or "policy", more=further.columns)
    if paper:
        print(f"\n{paper}")
    if values["json"].value:
        settings = {name: found[0]["settings"] for name, found in records.items()}
        kept = {"benchmarks": summary, "settings": settings, "notes": further.notes}
        text = json.dumps(kept, indent=2)
        Path(values["json"].value).write_text(text + "\n", encoding="utf-8")


def _benchmark_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "benchmarks", "", "names with commas between; see docs/evaluation.md", flag_values=values
    )
    what = "with --benchmarks; default: the benchmark's, 16 samples at 0.6 and top-p 0.95"
    flags.DEFINE_integer("samples", None, f"per prompt, {what}", flag_values=values)
    flags.DEFINE_float("temperature", None, what, flag_values=values)
    flags.DEFINE_float("top_p", None, what, flag_values=values)
    flags.DEFINE_integer("top_k", None, f"{what}, all tokens", flag_values=values)
    flags.DEFINE_string(
        "codeforces", "", "folder of standings; see docs/evaluation.md", flag_values=values
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Evaluates a policy on held-out prompts.")
    flags.DEFINE_string(
        "run",
        "",
        "folder of a run; empty: the policy training would start from",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out",
        "",
        "JSON-lines file for the judged samples; with --benchmarks a folder, by default of the run",
        flag_values=values,
    )
    flags.DEFINE_string("json", "", "file for the summary", flag_values=values)

    _benchmark_flags(values)
    define_flags(values)

    def start(config: Config, values: flags.FlagValues) -> None:
        join(values)
        configure_jax()
        run = str(values["run"].value)
        if run and not Path(run).is_dir():
            raise InputError(f"--run={run}: no such folder; name the folder of a run")
        if values["benchmarks"].value:
            _on_benchmarks(config, run, values)
            return
        names = ("samples", "temperature", "top_p", "top_k", "codeforces")
        unused = [name for name in names if values[name].value not in (None, "")]
        require(
            not unused,
            f"--{unused[0] if unused else ''} goes with --benchmarks: name some, or set"
            " --config.eval's fields",
        )
        summary = evaluate(config, run, values["out"].value or None)
        if jax.process_index() == 0:
            print(render_table({Path(run).name or "policy": summary}))
            if values["json"].value:
                Path(values["json"].value).write_text(json.dumps(summary, indent=2) + "\n")

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
