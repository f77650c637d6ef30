"""Rows of a prepared data set by position: shuffled anew each epoch, repeated without end."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import absl.logging
import numpy as np

from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import nearest

BUILDERS: Mapping[str, str] = {
    "countdown": "flowrl_jax.datasets.countdown",
    "prompts": "flowrl_jax.datasets.prompts",
    "stories": "flowrl_jax.datasets.stories",
}
"""Name -> module with `make_builder(options, data_dir)`, imported when it is used."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which rows, in which order.

    Attributes:
        builder: a name in BUILDERS.
        options: settings of the builder by name.
        data_dir: folder of prepared data; it is filled once and found again afterwards.
        split: a split, or a TFDS slice of one ("train[:100]").
        seed: of the shuffle, from 0 to 2**32 - 1.
        shuffle: whether each epoch has its own random order; otherwise the order of the split.
    """

    builder: str = "countdown"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_dir: str = "data"
    split: str = "train"
    seed: int = 0
    shuffle: bool = True


class PromptSource:
    """Random access to the endless row sequence of a data set.

    The row at a position depends on the config and the position alone, so one integer is the
    whole state of the input: a run that stores it continues with the very next row, and hosts
    that read different positions share no row within an epoch.

    Args:
        config: what to read. The data set is prepared first where that has not been done yet;
            several processes may do so at once.

    Raises:
        InputError: unknown builder, option or split, or an empty split.
    """

    def __init__(self, config: DataConfig):
        import grain

        self.config = config
        if not 0 <= config.seed < 2**32:
            raise InputError(f"data seed={config.seed}: give an integer from 0 to 2**32 - 1")
        builder = prepared_builder(config)
        source = builder.as_data_source(split=_checked_split(builder, config))
        self._size = len(source)
        rows = grain.MapDataset.source(_NumberedRows(source)).seed(config.seed)
        if config.shuffle:
            rows = rows.shuffle()
        self._rows = rows.repeat()

    def __len__(self) -> int:
        """The number of rows in the split, which is one epoch of positions."""
        return self._size

    def rows(self, position: int, count: int) -> list[dict[str, Any]]:
        """Returns the rows at position, ..., position + count - 1 as plain Python values.

        Args:
            position: index (>= 0) into the endless sequence; position // len(self) is the epoch.
            count: how many rows.

        Returns:
            The rows; `prompt_id` of a row is its index in the split, whatever the shuffle.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position={position}, count={count}: both must be >= 0")
        # The type allows for None, which only a filtered sequence would hold.
        return [cast("dict[str, Any]", self._rows[i]) for i in range(position, position + count)]


def prepared_builder(config: DataConfig) -> Any:
    """Returns the TFDS builder of a config, its data written to disk."""
    if config.builder not in BUILDERS:
        raise InputError(
            f"data set {config.builder!r}: unknown; {nearest(config.builder, BUILDERS)}"
        )
    module = importlib.import_module(BUILDERS[config.builder])
    import tensorflow_datasets as tfds

    data_dir = str(Path(config.data_dir).expanduser().absolute())
    with _quiet():
        builder = module.make_builder(dict(config.options), data_dir)
        if builder.is_prepared():
            return builder
        tfds.disable_progress_bar()
        try:
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        except OSError:
            # Each process writes a folder of its own and renames it. Where another one was
            # quicker the rename fails, and its folder holds the same rows.
            builder = module.make_builder(dict(config.options), data_dir)
            if not builder.is_prepared():
                raise
    for line in getattr(module, "dropped_lines", lambda _: ())(builder.info.metadata):
        print(line, file=sys.stderr, flush=True)
    return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing that it downloads, and from warning about configs of our own."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)


class _NumberedRows:
    """A data source whose rows are Python values and know their index."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: _to_python(value) for name, value in self._source[index].items()}
        # Fields a user's file has beyond the data set's own travel as one JSON text.
        extra = row.pop("metadata_json", None)
        return {**(json.loads(extra) if extra else {}), **row, "prompt_id": int(index)}


def _to_python(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.generic):
        return _to_python(value.item())
    if isinstance(value, np.ndarray):
        return _to_python(value.tolist())
    if isinstance(value, list):
        return [_to_python(item) for item in value]
    if isinstance(value, dict):
        return {name: _to_python(item) for name, item in value.items()}
    return value


def _checked_split(builder: Any, config: DataConfig) -> str:
    name = config.split.split("[")[0]
    if name not in builder.info.splits:
        known = sorted(builder.info.splits)
        raise InputError(
            f"data set {config.builder}, split {config.split!r}: unknown; {nearest(name, known)}"
        )
    try:
        size = builder.info.splits[config.split].num_examples
    except ValueError:
        raise InputError(
            f"data set {config.builder}, split {config.split!r}: not a slice; "
            "write it like train[:100] or train[50%:]"
        ) from None
    if not size:
        raise InputError(
            f"data set {config.builder}, split {config.split!r}: empty; choose a split with rows"
        )
    return config.split
