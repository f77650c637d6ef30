"""Sizes at which objectives are compared on Countdown, and the config of each run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl_jax.cli import load_config, override
from flowrl_jax.config import Config, parse_config
from flowrl_jax.errors import require
from flowrl_jax.experiments.arms import ARMS

K = 16  # samples among which distinct solutions are counted
_MAX_BATCHES = 3  # of dynamic sampling; 10 as published would be most of the time of all runs
_RESETS = 3  # parts that resets of the reference cut a run into, as in the exact comparison


# What the comparison sets itself, so that changing it would change nothing.
_OWN = ("loss", "model.start_from", "eval.k", "checkpoint.every", "checkpoint.keep")


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of the comparison.

    Attributes:
        title: for the table.
        changes: of the config file, nested as it is.
        level: accuracy at which arms are compared.
    """

    title: str
    changes: Mapping[str, Any]
    level: float


SCALES: dict[str, Scale] = {
    # Says nothing about objectives: it is there to try the command.
    "tiny": Scale(
        "Countdown, two numbers, tiny",
        {
            "steps": 4,
            "model": {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 1}
            | {"head_dim": 16, "mlp_dim": 64, "remat": "none"},
            "tokenizer": {"max_number": 12},
            "data": {
                "options": {"sizes": (2,), "target_max": 12, "max_value": 12}
                | {"min_solutions": 1, "train": 36, "test": 16}
            },
            "rollout": {"prompts_per_step": 8, "group_size": 4}
            | {"max_prompt_length": 8, "max_response_length": 8},
            "task": {"options": {"careless": 0.0}},
            "sft": {"steps": 100, "batch_size": 32}
            | {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 10}},
            "eval": {"every": 2, "prompts": 16, "prompts_per_batch": 16, "samples": 16},
        },
        level=0.1,
    ),
    "small": Scale(
        "Countdown, four numbers, 0.2 M parameters",
        {"eval": {"every": 20, "prompts": 128, "prompts_per_batch": 64, "samples": 32}},
        level=0.35,
    ),
    # For one GPU. No run of it has been made yet, so its rates and level are guesses.
    "25m": Scale(
        "Countdown, four and five numbers, 25 M parameters",
        {
            "steps": 300,
            "model": {"num_layers": 8, "embed_dim": 512, "num_heads": 8, "num_kv_heads": 8}
            | {"head_dim": 64, "mlp_dim": 1408, "init_std": 0.02, "dtype": "bfloat16"},
            "data": {
                "options": {"sizes": (4, 5), "number_max": 10, "target_max": 50}
                | {"min_solutions": 4, "train": 4096, "test": 256}
            },
            "rollout": {"prompts_per_step": 64, "group_size": 16}
            | {"max_prompt_length": 14, "max_response_length": 28},
            "optimizer": {"learning_rate": 1e-4},
            "sft": {"steps": 4000, "batch_size": 256, "optimizer": {"learning_rate": 1e-3}},
            "eval": {"every": 30, "prompts": 256, "prompts_per_batch": 256, "samples": 32},
        },
        level=0.5,
    ),
}


def base_config(file: str, scale: str, steps: int | None, overrides: Mapping[str, str]) -> Config:
    """The config that all runs have in common.

    Args:
        file: `FILE[:ARGUMENT]`, as `--config` takes it.
        scale: name in `SCALES`.
        steps: of every run; None: the scale's.
        overrides: texts by name, as in `cli.load_config`; they count more than the scale.

    Returns:
        The config; its `eval.every` says how often a run is measured.

    Raises:
        InputError: the file is missing, or a setting is wrong.
    """
    for name in overrides:
        require(
            not any(name == own or name.startswith(f"{own}.") for own in _OWN),
            f"--config.{name}={overrides[name]}: the comparison sets it itself; choose objectives"
            " with --arms and where runs are measured with --config.eval.every",
        )
    values = load_config(file, {})
    # Options are a data set's own business: no name of theirs is refused here.
    values.unlock()
    values.update(SCALES[scale].changes)
    override(values, overrides)
    if steps is not None:
        values.steps = steps
    config = parse_config(values)
    require(
        config.eval.every > 0,
        f"eval.every={config.eval.every}: the steps between two measurements; give 1 or more",
    )
    require(
        config.eval.samples >= K,
        f"eval.samples={config.eval.samples}: distinct solutions are counted among {K}; give"
        f" {K} or more",
    )
    return config


def seeded(base: Config, seed: int) -> Config:
    """The config of a seed's warm-up; the data set is the same for all seeds."""
    every = base.eval.every
    return dataclasses.replace(
        base,
        seed=base.seed + seed,
        eval=dataclasses.replace(base.eval, every=0, k=K),
        # Runs are measured from their checkpoints, so all of them stay until then.
        checkpoint=dataclasses.replace(base.checkpoint, every=every, keep=base.steps, keep_best=0),
    )


def of_arm(config: Config, arm: str, setting: str, warmup: Path) -> Config:
    """The config of an arm's run.

    Args:
        config: from `seeded`.
        arm: name in `ARMS`.
        setting: name in the arm's `settings`.
        warmup: folder of the run to start from.
    """
    learning = ARMS[arm].learning
    rollout, reference = config.rollout, config.reference
    if learning.get("only_varied"):
        rollout = dataclasses.replace(rollout, dynamic_sampling=True, max_batches=_MAX_BATCHES)
    if learning.get("reset_every"):
        every = max(config.steps // _RESETS, 1)
        reference = dataclasses.replace(reference, reset_every=every)
    return dataclasses.replace(
        config,
        loss=ARMS[arm].settings[setting],
        model=dataclasses.replace(config.model, start_from=str(warmup)),
        rollout=rollout,
        reference=reference,
    )
