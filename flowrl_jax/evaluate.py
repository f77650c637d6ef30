"""Evaluation of a policy: `python -m flowrl_jax.evaluate --config=FILE --run=DIR --out=FILE`."""

import dataclasses
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from flowrl_jax import cli
from flowrl_jax.assembly import (
    EVAL_STREAM,
    Parts,
    assemble,
    configure_jax,
    load_run_policy,
    reference_of,
    scoring_learner,
)
from flowrl_jax.config import Config
from flowrl_jax.datasets.pipeline import PromptSource
from flowrl_jax.distributed import define_flags, join, row_share
from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import Summary, prompt_values, summarize
from flowrl_jax.graded import samples_from_records, write_records
from flowrl_jax.grading import Grading
from flowrl_jax.new_folder import in_first_process
from flowrl_jax.progress import Progress
from flowrl_jax.report import render_table
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
        self._batch_size = parts.round_up_prompts(config.prompts_per_batch, config.samples)
        while self._batch_size % len(self._share.leaders):
            self._batch_size = parts.round_up_prompts(self._batch_size + 1, config.samples)
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
        self, policy: Any, reference: Any = None, progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """Judged samples, one record per prompt (see `graded.samples_from_records`).

        Each process samples and judges its own part of the prompts; all get all records.

        Args:
            policy: parameters.
            reference: parameters to measure KL against; without them KL is 0.
            progress: updated with the prompts done.
        """
        records = []
        size = self._batch_size
        for start in range(0, len(self._rows), size):
            rows = self._rows[start : start + size]
            # The last batch is filled up, so that every batch is the same compiled program.
            filled = rows + [rows[-1]] * (size - len(rows))
            mine = self._batch(policy, reference, filled[self._share.part(size)])
            everybody = itertools.chain.from_iterable(self._share.gather(mine))
            records += itertools.islice(everybody, len(rows))
            if progress:
                progress.update(len(rows))
        return records

    def metrics(self, policy: Any, reference: Any = None) -> dict[str, float]:
        """Means of the statistics under `eval/`."""
        samples = samples_from_records(self.records(policy, reference))
        values = prompt_values(samples, k=self._config.k)
        return {f"eval/{name}": float(np.mean(value)) for name, value in values.items()}

    @property
    def num_prompts(self) -> int:
        """Prompts that are evaluated."""
        return len(self._rows)

    def _batch(self, policy, reference, rows) -> list[dict[str, Any]]:
        parts, count = self._parts, self._config.samples
        arrays, _ = encode_rows(parts, rows, count)
        key = rollout_key(parts.config.seed, EVAL_STREAM)
        grading = Grading(parts, rows, count)
        rollout = sample(parts, policy, arrays, key, self._sampler, finished=grading)
        scored = (rollout.tokens, rollout.prompt_mask, rollout.response_mask)
        kl = np.zeros(len(rows) * count)
        if reference is not None:
            logprobs = [local_rows(self._score(params, *scored)) for params in (policy, reference)]
            kl = (logprobs[0] - logprobs[1]).sum(axis=1)
        lengths = local_rows(rollout.response_mask).sum(axis=1)
        truncated = local_rows(rollout.truncated)
        verdicts, texts = grading.verdicts(), grading.texts()
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
                    "reward": [verdict.reward for verdict in verdicts[mine]],
                    "outcome": [verdict.outcome for verdict in verdicts[mine]],
                    "length": lengths[mine].tolist(),
                    "truncated": truncated[mine].tolist(),
                    "kl": kl[mine].tolist(),
                }
            )
        return records


def evaluate(config: Config, run: str | Path, out: str | Path | None = None) -> Summary:
    """Evaluates the latest policy of a run.

    Args:
        config: the run's settings.
        run: the run's folder; empty for the policy that training would start from.
        out: JSON-lines file for the judged samples.

    Returns:
        name -> {"mean", "low", "high"}, 95 % intervals over prompts.

    Raises:
        InputError: for whatever of the config, data or folder is wrong, before compiling.
    """
    with tempfile.TemporaryDirectory() as scratch:
        parts = assemble(config, Path(run or scratch))
    evaluator = Evaluator(parts, config.eval)
    policy = load_run_policy(parts, run)
    reference = reference_of(parts, policy) if run else policy
    name = f"evaluate {Path(run).name}" if run else "evaluate"
    with Progress(evaluator.num_prompts, name, unit="prompt") as progress:
        records = evaluator.records(policy, reference, progress)
    if out:
        in_first_process(lambda: _write(Path(out), records))
    return summarize(samples_from_records(records), k=config.eval.k)


def _write(out: Path, records: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_records(out, records)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    values = cli.config_flag_values("Evaluates a policy on held-out prompts.")
    flags.DEFINE_string(
        "run",
        "",
        "folder of a run; empty: the policy training would start from",
        flag_values=values,
    )
    flags.DEFINE_string("out", "", "JSON-lines file for the judged samples", flag_values=values)
    flags.DEFINE_string("json", "", "file for the summary", flag_values=values)

    define_flags(values)

    def start(config: Config, values: flags.FlagValues) -> None:
        join(values)
        configure_jax()
        run = str(values["run"].value)
        if run and not Path(run).is_dir():
            raise InputError(f"--run={run}: no such folder; name the folder of a run")
        summary = evaluate(config, run, values["out"].value or None)
        if jax.process_index() == 0:
            print(render_table({Path(run).name or "policy": summary}))
            if values["json"].value:
                Path(values["json"].value).write_text(json.dumps(summary, indent=2) + "\n")

    return cli.run(start, values, arguments)


if __name__ == "__main__":
    sys.exit(main())
