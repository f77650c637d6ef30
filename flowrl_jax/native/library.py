"""Compiles `kernels.cc` on first use, keeps what was compiled, and makes it known to XLA."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

PRODUCTS = "flowrl_products"  # as XLA calls it
GATED_PRODUCTS = "flowrl_gated_products"
ATTENTION = "flowrl_attention"
_SOURCE = Path(__file__).with_name("kernels.cc")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-w")
# GCC 12.2, tuned for Intel's AVX-512, makes conditional moves of branches and overwrites the flags
# between two of them: wrong functions were called. Clang does not know the word.
_GCC_FLAGS = ("-fno-if-conversion",)
_TIMEOUT = 120  # seconds; the compiler takes about five


class CompilerError(Exception):
    """There is no compiler, or it fails; says why."""


@functools.cache
def panel_columns() -> int:
    """Columns of a panel of the kernels' products, once these are known to XLA.

    Raises:
        CompilerError: there are no kernels on this machine.
    """
    try:
        library = _loaded(_compiled())
    except (OSError, RuntimeError, ValueError) as error:  # no home, one of others, a quote in CXX
        raise CompilerError(f"cannot compile or load: {error}") from error
    for name in (PRODUCTS, GATED_PRODUCTS, ATTENTION):
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return library.flowrl_panel()


_given_up: list[str] = []  # why, if they are not to be used although there are some


def missing() -> str:
    """Why there are no kernels on this machine; "" where there are.

    Compiles them, if nobody has, which takes a few seconds. What keeps it from that is logged.
    """
    return _given_up[0] if _given_up else _missing_here()


def give_up(reason: str) -> None:
    """Does without the kernels from now on, where there are any.

    Args:
        reason: what `missing` says then.
    """
    if not missing():
        logger.warning("CPUs decode with XLA, which is slower: %s", reason)
        _given_up.append(reason)


@functools.cache
def _missing_here() -> str:
    try:
        panel_columns()
    except CompilerError as error:
        logger.warning("CPUs decode with XLA, which is slower: %s", error)
        return str(error)
    return ""


def _loaded(path: Path) -> ctypes.CDLL:
    """The library at a path, made again once if it is spoilt."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled()))


def _compiled() -> Path:
    """The library, made by this compiler for this processor from this source."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    compiler = shutil.which(command[0])
    if compiler is None:
        raise CompilerError(
            f"no C++ compiler {command[0]!r}: install GCC 11 or later, or clang, or name one in CXX"
        )
    version = _run([compiler, *command[1:], "--version"])
    gcc = _GCC_FLAGS if "Free Software Foundation" in version else ()
    command = [compiler, *command[1:], *_FLAGS, *gcc, f"-I{jax.ffi.include_dir()}"]
    files = (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))
    sources = [file.read_text(encoding="utf-8") for file in files]
    of = [*sources, *command, version, _processor(), jax.__version__]
    name = hashlib.sha256("\0".join(of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowrl_jax"
    library = folder / f"kernels-{name}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _compile(command, library)
    except OSError as error:
        raise CompilerError(f"cannot write to {folder}: {error}") from error


def _compile(command: list[str], library: Path) -> Path:
    """Compiles beside the library and moves it there whole: other processes may do the same."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        _run([*command, str(_SOURCE), "-o", str(made)])
        made.replace(library)
    return library


def _run(command: list[str]) -> str:
    """What a command says.

    Raises:
        CompilerError: it fails, with the first line of what it says is wrong.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(str(error)) from error
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()
        first = next((line for line in said if "error" in line), said[0])
        raise CompilerError(f"{command[0]} exits {done.returncode}: {first}")
    return done.stdout


def _processor() -> str:
    """What the compiler's "native" stands for: folders may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
