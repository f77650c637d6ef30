"""Samples and judges a policy's responses to held-out prompts."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from flowrl_jax.assembly import EVAL_STREAM, Parts, scoring_learner
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import row_share
from flowrl_jax.evaluation import bootstrap, prompt_values
from flowrl_jax.graded import samples_from_records
from flowrl_jax.grading import Grading
from flowrl_jax.progress import Progress
from flowrl_jax.rollouts import check_prompts, encode_rows, sample
from flowrl_jax.sampler import rollout_key
from flowrl_jax.sampling_config import EvalConfig
from flowrl_jax.sharding import local_rows
from flowrl_jax.train_step import make_score


class Evaluator:
    """Samples and judges responses to held-out prompts, the same ones with the same noise always.

    Args:
        parts: of the run.
        config: which prompts and how many samples.

    Attributes:
        batch_size: prompts that are sampled at one time.
    """

    def __init__(self, parts: Parts, config: EvalConfig):
        data = dataclasses.replace(parts.config.data, split=config.split, shuffle=False)
        source = PromptSource(data)
        count = min(config.prompts or len(source), len(source))
        check_prompts(parts, source, count)
        self._parts = parts
        self._config = config
        self._rows = source.rows(0, count)
        self._share = row_share(parts.layout)
        self.batch_size = parts.round_up_prompts(config.prompts_per_batch, config.samples)
        while self.batch_size % len(self._share.leaders):
            self.batch_size = parts.round_up_prompts(self.batch_size + 1, config.samples)
        self._sampler = parts.sampler(
            group_size=config.samples,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
        )
        # A greedy policy has no log-probabilities of its own; temperature 1 stands in.
        self._score = make_score(scoring_learner(parts, temperature=config.temperature or 1.0))

    def records(
        self,
        policy: Any,
        reference: Any = None,
        progress: Progress | None = None,
        *,
        done: int = 0,
        write: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Judged samples, one record per prompt (see `graded.samples_from_records`).

        Each process samples and judges its own part of the prompts; all get all records.

        Args:
            policy: parameters.
            reference: parameters to measure KL against; without them KL is 0.
            progress: updated with the prompts done.
            done: prompts at the beginning that are left out, a multiple of `batch_size`.
            write: called in every process with the records of each batch.
        """
        records = []
        size = self.batch_size
        for start in range(done, len(self._rows), size):
            rows = self._rows[start : start + size]
            # The last batch is filled up, so that every batch is the same compiled program.
            filled = rows + [rows[-1]] * (size - len(rows))
            mine = self._batch(policy, reference, filled[self._share.part(size)])
            everybody = itertools.chain.from_iterable(self._share.gather(mine))
            found = list(itertools.islice(everybody, len(rows)))
            records += found
            if write:
                write(found)
            if progress:
                progress.update(len(rows))
        return records

    def metrics(self, policy: Any, reference: Any = None) -> dict[str, float]:
        """Means of the statistics under `eval/`, with 95 % intervals over prompts.

        Args:
            policy: parameters.
            reference: parameters to measure KL against; without them there is no such metric.

        Returns:
            `eval/NAME`, `eval/NAME_low` and `eval/NAME_high` of `prompt_values`.
        """
        samples = samples_from_records(self.records(policy, reference))
        values = prompt_values(samples, k=self._config.k)
        if reference is None:
            del values["kl_to_reference"]
        found = {}
        for name, interval in bootstrap(values).items():
            ends = {"": interval["mean"], "_low": interval["low"], "_high": interval["high"]}
            found |= {f"eval/{name}{end}": value for end, value in ends.items()}
        return found

    @property
    def num_prompts(self) -> int:
        """Prompts that are evaluated."""
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is evaluated, in order."""
        return self._rows

    def _batch(self, policy, reference, rows) -> list[dict[str, Any]]:
        parts, count = self._parts, self._config.samples
        arrays, _ = encode_rows(parts, rows, count)
        key = rollout_key(parts.config.seed, EVAL_STREAM)
        grading = Grading(parts, rows, count) if self._share.leads else None
        rollout = sample(parts, policy, arrays, key, self._sampler, finished=grading)
        scored = (rollout.tokens, rollout.prompt_mask, rollout.response_mask)
        kl = np.zeros(len(rows) * count)
        if reference is not None:
            logprobs = [local_rows(self._score(params, *scored)) for params in (policy, reference)]
            kl = (logprobs[0] - logprobs[1]).sum(axis=1)
        lengths = local_rows(rollout.response_mask).sum(axis=1)
        truncated = local_rows(rollout.truncated)
        if grading is None:  # another process judges these rows
            return []
        verdicts, texts = grading.verdicts(), grading.texts()
        answers = [parts.task.answer(text, rows[i // count]) for i, text in enumerate(texts)]
        records = []
        for i, row in enumerate(rows):
            mine = slice(i * count, (i + 1) * count)
            forms = [verdict.form for verdict in verdicts[mine]]
            records.append(
                {
                    "prompt_id": row["prompt_id"],
                    "prompt": parts.task.prompt(row),
                    "responses": texts[mine],
                    "correct": [form is not None for form in forms],
                    "form": forms,
                    # Right answers are one, however they are written.
                    "answer": [
                        said and (form or said)
                        for form, said in zip(forms, answers[mine], strict=True)
                    ],
                    "reward": [verdict.reward for verdict in verdicts[mine]],
                    "outcome": [verdict.outcome for verdict in verdicts[mine]],
                    "length": lengths[mine].tolist(),
                    "truncated": truncated[mine].tolist(),
                    "kl": kl[mine].tolist(),
                }
            )
        return records


def metric_names(config: EvalConfig) -> list[str]:
    """Names of the metrics that an evaluation gives.

    Args:
        config: names k.
    """
    blank = {"correct": False, "form": None, "length": 1, "truncated": False, "kl": 0.0}
    record = {"prompt_id": 0, **{name: [value] * config.k for name, value in blank.items()}}
    values = prompt_values(samples_from_records([record]), k=config.k)
    return [f"eval/{name}" for name in values]
