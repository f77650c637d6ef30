"""Reading a user's own JSONL or parquet files, with errors that name the file and the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowrl_jax.errors import InputError


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        place: the file and the line (JSONL) or row (parquet), for messages.
        fields: the record.
    """

    place: str
    fields: dict[str, Any]


def read_records(path: str) -> Iterator[Record]:
    """Yields the records of a .jsonl, .json (one object a line) or .parquet file in order.

    Raises:
        InputError: the file is missing, empty or of another kind, or a line is no JSON object.
    """
    file = existing_file(path)
    if file.suffix == ".parquet":
        records = _read_parquet(file)
    elif file.suffix in (".jsonl", ".json"):
        records = _read_jsonl(file)
    else:
        raise InputError(f"{file}: unknown kind of file; give .jsonl or .parquet")
    count = 0
    for record in records:
        count += 1
        yield record
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


def field(record: Record, name: str) -> Any:
    """Returns a field of a record.

    Raises:
        InputError: the record has no such field.
    """
    if name not in record.fields:
        known = ", ".join(record.fields) or "none"
        raise InputError(
            f"{record.place}: no field {name!r} (fields: {known}); add it or name the right field"
        )
    return record.fields[name]


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
        content = hashlib.sha256(existing_file(path).read_bytes()).hexdigest()
        digest.update(f"{split}:{content}".encode())
    return digest.hexdigest()[:16]


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file} line {number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"{place}: not JSON ({reason}); write one JSON object a line"
                ) from None
            if not isinstance(fields, dict):
                raise InputError(
                    f"{place}: a JSON {type(fields).__name__}; write one JSON object a line"
                )
            yield Record(place, fields)


def _read_parquet(file: Path) -> Iterator[Record]:
    # Imported here: it costs a tenth of a second that readers of other files need not pay.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid:
        raise InputError(f"{file}: not a parquet file; give .jsonl or .parquet") from None
    for number, fields in enumerate(table.to_pylist()):
        yield Record(f"{file} row {number}", fields)
