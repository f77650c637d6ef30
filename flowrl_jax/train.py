"""Reinforcement learning of a policy: `python -m flowrl_jax.train --config=FILE --workdir=DIR`.

A step samples responses, judges them, and learns from them; `train` reads from top to bottom in
that order.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags

from flowrl_jax import cli
from flowrl_jax.alarm import Alarm
from flowrl_jax.assembly import (
    CHECKPOINTS,
    DROPOUT_STREAM,
    INIT_STREAM,
    Parts,
    assemble,
    claim_workdir,
    configure_jax,
    first_policy,
    make_learner,
)
from flowrl_jax.buckets import check_buckets, make_lengths, make_scores, make_update
from flowrl_jax.checkpoint import Checkpointer, saved_steps
from flowrl_jax.config import Config
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import any_process, define_flags, from_first, join, row_share
from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluator import Evaluator, metric_names
from flowrl_jax.learner import Learner
from flowrl_jax.learning_batch import make_learning_batch, make_minibatch
from flowrl_jax.loop import Collected, Loop
from flowrl_jax.metrics import CompileCounter, MetricWriter
from flowrl_jax.objectives import objective_of
from flowrl_jax.progress import Progress
from flowrl_jax.reference import (
    AnchoredState,
    Resets,
    abstract_anchored,
    anchored,
    check_metric,
    make_reset,
)
from flowrl_jax.replay import ReplayBuffer, prune
from flowrl_jax.resampling import make_take
from flowrl_jax.rollouts import check_prompts, check_rollouts
from flowrl_jax.sampler import rollout_key
from flowrl_jax.settings import save_settings
from flowrl_jax.train_step import abstract_state, init_state
from flowrl_jax.types import TrainState

REPLAY = "replay"  # folder of a run: STEP.PART.npz beside checkpoint STEP


def build_loop(parts: Parts) -> Loop:
    """The loop, still without its reference policy; reads no weights and compiles nothing.

    Raises:
        InputError: if sizes do not fit, or a prompt is too long.
    """
    config, rollout = parts.config, parts.config.rollout
    learner = make_learner(
        parts,
        config.loss,
        config.optimizer,
        config.rows_per_update,
        steps=config.steps,
        updates=config.updates,
    )
    check_buckets(learner, rollout.max_prompt_length)
    share = row_share(parts.layout)
    replayed = config.replayed_prompts
    check_rollouts(rollout, share, parts.layout, parts.sampling_layout, replayed)
    if config.reference.on_plateau:
        check_metric(config.reference, metric_names(config.eval))
    source = PromptSource(dataclasses.replace(config.data, seed=config.seed))
    batches = rollout.max_batches if rollout.dynamic_sampling else 1
    check_prompts(parts, source, config.steps * config.sampled_prompts * batches)
    programs = {
        "lengths": make_lengths(learner),
        "score": make_scores(learner, config.rows_per_update),
        "learning_batch": make_learning_batch(learner),
        "minibatch": make_minibatch(learner, config.train.updates_per_rollout),
        "update": make_update(learner, len(source)),
        "take": make_take(parts.layout),
    }
    evaluator = Evaluator(parts, config.eval) if config.eval.every else None
    loop = Loop(parts, learner, parts.sampler(), source, programs, evaluator, share)
    if config.reference.moves:
        loop.resets = Resets(config.reference)
        programs |= make_reset(learner, len(source))
    if replayed:
        size = config.replay.size // len(share.leaders)
        loop.replay = ReplayBuffer(config.replay, size, config.seed, share.index)
    return loop


def train(config: Config, workdir: str | Path, *, resume: bool = False) -> dict[str, float]:
    """Trains a policy.

    Args:
        config: the settings.
        workdir: folder of checkpoints, metrics and the config; new unless `resume`.
        resume: continue the run in `workdir` from its latest checkpoint, as if it had not stopped;
            without a checkpoint it starts from the beginning.

    Returns:
        Wall-clock seconds and compilations of the run.

    Raises:
        InputError: for whatever of the config, data or folder is wrong, before compiling.
        cli.Preempted: after SIGTERM, once a checkpoint is complete.
        cli.Alarmed: after an alarm, where `alarm.stop` is set, once a checkpoint is complete.
    """
    workdir, started = Path(workdir), time.perf_counter()
    claim_workdir(workdir, resume=resume)
    loop = build_loop(assemble(config, workdir))
    with (
        contextlib.closing(loop.parts.task),
        CompileCounter() as compilations,
        _termination() as terminated,
        Checkpointer(workdir / CHECKPOINTS, config.checkpoint) as checkpointer,
    ):
        state, first, position = _start(loop, checkpointer, workdir)
        save_settings(workdir, config)
        with (
            Progress(config.steps, workdir.name, initial=first) as progress,
            MetricWriter(
                workdir,
                resume_step=first if first else (-1 if resume else None),
                config=config.metrics,
                print_line=progress.print,
                settings=dataclasses.asdict(config),
                alarm=Alarm(config.alarm, progress.print),
            ) as writer,
        ):
            _run_steps(
                loop,
                workdir,
                state,
                first,
                position,
                checkpointer,
                writer,
                progress,
                compilations,
                terminated,
            )
        return {"seconds": time.perf_counter() - started, "compilations": compilations.count}


def _start(loop: Loop, checkpointer: Checkpointer, workdir: Path) -> tuple[TrainState, int, int]:
    """State, steps done and position in the data: of the latest checkpoint, or of a new run."""
    config, learner = loop.parts.config, loop.learner
    num_prompts = len(loop.source)
    needs_reference = objective_of(config.loss).needs_reference(config.loss)
    state, first, position = None, 0, 0
    latest = from_first(checkpointer.latest_step())
    if latest is not None:
        state, first, position = _restore(loop, checkpointer, workdir, latest)
    adapters = learner.model.config.lora.rank > 0
    if state is None or adapters or (needs_reference and loop.anchor is None):
        policy = first_policy(loop.parts, learner)
        loop.reference = _computed(learner, policy) if needs_reference else None
        loop.base = policy if adapters else None
        if state is None:
            key = rollout_key(config.seed, INIT_STREAM)
            state = init_state(learner, num_prompts, key, policy)
    if loop.resets:
        # The same policy at first, or that of the last reset.
        loop.anchor_to(loop.anchor or loop.programs["snapshot"](state.params["policy"]))
    return state, first, position


def _restore(
    loop: Loop, checkpointer: Checkpointer, workdir: Path, step: int
) -> tuple[TrainState, int, int]:
    """State, steps done and position in the data of a checkpoint; and what the loop remembers."""
    state, _ = abstract_state(loop.learner, len(loop.source))
    if loop.resets:
        state = abstract_anchored(loop.learner, state)
    state, host, step = checkpointer.restore(state, step)
    if isinstance(state, AnchoredState):
        loop.resets = Resets(loop.parts.config.reference, host["reference"])
        loop.anchor, state = state.reference, state.trained
    # A run that had no replay before starts with an empty buffer.
    if loop.replay is not None and "replay" in host:
        processes = len(host["replay"])
        require(
            processes == len(loop.share.leaders),
            f"the replay buffer of checkpoint {step} is of {processes} processes with rows of their"
            f" own, and here are {len(loop.share.leaders)}: resume with as many, or set"
            " replay.fraction=0",
        )
        part = loop.share.index
        loop.replay.load(workdir / REPLAY / f"{step}.{part}.npz", host["replay"][part])
    return state, step, host["position"]


def _save(
    loop: Loop,
    checkpointer: Checkpointer,
    workdir: Path,
    step: int,
    state: TrainState,
    position: int,
    evaluation: dict[str, float],
    *,
    last: bool,
) -> None:
    """Writes a checkpoint, and beside it what is kept for replay."""
    host: dict[str, Any] = {"position": position}
    if loop.resets:
        host["reference"] = loop.resets.record()
        state = anchored(state, loop.anchor)
    folder, share = workdir / REPLAY, loop.share
    if loop.replay is not None:
        file = folder / f"{step}.{share.index}.npz"
        # Before the checkpoint: one that is complete must find its buffer.
        host["replay"] = share.gather(loop.replay.save(file) if share.leads else None)
    save = checkpointer.save_final if last else checkpointer.save
    save(step, state, host, evaluation)
    if loop.replay is not None and jax.process_index() == 0:
        prune(folder, {step, *saved_steps(workdir / CHECKPOINTS)})


def _computed(learner: Learner, policy: Any) -> Any:
    """A policy that is not trained, in the dtype that blocks would cast it to: half the memory."""
    return jax.tree.map(lambda x: x.astype(learner.model.config.dtype), policy)


def _run_steps(
    loop: Loop,
    workdir: Path,
    state: TrainState,
    first: int,
    position: int,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    progress: Progress,
    compilations: CompileCounter,
    terminated: threading.Event,
) -> None:
    config, evaluator = loop.parts.config, loop.evaluator
    dropout_key = rollout_key(config.seed, DROPOUT_STREAM)
    if evaluator and first == 0:
        evaluation = evaluator.metrics(loop.policy(state), loop.reference)
        writer.write(0, evaluation)
        if loop.resets:
            loop.resets.evaluated(evaluation)
    ahead: Collected | None = None
    for step in range(first + 1, config.steps + 1):
        begin = time.perf_counter()
        collected = ahead or loop.collect(
            loop.policy(state), step, position, age=0, head=loop.head(state)
        )
        position += loop.drawn(collected)
        if config.rollout.ahead and step < config.steps:
            # The policy that has not learnt from this rollout yet samples the next one meanwhile.
            ahead = loop.collect(
                loop.policy(state), step + 1, position, age=1, head=loop.head(state)
            )
        state, device_metrics = loop.learn(state, collected, dropout_key)
        done = time.perf_counter()
        metrics = {
            "data/position": position,
            "time/step": done - begin,
            "time/compilations": compilations.count,
            **loop.report(collected),
        }
        writer.write(step, metrics, device_metrics)
        progress.update(reward=f"{metrics['rollout/reward_mean']:.3f}")
        evaluation: dict[str, float] = {}
        if evaluator and (step % config.eval.every == 0 or step == config.steps):
            evaluation = evaluator.metrics(loop.policy(state), loop.reference)
            writer.write(step, evaluation)
        if loop.resets:
            # Not after an evaluation that is there because the run ends, which it might not have.
            if evaluation and step % config.eval.every == 0:
                loop.resets.evaluated(evaluation)
            reason = loop.resets.due(step)
            if reason:
                state = loop.reset_reference(state)
                ahead = loop.scored_anew(ahead) if ahead else None
                progress.print(f"step {step}: the policy is its own reference now, {reason}")
        # Clusters warn all hosts at about, not exactly, the same time; they stop at one step.
        stopping = any_process(terminated.is_set() or writer.stop_reason is not None)
        last = step == config.steps or stopping
        if last or checkpointer.should_save(step):
            # A step that a checkpoint holds must have its line of metrics, or a kill between the
            # two would lose it.
            writer.flush()
            _save(loop, checkpointer, workdir, step, state, position, evaluation, last=last)
        if stopping and step < config.steps:
            if ahead:
                ahead.close()
            _part(step, from_first(writer.stop_reason))


def _part(step: int, reason: str | None) -> NoReturn:
    """Leaves a run that is not done; `reason` is the alarm's, if it is the alarm that ends it."""
    if reason:
        raise cli.Alarmed(f"{reason} (saved step {step}; --resume goes on all the same)")
    raise cli.Preempted(f"saved step {step}; start again with --resume")


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

    define_flags(values)

    def start(config: Config, values: flags.FlagValues) -> None:
        if not values["workdir"].value:
            raise InputError("--workdir is missing: name the folder of the run")
        join(values)
        configure_jax(values["compilation_cache"].value)
        train(config, values["workdir"].value, resume=bool(values["resume"].value))

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
