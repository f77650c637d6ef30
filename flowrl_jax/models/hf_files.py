"""The safetensors files of a checkpoint folder: one file, or several under an index."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the name "bfloat16", which safetensors looks up)
import safetensors

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """The open files of a checkpoint; tensors are read from them part by part.

    Attributes:
        folder: where the files are.
    """

    def __init__(self, folder: Path, files: dict[str, Any], place: dict[str, str]):
        self.folder = folder
        self._files = files
        self._place = place

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def error(self, name: str, problem: str) -> InputError:
        """An error that names a tensor and its file."""
        file = self.folder / self._place[name]
        return InputError(f"{file}: tensor {name} {problem}")

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks that a tensor is there, of this shape and with floating-point numbers.

        Raises:
            InputError: otherwise.
        """
        if name not in self._place:
            raise InputError(
                f"{self.folder}: lacks the tensor {name} that config.json asks for; download the"
                " checkpoint again"
            )
        view = self.view(name)
        if tuple(view.get_shape()) != shape:
            raise self.error(
                name,
                f"has shape {view.get_shape()} where config.json asks for {list(shape)};"
                " download the checkpoint again",
            )
        if view.get_dtype() not in _DTYPES:
            raise self.error(
                name,
                f"has dtype {view.get_dtype()}, which is not supported; supported are"
                f" {', '.join(_DTYPES)}",
            )

    def view(self, name: str) -> Any:
        """A tensor that is read as far as it is indexed."""
        return self._files[self._place[name]].get_slice(name)


def _open(file: Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except (OSError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file}: not a whole safetensors file ({reason}); download it again"
        ) from error


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
            files = {SINGLE: _open(folder / SINGLE, stack)}
            yield Checkpoint(folder, files, dict.fromkeys(files[SINGLE].keys(), SINGLE))
            return
        if not (folder / INDEX).exists():
            raise InputError(
                f"{folder}: has neither {SINGLE} nor {INDEX}; give a checkpoint in the safetensors"
                " format"
            )
        place = _read_index(folder / INDEX)
        files = {name: _open(folder / name, stack) for name in sorted(set(place.values()))}
        held = {(tensor, name) for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118
        for tensor, name in sorted(held ^ set(place.items())):
            there, says = ("holds", "does not") if (tensor, name) in held else ("lacks", "does")
            raise InputError(
                f"{folder / name}: {there} the tensor {tensor} and {INDEX} {says} name it there;"
                " download both again"
            )
        yield Checkpoint(folder, files, place)
