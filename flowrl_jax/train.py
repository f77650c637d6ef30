"""Reinforcement learning of a policy: `python -m flowrl_jax.train --config=FILE --workdir=DIR`.

A step samples responses, judges them, and learns from them; `train` reads from top to bottom in
that order.
"""

import dataclasses
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from flowrl_jax import cli
from flowrl_jax.assembly import CHECKPOINTS, Parts, assemble, configure_jax, first_policy, make_learner
from flowrl_jax.checkpoint import Checkpointer, saved_steps
from flowrl_jax.config import Config
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.errors import InputError
from flowrl_jax.evaluate import Evaluator
from flowrl_jax.learning_batch import make_learning_batch, make_minibatch
from flowrl_jax.metrics import CompileCounter, MetricWriter
from flowrl_jax.objectives import objective_of
from flowrl_jax.progress import Progress
from flowrl_jax.rollouts import encode_rows, grade, responses, sample
from flowrl_jax.sampler import rollout_key
from flowrl_jax.sharding import local_rows
from flowrl_jax.train_step import (
    Learner,
    abstract_state,
    init_state,
    make_score,
    make_train_step,
)
from flowrl_jax.types import Rollout, TrainState

# Streams of randomness derived from the seed besides the rollouts', which take steps as labels.
_INIT_STREAM, _DROPOUT_STREAM = 2**31 - 1, 2**31 - 2


@dataclasses.dataclass
class Loop:
    """What the steps of a run share.

    Attributes:
        parts: of the run.
        learner: what is fixed about learning.
        source: rows of the training split.
        reference: parameters of the reference policy; None where the objective has none.
        programs: the jitted programs by name.
    """

    parts: Parts
    learner: Learner
    source: PromptSource
    reference: Any
    programs: dict[str, Any]

    def collect(self, params: Any, step: int, position: int) -> tuple[list, Rollout, dict]:
        """Samples responses to the rows at `position`; returns rows, rollout and metrics."""
        config = self.parts.config.rollout
        hosts = jax.process_count()
        count = config.prompts_per_step // hosts
        rows = self.source.rows(position + jax.process_index() * count, count)
        arrays, truncated = encode_rows(self.parts, rows, config.group_size)
        key = rollout_key(self.parts.config.seed, step)
        batch = config.prompts_per_batch // hosts
        rollout = sample(self.parts, params, arrays, key, self.parts.sampler(), batch)
        self._prompt_id = arrays["prompt_id"]
        return rows, rollout, {"rollout/truncated_prompts": truncated}

    def learn(
        self, state: TrainState, rollout: Rollout, rows: list, key: jax.Array
    ) -> tuple[TrainState, dict[str, float], dict[str, jax.Array]]:
        """Judges a rollout and takes the optimiser's steps on it."""
        config = self.parts.config
        policy = state.params["policy"]
        score = self.programs["score"]
        arrays = (rollout.tokens, rollout.prompt_mask, rollout.response_mask)
        # Both are dispatched before the host judges, so that device and host work together.
        ref_logprobs = score(self.reference, *arrays) if self.reference is not None else None
        old_logprobs = rollout.sampler_logprobs
        if config.rollout.old_logprobs == "trainer":
            old_logprobs = score(policy, *arrays)
        rewards = grade(self.parts, rows, responses(self.parts, rollout))
        host = self.parts.layout.put_batch({"reward": rewards, "prompt_id": self._prompt_id})
        batch, metrics = self.programs["learning_batch"](
            rollout, old_logprobs, old_logprobs if ref_logprobs is None else ref_logprobs, **host
        )
        updates = config.train.updates_per_rollout
        for i in range(config.updates):
            minibatch = self.programs["minibatch"](batch, i % updates) if updates > 1 else batch
            state, step_metrics = self.programs["train_step"](state, minibatch, key)
            metrics = _merge(metrics, step_metrics, i)
        return state, {"rollout/reward_mean": float(np.mean(rewards))}, metrics


def _merge(metrics: dict, step_metrics: dict, update: int) -> dict:
    """Metrics of the rollout's last update, and of its first the difference to the old policy."""
    merged = metrics | {f"train/{name}": value for name, value in step_metrics.items()}
    if "log_z" in step_metrics:
        merged["log_z/mean"] = merged.pop("train/log_z")
        merged.pop("train/log_z_target")
    difference = merged.pop("train/old_logprob_diff_max")
    if update == 0:
        # At the first update the policy is the one that sampled: this is pure rounding.
        merged["train/old_logprob_diff_max"] = difference
    else:
        merged["train/old_logprob_diff_max"] = metrics["train/old_logprob_diff_max"]
    return merged


def build_loop(parts: Parts, source: PromptSource) -> tuple[Loop, TrainState]:
    """The loop and a new state, its policy from where the config says.

    Raises:
        InputError: if weights or sizes do not fit.
    """
    config = parts.config
    learner = make_learner(
        parts, config.loss, config.optimizer, config.rows_per_update,
        steps=config.steps, updates=config.updates,
    )
    if config.rollout.prompts_per_step % jax.process_count():
        raise InputError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step} does not divide over"
            f" {jax.process_count()} hosts: choose a multiple"
        )
    policy = first_policy(parts, learner)
    key = rollout_key(config.seed, _INIT_STREAM)
    state = init_state(learner, len(source), key, policy)
    reference = None
    if objective_of(config.loss).needs_reference(config.loss):
        # A copy: the state's buffers are donated to the first step.
        reference = jax.tree.map(lambda x: x.copy(), state.params["policy"])
    programs = {
        "score": make_score(learner),
        "learning_batch": make_learning_batch(learner),
        "minibatch": make_minibatch(learner, config.train.updates_per_rollout),
        "train_step": make_train_step(learner, len(source)),
    }
    return Loop(parts, learner, source, reference, programs), state


