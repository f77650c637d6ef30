"""Countdown problems as a TFDS data set: generated, or read from files.

Generated problems are drawn without repetition, so no problem of the test split, that is no pair
of a multiset of numbers and a target, is in the train split. Whole multisets are not held out: the
numbers of a test problem usually occur in train with other targets.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from flowrl_jax.datasets import files
from flowrl_jax.errors import InputError
from flowrl_jax.tasks import countdown_solver as solver
from flowrl_jax.tasks.base import make_config

_MAX_NUMBERS = 6
# Below this many multisets all are listed and shuffled; above, they are drawn until enough.
_LISTED_MULTISETS = 50_000
# Problems gathered per problem wanted before the draw, so that one multiset fills only a small
# part of a split although all its targets are gathered at once.
_POOL_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class CountdownData:
    """What the data set contains.

    Attributes:
        sizes: how many numbers a problem may have.
        number_min: smallest given number.
        number_max: largest given number.
        target_min: smallest target.
        target_max: largest target.
        min_solutions: problems with fewer canonical solutions are left out.
        max_value: largest intermediate result of a solution that counts; 0 for any.
        train: number of problems in the split train.
        test: number of problems in the split test.
        seed: of the draw.
        train_file: a parquet or JSONL file to read the split train from instead; its records have
            `nums` (or `numbers`), `target` and perhaps `prompt` (text or chat messages).
        test_file: the same for the split test.
        solve: whether solutions of problems read from files are computed (about 1 ms each);
            otherwise their `solutions` are empty.
        drop_overlap: what happens when a problem of the test file is in the train file: True
            leaves it out of train, False stops with an error.

    With files, of the settings for generated problems only `max_value` has a meaning.
    """

    sizes: tuple[int, ...] = (4,)
    number_min: int = 1
    number_max: int = 10
    target_min: int = 1
    target_max: int = 50
    min_solutions: int = 1
    max_value: int = 0
    train: int = 8192
    test: int = 512
    seed: int = 0
    train_file: str = ""
    test_file: str = ""
    solve: bool = False
    drop_overlap: bool = False

    def __post_init__(self):
        if not self.sizes or not all(2 <= size <= _MAX_NUMBERS for size in self.sizes):
            raise InputError(
                f"countdown sizes={self.sizes}: give one or more sizes from 2 to {_MAX_NUMBERS}"
            )
        for name in ("number", "target"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if not 0 <= low <= high:
                raise InputError(
                    f"countdown {name}_min={low}, {name}_max={high}: not a range; "
                    "give 0 <= min <= max"
                )
        if self.train < 0 or self.test < 0 or self.train + self.test == 0:
            raise InputError(
                f"countdown train={self.train}, test={self.test}: give sizes >= 0, not both 0"
            )

    @property
    def paths(self) -> dict[str, str]:
        """Split -> file, for the splits that are read from files; empty where all is generated."""
        given = {"train": self.train_file, "test": self.test_file}
        return {split: path for split, path in given.items() if path}


class Problem(NamedTuple):
    """One problem.

    Attributes:
        numbers: the given numbers, ascending where generated.
        target: the value to reach.
        solutions: canonical strings of all solutions in whole numbers >= 0; may be empty where
            the problem was read from a file.
        prompt: the question in the file's own words, or empty.
    """

    numbers: tuple[int, ...]
    target: int
    solutions: tuple[str, ...] = ()
    prompt: str = ""


@dataclasses.dataclass(eq=False)
class CountdownBuilderConfig(tfds.core.BuilderConfig):
    """TFDS configuration: its name follows from the data, so equal names mean equal content."""

    data: CountdownData = CountdownData()


class CountdownBuilder(tfds.core.GeneratorBasedBuilder):
    """Countdown problems: numbers, target, solutions (canonical strings), prompt."""

    name = "countdown"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "numbers": tfds.features.Sequence(np.int64),
                    "target": tfds.features.Scalar(np.int64),
                    "solutions": tfds.features.Sequence(tfds.features.Text()),
                    "prompt": tfds.features.Text(),
                }
            ),
            # Records keep the order they are written in; the reader shuffles.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded.
        config = self.builder_config
        assert isinstance(config, CountdownBuilderConfig)
        splits = problems(config.data)
        return {name: self._generate_examples(part) for name, part in splits.items()}

    def _generate_examples(self, part: list[Problem]) -> Iterator[tuple[int, dict]]:
        for i, problem in enumerate(part):
            yield i, problem._asdict()


def make_builder(options: Mapping[str, Any], data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder for plain options (fields of CountdownData)."""
    data = make_config(CountdownData, options, owner="data set countdown")
    # The files count by their content, not by where they lie.
    options = dataclasses.asdict(data) | {"train_file": "", "test_file": ""}
    name = files.config_name(options, data.paths)
    config = CountdownBuilderConfig(name=name, data=data)
    return CountdownBuilder(config=config, data_dir=data_dir, file_format="array_record")


