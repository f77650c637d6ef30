"""A user's own prompts, from JSONL or parquet files, as a TFDS data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from flowrl_jax.datasets import files
from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import make_config

RESERVED_FIELDS = ("prompt_id", "metadata_json")


@dataclasses.dataclass(frozen=True)
class PromptsData:
    """Which files, and what their fields are called.

    Attributes:
        train_file: .jsonl or .parquet file of the split train; empty for no such split.
        test_file: the same for the split test.
        prompt_field: field with the prompt: text, or chat messages whose contents are joined.
        answer_field: field with the answer the task judges by; empty where the files have none.
    """

    train_file: str = ""
    test_file: str = ""
    prompt_field: str = "prompt"
    answer_field: str = "answer"

    def __post_init__(self):
        if not self.paths:
            raise InputError("data set prompts: no file; give train_file or test_file")

    @property
    def paths(self) -> dict[str, str]:
        """Split -> file."""
        given = {"train": self.train_file, "test": self.test_file}
        return {split: path for split, path in given.items() if path}


@dataclasses.dataclass(eq=False, kw_only=True)
class PromptsBuilderConfig(tfds.core.BuilderConfig):
    """TFDS configuration: its name follows from the files' content."""

    data: PromptsData


class PromptsBuilder(tfds.core.GeneratorBasedBuilder):
    """Prompts in the order of the file: prompt, answer, and all other fields as JSON.

    `flowrl_jax.datasets.pipeline` puts the other fields back into the row, so a task finds them
    under the names they have in the file.
    """

    name = "prompts"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "prompt": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                    "metadata_json": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing is downloaded.
        config = self.builder_config
        assert isinstance(config, PromptsBuilderConfig)
        data = config.data
        splits = {split: read_prompts(path, data) for split, path in data.paths.items()}
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def _generate_examples(self, rows: list[dict[str, str]]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(rows)


def make_builder(options: Mapping[str, Any], data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder for plain options (fields of PromptsData)."""
    data = make_config(PromptsData, options, owner="data set prompts")
    fields = {"prompt_field": data.prompt_field, "answer_field": data.answer_field}
    config = PromptsBuilderConfig(name=files.config_name(fields, data.paths), data=data)
    return PromptsBuilder(config=config, data_dir=data_dir, file_format="array_record")


def read_prompts(path: str, data: PromptsData) -> list[dict[str, str]]:
    """Returns the prompts of a file as {"prompt", "answer", "metadata_json"}, in order.

    Raises:
        InputError: the file is missing, empty or unreadable, or a record lacks a field, has an
            unusable prompt or uses a name of RESERVED_FIELDS; with file and line.
    """
    rows = []
    for record in files.read_records(path):
        extra = dict(record.fields)
        for name in RESERVED_FIELDS:
            if name in extra:
                raise InputError(f"{record.place}: field {name!r} is taken; rename it")
        prompt = files.prompt_text(record, data.prompt_field)
        if not prompt:
            raise InputError(f"{record.place}: {data.prompt_field!r} is empty; give a prompt")
        extra.pop(data.prompt_field)
        answer = ""
        if data.answer_field:
            value = files.field(record, data.answer_field)
            answer = value if isinstance(value, str) else _json(value, record)
            extra.pop(data.answer_field)
        rows.append({"prompt": prompt, "answer": answer, "metadata_json": _json(extra, record)})
    return rows


def _json(value: Any, record: files.Record) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{record.place}: a value that JSON cannot hold ({error}); use text, numbers, lists"
        ) from None
