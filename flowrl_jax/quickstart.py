"""Warm-up, FlowRL and GRPO on Countdown, compared: `make quickstart`.

Every stage is what its own command does (`sft`, `train`, `evaluate`, `report`); this module runs
them in one process and says which is which.
"""

import dataclasses
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from flowrl_jax import cli, report
from flowrl_jax.assembly import configure_jax
from flowrl_jax.config import Config
from flowrl_jax.errors import InputError
from flowrl_jax.evaluate import evaluate
from flowrl_jax.evaluation import paired_difference
from flowrl_jax.graded import read_records, samples_from_records
from flowrl_jax.objectives.presets import PRESETS
from flowrl_jax.sampling_config import EvalConfig
from flowrl_jax.sft import sft
from flowrl_jax.train import train

# Samples per problem of the final evaluation: twice the 16 that the figures speak of, so that
# pass@16 and distinct solutions in 16 are averages over many choices of 16.
FINAL_SAMPLES = 32
POLICIES = ("warmup", "flowrl", "grpo")
PACKAGES = ("jax", "flax", "optax")


def quickstart(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Runs all stages and writes `summary.json` and `report.html`.

    Args:
        config: of the FlowRL run; the warm-up and GRPO differ in nothing but the objective.
        workdir: folder of the three runs and the results; an older one is moved aside.

    Returns:
        The summary, as written.
    """
    workdir = Path(workdir)
    _move_aside(workdir)
    started = time.perf_counter()
    warmup = workdir / "warmup"
    model = dataclasses.replace(config.model, start_from=str(warmup))
    flowrl = dataclasses.replace(config, model=model)
    grpo = dataclasses.replace(flowrl, loss=PRESETS["grpo"])

    _announce("1/6", "warm-up on demonstrations", "sft")
    sft(config, warmup)
    _announce("2/6", "FlowRL from the warm-up", "train")
    train(flowrl, workdir / "flowrl")
    _announce("3/6", "GRPO from the same start, with the same budget", "train")
    train(grpo, workdir / "grpo")

    final = dataclasses.replace(config.eval, prompts=0, samples=max(FINAL_SAMPLES, config.eval.k))
    results = {}
    for number, policy in enumerate(POLICIES, start=4):
        _announce(f"{number}/6", f"{policy} on held-out problems", "evaluate")
        results[policy] = _evaluate(flowrl, final, workdir / policy)
    summary = _summary(config, results, workdir, time.perf_counter() - started)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _show(workdir)
    return summary


def _move_aside(workdir: Path) -> None:
    """Keeps the results of an earlier quickstart under another name."""
    if not workdir.exists():
        return
    number = 1
    while (kept := workdir.with_name(f"{workdir.name}-{number}")).exists():
        number += 1
    workdir.rename(kept)
    print(f"{workdir} is from an earlier run; it is now {kept}")


def _announce(number: str, what: str, command: str) -> None:
    print(f"\n[{number}] {what}  (python -m flowrl_jax.{command})", flush=True)


def _evaluate(config: Config, settings: EvalConfig, run: Path) -> Any:
    return evaluate(dataclasses.replace(config, eval=settings), run, run / "samples.jsonl")


def _summary(
    config: Config, results: dict[str, Any], workdir: Path, seconds: float
) -> dict[str, Any]:
    samples = {
        policy: samples_from_records(read_records(workdir / policy / "samples.jsonl"))
        for policy in POLICIES
    }
    return {
        "title": "FlowRL and GRPO on Countdown",
        "summary": (
            "Four numbers, one target, several right answers. Both policies start from the same"
            f" warm-up and take {config.steps} steps of"
            f" {config.rollout.prompts_per_step} problems x {config.rollout.group_size} samples."
        ),
        "policies": results,
        "start": "warmup",
        "differences": {
            "FlowRL minus GRPO": paired_difference(
                samples["flowrl"], samples["grpo"], k=config.eval.k
            )
        },
        "settings": {
            "beta": config.loss.beta,
            "learning rate": config.optimizer.learning_rate,
            "steps": config.steps,
            "problems per step": config.rollout.prompts_per_step,
            "samples per problem": config.rollout.group_size,
            "held-out problems": samples["warmup"].num_prompts,
        },
        "command": "make quickstart" + (f" SEED={config.seed}" if config.seed else ""),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seed": config.seed,
        "seconds": seconds,
    }


def _show(workdir: Path) -> None:
    """Prints the table and some answers, and writes the report."""
    data = report.load([workdir])
    report.write(workdir / "report.html", data)
    report.write_plane(workdir / "accuracy_diversity.svg", data)
    print(f"\nHeld-out problems, mean and 95 % interval:\n\n{report.render_table(data.results)}\n")
    compared = report.equal_accuracy(data)
    if compared is not None:
        first, second, values = compared
        print(
            f"At equal accuracy (pass@1 = {values.accuracy[-1]:.3f}, read off the learning curves):"
            f" {values.first[-1]:.2f} distinct correct solutions in 16 samples with"
            f" {data.label(first)}, {values.second[-1]:.2f} with {data.label(second)}\n"
        )
    for group in data.samples[:2]:
        print(group.prompt)
        for policy, samples in group.samples.items():
            right = dict.fromkeys(s.response for s in samples if s.correct)
            shown = "   ".join(list(right)[:4]) or "-"
            print(f"  {data.label(policy):8} {len(right):2} different right answers: {shown}")
    print(f"\nReport: {workdir / 'report.html'}   ({data.seconds:.0f} s in all)")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Warm-up, FlowRL and GRPO on one task, compared.")
    flags.DEFINE_string("workdir", "runs/quickstart", "folder of the results", flag_values=values)

    def start(config: Config, values: flags.FlagValues) -> None:
        if not hasattr(config.loss, "beta"):
            raise InputError(
                "the quickstart compares a FlowRL objective with GRPO: name a preset"
                " of FlowRL, as in --config=configs/quickstart.py:flowrl_paper"
            )
        configure_jax()
        print(f"{jax.device_count()} {jax.default_backend()} device(s), jax {jax.__version__}")
        quickstart(config, str(values["workdir"].value))

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
