"""The file of judgements that `flowrl_jax.judge` keeps beside samples, and what it says of them.

Its first line has the settings (`JudgeConfig.record`), each other line one judgement. A judgement
counts for the responses it was asked about, which a digest of the question tells.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluation.judge import JudgeConfig, order, question

Record = Mapping[str, Any]


def scores_path(samples: str | Path) -> Path:
    """The file of the judgements of a file of samples, where none other is named."""
    return Path(f"{samples}.judge.jsonl")


def prompt_key(record: Record) -> str:
    """What tells the prompts of a file of samples apart."""
    return f"{record.get('benchmark', '')}/{record['prompt_id']}"


def judge_tasks(records: Sequence[Record], config: JudgeConfig) -> Iterator[dict[str, Any]]:
    """Yields what a judge is asked about the samples of an evaluation.

    Args:
        records: with "prompt_id", "prompt" and "responses", and "benchmark" if of several.
        config: how.

    Yields:
        "key" of the prompt, "repeat", "order" of the responses, "question", and "asked", its
        digest.

    Raises:
        InputError: a record lacks a field or has too few responses, or a prompt occurs twice.
    """
    keys: set[str] = set()
    for number, record in enumerate(records):
        missing = [name for name in ("prompt_id", "prompt", "responses") if name not in record]
        require(
            not missing,
            f"sample record {number} lacks {', '.join(missing)}: give the file that `evaluate"
            " --out` writes",
        )
        key = prompt_key(record)
        require(key not in keys, f"prompt {key} occurs twice in the samples: judge one run")
        keys.add(key)
        responses = record["responses"]
        for repeat in range(config.repeats):
            places = order(config.seed, key, repeat, len(responses))
            text = question(record["prompt"], [responses[i] for i in places], config.cut)
            yield {
                "key": key,
                "repeat": repeat,
                "order": places,
                "question": text,
                "asked": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16],
            }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What a judge said of the samples of an evaluation.

    Attributes:
        model: name of the judge.
        settings: the first line of the file, by which two evaluations compare.
        scores: [P] float64, of each prompt the mean of its judgements that have a score.
        prompts: how many there are, P of which have a score.
        failed: judgements without a score.
        missing: judgements that were not made yet, or of other responses.
    """

    model: str
    settings: Mapping[str, Any]
    scores: np.ndarray
    prompts: int
    failed: int
    missing: int

    def describe(self) -> str:
        """One line about what the score is a mean of."""
        left = self.prompts - len(self.scores)
        parts = [f"diversity by {self.model} over {self.prompts - left} of {self.prompts} prompts"]
        parts += [f"{self.failed} judgements failed"] if self.failed else []
        parts += [f"{self.missing} are missing: run the judge again"] if self.missing else []
        return "; ".join(parts)


def read_judged(samples: str | Path, records: Sequence[Record]) -> Judged | None:
    """Reads the judgements of an evaluation's samples.

    Args:
        samples: the file of samples.
        records: its records, with responses.

    Returns:
        The judgements; None if nobody judged these samples.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    path = scores_path(samples)
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be half a line
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): judge again, or remove it") from None
    if not lines:
        return None
    config = _config(path, lines[0])
    found = dict(_judgement(path, *line) for line in enumerate(lines[1:], start=2))
    scores: dict[str, list[float]] = {}
    failed = missing = 0
    for task in judge_tasks(records, config):
        judgement = found.get((task["key"], task["repeat"]))
        if judgement is None or judgement["asked"] != task["asked"]:
            missing += 1
        elif judgement["score"] is None:
            failed += 1
        else:
            scores.setdefault(task["key"], []).append(float(judgement["score"]))
    return Judged(
        model=config.model,
        settings=config.record(),
        scores=np.array([np.mean(each) for each in scores.values()], np.float64),
        prompts=len(records),
        failed=failed,
        missing=missing,
    )


def _config(path: Path, line: str) -> JudgeConfig:
    """The settings in the first line."""
    names = {field.name for field in dataclasses.fields(JudgeConfig)}
    try:
        header = json.loads(line)
        config = JudgeConfig(**{name: header[name] for name in header if name in names})
    except (ValueError, TypeError, InputError) as error:
        cause = " ".join(str(error).split())
        raise InputError(
            f"{path} line 1 has no settings of a judge ({cause}): judge again, or remove the file"
        ) from None
    different = [name for name, value in config.record().items() if header.get(name) != value]
    require(
        not different,
        f"{path} holds judgements of another version ({', '.join(different)} differ): judge again"
        " into a new file, or remove this one",
    )
    return config


def _judgement(path: Path, number: int, line: str) -> tuple[tuple[str, int], dict[str, Any]]:
    try:
        record = json.loads(line)
        key, score = (record["key"], record["repeat"]), record["score"]
        _ = hash(key), record["asked"]
        require(score is None or score in range(1, 6), "no score")
        return key, record
    except (ValueError, LookupError, TypeError, InputError):
        raise InputError(
            f"{path} line {number} is no judgement: remove it, or judge again into a new file"
        ) from None
