"""Chips: what the compiler calls them, and the rates that their makers publish."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from jax.experimental import topologies

from flowrl_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as the compiler counts them.

    Attributes:
        name: as topologies are named.
        memory: bytes that a program may use, by the compiler's own account.
        flops: peak bfloat16 operations a second, published.
        bandwidth: bytes of memory read a second, published.
        links: bytes a second over all links to neighbouring chips, published.
        example: a topology, for messages.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    example: str


# Rates: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; memory: what the compiler says when a
# program does not fit. A tpu7x chip is two devices.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75 * GIB, 275e12, 1.2e12, 3.0e11, "v4:2x2x2"),
        Chip("v5e", 15.75 * GIB, 197e12, 0.82e12, 2.0e11, "v5e:4x4"),
        Chip("v5p", 95.73 * GIB, 459e12, 2.77e12, 6.0e11, "v5p:2x2x2"),
        Chip("v6e", 31.24 * GIB, 918e12, 1.64e12, 4.5e11, "v6e:2x4"),
        Chip("tpu7x", 94.75 * GIB, 1153e12, 3.69e12, 6.0e11, "tpu7x:2x2x1"),
    )
}


def describe(topology: str) -> tuple[Chip, list[Any]]:
    """The devices of a topology that is not there.

    Args:
        topology: such as "v5p:2x2x2".

    Returns:
        The chip and the devices, which the compiler compiles for.

    Raises:
        InputError: the name is not known, or the TPU compiler is not installed.
    """
    chip = CHIPS.get(topology.partition(":")[0])
    known = ", ".join(chip.example for chip in CHIPS.values())
    if chip is None:
        raise InputError(
            f"--topology={topology}: not known; name a chip and its grid, such as {known}"
        )
    try:
        with _compile_only():
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the plugin raises errors of its own, and of several kinds
        reason = " ".join(str(error).split())[:200]
        if "not installed" in reason or isinstance(error, ImportError):
            raise InputError(
                "the TPU compiler is not installed: pip install libtpu (it needs no TPU), or set"
                " TPU_LIBRARY_PATH to its libtpu.so"
            ) from error
        raise InputError(
            f"--topology={topology}: the compiler refuses it ({reason}); known are such as {known}"
        ) from error
    return chip, list(found.devices)


@contextlib.contextmanager
def _compile_only() -> Iterator[None]:
    """Keeps the plugin from asking the network what machine this is."""
    settings = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    kept = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
