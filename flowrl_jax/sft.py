"""Supervised fine-tuning on a task's demonstrations: `python -m flowrl_jax.sft --config=FILE`.

A cold start for reinforcement learning: the same model, the same train step with another
objective, and a run folder that `model.start_from` can name.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from flowrl_jax import cli
from flowrl_jax.assembly import (
    CHECKPOINTS,
    INIT_STREAM,
    Parts,
    assemble,
    claim_workdir,
    configure_jax,
    first_policy,
    make_learner,
)
from flowrl_jax.checkpoint import CheckpointConfig, Checkpointer
from flowrl_jax.config import Config
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import define_flags, join, row_share
from flowrl_jax.errors import InputError
from flowrl_jax.metrics import MetricWriter
from flowrl_jax.objectives.sft import SFTConfig
from flowrl_jax.progress import Progress
from flowrl_jax.rollouts import check_prompts, encode_prompt, fit_prompt
from flowrl_jax.sampler import rollout_key
from flowrl_jax.settings import save_settings
from flowrl_jax.tasks import Row
from flowrl_jax.train_step import init_state, make_train_step
from flowrl_jax.types import TrainBatch


def demonstration_arrays(parts: Parts, rows: Sequence[Row], position: int) -> dict[str, np.ndarray]:
    """Arrays of a `TrainBatch` that shows one demonstration per row.

    Args:
        parts: of the run.
        rows: of the data set.
        position: of the first row; which of its demonstrations a row shows depends on the seed
            and on its position alone, whatever the number of hosts.

    Raises:
        InputError: a prompt or a demonstration is too long.
    """
    rollout = parts.config.rollout
    width, length = rollout.max_prompt_length, rollout.max_response_length
    count = len(rows)
    tokens = np.full((count, width + length), parts.tokenizer.pad_id, np.int32)
    prompt_mask = np.zeros((count, width), bool)
    response_mask = np.zeros((count, length), bool)
    for i, row in enumerate(rows):
        name = f"prompt {row['prompt_id']}"
        prompt, _ = fit_prompt(parts, encode_prompt(parts, parts.task.prompt(row)), name)
        rng = np.random.default_rng((parts.config.seed, position + i))
        shown = [*parts.tokenizer.encode(parts.task.demonstration(row, rng)), parts.eos_ids[0]]
        if len(shown) > length:
            raise InputError(
                f"{name}: its demonstration has {len(shown)} tokens, more than"
                f" rollout.max_response_length={length}: raise the limit"
            )
        tokens[i, width - len(prompt) : width] = prompt
        tokens[i, width : width + len(shown)] = shown
        prompt_mask[i, width - len(prompt) :] = True
        response_mask[i, : len(shown)] = True
    zeros = np.zeros((count, length), np.float32)
    return {
        "tokens": tokens,
        "prompt_mask": prompt_mask,
        "response_mask": response_mask,
        "old_logprobs": zeros,
        "ref_logprobs": zeros,
        "reward": np.zeros(count, np.float32),
        "prompt_id": np.array([row["prompt_id"] for row in rows], np.int32),
        "row_id": np.arange(count, dtype=np.int32),
    }


def sft(config: Config, workdir: str | Path) -> None:
    """Fine-tunes the policy that the config names and saves it as a run in `workdir`.

    Raises:
        InputError: for whatever of the config, data or folder is wrong, before compiling.
    """
    workdir = Path(workdir)
    claim_workdir(workdir)
    parts = assemble(config, workdir)
    settings = config.sft
    source = PromptSource(dataclasses.replace(config.data, seed=config.seed))
    check_prompts(parts, source, settings.steps * settings.batch_size)
    learner = make_learner(
        parts,
        SFTConfig(),
        settings.optimizer,
        settings.batch_size,
        steps=settings.steps,
        updates=1,
    )
    mine = row_share(parts.layout).part(settings.batch_size)

    def arrays_of(step: int) -> dict[str, np.ndarray]:
        position = (step - 1) * settings.batch_size + mine.start
        rows = source.rows(position, mine.stop - mine.start)
        return demonstration_arrays(parts, rows, position)

    arrays_of(1)  # raises before anything compiles if demonstrations are too long
    save_settings(workdir, config)
    key = rollout_key(config.seed, INIT_STREAM)
    policy = first_policy(parts, learner)
    state: Any = init_state(learner, 1, key, policy)
    base = (policy,) if parts.model.config.lora.rank else ()
    del policy
    step_program = make_train_step(learner, 1)
    with (
        Checkpointer(workdir / CHECKPOINTS, CheckpointConfig(every=0, keep=1)) as checkpointer,
        Progress(settings.steps, f"{workdir.name} (fine-tuning)") as progress,
        MetricWriter(workdir, config=dataclasses.replace(config.metrics, table=False)) as writer,
    ):
        for step in range(1, settings.steps + 1):
            batch = TrainBatch(**parts.layout.put_batch(arrays_of(step)))
            state, metrics = step_program(state, batch, key, *base)
            names = ("loss", "grad_norm", "skipped_steps")
            writer.write(step, {}, {f"sft/{name}": metrics[name] for name in names})
            progress.update()
        writer.flush()
        position = settings.steps * settings.batch_size
        checkpointer.save_final(settings.steps, state, {"position": position})


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Fine-tunes a policy on its task's demonstrations.")
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)

    define_flags(values)

    def start(config: Config, values: flags.FlagValues) -> None:
        if not values["workdir"].value:
            raise InputError("--workdir is missing: name the folder of the run")
        join(values)
        configure_jax()
        sft(config, values["workdir"].value)

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
