"""What every step of reinforcement learning does: sample, judge, learn.

`train` has the loop around it.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flowrl_jax.assembly import RESAMPLE_STREAM, Parts
from flowrl_jax.buckets import padding_saved
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import RowShare
from flowrl_jax.evaluator import Evaluator
from flowrl_jax.grading import Grading, response_metrics
from flowrl_jax.learner import Learner
from flowrl_jax.log_z_points import LOG_Z_ROWS
from flowrl_jax.models.lora import with_adapters
from flowrl_jax.objectives import objective_of
from flowrl_jax.reference import Resets
from flowrl_jax.replay import REWARD, ReplayBuffer
from flowrl_jax.resampling import Groups, draw_until_varied
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
        anchor: what of the reference a checkpoint holds; None where it never moves.
        replay: groups of earlier rollouts; None without replay.
        resets: when the reference moves; None where it never does.
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
    anchor: Any = None
    replay: ReplayBuffer | None = None
    resets: Resets | None = None

    def policy(self, state: TrainState) -> Any:
        """All weights of the policy, adapters among them."""
        return with_adapters(self.base, state.params["policy"])

    def head(self, state: TrainState) -> Any:
        """The value head, where values of the time of sampling are asked for; else None."""
        objective = objective_of(self.learner.objective)
        return None if objective.returns is None else state.params["value"]

    def anchor_to(self, trained: Any) -> None:
        """Makes a policy the reference.

        Args:
            trained: its parameters, or its adapters; they stay as they are.
        """
        self.anchor = trained
        self.reference = with_adapters(self.base, trained)

    def reset_reference(self, state: TrainState) -> TrainState:
        """Makes the policy as it is the reference.

        What is kept for replay was scored by the old one, and is forgotten.

        Args:
            state: is used up.
        """
        assert self.resets is not None
        self.resets.done()
        self.anchor_to(self.programs["snapshot"](state.params["policy"]))
        if self.replay is not None:
            self.replay.clear()
        if not self.parts.config.reference.reset_optimizer:
            return state
        return self.programs["restart"](state)

    def scored_anew(self, collected: "Collected") -> "Collected":
        """A rollout with the log-probabilities of the reference as it is now.

        Args:
            collected: scored by another reference.
        """
        rollout = collected.rollout
        scored = (rollout.tokens, rollout.prompt_mask, rollout.response_mask, collected.lengths)
        ref_logprobs = self.programs["score"](self.reference, *scored)
        return dataclasses.replace(collected, ref_logprobs=ref_logprobs)

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
        config = self.parts.config.rollout
        draws: list[Draw] = []

        def draw(number: int = 0) -> Rollout:
            rollout, drawn = self._draw(policy, step, position, number)
            draws.append(drawn)
            return rollout

        groups, varied = None, 0
        if config.dynamic_sampling:
            rollout, groups, varied = draw_until_varied(
                lambda number: (draw(number), self._groups(draws[-1])),
                self.programs["take"],
                config.max_batches,
            )
        else:
            rollout = draw()
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
            *(step, rollout, lengths, *logprobs, tuple(draws), groups, varied, age, values)
        )

    def _draw(self, policy: Any, step: int, position: int, number: int) -> tuple[Rollout, "Draw"]:
        """Samples batch `number` of those that may be drawn for a step."""
        began = time.perf_counter()
        config = self.parts.config.rollout
        prompts = self.parts.config.sampled_prompts
        mine = self.share.part(prompts)
        first = position + number * prompts + mine.start
        rows = self.source.rows(first, mine.stop - mine.start)
        arrays, truncated = encode_rows(self.parts, rows, config.group_size)
        key = rollout_key(self.parts.config.seed, step)
        if number:  # a prompt may come again within a step, and is not to give the same responses
            key = rollout_key(self.parts.config.seed, RESAMPLE_STREAM)
            key = jax.random.fold_in(jax.random.fold_in(key, step), number)
        batch = config.prompts_per_batch // len(self.share.leaders)
        grading = Grading(self.parts, rows, config.group_size) if self.share.leads else None
        rollout = sample(self.parts, policy, arrays, key, self.sampler, batch, grading)
        lengths = local_rows(rollout.response_mask).sum(axis=1)
        seconds = time.perf_counter() - began
        return rollout, Draw(rows, grading, truncated, lengths, seconds)

    def _groups(self, draw: "Draw") -> Groups:
        """What was drawn, judged; every process must ask at the same point."""
        ids = [row["prompt_id"] for row in draw.rows]
        rewards = draw.grading.rewards().tolist() if draw.grading else None
        found = self.share.gather([ids, rewards])
        prompt_id = np.array([i for ids, _ in found for i in ids], np.int32)
        reward = np.array([x for _, rewards in found for x in rewards], np.float32)
        return Groups(prompt_id, reward.reshape(prompt_id.size, -1))

    def learn(
        self, state: TrainState, collected: "Collected", key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        """Takes the optimiser's steps on a rollout.

        Returns:
            The new state, and metrics.
        """
        config = self.parts.config
        lesson, replayed = self._lesson(collected)
        batch, metrics = self.programs["learning_batch"](
            lesson.rollout,
            lesson.old_logprobs,
            lesson.ref_logprobs,
            values=lesson.values,
            reward=lesson.reward,
            prompt_id=lesson.prompt_id,
        )
        metrics = metrics | replayed
        updates = config.train.updates_per_rollout
        lengths = lesson.lengths.reshape(updates, -1)
        limit = config.rollout.max_response_length
        saved = padding_saved(self.learner, lengths, limit)
        metrics["train/padding_saved"] = np.float32(saved)
        for i in range(config.updates):
            minibatch = self.programs["minibatch"](batch, i % updates) if updates > 1 else batch
            base = () if self.base is None else (self.base,)
            own = lengths[i % updates]
            state, step_metrics = self.programs["update"](state, minibatch, own, key, *base)
            metrics = _merge(metrics, step_metrics, i)
        return state, metrics

    def report(self, collected: "Collected") -> dict[str, float]:
        """What was sampled for a step, learnt from or not: what it earned and what it cost.

        Every process must ask at the same point.

        Args:
            collected: that was learnt from.
        """
        draws = collected.draws
        graded = [draw.grading for draw in draws if draw.grading]
        judging: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for grading in graded:
            judging.update(grading.metrics())
            counts.update(grading.outcomes())
        rewards = [grading.rewards() for grading in graded]
        lengths = np.concatenate([draw.lengths for draw in draws])
        correct = np.concatenate([grading.correct() for grading in graded]) if graded else None
        truncated, tokens, reward, number = self.share.total(
            [
                sum(draw.truncated for draw in draws),
                int(lengths.sum()),
                float(sum(np.sum(x, dtype=np.float64) for x in rewards)),
                sum(x.size for x in rewards),
            ]
        )
        seconds = sum(draw.seconds for draw in draws)
        outcomes = self.share.count(counts)
        return {
            "rollout/reward_mean": reward / number,
            "rollout/truncated_prompts": truncated,
            "rollout/age": collected.age,
            "time/rollout": seconds,
            "time/tokens_per_second": tokens / max(seconds, 1e-9),
            **judging,
            **response_metrics(self.share, correct, lengths, self.parts.config.rollout.group_size),
            **{f"outcome/{name}": count / number for name, count in outcomes.items()},
            **self._resampled(collected),
            **({"reference/resets": self.resets.count} if self.resets else {}),
        }

    def _resampled(self, collected: "Collected") -> dict[str, float]:
        if not self.parts.config.rollout.dynamic_sampling:
            return {}
        batches, prompts = len(collected.draws), self.parts.config.sampled_prompts
        return {
            "rollout/batches": batches,
            "rollout/resampled_prompts": (batches - 1) * prompts,
            "rollout/drawn_with_signal": collected.varied / (batches * prompts),
        }

    def drawn(self, collected: "Collected") -> int:
        """Positions of the data that a rollout has used up, over all processes."""
        return len(collected.draws) * self.parts.config.sampled_prompts

    def _lesson(self, collected: "Collected") -> tuple["Lesson", dict[str, np.float32]]:
        """What is learnt from: a rollout that has been judged, and what is replayed beside it."""
        group_size = self.parts.config.rollout.group_size
        if collected.groups is None:
            prompt_id = np.array([row["prompt_id"] for row in collected.draws[0].rows], np.int32)
            reward = self._rewards(collected.draws[0])
        else:
            mine = self.share.part(collected.groups.prompt_id.size)
            prompt_id = collected.groups.prompt_id[mine]
            reward = collected.groups.reward[mine].reshape(-1)
        host = {"reward": reward, "prompt_id": np.repeat(prompt_id, group_size)}
        scored = {
            "rollout": collected.rollout,
            "old_logprobs": collected.old_logprobs,
            "ref_logprobs": collected.ref_logprobs,
            "values": collected.values,
        }
        put = self.parts.layout.put_batch
        if self.replay is None:
            return Lesson(**scored, **put(host), lengths=collected.lengths), {}
        fresh, tree = jax.tree.flatten(jax.tree.map(local_rows, scored) | host)
        groups = {str(i): x.reshape(-1, group_size, *x.shape[1:]) for i, x in enumerate(fresh)}
        groups[REWARD] = reward.reshape(-1, group_size)
        count = self.parts.config.replayed_prompts // len(self.share.leaders)
        mixed, ages = self.replay.mix(collected.step, groups, count)
        rows = [mixed[str(i)].reshape(-1, *x.shape[1:]) for i, x in enumerate(fresh)]
        arrays = put(jax.tree.unflatten(tree, rows))
        lengths = np.asarray(self.programs["lengths"](arrays["rollout"].response_mask))
        return Lesson(**arrays, lengths=lengths), self._replayed(ages)

    def _replayed(self, ages: np.ndarray) -> dict[str, np.float32]:
        assert self.replay is not None
        found = self.share.gather([ages.tolist(), len(self.replay)])
        ages = np.array([age for ages, _ in found for age in ages])
        values = {
            "share": ages.size / self.parts.config.rollout.prompts_per_step,
            "age_mean": ages.mean() if ages.size else 0.0,
            "age_max": ages.max(initial=0),
            "size": sum(size for _, size in found),
        }
        return {f"replay/{name}": np.float32(value) for name, value in values.items()}

    def _rewards(self, draw: "Draw") -> np.ndarray:
        """Rewards of this process's rows, which one process finds out."""
        rewards = draw.grading.rewards() if draw.grading else None
        if len(self.share.leaders) == jax.process_count():
            assert rewards is not None
            return rewards
        found = self.share.gather(None if rewards is None else rewards.tolist())
        return np.array(found[self.share.index], np.float32)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Responses to some prompts of the data order, on their way to be judged.

    Attributes:
        rows: this process's, of the data set.
        grading: of the responses; None in a process that leaves it to another.
        truncated: prompts that were.
        lengths: `[rows x group size]` int, tokens of each of this process's responses.
        seconds: of sampling.
    """

    rows: Sequence[Row]
    grading: Grading | None
    truncated: int
    lengths: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True)
class Collected:
    """A rollout that is to be learnt from.

    Attributes:
        step: that it is for.
        rollout: of all processes' rows.
        lengths: `[B]` int, of all responses.
        old_logprobs: `[B, T]` float32, of the policy that sampled.
        ref_logprobs: `[B, T]` float32, of the reference; the old ones where there is none.
        draws: what was sampled for it; with dynamic sampling more than is in it.
        groups: of all processes' rows, where they had to be judged; None: `draws` judges them.
        varied: groups of `draws` whose rewards are not all equal, where that is known.
        age: steps that the policy has learnt since it sampled.
        values: `[B, T]` float32, of the head that went with that policy; None where the objective
            does not ask for them.
    """

    step: int
    rollout: Rollout
    lengths: np.ndarray
    old_logprobs: jax.Array
    ref_logprobs: jax.Array
    draws: tuple[Draw, ...]
    groups: Groups | None
    varied: int
    age: int
    values: jax.Array | None = None

    def close(self) -> None:
        """Judges no more."""
        for draw in self.draws:
            if draw.grading:
                draw.grading.close()


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the optimiser's steps are taken on, over all processes.

    Attributes:
        rollout: B rows.
        old_logprobs: `[B, T]` float32, of the policy that sampled each row.
        ref_logprobs: `[B, T]` float32.
        reward: `[B]` float32, raw.
        prompt_id: `[B]` int32.
        lengths: `[B]` int, on the host.
        values: `[B, T]` float32, of the head that went with the policy that sampled each row; None
            where the objective does not ask for them.
    """

    rollout: Rollout
    old_logprobs: jax.Array
    ref_logprobs: jax.Array
    reward: jax.Array
    prompt_id: jax.Array
    lengths: np.ndarray
    values: jax.Array | None = None


def _merge(metrics: dict, step_metrics: dict, update: int) -> dict:
    """Metrics of the rollout's last update, and of its first the difference to the old policy."""
    merged = metrics | {f"train/{name}": value for name, value in step_metrics.items()}
    if "log_z" in step_metrics:
        merged["log_z/mean"] = merged.pop("train/log_z")
        merged["log_z/gap"] = merged.pop("train/log_z_gap")
        merged.pop("train/log_z_target")
    if "log_z_rows" in step_metrics:
        merged[LOG_Z_ROWS] = merged.pop("train/log_z_rows")
    if update > 0:
        # At the first update the policy is the one that sampled: this is pure rounding.
        name = "train/old_logprob_diff_max"
        merged[name] = metrics[name]
    return merged
