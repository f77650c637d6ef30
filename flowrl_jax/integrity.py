"""Whether what is read is what was written: digests of arrays, and lists of files."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, Sharding

FILE_LIST = "files.json"
HASHED_BYTES = 2**20


def digests(arrays: Iterable[jax.Array]) -> list[int]:
    """A 32-bit digest of each array's bits, however the array is cut over devices.

    It is computed where the arrays live, by one program per mesh; large arrays do not travel.

    Args:
        arrays: of any shape and sharding; bool, integers or floats.

    Returns:
        Integers in [0, 2^32), the same on every process.
    """
    arrays = list(arrays)
    places: dict[Sharding, list[int]] = {}
    for place, x in enumerate(arrays):
        places.setdefault(_everywhere(x.sharding), []).append(place)
    values: dict[int, jax.Array] = {}
    for sharding, group in places.items():
        found = _digests([arrays[place] for place in group], sharding)
        values |= dict(zip(group, found, strict=True))
    return [int(value) for _, value in sorted(jax.device_get(values).items())]


def _everywhere(sharding: Sharding) -> Sharding:
    """Every process needs the values, so every device of a mesh is given them."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


@functools.partial(jax.jit, static_argnames="sharding")
def _digests(arrays: list[jax.Array], sharding: Sharding) -> list[jax.Array]:
    return jax.lax.with_sharding_constraint([_digest(x) for x in arrays], sharding)


def _digest(x: jax.Array) -> jax.Array:
    """The sum modulo 2^32, in which order does not matter, of each word mixed with its place."""
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ _mix(place + jnp.uint32(1))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The array's bits as uint32; an element of 64 bits becomes two along a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize < 4:
        unsigned = jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint16
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser (Appleby, 2011): each bit that goes in flips half that come out."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def list_files(directory: epath.Path) -> None:
    """Writes `FILE_LIST`, which names the files below a directory and their sizes.

    Files of at most `HASHED_BYTES`, in which structure is kept, are listed with their SHA-256;
    larger ones hold arrays, which have digests.
    """
    files = {}
    for path in _files_below(directory):
        size = path.stat().length
        name = path.relative_to(directory).as_posix()
        files[name] = [size, _sha256(path) if size <= HASHED_BYTES else None]
    (directory / FILE_LIST).write_text(json.dumps(files))


def check_files(directory: epath.Path) -> None:
    """Compares the files below a directory with its `FILE_LIST`.

    Raises:
        ValueError: naming a file that is missing or not as it was.
    """
    for name, (size, sha256) in json.loads((directory / FILE_LIST).read_text()).items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory.name}/{name} is missing")
        found = path.stat().length
        if found != size:
            raise ValueError(f"{directory.name}/{name} has {found} bytes instead of {size}")
        if sha256 is not None and sha256 != _sha256(path):
            raise ValueError(f"{directory.name}/{name} is not as it was written")


def _files_below(directory: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _sha256(path: epath.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
