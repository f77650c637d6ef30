"""Digests tell arrays apart, whatever their layout; lists of files tell directories apart."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from flowrl_jax.integrity import FILE_LIST, HASHED_BYTES, check_files, digests, list_files
from flowrl_jax.sharding import MeshConfig, make_mesh


def reference(x: np.ndarray) -> int:
    """The digest by Python's integers, one word after the other."""

    def mix(word: int) -> int:
        word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
        return word ^ (word >> 16)

    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    words = np.ascontiguousarray(x).reshape(-1).view(unsigned)
    return sum(mix(int(word) ^ mix(place + 1)) for place, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 4)])
def test_digest_is_the_sum_of_mixed_words(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 100, shape)
    x = jnp.asarray(values % 2 if dtype == "bool" else values, dtype)

    assert digests([x]) == [reference(np.asarray(x))]


def test_digest_does_not_depend_on_the_sharding() -> None:
    x = jax.random.normal(jax.random.key(0), (8, 16))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    specs = [("fsdp", "tensor"), ("tensor", "fsdp"), (None, ("tensor", "fsdp")), ()]
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for spec in specs]

    assert digests(placed) == digests([x]) * len(specs)


def test_digest_tells_apart_what_comparing_floats_or_sums_would_not() -> None:
    x = jnp.asarray([[1.0, 0.0], [2.0, jnp.nan]])
    others = [
        x,
        x.T,
        x[::-1],
        x.reshape(4)[jnp.asarray([1, 0, 2, 3])].reshape(2, 2),
        x * jnp.asarray([[1.0, -1.0], [1.0, 1.0]]),  # 0.0 becomes -0.0
        jnp.zeros((2, 2)),
        jnp.zeros((2, 3)),
    ]

    assert len(set(digests(others))) == len(others)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A directory with a small, a nested and a large file, and their list."""
    (tmp_path / "below").mkdir()
    (tmp_path / "small").write_bytes(b"small")
    (tmp_path / "below" / "nested").write_bytes(b"nested")
    (tmp_path / "large").write_bytes(bytes(HASHED_BYTES + 1))
    list_files(epath.Path(tmp_path))
    return tmp_path


def test_unchanged_files_pass(listed: Path) -> None:
    (listed / "new").write_bytes(b"of no concern")

    check_files(epath.Path(listed))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("small", None, "small is missing"),
        ("below/nested", None, "below/nested is missing"),
        ("small", b"smell", "small is not as it was written"),
        ("large", bytes(HASHED_BYTES), f"large has {HASHED_BYTES} bytes instead of"),
        (FILE_LIST, b"{", "Expecting property name"),
    ],
)
def test_changed_files_are_named(
    listed: Path, name: str, content: bytes | None, complaint: str
) -> None:
    (listed / name).unlink()
    if content is not None:
        (listed / name).write_bytes(content)

    with pytest.raises(ValueError, match=complaint):
        check_files(epath.Path(listed))
