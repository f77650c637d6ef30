"""Graded samples of a policy, and the JSON-lines file an evaluation keeps them in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Graded responses of one policy: P prompts with n samples each.

    Attributes:
      prompt_id: [P] int, the index of each prompt in its split; pairs evaluations of the same
        prompts.
      correct: [P, n] bool, whether the response solves the prompt.
      form: [P, n] object, the canonical form (str) of a correct response; two correct responses are
        the same solution exactly when their forms are equal. Ignored where `correct` is False
        (usually None there).
      length: [P, n] int, response tokens, end-of-sequence token included.
      truncated: [P, n] bool, whether the response was cut at the token limit.
      kl: [P, n] float, log policy(response) - log reference(response), in nats per response; its
        mean over responses drawn from the policy is an unbiased estimate of KL(policy ||
        reference).

    Raises:
      InputError: the arrays disagree in shape, there is no sample, `kl` is not finite, or a correct
        response has no canonical form.
    """

    prompt_id: np.ndarray
    correct: np.ndarray
    form: np.ndarray
    length: np.ndarray
    truncated: np.ndarray
    kl: np.ndarray

    def __post_init__(self) -> None:
        shape = self.correct.shape
        if self.correct.ndim != 2 or 0 in shape:
            raise InputError(
                f"samples.correct has shape {shape}; an evaluation needs [prompts, samples] with"
                " at least one of each; check that the evaluation set is not empty"
            )
        for name in ("form", "length", "truncated", "kl"):
            if getattr(self, name).shape != shape:
                raise InputError(
                    f"samples.{name} has shape {getattr(self, name).shape} but samples.correct has"
                    f" {shape}; give every prompt the same number of samples in every field"
                )
        if self.prompt_id.shape != shape[:1]:
            raise InputError(
                f"samples.prompt_id has shape {self.prompt_id.shape} but there are {shape[0]}"
                " prompts; give one id per prompt"
            )
        self._check_values()

    def _check_values(self) -> None:
        bad = np.argwhere(~np.isfinite(np.asarray(self.kl, np.float64)))
        if bad.size:
            raise InputError(
                f"samples.kl of prompt {self.prompt_id[bad[0, 0]]}, sample {bad[0, 1]} is not"
                " finite; log-probabilities must be: check the reference weights and their dtype"
            )
        for p, s in np.argwhere(self.correct):
            if not isinstance(self.form[p, s], str):
                raise InputError(
                    f"prompt {self.prompt_id[p]}, sample {s} is correct but its canonical form is"
                    f" {self.form[p, s]!r}; a task must return a string for every correct response"
                )

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts."""
        return self.correct.shape[0]

    @property
    def num_samples(self) -> int:
        """n, the number of samples of each prompt."""
        return self.correct.shape[1]

    def solution_counts(self) -> list[np.ndarray]:
        """How often each distinct correct solution occurs: per prompt [solutions] int."""
        counts = []
        for forms, correct in zip(self.form, self.correct, strict=True):
            found = Counter(f for f, ok in zip(forms, correct, strict=True) if ok)
            counts.append(np.array(list(found.values()), dtype=np.int64))
        return counts


def samples_from_records(records: Iterable[Mapping[str, Any]]) -> Samples:
    """Builds `Samples` from one mapping per prompt, the lines of an evaluation's JSON-lines file.

    Args:
      records: each with "prompt_id" (int) and, as lists over the n samples, "correct" (bool),
        "form" (str or None), "length" (tokens), "truncated" (bool) and "kl" (nats). Other keys
        ("prompt", "responses", ...) are ignored.

    Returns:
      The samples, prompts in the order of the records.

    Raises:
      InputError: a key is missing, or prompts differ in their number of samples.
    """
    records = list(records)
    fields = ("correct", "form", "length", "truncated", "kl")
    sizes = set()
    for i, record in enumerate(records):
        missing = [key for key in ("prompt_id", *fields) if key not in record]
        if missing:
            raise InputError(
                f"evaluation record {i} lacks {', '.join(missing)}; write one record per prompt"
                f" with prompt_id, {', '.join(fields)}"
            )
        sizes |= {len(record[key]) for key in fields}
    if len(sizes) > 1:
        raise InputError(
            f"prompts have {min(sizes)} to {max(sizes)} samples; every prompt needs the same"
            " number: evaluate again, or drop the incomplete prompts"
        )
    columns = {key: [list(record[key]) for record in records] for key in fields}
    shape = (len(records), sizes.pop() if sizes else 0)
    return Samples(
        prompt_id=np.array([record["prompt_id"] for record in records], dtype=np.int64),
        correct=np.array(columns["correct"], dtype=bool).reshape(shape),
        form=np.array(columns["form"], dtype=object).reshape(shape),
        length=np.array(columns["length"], dtype=np.int64).reshape(shape),
        truncated=np.array(columns["truncated"], dtype=bool).reshape(shape),
        kl=np.array(columns["kl"], dtype=np.float64).reshape(shape),
    )


def write_records(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes evaluation records as JSON lines; `path` is the old file or the new one, never half.

    Args:
      path: the JSON-lines file; its folder exists.
      records: see `samples_from_records`; keys "prompt" (str) and "responses" (list of n str) let a
        report show them.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
    partial.replace(path)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Reads what `write_records` wrote.

    Args:
      path: the JSON-lines file.

    Returns:
      One dict per prompt, in file order.

    Raises:
      InputError: the file is absent or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; run an evaluation first or correct the path")
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise InputError(
                    f"{path} line {number} is not a JSON object; evaluate again to rewrite the file"
                )
            records.append(record)
    return records
