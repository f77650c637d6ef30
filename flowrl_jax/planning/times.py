"""Seconds that a program takes by published rates: an estimate, no measurement."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flowrl_jax.planning.chips import Chip
from flowrl_jax.planning.collectives import Traffic

ASSUMPTIONS = (
    "matrix products and kernels run at the published peak, and memory at its published rate",
    "each operand is read and each result written once by every instruction that is not fused",
    "a collective uses one link for each axis of the grid that it extends over, two where the grid"
    " closes to a ring",
    "operations, memory and asynchronous collectives overlap completely; collectives that the"
    " compiler left synchronous overlap with nothing",
    "responses are as long as they may be, and a decoded token attends to the longest one",
)
ASSUMPTIONS_OF_FORMULAS = (
    "nothing was compiled: memory is a formula that lay within a fifth of compiled programs",
    "matrix products run at the published peak, and memory and links at their published rates",
    "operations, memory and transfers overlap completely",
    "responses are as long as they may be, and a decoded token attends to the longest one",
)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Where a program's time goes.

    Attributes:
        compute: of its matrix products and kernels.
        memory: of its reads and writes.
        network: of all its collectives.
        total: an estimate of the whole, see `ASSUMPTIONS`.
    """

    compute: float
    memory: float
    network: float
    total: float


def estimate(
    flops: float, moved: float, collectives: Iterable[Traffic], chip: Chip, mesh: Mesh
) -> Seconds:
    """Estimates a program's time.

    Args:
        flops: operations of one device.
        moved: bytes in and out of its memory.
        collectives: of the program.
        chip: that it runs on.
        mesh: of the chips.
    """
    compute, memory = flops / chip.flops, moved / chip.bandwidth
    network = waiting = 0.0
    for one in collectives:
        rate = link_rate(chip, mesh, one.axes)
        network += one.bytes / rate
        waiting += one.waiting_bytes / rate
    total = max(compute, memory, network - waiting) + waiting
    return Seconds(compute, memory, network, total)


def link_rate(chip: Chip, mesh: Mesh, over: str) -> float:
    """Bytes a second that a device receives from others along some axes of the mesh.

    Args:
        chip: that the devices are.
        mesh: of the devices.
        over: names of mesh axes, joined by "+".
    """
    places = np.array([_place(chip, device) for device in mesh.devices.flat])
    whole = places.max(axis=0) + 1
    chosen = tuple(slice(None) if axis in over.split("+") else 0 for axis in mesh.axis_names)
    group = places.reshape(*mesh.devices.shape, -1)[chosen].reshape(-1, places.shape[1])
    extent = [len(set(column)) for column in group.T]
    if extent[0] > 1:
        return chip.network
    if not chip.torus:
        return chip.links
    links = 0
    for size, length in zip(extent[1:], whole[1:], strict=True):
        ring = size == length and _closes(chip, whole[1:], length)
        links += (2 if ring else 1) if size > 1 else 0
    return chip.links * links / (2 * chip.torus) if links else chip.links


def _place(chip: Chip, device: Any) -> tuple[int, ...]:
    """Slice or node of a device, and its chip's place in the grid."""
    if not chip.torus:
        return (device.id // chip.largest[0], device.id)
    return (getattr(device, "slice_index", None) or 0, *device.coords[: chip.torus])


def _closes(chip: Chip, grid: Sequence[int], length: int) -> bool:
    """Whether an axis of the grid is a ring: in whole cubes of 4, or where it is a whole pod's."""
    if chip.torus == 3:
        return all(size % 4 == 0 for size in grid)
    return length == max(chip.largest)
