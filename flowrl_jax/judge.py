"""Diversity by a judge: `python -m flowrl_jax.judge --samples=FILE --endpoint=URL --model=NAME`.

Reads the samples of an evaluation, asks an OpenAI-compatible server how varied each prompt's
responses are (`evaluation.judge`), and writes every judgement as a line of JSON when it comes. A
command that is started again goes on where it stopped, and tries again what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluation.judge import (
    Judge,
    JudgeConfig,
    Judgement,
    summarize_scores,
)
from flowrl_jax.evaluation.judgements import judge_tasks, scores_path
from flowrl_jax.graded import read_records
from flowrl_jax.progress import Progress


class Scores:
    """The file of judgements: its first line says how they were made, the others are judgements.

    Args:
        path: of the file, which is made or continued.
        config: how judgements are made.

    Raises:
        InputError: the file holds judgements made otherwise, or cannot be written.
    """

    def __init__(self, path: Path, config: JudgeConfig):
        self._path = path
        self.records: dict[tuple[str, int], dict[str, Any]] = {}
        header = config.record()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                lines = file.readlines()
                if lines and not lines[-1].endswith(b"\n"):  # cut off in writing
                    file.truncate(sum(map(len, lines[:-1])))
                    lines.pop()
        except OSError as error:
            raise InputError(
                f"--scores={path} cannot be written ({error.strerror}): name another file"
            ) from None
        if lines:
            self._check(lines[0], header)
        else:
            self._append(header)
        for number, line in enumerate(lines[1:], start=2):
            self._take(number, line)

    def add(self, record: dict[str, Any]) -> None:
        """Writes a judgement; it is on disk when this returns."""
        self.records[record["key"], record["repeat"]] = record
        self._append(record)

    def scored(self, task: Mapping[str, Any]) -> bool:
        """Whether the judgement of a task is there, of the same responses, and has a score."""
        found = self.records.get((task["key"], task["repeat"]))
        return found is not None and found["score"] is not None and found["asked"] == task["asked"]

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _check(self, line: bytes, header: Mapping[str, Any]) -> None:
        try:
            found = json.loads(line)
            different = [name for name in header if found.get(name) != header[name]]
        except (ValueError, AttributeError):
            found, different = None, ["everything"]
        if different:
            raise InputError(
                f"--scores={self._path} holds judgements made with another {different[0]}: name"
                " another file, or the settings in its first line"
            )

    def _take(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
            self.records[record["key"], record["repeat"]] = record
        except (ValueError, LookupError, TypeError):
            raise InputError(
                f"--scores={self._path} line {number} is no judgement: remove it, or name another"
                " file"
            ) from None


def judge_samples(
    records: Sequence[Mapping[str, Any]], config: JudgeConfig, scores: Scores, judge: Judge,
    parallel: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """Judges the prompts of an evaluation.

    Args:
        records: with "prompt_id", "prompt" and "responses", and "benchmark" if of several.
        config: how.
        scores: the file to continue.
        judge: who.
        parallel: calls at one time.

    Returns:
        As `summarize_scores`, and "judge": the settings.

    Raises:
        InputError: a record lacks a field or has too few responses, or the server refuses the key,
            model or address; or no judgement succeeded.
    """
    tasks = list(judge_tasks(records, config))
    waiting = [task for task in tasks if not scores.scored(task)]
    with (
        Progress(len(tasks), "judge", initial=len(tasks) - len(waiting), unit="call") as progress,
        ThreadPoolExecutor(parallel, thread_name_prefix="judge") as pool,
    ):
        queue, running = iter(waiting), {}
        try:
            while True:
                _start(pool, judge, queue, running, parallel)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    scores.add(_record(task, future.result()))
                    progress.update()
        except BaseException:
            judge.stop()
            raise
    kept = [scores.records[task["key"], task["repeat"]] for task in tasks]
    summary = summarize_scores(kept, len(records), seed=config.seed)
    return summary | {"judge": config.record()}


def _start(
    pool: ThreadPoolExecutor,
    judge: Judge,
    queue: Iterable[dict[str, Any]],
    running: dict[Future[Judgement], dict[str, Any]],
    parallel: int,
) -> None:
    """Keeps as many calls going as may: what has not begun need not be cancelled."""
    while len(running) < parallel and (task := next(iter(queue), None)) is not None:
        running[pool.submit(judge, task["question"])] = task


def _record(task: Mapping[str, Any], judgement: Judgement) -> dict[str, Any]:
    return {
        "key": task["key"],
        "repeat": task["repeat"],
        "order": task["order"],
        "asked": task["asked"],
        "score": judgement.score,
        "reply": judgement.reply,
        "failure": judgement.failure,
        "calls": judgement.calls,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowrl_jax.judge", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--samples", required=True, help="JSON lines that `evaluate --out` wrote")
    add("--endpoint", required=True, help="such as http://localhost:8000/v1")
    add("--model", required=True, help="name of the judge at the endpoint")
    add("--scores", help="judgements, to write or continue; default: SAMPLES.judge.jsonl")
    add("--json", help="file for the summary")
    add("--key_env", default="", help="name of the environment variable with the server's key")
    add("--parallel", type=int, default=4, help="calls at one time")
    for field in ("repeats", "seed", "cut", "max_tokens", "timeout", "attempts", "backoff"):
        default = getattr(JudgeConfig, field)
        add(f"--{field}", type=type(default), default=default, help="see evaluation.JudgeConfig")
    return parser


def _run(options: argparse.Namespace) -> None:
    names = ("endpoint", "model", "repeats", "seed", "cut", "max_tokens", "timeout", "attempts",
             "backoff")  # fmt: skip
    config = JudgeConfig(**{name: getattr(options, name) for name in names})
    require(options.parallel >= 1, f"--parallel={options.parallel} must be at least 1")
    key = os.environ.get(options.key_env, "") if options.key_env else ""
    require(
        bool(key) or not options.key_env,
        f"--key_env={options.key_env}: this environment variable is not set; set it to the"
        " server's key, or leave the flag out",
    )
    records = read_records(options.samples)
    scores = Scores(Path(options.scores or scores_path(options.samples)), config)
    summary = judge_samples(records, config, scores, Judge(config, key), options.parallel)
    score = summary["score"]
    print(
        f"diversity by {config.model}: {score['mean']:.2f} [{score['low']:.2f},"
        f" {score['high']:.2f}] over {summary['prompts'] - summary['prompts_without_score']} of"
        f" {summary['prompts']} prompts; {sum(summary['failures'].values())} of"
        f" {summary['judgements']} judgements failed"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 after one line about a wrong input."""
    try:
        _run(_parser().parse_args(arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
