"""Chips: what the compiler calls them, and the rates that their makers publish."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.experimental import topologies

from flowrl_jax.errors import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as programs see it; v2, v3 and tpu7x have two of them on a chip.

    Attributes:
        name: as topologies are named.
        memory: bytes that a program may use, by the compiler's own account; of GPUs what the
            driver leaves.
        flops: peak bfloat16 operations a second, published.
        bandwidth: bytes of memory read or written a second, published.
        links: bytes a second that all links to neighbours bring in, published.
        network: bytes a second from other slices or nodes.
        torus: axes of the grid of chips; 0 where a switch joins all of a node.
        largest: grid of the largest slice, or devices of a node.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    network: float
    torus: int
    largest: tuple[int, ...]

    @property
    def compiled(self) -> bool:
        """Whether a compiler for it works without it."""
        return self.torus > 0


# Rates of TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, v2 and v3: Jouppi et al., CACM
# 63(7), 2020; v4's network is not published and taken to be v5p's. Memory: what the compiler says
# when a program does not fit. Rates of GPUs: NVIDIA's data sheets of the SXM modules, dense.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", 7.48 * GIB, 22.5e12, 0.35e12, 1.24e11, 1.5e9, 2, (16, 16)),
        Chip("v3", 15.48 * GIB, 61.5e12, 0.45e12, 1.64e11, 1.5e9, 2, (32, 32)),
        Chip("v4", 30.75 * GIB, 275e12, 1.2e12, 3.0e11, 6.25e9, 3, (16, 16, 16)),
        Chip("v5e", 15.75 * GIB, 197e12, 0.819e12, 2.0e11, 3.125e9, 2, (16, 16)),
        Chip("v5p", 95.73 * GIB, 459e12, 2.765e12, 6.0e11, 6.25e9, 3, (16, 16, 24)),
        Chip("v6e", 31.24 * GIB, 918e12, 1.638e12, 4.0e11, 12.5e9, 2, (16, 16)),
        Chip("tpu7x", 94.74 * GIB, 1153e12, 3.69e12, 3.0e11, 6.25e9, 3, (16, 16, 16)),
        Chip("a100", 0.95 * 80.0 * GIB, 312e12, 2.039e12, 3.0e11, 25e9, 0, (8,)),
        Chip("h100", 0.95 * 79.6 * GIB, 989e12, 3.35e12, 4.5e11, 50e9, 0, (8,)),
        Chip("h200", 0.95 * 140.4 * GIB, 989e12, 4.8e12, 4.5e11, 50e9, 0, (8,)),
        Chip("b200", 0.95 * 179.1 * GIB, 2250e12, 8.0e12, 9.0e11, 50e9, 0, (8,)),
    )
}


@dataclasses.dataclass(frozen=True)
class Absent:
    """Stands in for a device that no compiler describes, where shapes are all that is asked for.

    Attributes:
        id: place among the devices.
        device_kind: name of the chip.
        platform: "gpu".
        process_index: node that it is of.
    """

    id: int
    device_kind: str
    platform: str = "gpu"
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that need not be there.

    Attributes:
        name: as given, such as "v5p:2x2x2" or "h100:8".
        chip: of which all devices are.
        devices: that the compiler compiles for, or `Absent`; slice after slice.
        slices: of this shape, joined by a data centre's network.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        """Devices, over all slices."""
        return len(self.devices)


def describe(name: str, slices: int = 1) -> Topology:
    """The devices of a topology that is not there.

    Args:
        name: a TPU and its grid, such as "v5p:2x2x2", or a GPU and how many, such as "h100:8".
        slices: how many of them.

    Raises:
        InputError: the name is not known, or the TPU compiler is not installed.
    """
    chip = CHIPS.get(re.split("[:-]", name)[0])
    if slices < 1:
        raise InputError(f"--slices={slices} must be at least 1")
    if chip is None:
        examples = (topology_name(chip, _first_grid(chip)) for chip in CHIPS.values())
        raise InputError(
            f"--topology={name}: not known; name a chip and its grid, or a GPU and how many, such"
            f" as {', '.join(examples)}"
        )
    if not chip.compiled:
        count = name.partition(":")[2]
        if not count.isdigit() or int(count) < 1:
            raise InputError(f"--topology={name}: say how many GPUs, such as {chip.name}:8")
        node = chip.largest[0]
        numbers = range(int(count) * slices)
        devices = tuple(Absent(n, chip.name, process_index=n // node) for n in numbers)
        return Topology(name, chip, devices, slices)
    try:
        devices = _ask(name, slices)
    except Exception as error:  # the plugin raises errors of its own, and of several kinds
        reason = " ".join(str(error).split())[:200]
        if "not installed" in reason or isinstance(error, ImportError):
            raise InputError(
                "the TPU compiler is not installed: pip install libtpu (it needs no TPU), or set"
                " TPU_LIBRARY_PATH to its libtpu.so; GPUs such as h100:8 need none"
            ) from error
        known = ", ".join(topology_name(chip, grid) for grid in grids(chip))
        raise InputError(
            f"--topology={name}: the compiler refuses it ({reason}); it knows {known}"
        ) from error
    return Topology(name, chip, devices, slices)


def grids(chip: Chip) -> list[tuple[int, ...]]:
    """Shapes of slices, the smallest first: those one can ask for that the compiler knows too.

    Args:
        chip: a TPU, whose grids grow by doubling one axis; or a GPU, whose nodes do.
    """
    if not chip.compiled:
        return [(2**power,) for power in range(11)]
    grid, found = sorted(_first_grid(chip)), [(1,) * chip.torus]
    while all(size <= most for size, most in zip(grid, sorted(chip.largest), strict=True)):
        found.append(tuple(grid))
        grid = sorted([2 * grid[0], *grid[1:]])
    found += [chip.largest] * (chip.largest not in found)
    return [grid for grid in found if _is_known(topology_name(chip, grid))]


def topology_name(chip: Chip, grid: Sequence[int]) -> str:
    """The name of a grid, axes of one chip last: "v5p:2x2x1"."""
    axes = sorted(grid, key=lambda size: (size == 1, size))
    return f"{chip.name}:{'x'.join(map(str, axes))}"


def _first_grid(chip: Chip) -> tuple[int, ...]:
    """The smallest grid of several chips: a host's board."""
    return (2, 2, 1)[: chip.torus] if chip.compiled else chip.largest


def _is_known(name: str) -> bool:
    try:
        return bool(_ask(name, 1))
    except Exception:  # the plugin's own kinds, as in `describe`
        return False


def _ask(name: str, slices: int) -> tuple[Any, ...]:
    """The compiler's devices of a topology."""
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4"):
        options["chip_config_name"] = "megacore"  # as v4 is used: its two cores are one device
    with _compile_only():
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return tuple(found.devices)


@contextlib.contextmanager
def _compile_only() -> Iterator[None]:
    """Keeps the plugin from asking the network what machine this is, and from warning about it."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: the topology that is asked for is what counts
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
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
