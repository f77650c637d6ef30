"""The safetensors files of a checkpoint folder: one file, or several under an index.

The safetensors library checks the files; numbers are read here, with plain reads. The library
maps files into memory, where every page that was ever looked at counts as the process's own: a
loaded model would seem to be, and under a memory limit would be, in memory twice.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_fields import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CHUNK_BYTES = 2**24  # of rows that are read to take some of their columns


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: its file, first byte, type and shape."""

    file: BinaryIO
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The open files of a checkpoint; tensors are read from them part by part.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path, tensors: dict[str, _Tensor]):
        self.folder = folder
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def error(self, name: str, problem: str) -> InputError:
        """An error that names a tensor and its file."""
        return InputError(f"{self._tensors[name].file.name}: tensor {name} {problem}")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks that a tensor is there, of this shape and with floating-point numbers.

        Raises:
            InputError: otherwise.
        """
        if name not in self._tensors:
            raise InputError(
                f"{self.folder}: lacks the tensor {name} that config.json asks for; download the"
                " checkpoint again"
            )
        tensor = self._tensors[name]
        if tensor.shape != shape:
            raise self.error(
                name,
                f"has shape {list(tensor.shape)} where config.json asks for {list(shape)};"
                " download the checkpoint again",
            )
        if tensor.dtype not in _DTYPES:
            raise self.error(
                name,
                f"has dtype {tensor.dtype}, which is not supported; supported are"
                f" {', '.join(_DTYPES)}",
            )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor of one or two axes, and little more of the file.

        Args:
            name: of the tensor.
            index: one slice per axis, with start and stop; what lies beyond the tensor is zero.

        Returns:
            The part, in the tensor's dtype, or float32 for float64, which JAX does not hold.

        Raises:
            InputError: the file ended early.
        """
        tensor = self._tensors[name]
        inside = [
            slice(s.start, min(s.stop, size)) for s, size in zip(index, tensor.shape, strict=True)
        ]
        part = self._read_inside(name, tensor, *inside)
        missing = [
            (0, (s.stop - s.start) - held) for s, held in zip(index, part.shape, strict=True)
        ]
        part = np.pad(part, missing) if any(after for _, after in missing) else part
        with np.errstate(over="ignore"):  # what does not fit is infinite, and refused as such
            return part.astype(np.float32) if part.dtype == np.float64 else part

    def _read_inside(
        self, name: str, tensor: _Tensor, rows: slice, columns: slice = slice(0, 1)
    ) -> np.ndarray:
        dtype, width = _DTYPES[tensor.dtype], (*tensor.shape, 1)[1]
        row_bytes = width * dtype.itemsize
        count = max(rows.stop - rows.start, 0)
        taken = columns.stop - columns.start
        part = np.empty((count, taken), dtype)
        step = max(count if taken == width else _CHUNK_BYTES // row_bytes, 1)
        for start in range(0, count, step):
            size = min(step, count - start)
            target = part[start : start + size]
            held = target if taken == width else np.empty((size, width), dtype)
            self._fill(name, tensor, tensor.offset + (rows.start + start) * row_bytes, held)
            if held is not target:
                target[...] = held[:, columns]
        return part if len(tensor.shape) == 2 else part[:, 0]

    def _fill(self, name: str, tensor: _Tensor, offset: int, array: np.ndarray) -> None:
        bytes_of: Any = array.reshape(-1).view(np.uint8)
        view = memoryview(bytes_of)
        while view:
            count = os.preadv(tensor.file.fileno(), [view], offset)
            if not count:
                raise self.error(name, "ends early: the file was changed; download it again")
            view, offset = view[count:], offset + count


def _open(file: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """The tensors of one file."""
    if not file.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{file}: is not a file; give a checkpoint in the safetensors format")
    try:
        with safetensors.safe_open(file, framework="numpy") as checked:
            checked.keys()
        stream = stack.enter_context(file.open("rb"))
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file}: not a whole safetensors file ({reason}); download it again"
        ) from error
    return {
        name: _Tensor(
            stream, 8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read_index(file: Path) -> dict[str, str]:
    """Names of the tensors and the files that hold them."""
    place = read_json(file).get("weight_map")
    if not isinstance(place, dict) or not place:
        raise InputError(f"{file}: has no weight_map; download it again")
    for tensor, name in place.items():
        # A name with a folder in it could point anywhere on the machine.
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise InputError(f"{file}: {tensor} lies in {name!r}, which is not a file's name")
        if not (file.parent / name).is_file():
            raise InputError(f"{file}: names {name}, which is absent; download that file too")
    return place


@contextlib.contextmanager
def open_checkpoint(folder: Path) -> Iterator[Checkpoint]:
    """Opens the safetensors files of a folder; `model.safetensors` goes before an index.

    Args:
        folder: holds the files.

    Yields:
        The checkpoint, whose files are closed at the end.

    Raises:
        InputError: there are none, one is absent, damaged or of another format, or the index and
            the files disagree about what is where.
    """
    with contextlib.ExitStack() as stack:
        if (folder / SINGLE).exists():
            yield Checkpoint(folder, _open(folder / SINGLE, stack))
            return
        if not (folder / INDEX).exists():
            raise InputError(
                f"{folder}: has neither {SINGLE} nor {INDEX}; give a checkpoint in the safetensors"
                " format"
            )
        place = _read_index(folder / INDEX)
        files = {name: _open(folder / name, stack) for name in sorted(set(place.values()))}
        held = {(tensor, name) for name, tensors in files.items() for tensor in tensors}
        for tensor, name in sorted(held ^ set(place.items())):
            there, says = ("holds", "does not") if (tensor, name) in held else ("lacks", "does")
            raise InputError(
                f"{folder / name}: {there} the tensor {tensor} and {INDEX} {says} name it there;"
                " download both again"
            )
        yield Checkpoint(folder, {tensor: files[name][tensor] for tensor, name in place.items()})