def problems(data: CountdownData) -> dict[str, list[Problem]]:
    """Returns split -> problems, the same for the same settings.

    Raises:
        InputError: fewer problems exist than the splits ask for, a file is unusable, or a problem
            of the test file is in the train file and `drop_overlap` does not allow for it.
    """
    if data.paths:
        splits = {split: _read(path, data) for split, path in data.paths.items()}
    else:
        splits = _generate(data)
    splits = _hold_out(splits, drop=data.drop_overlap)
    return {split: part for split, part in splits.items() if part}


def _generate(data: CountdownData) -> dict[str, list[Problem]]:
    rng = np.random.default_rng(data.seed)
    wanted = data.train + data.test
    targets = range(data.target_min, data.target_max + 1)
    pool: list[Problem] = []
    for numbers in _multisets(data, rng):
        found = solver.solve_all(numbers, targets, max_value=data.max_value or None)
        for target in targets:
            solutions = found[target]
            if len(solutions) >= max(1, data.min_solutions):
                pool.append(Problem(numbers, target, solutions))
        if len(pool) >= _POOL_FACTOR * wanted:
            break
    if len(pool) < wanted:
        raise InputError(
            f"countdown train={data.train}, test={data.test}: only {len(pool)} problems exist; "
            "ask for fewer or widen sizes, the number range or the target range"
        )
    chosen = [pool[i] for i in rng.permutation(len(pool))[:wanted]]
    return {"test": chosen[: data.test], "train": chosen[data.test :]}


def _multisets(data: CountdownData, rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """All sorted multisets of the wanted sizes in random order, each once."""
    values = range(data.number_min, data.number_max + 1)
    counts = [math.comb(len(values) + size - 1, size) for size in data.sizes]
    total = sum(counts)
    if total <= _LISTED_MULTISETS:
        listed = [
            numbers
            for size in data.sizes
            for numbers in itertools.combinations_with_replacement(values, size)
        ]
        for i in rng.permutation(total):
            yield listed[i]
        return
    seen: set[tuple[int, ...]] = set()
    while len(seen) < total:
        size = int(rng.choice(data.sizes, p=np.array(counts) / total))
        # Distinct draws from a longer range, moved together, are multisets drawn uniformly.
        spread = np.sort(rng.choice(len(values) + size - 1, size, replace=False))
        numbers = tuple(int(n) + data.number_min for n in spread - np.arange(size))
        if numbers not in seen:
            seen.add(numbers)
            yield numbers


def _read(path: str, data: CountdownData) -> list[Problem]:
    found = []
    for record in files.read_records(path):
        name = "nums" if "nums" in record.fields else "numbers"
        numbers, target = files.field(record, name), files.field(record, "target")
        if not isinstance(numbers, list) or not all(_is_natural(n) for n in numbers):
            raise InputError(f"{record.place}: {name}={numbers!r}; give a list of integers >= 0")
        if not 2 <= len(numbers) <= _MAX_NUMBERS:
            raise InputError(
                f"{record.place}: {len(numbers)} numbers; give from 2 to {_MAX_NUMBERS}"
            )
        if not _is_natural(target):
            raise InputError(f"{record.place}: target={target!r}; give an integer >= 0")
        solutions: tuple[str, ...] = ()
        if data.solve:
            solutions = solver.solve(numbers, target, max_value=data.max_value or None)
        prompt = files.prompt_text(record, "prompt") if "prompt" in record.fields else ""
        found.append(Problem(tuple(numbers), target, solutions, prompt))
    return found


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _hold_out(splits: dict[str, list[Problem]], *, drop: bool) -> dict[str, list[Problem]]:
    """Makes sure that no problem of test is in train, whatever the order of its numbers."""
    held_out = {_identity(problem) for problem in splits.get("test", ())}
    train = [p for p in splits.get("train", ()) if _identity(p) not in held_out]
    shared = len(splits.get("train", ())) - len(train)
    if shared and not drop:
        raise InputError(
            f"countdown: {shared} problems of train are also in test; remove them or set "
            "drop_overlap=True to leave them out of train"
        )
    return {**splits, "train": train}


def _identity(problem: Problem) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(problem.numbers)), problem.target
