"""Files from the web: fetched once into the data folder, whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from flowrl_jax.datasets.files import file_digest
from flowrl_jax.errors import InputError

_TIMEOUT = 60  # seconds without a byte
_SUFFIX = ".partial"


def is_url(path: str) -> bool:
    """Whether a path is an address to download from."""
    return path.startswith(("http://", "https://"))


def fetched(url: str, folder: Path, *, sha256: str = "") -> Path:
    """Returns the local file of a URL, downloading it first where it is not there.

    A file that somebody has put there counts as downloaded. While bytes arrive they lie under
    another name, so a file with the right name is whole; what a killed process left of an earlier
    attempt is removed.

    Args:
        url: http or https.
        folder: where the file goes, under the last part of the URL's path.
        sha256: what the content must have; empty for any.

    Raises:
        InputError: the server cannot be reached, refuses or breaks off, the disk refuses, or the
            content is another one.
    """
    name = urllib.parse.unquote(Path(urllib.parse.urlsplit(url).path).name)
    if not name:
        raise InputError(f"{url}: names no file; give the address of a .jsonl, .csv or .parquet")
    target = folder / name
    if target.is_file():
        if sha256 and file_digest(str(target)) != sha256:
            raise InputError(
                f"{target}: is not the file its sha256 {sha256[:12]}... names; remove it, so that"
                f" {url} is downloaded, or give your own file in train_file or test_file"
            )
        return target
    partial = folder / f"{_prefix(name)}{os.getpid()}{_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, name)
        digest = _download(url, partial)
        if sha256 and digest != sha256:
            raise InputError(
                f"{url}: has sha256 {digest[:12]}..., not {sha256[:12]}...: another file than"
                f" expected; place the right one at {target}"
            )
        os.replace(partial, target)
    except urllib.error.HTTPError as error:
        raise InputError(
            f"{url}: {error.code} {error.reason}; place the file at {target}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"{url}: cannot be downloaded ({_reason(error)}); place the file at {target}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _download(url: str, partial: Path) -> str:
    """Writes the content to a file and returns its sha256."""
    request = urllib.request.Request(url, headers={"User-Agent": "flowrl_jax"})
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, partial.open("wb") as out:
        expected = response.headers.get("Content-Length")
        while block := response.read(1 << 20):
            digest.update(block)
            out.write(block)
        if expected is not None and out.tell() != int(expected):
            raise OSError(f"connection closed after {out.tell()} of {expected} bytes")
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _prefix(name: str) -> str:
    return f".{name}.{socket.gethostname()}."


def _remove_leftovers(folder: Path, name: str) -> None:
    for entry in folder.iterdir():
        if entry.name.startswith(_prefix(name)) and entry.name.endswith(_SUFFIX):
            writer = entry.name.removeprefix(_prefix(name)).removesuffix(_SUFFIX)
            if writer.isdecimal() and not _alive(int(writer)):
                entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return (str(inner) or type(inner).__name__).splitlines()[0]
