"""What every step of reinforcement learning does: sample, judge, learn.

`train` has the loop around it.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flowrl_jax.assembly import Parts
from flowrl_jax.buckets import padding_saved
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import RowShare
from flowrl_jax.evaluator import Evaluator
from flowrl_jax.grading import Grading
from flowrl_jax.learner import Learner
from flowrl_jax.models.lora import with_adapters
from flowrl_jax.objectives import objective_of
from flowrl_jax.rollouts import encode_rows, sample
from flowrl_jax.sampler import SamplerConfig, rollout_key
from flowrl_jax.sharding import local_rows
from flowrl_jax.tasks import Row
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

    def head(self, state: TrainState) -> Any:
        """The value head, where values of the time of sampling are asked for; else None."""
        objective = objective_of(self.learner.objective)
        return None if objective.returns is None else state.params["value"]

    def collect(
        self, policy: Any, step: int, position: int, age: int, head: Any = None
    ) -> "Collected":
        """Samples responses to this process's part of the rows from `position` on.

        Args:
            policy: parameters.
            step: that the responses are for.
            position: in the data.
            age: steps that the policy will have learnt before that one.
            head: from `head`, of the same state as the policy.
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
        old_logprobs, values = rollout.sampler_logprobs, None
        if config.old_logprobs == "trainer" or head is not None:
            again = score(policy, *scored, head)
            again, values = (again, None) if head is None else again
            old_logprobs = again if config.old_logprobs == "trainer" else old_logprobs
        ref_logprobs = old_logprobs
        if self.reference is not None:
            ref_logprobs = score(self.reference, *scored)
        logprobs = (old_logprobs, ref_logprobs)
        return Collected(
            rows, rollout, lengths, *logprobs, grading, truncated, seconds, age, values
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
            collected.rollout,
            collected.old_logprobs,
            collected.ref_logprobs,
            values=collected.values,
            **host,
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

    def report(self, collected: "Collected", rewards: np.ndarray) -> dict[str, float]:
        """What a rollout earned and cost; every process must ask at the same point.

        Args:
            collected: that was learnt from.
            rewards: of this process's rows.
        """
        lengths = local_rows(collected.rollout.response_mask).sum(axis=1)
        judging = collected.grading.metrics() if collected.grading else {}
        outcomes = self.share.count(collected.grading.outcomes() if collected.grading else {})
        truncated, tokens, reward, graded = self.share.total(
            [
                collected.truncated,
                int(lengths.sum()),
                float(np.sum(rewards, dtype=np.float64)),
                rewards.size,
            ]
        )
        return {
            "rollout/reward_mean": reward / graded,
            "rollout/truncated_prompts": truncated,
            "rollout/age": collected.age,
            "time/rollout": collected.seconds,
            "time/tokens_per_second": tokens / max(collected.seconds, 1e-9),
            **judging,
            **{f"outcome/{name}": count / graded for name, count in outcomes.items()},
        }

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
        values: `[B, T]` float32, of the head that went with that policy; None where the objective
            does not ask for them.
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
    values: jax.Array | None = None


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
