"""A policy on several benchmarks, for `python -m flowrl_jax.evaluate --benchmarks=...`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from flowrl_jax.assembly import CHECKPOINTS, Parts, assemble, load_run_policy
from flowrl_jax.checkpoint import saved_steps
from flowrl_jax.config import Config
from flowrl_jax.distributed import from_first
from flowrl_jax.errors import InputError
from flowrl_jax.evaluation.benchmarks import Benchmark
from flowrl_jax.evaluator import Evaluator
from flowrl_jax.graded import read_records
from flowrl_jax.new_folder import in_first_process
from flowrl_jax.progress import Progress
from flowrl_jax.tasks import TaskConfig, build


def benchmark_config(config: Config, benchmark: Benchmark) -> Config:
    """The settings of a run with another data set, task and sampling.

    Options that the run's config gives to the same task are kept where the benchmark has none, and
    those of a data set that is generated.

    Args:
        config: the run's settings.
        benchmark: what is to be evaluated.
    """
    data, task, how = config.data, config.task, benchmark.sampling
    own_data = data.options if data.builder == benchmark.dataset else {}
    own_data = benchmark.dataset_options or own_data
    own_task = task.options if task.name == benchmark.task else {}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, builder=benchmark.dataset, options=own_data),
        task=TaskConfig(benchmark.task, {**own_task, **benchmark.task_options}),
        eval=dataclasses.replace(
            config.eval,
            split=benchmark.split,
            samples=how.samples,
            k=how.samples,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            min_p=0.0,
        ),
    )


def samples_path(out: str | Path, name: str) -> Path:
    """The file of a benchmark's samples in the folder of an evaluation."""
    return Path(out) / f"{name}.jsonl"


def run_benchmarks(
    config: Config, run: str, chosen: Mapping[str, Benchmark], out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Evaluates the latest policy of a run, going on where an earlier call stopped.

    Args:
        config: the run's settings.
        run: the run's folder; empty for the policy that training would start from.
        chosen: name -> benchmark.
        out: folder of the files of samples, NAME.jsonl.

    Returns:
        In the first process: name -> records, as `evaluation.results` takes them, read back from
        the files. Nothing in the others.

    Raises:
        InputError: for whatever of the config, data or files is wrong, before compiling.
    """
    with tempfile.TemporaryDirectory() as scratch:
        parts = assemble(config, Path(run or scratch))
    step = saved_steps(Path(run) / CHECKPOINTS)[-1] if run else 0
    todo = []
    for name, benchmark in chosen.items():
        settings = benchmark_config(config, benchmark)
        own = dataclasses.replace(parts, config=settings, task=build(settings.task))
        evaluator = Evaluator(own, settings.eval)
        file = SampleFile(samples_path(out, name), _stamp(own, name, run, step))
        todo.append((name, own, evaluator, file, file.completed(evaluator)))
    left = [entry for entry in todo if entry[-1] < entry[2].num_prompts]
    policy = load_run_policy(parts, run) if left else None
    for name, own, evaluator, file, done in left:
        with (
            contextlib.closing(own.task),
            Progress(evaluator.num_prompts, name, initial=done, unit="prompt") as progress,
        ):
            evaluator.records(policy, None, progress, done=done, write=file.write)
    if jax.process_index() != 0:
        return {}
    return {name: read_records(file.path) for name, _, _, file, _ in todo}


def _stamp(parts: Parts, name: str, run: str, step: int) -> dict[str, Any]:
    """What records must share to be of one evaluation."""
    config = parts.config
    sampling = ("split", "samples", "temperature", "top_p", "top_k")
    return {
        "benchmark": name,
        "run": Path(run).name,
        "step": step,
        "seed": config.seed,
        "task": config.task.name,
        "task_options": {key: repr(value) for key, value in config.task.options.items()},
        "max_response_length": config.rollout.max_response_length,
        **{field: getattr(config.eval, field) for field in sampling},
    }


class SampleFile:
    """Records of a benchmark, a line each, in the order of its prompts.

    Args:
        path: of the file.
        stamp: what is written into each record beside its samples.
    """

    def __init__(self, path: Path, stamp: Mapping[str, Any]):
        self.path, self._stamp = path, dict(stamp)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Adds records; they are on disk when this returns. The first process writes."""
        if jax.process_index() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                for record in records:
                    line = {**record, "settings": self._stamp}
                    file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def completed(self, evaluator: Evaluator) -> int:
        """Cuts the file, or makes it, so that it ends with a whole batch.

        Args:
            evaluator: of the same prompts.

        Returns:
            How many of the prompts it holds.

        Raises:
            InputError: it holds something else, or cannot be written.
        """
        found = [0]

        def prepare() -> None:
            found[0] = self._prepare(evaluator)

        in_first_process(prepare)
        return from_first(found[0])

    def _prepare(self, evaluator: Evaluator) -> int:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(0)
                lines = file.readlines()
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}): name another --out"
            ) from None
        if lines and not lines[-1].endswith(b"\n"):  # cut off in writing
            lines.pop()
        for number, line in enumerate(lines):
            self._check(number, line, evaluator)
        done = len(lines)
        if done < evaluator.num_prompts:
            # The batches are those of an uninterrupted evaluation: so are the samples, to the bit.
            done -= done % evaluator.batch_size
        os.truncate(self.path, sum(map(len, lines[:done])))
        return done

    def _check(self, number: int, line: bytes, evaluator: Evaluator) -> None:
        try:
            record = json.loads(line)
            found = dict(record["settings"], prompt_id=record["prompt_id"])
        except (ValueError, LookupError, TypeError):
            found = {}
        rows = evaluator.rows
        wanted = dict(
            self._stamp, prompt_id=rows[number]["prompt_id"] if number < len(rows) else None
        )
        wanted = json.loads(json.dumps(wanted))
        different = [name for name in wanted if found.get(name, self) != wanted[name]]
        if different:
            name = different[0]
            raise InputError(
                f"{self.path} line {number + 1} has {name}={found.get(name)!r}, not"
                f" {wanted[name]!r}: it is of another evaluation; name another --out, or remove it"
            )
