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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from flowrl_jax import cli
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
from flowrl_jax.buckets import (
    check_buckets,
    make_lengths,
    make_scores,
    make_update,
    padding_saved,
)
from flowrl_jax.checkpoint import Checkpointer
from flowrl_jax.config import Config
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import (
    RowShare,
    any_process,
    define_flags,
    from_first,
    join,
    row_share,
)
from flowrl_jax.errors import InputError
from flowrl_jax.evaluator import Evaluator
from flowrl_jax.grading import Grading
from flowrl_jax.learner import Learner
from flowrl_jax.learning_batch import make_learning_batch, make_minibatch
from flowrl_jax.metrics import CompileCounter, MetricWriter
from flowrl_jax.models.lora import with_adapters
from flowrl_jax.objectives import objective_of
from flowrl_jax.progress import Progress
from flowrl_jax.rollouts import check_prompts, check_rollouts, encode_rows, sample
from flowrl_jax.sampler import SamplerConfig, rollout_key
from flowrl_jax.settings import save_settings
from flowrl_jax.sharding import local_rows
from flowrl_jax.tasks import Row
from flowrl_jax.train_step import abstract_state, init_state
from flowrl_jax.types import Rollout, TrainState


@dataclasses.dataclass
class Loop:
    """What the steps of a run share.

    Attributes:
        parts: of the run.
        learner: what is fixed about learning.
        sampler: how responses are drawn.
        source: rows of the training split.
        programs: the jitted programs by name.
        evaluator: of held-out prompts; None where the run is not evaluated.
        share: which rows this process samples and judges.
        reference: parameters of the reference policy; None where the objective has none.
        base: the frozen weights, where adapters are trained; the reference is the same arrays.
    """

    parts: Parts
    learner: Learner
    sampler: SamplerConfig
    source: PromptSource
    programs: dict[str, Any]
    evaluator: Evaluator | None
    share: RowShare
    reference: Any = None
    base: Any = None

    def policy(self, state: TrainState) -> Any:
        """All weights of the policy, adapters among them."""
        return with_adapters(self.base, state.params["policy"])

    def collect(self, policy: Any, step: int, position: int, age: int) -> "Collected":
        """Samples responses to this process's part of the rows from `position` on.

        Args:
            policy: parameters.
            step: that the responses are for.
            position: in the data.
            age: steps that the policy will have learnt before that one.
        """
        began = time.perf_counter()
        config = self.parts.config.rollout
        mine = self.share.part(config.prompts_per_step)
        rows = self.source.rows(position + mine.start, mine.stop - mine.start)
        arrays, truncated = encode_rows(self.parts, rows, config.group_size)
        key = rollout_key(self.parts.config.seed, step)
        batch = config.prompts_per_batch // len(self.share.leaders)
        grading = Grading(self.parts, rows, config.group_size) if self.share.leads else None
        rollout = sample(self.parts, policy, arrays, key, self.sampler, batch, grading)
        seconds = time.perf_counter() - began
        score = self.programs["score"]
        lengths = np.asarray(self.programs["lengths"](rollout.response_mask))
        scored = (rollout.tokens, rollout.prompt_mask, rollout.response_mask, lengths)
        # Both are dispatched while the host judges, so that device and host work together.
        old_logprobs = rollout.sampler_logprobs
        if config.old_logprobs == "trainer":
            old_logprobs = score(policy, *scored)
        ref_logprobs = old_logprobs
        if self.reference is not None:
            ref_logprobs = score(self.reference, *scored)
        return Collected(
            rows, rollout, lengths, old_logprobs, ref_logprobs, grading, truncated, seconds, age
        )

    def learn(
        self, state: TrainState, collected: "Collected", key: jax.Array
    ) -> tuple[TrainState, np.ndarray, dict[str, Any]]:
        """Takes the optimiser's steps on a rollout.

        Returns:
            The new state, the rewards of this process's rows, and metrics.
        """
        config = self.parts.config
        rewards = self._rewards(collected)
        prompt_id = np.array([row["prompt_id"] for row in collected.rows], np.int32)
        host = self.parts.layout.put_batch(
            {"reward": rewards, "prompt_id": np.repeat(prompt_id, config.rollout.group_size)}
        )
        batch, metrics = self.programs["learning_batch"](
            collected.rollout, collected.old_logprobs, collected.ref_logprobs, **host
        )
        updates = config.train.updates_per_rollout
        lengths = collected.lengths.reshape(updates, -1)
        limit = config.rollout.max_response_length
        saved = padding_saved(self.learner, lengths, limit)
        metrics["train/padding_saved"] = np.float32(saved)
        for i in range(config.updates):
            minibatch = self.programs["minibatch"](batch, i % updates) if updates > 1 else batch
            base = () if self.base is None else (self.base,)
            own = lengths[i % updates]
            state, step_metrics = self.programs["update"](state, minibatch, own, key, *base)
            metrics = _merge(metrics, step_metrics, i)
        return state, rewards, metrics

    def _rewards(self, collected: "Collected") -> np.ndarray:
        """Rewards of this process's rows, which one process finds out."""
        rewards = collected.grading.rewards() if collected.grading else None
        if len(self.share.leaders) == jax.process_count():
            assert rewards is not None
            return rewards
        found = self.share.gather(None if rewards is None else rewards.tolist())
        return np.array(found[self.share.index], np.float32)


