"""Memory and time of a run on chips that are not there: `python -m flowrl_jax.plan`.

    plan --config=configs/math_7b.py --topology=v5p:2x2x2 [--json=FILE] [--programs=train_step,...]

compiles every program of the loop with the real TPU compiler, which needs no TPU, and prints what
each needs of a device's memory. The compiler is the package libtpu, installed, or unpacked anywhere
and named by the environment variable TPU_LIBRARY_PATH. Neither weights, tokenizer nor data are
read: a model that has not been downloaded is known by its folder's name, if it is a published one.
Times are lower bounds from published rates and no measurements.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from flowrl_jax import cli
from flowrl_jax.config import Config
from flowrl_jax.errors import InputError
from flowrl_jax.planning.chips import Chip, describe
from flowrl_jax.planning.measure import Measured, gib, measure
from flowrl_jax.planning.programs import planned_learner, programs

NAMES = ("prefill", "decode", "score", "train_step")


def plan(config: Config, topology: str, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """Compiles a run's programs.

    Args:
        config: the settings.
        topology: such as "v5p:2x2x2".
        names: of the programs, some of `NAMES`.

    Returns:
        `{"topology", "chip", "devices", "model", "mesh", "fits", "programs": {name: ...}}`, sizes
        in bytes on one device.

    Raises:
        InputError: the topology is not known, sizes do not divide, or the model's shape is not
            known; before anything compiles.
    """
    chip, devices = describe(topology)
    learner = planned_learner(config, devices)
    shape = learner.model.config
    length = config.rollout.max_prompt_length + config.rollout.max_response_length
    measured = {
        program.name: dataclasses.asdict(measure(program, shape, chip, len(devices), length))
        for program in programs(config, learner)
        if program.name in names
    }
    return {
        "topology": topology,
        "chip": dataclasses.asdict(chip),
        "devices": len(devices),
        "mesh": dict(learner.layout.mesh.shape),
        "model": {"parameters": shape.num_parameters, "attention": shape.attention},
        "fits": all(program["fits"] for program in measured.values()),
        "programs": measured,
    }


def table(found: dict[str, Any]) -> str:
    """What a plan says, for people."""
    chip = Chip(**found["chip"])
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    lines = [
        f"{found['devices']} x {chip.name}, {gib(chip.memory)} GiB each; mesh {mesh};"
        f" {found['model']['parameters'] / 1e9:.1f}e9 parameters",
        f"{'program':12}{'GiB':>8}{'arguments':>11}{'other':>8}{'TFLOP':>11}{'s >=':>9}"
        f"{'compiled in':>13}",
    ]
    for values in found["programs"].values():
        program = Measured(**values)
        lines.append(
            f"{program.name:12}{gib(program.peak_bytes):>8}{gib(program.argument_bytes):>11}"
            f"{gib(program.peak_bytes - program.argument_bytes):>8}"
            f"{program.model_flops / 1e12:>11.1f}{program.seconds:>9.3g}"
            f"{program.compile_seconds:>11.0f} s"
            + ("" if program.fits else f"  {gib(program.peak_bytes - chip.memory)} GiB too many")
        )
    lines.append(
        "Operations are the model's own, over all devices; seconds are a lower bound from published"
        " rates."
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Says what a run needs of chips that are not there.")
    flags.DEFINE_string("topology", "", "such as v5p:2x2x2 or v6e:2x4", flag_values=values)
    flags.DEFINE_string("json", "", "file for the numbers", flag_values=values)
    flags.DEFINE_list("programs", list(NAMES), "which programs", flag_values=values)

    def start(config: Config, values: flags.FlagValues) -> None:
        # Planning must neither wait for this machine's accelerators nor take them.
        jax.config.update("jax_platforms", "cpu")
        topology, names = str(values["topology"].value), list(values["programs"].value or [])
        if not topology:
            raise InputError("--topology is missing: name one, such as v5p:2x2x2")
        unknown = [name for name in names if name not in NAMES]
        if unknown:
            raise InputError(f"--programs={unknown[0]}: not known; known: {', '.join(NAMES)}")
        found = plan(config, topology, names)
        print(table(found))
        if values["json"].value:
            Path(str(values["json"].value)).write_text(json.dumps(found, indent=2) + "\n")

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
