"""Memory and time of a run on chips that are not there: `python -m flowrl_jax.plan`.

    plan --config=configs/math_7b.py --topology=v5p:2x2x2 [--search] [--json=FILE]
         [--programs=train_step,...] [--slices=N]

compiles every program of the loop with the real TPU compiler, which needs no TPU, and prints what
each needs of a device's memory, what it computes and what devices send each other. The compiler is
the package libtpu, installed, or unpacked anywhere and named by the environment variable
TPU_LIBRARY_PATH. For GPUs (`--topology=h100:8`) there is no compiler: formulas take its place, and
the table says so. Neither weights, tokenizer nor data are read: a model that has not been
downloaded is known by its folder's name, if it is a published one. Times are estimates from
published rates and no measurements.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from flowrl_jax import cli
from flowrl_jax.config import Config
from flowrl_jax.errors import InputError
from flowrl_jax.planning.chips import describe
from flowrl_jax.planning.measure import Measured
from flowrl_jax.planning.programs import planned_learner
from flowrl_jax.planning.search import (
    Choice,
    largest_micro_batch,
    measure_all,
    smallest_slice,
    suggest,
)
from flowrl_jax.planning.table import table
from flowrl_jax.planning.times import ASSUMPTIONS, ASSUMPTIONS_OF_FORMULAS

NAMES = ("prefill", "decode", "score", "train_step")


def plan(
    config: Config,
    topology: str,
    names: Sequence[str] = NAMES,
    *,
    slices: int = 1,
    search: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compiles a run's programs, or estimates them where no compiler for the chip is at hand.

    Args:
        config: the settings.
        topology: such as "v5p:2x2x2" or "h100:8".
        names: of the programs, some of `NAMES`.
        slices: of this topology, joined by a data centre's network.
        search: whether to look for the largest micro-batch on this topology and the smallest slice
            of the chip, by compiling; a few more compilations.
        say: is told what is being done.

    Returns:
        What --json writes, see docs/plan.md; sizes in bytes on one device.

    Raises:
        InputError: the topology is not known, sizes do not divide, or the model's shape is not
            known; before anything compiles.
    """
    described = describe(topology, slices)
    learner = planned_learner(config, described.devices)
    measured = list(measure_all(config, described, names, say))
    fits = all(program.fits for program in measured)
    shape = learner.model.config
    compiled = described.chip.compiled
    assumptions: list[str] = [*(ASSUMPTIONS if compiled else ASSUMPTIONS_OF_FORMULAS)]
    if compiled and shape.attention != config.model.attention:
        assumptions.append(f"the run has --config.model.attention={shape.attention}")
    found = {
        "topology": topology,
        "slices": slices,
        "chip": dataclasses.asdict(described.chip),
        "devices": described.count,
        "mesh": dict(learner.layout.mesh.shape),
        "model": {
            "parameters": shape.num_parameters,
            "layers": shape.num_layers,
            "attention": shape.attention if compiled else config.model.attention,
            "remat": shape.remat,
        },
        "micro_batch_size": learner.micro_batch(config.rows_per_update),
        "estimated": not compiled,
        "fits": fits,
        "programs": {program.name: dataclasses.asdict(program) for program in measured},
        "step_seconds": _step_seconds(measured, names),
        "assumptions": assumptions,
        "suggestions": [],
    }
    if not fits:
        found["suggestions"] = _plain(suggest(config, described, names, measured))
    if search:
        found["search"] = {
            "largest_micro_batch": _plain(largest_micro_batch(config, described, measured, say)),
            "smallest_slice": _plain(smallest_slice(config, described, names, measured, say)),
        }
    return found


def _step_seconds(measured: Sequence[Measured], names: Sequence[str]) -> float | None:
    """Seconds of a whole step; None where a program is left out or its time is not known."""
    if set(names) != set(NAMES) or not all(program.seconds for program in measured):
        return None
    return sum(program.runs_per_step * program.seconds for program in measured)


def _plain(choices: Choice | list[Choice] | None) -> Any:
    """As JSON has it."""
    if isinstance(choices, list):
        return [dataclasses.asdict(choice) for choice in choices]
    return None if choices is None else dataclasses.asdict(choices)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Says what a run needs of chips that are not there.")
    flags.DEFINE_string("topology", "", "such as v5p:2x2x2, v6e:2x4 or h100:8", flag_values=values)
    flags.DEFINE_integer("slices", 1, "of this topology", flag_values=values)
    flags.DEFINE_string("json", "", "file for the numbers", flag_values=values)
    flags.DEFINE_list("programs", list(NAMES), "which programs", flag_values=values)
    flags.DEFINE_bool(
        "search",
        False,
        "finds the largest micro-batch and the smallest slice that fit, by compiling",
        flag_values=values,
    )

    def start(config: Config, values: flags.FlagValues) -> None:
        # Planning must neither wait for this machine's accelerators nor take them.
        jax.config.update("jax_platforms", "cpu")
        topology, names = str(values["topology"].value), list(values["programs"].value or [])
        if not topology:
            raise InputError("--topology is missing: name one, such as v5p:2x2x2")
        unknown = [name for name in names if name not in NAMES]
        if unknown or not names:
            raise InputError(
                f"--programs={','.join(unknown)}: not known; known: {', '.join(NAMES)}"
            )
        out = str(values["json"].value)
        if out and not Path(out).parent.is_dir():
            raise InputError(f"--json={out}: the folder is missing: make it, or name another")
        found = plan(
            config,
            topology,
            names,
            slices=int(str(values["slices"].value)),
            search=bool(values["search"].value),
            say=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
        )
        print(table(found))
        if out:
            Path(out).write_text(json.dumps(found, indent=2) + "\n")

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