@dataclasses.dataclass(frozen=True)
class Collected:
    """A rollout that is to be learnt from.

    Attributes:
        rows: this process's, of the data set.
        rollout: of all processes' rows.
        lengths: `[B]` int, of all responses.
        old_logprobs: `[B, T]` float32, of the policy that sampled.
        ref_logprobs: `[B, T]` float32, of the reference; the old ones where there is none.
        grading: of the responses; None in a process that leaves it to another.
        truncated: prompts that were.
        seconds: of sampling.
        age: steps that the policy has learnt since it sampled.
    """

    rows: Sequence[Row]
    rollout: Rollout
    lengths: np.ndarray
    old_logprobs: jax.Array
    ref_logprobs: jax.Array
    grading: Grading | None
    truncated: int
    seconds: float
    age: int


def _merge(metrics: dict, step_metrics: dict, update: int) -> dict:
    """Metrics of the rollout's last update, and of its first the difference to the old policy."""
    merged = metrics | {f"train/{name}": value for name, value in step_metrics.items()}
    if "log_z" in step_metrics:
        merged["log_z/mean"] = merged.pop("train/log_z")
        merged.pop("train/log_z_target")
    if update > 0:
        # At the first update the policy is the one that sampled: this is pure rounding.
        name = "train/old_logprob_diff_max"
        merged[name] = metrics[name]
    return merged


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
    check_rollouts(rollout, share, parts.layout, parts.sampling_layout)
    source = PromptSource(dataclasses.replace(config.data, seed=config.seed))
    check_prompts(parts, source, config.steps * rollout.prompts_per_step)
    programs = {
        "lengths": make_lengths(learner),
        "score": make_scores(learner, config.rows_per_update),
        "learning_batch": make_learning_batch(learner),
        "minibatch": make_minibatch(learner, config.train.updates_per_rollout),
        "update": make_update(learner, len(source)),
    }
    evaluator = Evaluator(parts, config.eval) if config.eval.every else None
    return Loop(parts, learner, parts.sampler(), source, programs, evaluator, share)


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
        state, first, position = _start(loop, checkpointer)
        save_settings(workdir, config)
        with (
            Progress(config.steps, workdir.name, initial=first) as progress,
            MetricWriter(
                workdir,
                resume_step=first if first else (-1 if resume else None),
                config=config.metrics,
                print_line=progress.print,
                settings=dataclasses.asdict(config),
            ) as writer,
        ):
            _run_steps(
                loop,
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


def _start(loop: Loop, checkpointer: Checkpointer) -> tuple[TrainState, int, int]:
    """State, steps done and position in the data: of the latest checkpoint, or of a new run."""
    config, learner = loop.parts.config, loop.learner
    num_prompts = len(loop.source)
    needs_reference = objective_of(config.loss).needs_reference(config.loss)
    state, first, position = None, 0, 0
    latest = from_first(checkpointer.latest_step())
    if latest is not None:
        abstract, _ = abstract_state(learner, num_prompts)
        state, host, first = checkpointer.restore(abstract, latest)
        position = host["position"]
    adapters = learner.model.config.lora.rank > 0
    if state is None or needs_reference or adapters:
        policy = first_policy(loop.parts, learner)
        loop.reference = _computed(learner, policy) if needs_reference else None
        loop.base = policy if adapters else None
        if state is None:
            key = rollout_key(config.seed, INIT_STREAM)
            state = init_state(learner, num_prompts, key, policy)
    return state, first, position


def _computed(learner: Learner, policy: Any) -> Any:
    """A policy that is not trained, in the dtype that blocks would cast it to: half the memory."""
    return jax.tree.map(lambda x: x.astype(learner.model.config.dtype), policy)


def _run_steps(
    loop: Loop,
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
        writer.write(0, evaluator.metrics(loop.policy(state), loop.reference))
    ahead: Collected | None = None
    for step in range(first + 1, config.steps + 1):
        begin = time.perf_counter()
        collected = ahead or loop.collect(loop.policy(state), step, position, age=0)
        position += config.rollout.prompts_per_step
        if config.rollout.ahead and step < config.steps:
            # The policy that has not learnt from this rollout yet samples the next one meanwhile.
            ahead = loop.collect(loop.policy(state), step + 1, position, age=1)
        state, rewards, device_metrics = loop.learn(state, collected, dropout_key)
        done = time.perf_counter()
        lengths = local_rows(collected.rollout.response_mask).sum(axis=1)
        judging = collected.grading.metrics() if collected.grading else {}
        outcomes = loop.share.count(collected.grading.outcomes() if collected.grading else {})
        truncated, tokens, reward, graded = loop.share.total(
            [
                collected.truncated,
                int(lengths.sum()),
                float(np.sum(rewards, dtype=np.float64)),
                rewards.size,
            ]
        )
        metrics = {
            "data/position": position,
            "rollout/reward_mean": reward / graded,
            "rollout/truncated_prompts": truncated,
            "rollout/age": collected.age,
            "time/rollout": collected.seconds,
            "time/step": done - begin,
            "time/tokens_per_second": tokens / max(collected.seconds, 1e-9),
            "time/compilations": compilations.count,
            **judging,
            **{f"outcome/{name}": count / graded for name, count in outcomes.items()},
        }
        writer.write(step, metrics, device_metrics)
        progress.update(reward=f"{reward / graded:.3f}")
        evaluation: dict[str, float] = {}
        if evaluator and (step % config.eval.every == 0 or step == config.steps):
            evaluation = evaluator.metrics(loop.policy(state), loop.reference)
            writer.write(step, evaluation)
        # Clusters warn all hosts at about, not exactly, the same time; they stop at one step.
        stopping = any_process(terminated.is_set())
        last = step == config.steps or stopping
        if last or checkpointer.should_save(step):
            # A step that a checkpoint holds must have its line of metrics, or a kill between the
            # two would lose it.
            writer.flush()
            save = checkpointer.save_final if last else checkpointer.save
            save(step, state, {"position": position}, evaluation)
        if stopping and step < config.steps:
            if ahead and ahead.grading:
                ahead.grading.close()
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