def train(config: Config, workdir: str | Path, *, resume: bool = False) -> dict[str, float]:
    """Trains a policy.

    Args:
        config: the settings.
        workdir: folder of checkpoints, metrics and the config; new unless `resume`.
        resume: continue the run in `workdir` from its latest checkpoint, as if it had not stopped.

    Returns:
        Wall-clock seconds and compilations of the run.

    Raises:
        InputError: for whatever of the config, data or folder is wrong, before compiling.
        cli.Preempted: after SIGTERM, once a checkpoint is complete.
    """
    workdir = Path(workdir)
    if not resume and saved_steps(workdir / CHECKPOINTS):
        raise InputError(
            f"{workdir} already holds a run: pass --resume to continue it, or another --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    parts = assemble(config, workdir)
    source = PromptSource(dataclasses.replace(config.data, seed=config.seed))
    loop, state = build_loop(parts, source)
    first, position = 0, 0
    with Checkpointer(workdir / CHECKPOINTS, config.checkpoint) as checkpointer:
        if resume and checkpointer.latest_step() is not None:
            abstract, _ = abstract_state(loop.learner, len(source))
            state, host, first = checkpointer.restore(abstract)
            position = host["position"]
        evaluator = Evaluator(parts, config.eval) if config.eval.every else None
        _save_settings(workdir, config)
        started = time.perf_counter()
        with (
            Progress(config.steps, workdir.name, initial=first) as progress,
            MetricWriter(
                workdir,
                resume_step=first if first else (-1 if resume else None),
                config=config.metrics,
                print_line=progress.print,
                settings=dataclasses.asdict(config),
            ) as writer,
            CompileCounter() as compilations,
            _termination() as terminated,
        ):
            _run_steps(
                loop, state, first, position, checkpointer, evaluator, writer, progress,
                compilations, terminated,
            )
            return {
                "seconds": time.perf_counter() - started, "compilations": compilations.count
            }


def _run_steps(
    loop: Loop, state: TrainState, first: int, position: int, checkpointer: Checkpointer,
    evaluator: "Evaluator | None", writer: MetricWriter, progress: Progress,
    compilations: CompileCounter, terminated: threading.Event,
) -> None:
    config = loop.parts.config
    dropout_key = rollout_key(config.seed, _DROPOUT_STREAM)
    evaluation: dict[str, float] = {}
    if evaluator and first == 0:
        evaluation = evaluator.metrics(state.params["policy"], loop.reference)
        writer.write(0, evaluation)
    for step in range(first + 1, config.steps + 1):
        begin = time.perf_counter()
        rows, rollout, metrics = loop.collect(state.params["policy"], step, position)
        position += config.rollout.prompts_per_step
        lengths = local_rows(rollout.response_mask).sum(axis=1)
        sampled = time.perf_counter()
        state, judged, device_metrics = loop.learn(state, rollout, rows, dropout_key)
        done = time.perf_counter()
        metrics |= judged | {
            "data/position": position,
            "time/rollout": sampled - begin,
            "time/step": done - begin,
            "time/tokens_per_second": float(lengths.sum() / max(sampled - begin, 1e-9)),
            "time/compilations": compilations.count,
        }
        writer.write(step, metrics, device_metrics)
        progress.update(reward=f"{judged['rollout/reward_mean']:.3f}")
        if evaluator and (step % config.eval.every == 0 or step == config.steps):
            evaluation = evaluator.metrics(state.params["policy"], loop.reference)
            writer.write(step, evaluation)
        last = step == config.steps or terminated.is_set()
        if last or checkpointer.should_save(step):
            # A step that a checkpoint holds must have its line of metrics, or a kill between the
            # two would lose it.
            writer.flush()
            save = checkpointer.save_final if last else checkpointer.save
            save(step, state, {"position": position}, evaluation)
        if terminated.is_set() and step < config.steps:
            raise cli.Preempted(f"saved step {step}; start again with --resume")


def _save_settings(workdir: Path, config: Config) -> None:
    """Keeps the settings beside the results, for people and for reports."""
    if jax.process_index() == 0:
        text = json.dumps(dataclasses.asdict(config), indent=2, default=str)
        (workdir / "config.json").write_text(text + "\n")


class _termination:
    """Notices SIGTERM, which clusters send before they take a machine away."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
        return event

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Trains a policy by reinforcement learning.")
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_bool("resume", False, "continue the run in workdir", flag_values=values)
    flags.DEFINE_string(
        "compilation_cache", "", "folder of compiled programs to reuse", flag_values=values
    )

    def start(config: Config, values: flags.FlagValues) -> None:
        if not values["workdir"].value:
            raise InputError("--workdir is missing: name the folder of the run")
        configure_jax(values["compilation_cache"].value)
        train(config, values["workdir"].value, resume=values["resume"].value)

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
