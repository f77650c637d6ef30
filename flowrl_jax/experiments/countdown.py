"""python -m flowrl_jax.experiments.countdown: objectives compared through the trainer itself.

Held-out Countdown. Each seed has a warm-up on demonstrations; from it every arm takes the same
number of steps with the same prompts, samples per prompt and learning rate, in runs that are what
`sft` and `train` make. The checkpoints of a run are measured one by one, always against the
warm-up, by problem, since a run's own evaluations know no KL where its objective has no reference
and another one where the reference moves. What is done is kept in the folder and not done again; a
run that was interrupted goes on at its last checkpoint.

Dynamic sampling (DAPO, ProRL) samples more prompts than the others to learn from as many;
countdown.csv says how many.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowrl_jax import cli
from flowrl_jax.assembly import CHECKPOINTS, assemble, configure_jax, load_run_policy, reference_of
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.config import Config
from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluation import prompt_values
from flowrl_jax.evaluator import Evaluator
from flowrl_jax.experiments.arms import ARMS
from flowrl_jax.experiments.countdown_table import Curves, write_results
from flowrl_jax.experiments.scales import SCALES, K, base_config, of_arm, seeded
from flowrl_jax.graded import samples_from_records
from flowrl_jax.metrics import read_metrics
from flowrl_jax.settings import settings_of
from flowrl_jax.sft import sft
from flowrl_jax.tasks.base import nearest
from flowrl_jax.train import train

DEFAULT_ARMS = (
    *("grpo:kl_coef=0.01", "dapo:kl_coef=0.01", "dr_grpo:kl_coef=0.01", "gspo:kl_coef=0.01"),
    *("gmpo:kl_coef=0.01", "cispo:kl_coef=0.01", "prorl:kl_coef=0.01", "rloo_kl:beta=15"),
    *("flowrl_paper:beta=15", "flowrl_paper:beta=1", "tb_vargrad:beta=15", "flowrl:beta=15"),
)
MEASURES = {  # of `prompt_values`, by the names that the statistics of experiments know
    "accuracy": "pass_at_1",
    f"pass_{K}": f"pass_at_{K}",
    f"distinct_{K}": f"distinct_correct_{K}",
    "effective": "effective_solutions",
    "kl_to_reference": "kl_to_reference",
    "length": "mean_length",
}
_MAX_SEEDS = 16  # what an exact sign-flip test can list


@dataclasses.dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        arm: name in `ARMS`; "warmup" for the run that the others start from.
        setting: name in the arm's `settings`.
        seed: counted from the config's.
        config: its settings.
    """

    arm: str
    setting: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Of its folder and its file of results."""
        setting = self.setting.replace("=", "")
        return "-".join([self.arm, *([setting] if setting else []), f"seed{self.seed}"])

    def folder(self, workdir: Path) -> Path:
        """Where it trains."""
        return workdir / "runs" / self.name

    def file(self, workdir: Path) -> Path:
        """Its results: arrays `[points, prompts]` by the names of `MEASURES`, and `steps`."""
        return workdir / "results" / f"{self.name}.npz"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, as in `cli`."""
    parser = argparse.ArgumentParser(
        prog="python -m flowrl_jax.experiments.countdown",
        description=__doc__,
        epilog="--config.SECTION.FIELD=VALUE changes a setting of all runs, as for train.",
    )
    parser.add_argument("--workdir", required=True, help="folder of runs and results")
    parser.add_argument(
        "--scale", default="small", help=f"{', '.join(SCALES)} (default %(default)s)"
    )
    parser.add_argument(
        "--arms",
        default=",".join(DEFAULT_ARMS),
        help="ARM or ARM:SETTING of experiments/arms.py, comma between (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default 3)")
    parser.add_argument("--steps", type=int, help="of every run; default: the scale's")
    parser.add_argument("--level", type=float, help="accuracy to compare at; default: the scale's")
    parser.add_argument(
        "--config", default="configs/quickstart.py", help="that scales change (default %(default)s)"
    )
    try:
        words, overrides = cli.split_overrides(sys.argv[1:] if arguments is None else arguments)
        compare(parser.parse_args(words), overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.WRONG_INPUT
    except cli.Alarmed as error:
        print(f"stopped: {error}", file=sys.stderr)
        return cli.ALARMED
    except cli.Preempted:
        print("preempted: the same command goes on where this one stopped", file=sys.stderr)
        return cli.PREEMPTED
    return 0


def compare(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Makes all runs that are not done, and the table after each seed.

    Args:
        options: of the command line.
        overrides: settings by name, as text.

    Raises:
        InputError: an option is wrong, or the folder holds results of other settings.
        cli.Alarmed, cli.Preempted: as `train`.
    """
    require(
        options.scale in SCALES,
        f"--scale={options.scale}: unknown; {nearest(options.scale, SCALES)}",
    )
    level = SCALES[options.scale].level if options.level is None else options.level
    require(0.0 < level < 1.0, f"--level={level}: an accuracy; give one between 0 and 1")
    require(
        1 <= options.seeds <= _MAX_SEEDS,
        f"--seeds={options.seeds}: give 1 to {_MAX_SEEDS}",
    )
    arms = arms_of(options.arms)
    base = base_config(options.config, options.scale, options.steps, overrides)
    workdir = Path(options.workdir)
    seeds = [runs_of(base, seed, arms, workdir) for seed in range(options.seeds)]
    _claim(workdir, base)
    configure_jax(str(workdir / "compiled"))
    print(f"{jax.device_count()} {jax.default_backend()} device(s), jax {jax.__version__}")
    todo = [run for runs in seeds for run in runs if not run.file(workdir).exists()]
    clock = _Clock(len(todo))
    for number, runs in enumerate(seeds, start=1):
        for run in runs:
            if run in todo:
                clock.announce(run.name)
                perform(run, workdir)
        title = f"{SCALES[options.scale].title}, {base.steps} steps"
        write_results(workdir, title, _curves(seeds[:number], workdir), level)
    print((workdir / "table.md").read_text(encoding="utf-8"))


def arms_of(given: str) -> list[tuple[str, str]]:
    """Arms and settings that a flag names.

    Args:
        given: `ARM` or `ARM:SETTING`, comma between; an arm alone has its settings of
            `DEFAULT_ARMS`, or else its first one.

    Raises:
        InputError: a name is unknown, or there is none.
    """
    chosen: list[tuple[str, str]] = []
    for word in filter(None, given.split(",")):
        arm, colon, setting = word.partition(":")
        require(arm in ARMS, f"--arms={given}: {arm} is unknown; {nearest(arm, ARMS)}")
        known = ARMS[arm].settings
        require(
            not colon or setting in known,
            f"--arms={given}: {arm} has no setting {setting!r}; give one of {', '.join(known)}",
        )
        usual = [name.partition(":")[2] for name in DEFAULT_ARMS if name.startswith(f"{arm}:")]
        chosen += [(arm, x) for x in ([setting] if colon else usual or [next(iter(known))])]
    require(bool(chosen), f"--arms={given}: names none; {nearest('', ARMS)}")
    return list(dict.fromkeys(chosen))


def runs_of(base: Config, seed: int, arms: Iterable[tuple[str, str]], workdir: Path) -> list[Run]:
    """A seed's runs: its warm-up, then the arms."""
    config = seeded(base, seed)
    warmup = Run("warmup", "", seed, config)
    start = warmup.folder(workdir)
    others = [Run(arm, x, seed, of_arm(config, arm, x, start)) for arm, x in arms]
    return [warmup, *others]


def perform(run: Run, workdir: Path) -> None:
    """Trains and measures; goes on with what was interrupted.

    Args:
        run: what to do.
        workdir: folder of the experiment.
    """
    folder, steps = run.folder(workdir), run.config.steps
    saved = saved_steps(folder / CHECKPOINTS)
    if run.arm == "warmup":
        if not saved:
            # It has a single checkpoint, at its end: there is nothing to go on from.
            shutil.rmtree(folder, ignore_errors=True)
            sft(run.config, folder)
    elif saved[-1:] != [steps]:
        train(run.config, folder, resume=folder.exists())
    saved = saved_steps(folder / CHECKPOINTS)
    # Whoever was preempted has saved where nothing is measured.
    points = [x for x in saved if x % run.config.checkpoint.every == 0 or x == saved[-1]]
    arrays: dict[str, Any] = measure(run.config, folder, points)
    arrays["steps"] = np.array([0] if run.arm == "warmup" else points)
    arrays["drawn"] = np.array(0 if run.arm == "warmup" else _drawn(folder))
    file = run.file(workdir)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as lines:
        np.savez(lines, **arrays)
    partial.replace(file)
    for step in saved[:-1]:
        shutil.rmtree(folder / CHECKPOINTS / str(step))


def measure(config: Config, folder: Path, steps: Sequence[int]) -> dict[str, np.ndarray]:
    """What held-out problems say of a run's checkpoints.

    Args:
        config: of the run.
        folder: of the run.
        steps: of its checkpoints.

    Returns:
        `[points, prompts]` by the names of `MEASURES`; KL is against the policy that the run
        started from, or against the first of its own checkpoints where that is none.
    """
    parts = assemble(config, folder)
    evaluator = Evaluator(parts, config.eval)
    found: list[dict[str, np.ndarray]] = []
    reference = None
    for step in steps:
        policy = load_run_policy(parts, folder, step)
        if reference is None:
            reference = reference_of(parts, policy) if config.model.start_from else policy
        records = evaluator.records(policy, reference)
        found.append(prompt_values(samples_from_records(records), k=K))
    parts.task.close()
    return {name: np.stack([x[other] for x in found]) for name, other in MEASURES.items()}


def _drawn(folder: Path) -> int:
    """Prompts that a run has sampled responses to."""
    return int(read_metrics(folder)[-1]["data/position"])


def _claim(workdir: Path, base: Config) -> None:
    """Makes the folder, and refuses one whose results are of other settings."""
    file = workdir / "settings.json"
    text = json.dumps(settings_of(base), indent=2, default=str) + "\n"
    if file.is_file():
        old, new = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
        names = [name for name in new if old.get(name) != new[name]]
        require(
            not names,
            f"--workdir={workdir} holds runs with another {', '.join(names)}: give the same"
            " --scale, --steps, --config and settings, or name another folder",
        )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be made ({error.strerror}): name another folder"
        ) from error
    file.write_text(text, encoding="utf-8")


def _curves(seeds: Sequence[Sequence[Run]], workdir: Path) -> list[Curves]:
    """The results of each arm over seeds; the first one is the warm-up's."""
    curves = []
    for runs in zip(*seeds, strict=True):
        arrays = []
        for run in runs:
            with np.load(run.file(workdir)) as file:
                arrays.append({name: file[name] for name in file.files})
        measured = {name: np.stack([x[name] for x in arrays]) for name in MEASURES}
        drawn = float(np.mean([x["drawn"] for x in arrays]))
        curves.append(Curves(runs[0].arm, runs[0].setting, arrays[0]["steps"], measured, drawn))
    return curves


class _Clock:
    """Says which run begins and how long the rest may take."""

    def __init__(self, total: int) -> None:
        self._total, self._started, self._began = total, 0, time.perf_counter()

    def announce(self, name: str) -> None:
        self._started += 1
        done = self._started - 1
        left = ""
        if done:
            seconds = (time.perf_counter() - self._began) / done * (self._total - done)
            left = f"  (about {seconds / 60:.0f} min left)"
        print(f"\n[{self._started}/{self._total}] {name}{left}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
