"""Story openings with asked-for words as a TFDS data set, for `flowrl_jax.tasks.stories`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from flowrl_jax.datasets import files
from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import make_config

_NAMES = ("Lily", "Tim", "Sue", "Ben", "Mia", "Tom", "Anna", "Max")
_OPENINGS = (
    "Once upon a time, there was a child named {}.",
    "One day, {} went to the park.",
    "{} had a new friend.",
    "It was a sunny day and {} wanted to play.",
)
_WORDS = (
    *("ball", "bird", "boat", "box", "car", "cat", "dog", "fish", "flower", "hat"),
    *("house", "mom", "rain", "sun", "tree", "water"),
)


@dataclasses.dataclass(frozen=True)
class StoriesData:
    """What the data set contains.

    Attributes:
        words: asked-for words per story.
        train: number of rows in the split train.
        test: number of rows in the split test.
        seed: of the draw.
    """

    words: int = 2
    train: int = 1024
    test: int = 64
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.words <= 4:
            raise InputError(f"stories words={self.words}: give 1 to 4 words per story")
        if self.train < 0 or self.test < 0 or self.train + self.test == 0:
            raise InputError(
                f"stories train={self.train}, test={self.test}: give sizes >= 0, not both 0"
            )


@dataclasses.dataclass(eq=False)
class StoriesBuilderConfig(tfds.core.BuilderConfig):
    """TFDS configuration: its name follows from the data, so equal names mean equal content."""

    data: StoriesData = StoriesData()


class StoriesBuilder(tfds.core.GeneratorBasedBuilder):
    """Openings (prompt) and asked-for words (words); no row of test is in train."""

    name = "stories"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "words": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded.
        config = self.builder_config
        assert isinstance(config, StoriesBuilderConfig)
        splits = rows(config.data)
        return {split: self._generate_examples(part) for split, part in splits.items()}

    def _generate_examples(self, part: list[dict[str, Any]]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(part)


def make_builder(options: Mapping[str, Any], data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder for plain options (fields of StoriesData)."""
    data = make_config(StoriesData, options, owner="data set stories")
    config = StoriesBuilderConfig(name=files.config_name(dataclasses.asdict(data), {}), data=data)
    return StoriesBuilder(config=config, data_dir=data_dir, file_format="array_record")


def rows(data: StoriesData) -> dict[str, list[dict[str, Any]]]:
    """Returns split -> rows {"prompt", "words"}, all different, the same for the same settings.

    Raises:
        InputError: fewer different rows exist than the splits ask for.
    """
    prompts = [opening.format(name) for opening in _OPENINGS for name in _NAMES]
    choices = list(itertools.combinations(_WORDS, data.words))
    total, wanted = len(prompts) * len(choices), data.train + data.test
    if wanted > total:
        raise InputError(
            f"stories train={data.train}, test={data.test}: only {total} rows exist; ask for fewer"
        )
    drawn = []
    for i in np.random.default_rng(data.seed).permutation(total)[:wanted]:
        prompt, words = divmod(int(i), len(choices))
        drawn.append({"prompt": prompts[prompt], "words": list(choices[words])})
    splits = {"test": drawn[: data.test], "train": drawn[data.test :]}
    return {split: part for split, part in splits.items() if part}
