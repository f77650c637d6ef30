"""Records of JSONL, JSON, CSV and parquet files, with errors that name the file and the row."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from flowrl_jax.errors import InputError

_SPLITS = ("train", "test", "validation", "valid", "val", "dev")
# Rows of programming contests hold megabytes of tests each, so few are in memory at a time.
_PARQUET_ROWS = 64
_CSV_FIELD_BYTES = 1 << 30


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        place: the file and the line (JSONL, CSV) or row (JSON, parquet), for messages.
        fields: the record.
    """

    place: str
    fields: dict[str, Any]


def read_records(path: str) -> Iterator[Record]:
    """Yields the records of a file in order.

    Args:
        path: a .jsonl, .json (an array of objects, or one object a line), .csv (with a header) or
            .parquet file; each may also be compressed, as in .jsonl.gz. Lines, CSV rows and
            parquet are streamed; a JSON array is read whole.

    Raises:
        InputError: the file is missing, empty, damaged or of another kind, or a record is none.
    """
    file = existing_file(path)
    count = 0
    try:
        for record in _READERS[_kind(file)](file):
            count += 1
            yield record
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 after row {count}; save it as UTF-8") from None
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"{file}: cannot be read after row {count} ({_line(error)}); copy it anew"
        ) from None
    if not count:
        raise InputError(f"{file}: has no records; give a file with at least one")


def existing_file(path: str) -> Path:
    """Returns the path of a file that is there, with ~ expanded.

    Raises:
        InputError: it is not there.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the path of a .jsonl or .parquet file")
    return file


def split_files(path: str, split: str) -> list[str]:
    """Returns the files of a split at a path, in order of their names.

    A file stands for itself. In a folder it is every readable file with the split's name as a word
    of its own, such as train.jsonl, train-00000-of-00002.parquet or my_train2.csv; where no file
    is named after any split, it is all of them.

    Raises:
        InputError: nothing is there, or a folder has no file for the split.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        return [str(existing_file(path))]
    found = [f for f in place.iterdir() if f.is_file() and _suffix(f) in _READERS]
    found.sort(key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f.name)])
    named = [f for f in found if _names(f, split)]
    if not named and not any(_names(f, other) for f in found for other in _SPLITS):
        named = found
    if not named:
        listed = ", ".join(f.name for f in found[:5]) or "none that can be read"
        raise InputError(
            f"{place}: no file for split {split} (files: {listed}); name one {split}.jsonl or"
            " .json, .csv or .parquet, or give the file itself"
        )
    return [str(f) for f in named]


def field(record: Record, name: str) -> Any:
    """Returns a field of a record; "a.b" is b within a where no field is named so.

    Raises:
        InputError: the record has no such field.
    """
    value: Any = record.fields
    for key in [name] if name in record.fields else name.split("."):
        if not isinstance(value, dict) or key not in value:
            known = ", ".join(record.fields) or "none"
            raise InputError(
                f"{record.place}: no field {name!r} (fields: {known}); add it or name the right"
                " field"
            )
        value = value[key]
    return value


def prompt_text(record: Record, name: str) -> str:
    """Returns the prompt in a field: text, or chat messages whose contents are joined by newlines.

    Raises:
        InputError: the record has no such field, or it is neither.
    """
    prompt = field(record, name)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt
    ):
        return "\n".join(message["content"] for message in prompt)
    raise InputError(f"{record.place}: {name!r} is neither text nor a list of messages; give one")


def config_name(options: Mapping[str, Any], paths: Mapping[str, str]) -> str:
    """Returns a name for prepared data that changes whenever its content would.

    Args:
        options: the settings that shape the data.
        paths: split -> file read for it; the files' bytes count, not where they lie.
    """
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=list).encode())
    for split, path in sorted(paths.items()):
        digest.update(f"{split}:{file_digest(path)}".encode())
    return digest.hexdigest()[:16]


def file_digest(path: str) -> str:
    """Returns the sha256 of a file's bytes in hexadecimal digits."""
    with existing_file(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _names(file: Path, split: str) -> bool:
    return bool(re.search(rf"(?<![a-z]){split}(?![a-z])", file.name.lower()))


def _suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix


def _kind(file: Path) -> str:
    kind = _suffix(file)
    if kind not in _READERS:
        raise InputError(
            f"{file}: unknown kind of file; give .jsonl or .parquet, .json or .csv (or .gz of one)"
        )
    return kind


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_lines(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file} line {number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"{place}: not JSON ({_line(error)}); write one JSON object a line"
                ) from None
            if not isinstance(fields, dict):
                raise InputError(
                    f"{place}: a JSON {type(fields).__name__}; write one JSON object a line"
                )
            yield Record(place, fields)


def _read_json(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        if not stream.read(1 << 16).lstrip().startswith(b"["):
            yield from _read_lines(file)
            return
        stream.seek(0)
        try:
            records = json.load(stream)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise InputError(f"{file}: not JSON ({_line(error)}); mend or copy it anew") from None
    for number, fields in enumerate(records):
        if not isinstance(fields, dict):
            raise InputError(
                f"{file} row {number}: a JSON {type(fields).__name__}; make it an object"
            )
        yield Record(f"{file} row {number}", fields)


def _read_csv(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        csv.field_size_limit(_CSV_FIELD_BYTES)
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        rows = csv.reader(text, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise InputError(f"{file} line 1: a column is named twice; rename one")
            for values in rows:
                place = f"{file} line {rows.line_num}"
                if values and len(values) != len(header):
                    raise InputError(
                        f"{place}: {len(values)} values for {len(header)} columns"
                        f" ({', '.join(header)}); quote values that hold commas or line ends"
                    )
                if values:
                    yield Record(place, dict(zip(header, values, strict=True)))
        except csv.Error as error:
            raise InputError(
                f"{file} line {rows.line_num}: not CSV ({_line(error)}); mend the line"
            ) from None


def _read_parquet(file: Path) -> Iterator[Record]:
    # Imported here: it costs a tenth of a second that readers of other files need not pay.
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(file) as stream:
            # A compressed file cannot be read from its end, where parquet has its index.
            source = io.BytesIO(stream.read()) if file.suffix == ".gz" else stream
            number = 0
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    yield Record(f"{file} row {number}", fields)
                    number += 1
    except pyarrow.ArrowInvalid:
        raise InputError(f"{file}: not a parquet file; give .jsonl or .parquet") from None


_READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
