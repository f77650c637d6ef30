"""Prompts from public data sets or a user's own files, as a TFDS data set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from flowrl_jax.datasets import catalog, download, files
from flowrl_jax.datasets.cleaning import Cleaner, Cleaning, Evaluation
from flowrl_jax.datasets.rows import NO_TESTS, Row, RowFunction
from flowrl_jax.datasets.verl import tests_text
from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import make_config

RESERVED_FIELDS = ("prompt_id", "metadata_json")


@dataclasses.dataclass(frozen=True)
class PromptsData:
    """Which rows.

    Attributes:
        train: name of a public data set (`catalog.SOURCES`) for the split train; empty for a file
            of your own, or for no such split.
        test: the same for the split test.
        train_file: .jsonl, .json, .csv or .parquet file (perhaps .gz), folder of them or URL that
            the split train is read from; empty for the named data set's own URL.
        test_file: the same for the split test.
        train_sha256: of the content of train_file, which is checked; empty for any.
        test_sha256: the same for test_file.
        prompt_field: of your own files: field with the prompt, text or chat messages whose
            contents are joined. "a.b" is field b within a.
        answer_field: field with the answer the task judges by; empty where the files have none.
        tests_field: field with the tests of code problems, which every row then has in `tests`, in
            a form that `rewards.code.parse` reads; answer_field is not read then. Empty where the
            files have none, or have them in `tests`.
        columns: other fields of the row -> fields of your own files, as pairs or a mapping; fields
            that are not named keep their names.
        deduplicate: whether of rows of train with one prompt only the first stays.
        decontaminate: what train may not share problems with: "test" (the split), names of
            public data sets, NAME=FILE where such a set lies, or files of your own.
        min_chars, max_chars, ngram, overlap: see `cleaning.Cleaning`; of train alone.
    """

    train: str = ""
    test: str = ""
    train_file: str = ""
    test_file: str = ""
    train_sha256: str = ""
    test_sha256: str = ""
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    tests_field: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    deduplicate: bool = True
    decontaminate: tuple[str, ...] = ()
    min_chars: int = 0
    max_chars: int = 0
    ngram: int = 13
    overlap: float = 0.5

    def __post_init__(self):
        if not self.splits:
            raise InputError(
                "data set prompts: no file; give train_file or test_file, or name a public set in"
                " train or test"
            )
        for name, _ in self.columns:
            if name in (*RESERVED_FIELDS, "prompt", "answer"):
                raise InputError(
                    f"data set prompts: columns[{name!r}] is taken; name another field of the row"
                    " (prompt_field and answer_field are for prompt and answer)"
                )
        self.cleaning("train", ())

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits there are."""
        return tuple(
            split
            for split in ("train", "test")
            if getattr(self, split) or getattr(self, f"{split}_file")
        )

    def cleaning(self, split: str, identity: tuple[str, ...]) -> Cleaning:
        """What is left out of a split; of test, nothing."""
        if split != "train":
            return Cleaning(deduplicate=())
        return Cleaning(
            deduplicate=identity if self.deduplicate else (),
            min_chars=self.min_chars,
            max_chars=self.max_chars,
            ngram=self.ngram,
            overlap=self.overlap,
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """Files of one form.

    Attributes:
        split: of which they are.
        digests: sha256 of each file.
        paths: of the files; those on the web are fetched when they are asked for.
        row: makes a row of a record.
        identity: fields that make two rows the same.
    """

    split: str
    digests: tuple[str, ...]
    sources: tuple[str | tuple[catalog.File, Path], ...]
    row: RowFunction
    identity: tuple[str, ...] = ("prompt",)

    def rows(self) -> Iterator[Row | str]:
        """Yields the rows in order, or why a record makes none.

        Raises:
            InputError: a file is missing or unusable, or a record lacks or misuses a field.
        """
        for source in self.sources:
            path = source if isinstance(source, str) else _fetched(*source)
            for record in files.read_records(path):
                row = self.row(record, self.split)
                if not isinstance(row, str):
                    _check_text(record, row)
                yield row


@dataclasses.dataclass(eq=False, kw_only=True)
class PromptsBuilderConfig(tfds.core.BuilderConfig):
    """TFDS configuration: its name follows from the files' content."""

    data: PromptsData
    parts: Mapping[str, Part]
    evaluation: Mapping[str, Part]


class PromptsBuilder(tfds.core.GeneratorBasedBuilder):
    """Prompts in the order of the files: prompt, answer, and all other fields as JSON.

    `flowrl_jax.datasets.pipeline` puts the other fields back into the row, so a task finds them
    under the names they have in the file. The metadata of the prepared data say for each split how
    many rows were kept, and how many dropped for which reason.
    """

    name = "prompts"
    VERSION = tfds.core.Version("2.0.0")

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
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # TFDS would name files anew; `download` keeps their names.
        config = self.builder_config
        assert isinstance(config, PromptsBuilderConfig)
        return {name: self._generate_examples(part) for name, part in config.parts.items()}

    def _generate_examples(self, part: Part) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        assert isinstance(config, PromptsBuilderConfig)
        evaluation = None
        if part.split == "train" and config.evaluation:
            evaluation = Evaluation(
                {name: _problems(other) for name, other in config.evaluation.items()},
                ngram=config.data.ngram,
                overlap=config.data.overlap,
            )
        cleaner = Cleaner(config.data.cleaning(part.split, part.identity), evaluation)
        for number, row in enumerate(cleaner.clean(part.rows())):
            extra = {k: v for k, v in row.items() if k not in ("prompt", "answer")}
            yield (
                number,
                {
                    "prompt": row["prompt"],
                    "answer": row["answer"],
                    "metadata_json": json.dumps(extra),
                },
            )
        if not cleaner.kept:
            raise InputError(
                f"data set prompts, split {part.split}: no row is left"
                f" ({_counts(cleaner.dropped)}); widen what is kept"
            )
        counts = {"kept": cleaner.kept, "dropped": dict(sorted(cleaner.dropped.items()))}
        metadata = self.info.metadata
        assert isinstance(metadata, dict)
        metadata[part.split] = counts


def make_builder(options: Mapping[str, Any], data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder for plain options (fields of PromptsData).

    Files whose content is not known beforehand are downloaded here, since it names the data.

    Raises:
        InputError: an option is wrong, or a file is missing.
    """
    options = dict(options)
    columns = options.get("columns", ())
    if isinstance(columns, Mapping):
        options["columns"] = tuple(sorted((str(k), str(v)) for k, v in columns.items()))
    data = make_config(PromptsData, options, owner="data set prompts")
    parts = {split: _part(data, split, data_dir) for split in data.splits}
    evaluation = dict(_evaluation_part(data, e, parts, data_dir) for e in data.decontaminate)
    # Files count by their content, not by where they lie.
    named = dataclasses.asdict(data) | {"train_file": "", "test_file": "", "decontaminate": ()}
    named["digests"] = {name: part.digests for name, part in parts.items()}
    named["evaluation"] = {name: part.digests for name, part in evaluation.items()}
    config = PromptsBuilderConfig(
        name=files.config_name(named, {}), data=data, parts=parts, evaluation=evaluation
    )
    return PromptsBuilder(config=config, data_dir=data_dir, file_format="array_record")


def dropped_lines(metadata: Mapping[str, Any]) -> list[str]:
    """Returns a line for each split of prepared data that rows were left out of."""
    return [
        f"data: {split}: kept {counts['kept']} of"
        f" {counts['kept'] + sum(counts['dropped'].values())} rows ({_counts(counts['dropped'])})"
        for split, counts in metadata.items()
        if counts["dropped"]
    ]


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none read"


def _part(data: PromptsData, split: str, data_dir: str) -> Part:
    name, path = getattr(data, split), getattr(data, f"{split}_file")
    return _located(data, split, name, path, getattr(data, f"{split}_sha256"), data_dir)


def _evaluation_part(
    data: PromptsData, entry: str, parts: Mapping[str, Part], data_dir: str
) -> tuple[str, Part]:
    if entry == "test":
        if entry not in parts:
            raise InputError("data decontaminate='test': there is no split test; give test_file")
        return entry, parts[entry]
    name, _, path = entry.partition("=")
    if name not in catalog.SOURCES:
        if not download.is_url(entry) and not Path(entry).expanduser().exists():
            catalog.source(entry, "test")  # neither a file nor a set: names the nearest set
        name, path = "", entry
    return name or Path(path).name, _located(data, "test", name, path, "", data_dir)


def _located(
    data: PromptsData, split: str, name: str, path: str, sha256: str, data_dir: str
) -> Part:
    """Finds the files of a split; downloads those whose content nothing tells beforehand."""
    folder = Path(data_dir) / "downloads"
    if not name:
        row, identity = own_rows(data), ("prompt",)
    else:
        source = catalog.source(name, split)
        row, identity = source.row, source.identity
        if not path:
            web = tuple((file, folder / name) for file in source.files[split])
            digests = tuple(
                file.sha256 or files.file_digest(_fetched(file, place)) for file, place in web
            )
            return Part(split, digests, web, row, identity)
    if download.is_url(path):
        file = catalog.File(path, sha256)
        place = folder / hashlib.sha256(path.encode()).hexdigest()[:8]
        digest = files.file_digest(_fetched(file, place))
        return Part(split, (digest,), ((file, place),), row, identity)
    paths = tuple(files.split_files(path, split))
    digests = tuple(files.file_digest(path) for path in paths)
    if sha256 and digests != (sha256,):
        raise InputError(
            f"{path}: sha256 is not {sha256[:12]}... ({len(paths)} files, the first with"
            f" {digests[0][:12]}...); give the right file, or correct {split}_sha256"
        )
    return Part(split, digests, paths, row, identity)


def _fetched(file: catalog.File, folder: Path) -> str:
    return str(download.fetched(file.url, folder, sha256=file.sha256))


def _check_text(record: files.Record, row: Row) -> None:
    for name in ("prompt", "answer"):
        try:
            row[name].encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(row[name][error.start]):04X}"
            raise InputError(
                f"{record.place}: {name!r} has half a character ({code}) that UTF-8 cannot write;"
                " mend the text"
            ) from None


def _problems(part: Part) -> Iterator[str]:
    return (row["prompt"] for row in part.rows() if not isinstance(row, str))


def own_rows(data: PromptsData) -> RowFunction:
    """Returns the row function of a user's own files.

    It raises InputError, with file and row, where a record lacks a field, has an unusable prompt or
    answer, or uses a name of RESERVED_FIELDS.
    """

    def row(record: files.Record, split: str) -> Row | str:
        del split
        extra = dict(record.fields)
        prompt = files.prompt_text(record, data.prompt_field)
        if not prompt:
            raise InputError(f"{record.place}: {data.prompt_field!r} is empty; give a prompt")
        extra.pop(data.prompt_field, None)
        answer = ""
        if data.answer_field and not data.tests_field:
            value = files.field(record, data.answer_field)
            if value is None:
                raise InputError(f"{record.place}: {data.answer_field!r} is null; give an answer")
            answer = value if isinstance(value, str) else _json(value, record)
            extra.pop(data.answer_field, None)
        for name, column in data.columns:
            extra[name] = files.field(record, column)
            if name != column:
                extra.pop(column, None)
        if data.tests_field:
            source = str(extra.get("data_source") or "")
            tests = tests_text(record, data.tests_field, source)
            if tests is None:
                return NO_TESTS
            # Tests may be megabytes: once is enough.
            extra = {**_without(extra, data.tests_field), "tests": tests}
        for name in extra:
            if name in (*RESERVED_FIELDS, "prompt", "answer"):
                raise InputError(f"{record.place}: field {name!r} is taken; rename it")
        _json(extra, record)
        return {**extra, "prompt": prompt, "answer": answer}

    return row


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Fields less the one of a name, "a.b" being b within a."""
    outer, _, inner = name.partition(".")
    if name in fields or not inner or not isinstance(fields.get(outer), dict):
        return {key: value for key, value in fields.items() if key != name}
    return {**fields, outer: _without(fields[outer], inner)}


def _json(value: Any, record: files.Record) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{record.place}: a value that JSON cannot hold ({error}); use text, numbers, lists"
        ) from None
