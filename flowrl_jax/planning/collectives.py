"""What devices send each other while a compiled program runs, counted from its text.

Bytes are those that one device receives where a group of n exchanges along a ring:

    all-gather          (n - 1) of its operand, (n - 1) / n of the gathered array
    reduce-scatter      (n - 1) / n of its operand
    all-reduce          2 (n - 1) / n of its operand: a reduce-scatter and an all-gather
    all-to-all          (n - 1) / n of its operand
    collective-permute  its operand

Between slices of TPUs the compiler writes a collective as a send and a receive that name its kind.
One that runs beside matrix products it writes several times: where it starts, with each of the
products, and where it ends.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from flowrl_jax.planning.hlo import Executed, Instruction

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
NO_AXIS = "none"

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIR = re.compile(r"\{(\d+),\s*(\d+)\}")
_ASYNC_STAGE = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}')
_MESH = re.compile(r"replica_groups=@?(mesh.*?\{[^{}]*\})")
_MESH_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_MESH_USED = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes of the mesh.

    Attributes:
        kind: one of `KINDS`.
        axes: of the mesh, over which their groups extend, joined by "+".
        count: how many run.
        bytes: that one device receives, see above.
        loop_bytes: of these, in loops.
        waiting_bytes: of these, in collectives that nothing else runs beside.
    """

    kind: str
    axes: str
    count: float
    bytes: float
    loop_bytes: float
    waiting_bytes: float


def traffic(
    program: Iterable[Executed], axes: Sequence[str], shape: Sequence[int]
) -> tuple[Traffic, ...]:
    """Sums a program's collectives by kind and axes, the largest first.

    Args:
        program: from `hlo.executed`.
        axes: names of the mesh's axes; several slices lie along the first.
        shape: their sizes; the program's devices are in the mesh's order.
    """
    sums: dict[tuple[str, str], Traffic] = {}
    for e in program:
        kind = kind_of(e)
        if kind is None:
            continue
        if e.instruction.opcode == "recv":
            over, slices = axes[0], _slices(e.instruction)
            received = e.times * _between_slices(e.instruction, kind, slices)
        else:
            groups = device_groups(e.instruction, int(np.prod(shape)))
            over = axes_of(groups, axes, shape)
            received = e.times * _received(e, kind, groups)
        key = kind, over
        old = sums.get(key, Traffic(*key, 0.0, 0.0, 0.0, 0.0))
        sums[key] = Traffic(
            *key,
            old.count + e.times,
            old.bytes + received,
            old.loop_bytes + received * bool(e.loops),
            old.waiting_bytes + received * (not _overlaps(e)),
        )
    return tuple(sorted(sums.values(), key=lambda one: -one.bytes))


def bytes_by_axes(collectives: Iterable[Traffic]) -> dict[str, float]:
    """Bytes that one device receives, by the axes of the mesh that they go over."""
    sums: dict[str, float] = {}
    for one in collectives:
        sums[one.axes] = sums.get(one.axes, 0.0) + one.bytes
    return sums


def kind_of(e: Executed) -> str | None:
    """The kind of a collective where it begins; None for its other stages and for the rest."""
    opcode = e.instruction.opcode.removesuffix("-start")
    if opcode == "recv":
        between = _BETWEEN_SLICES.search(e.instruction.attributes)
        return between[1].lower().replace("_", "-") if between else None
    if opcode not in KINDS:
        return None
    if e.fused.startswith("async_collective_fusion") or _async_stage(e) == "Done":
        return None
    if opcode == "all-reduce" and e.fused.startswith("all-reduce-scatter"):
        return "reduce-scatter"  # the TPU compiler's way to write one down
    return opcode


def device_groups(instruction: Instruction, devices: int) -> list[np.ndarray]:
    """Groups of devices that exchange with each other, by their places in the program's order.

    Args:
        instruction: a collective; of a permutation, groups are pairs that are not the same device.
        devices: of the program.

    Raises:
        ValueError: the text is none of XLA's ways to write groups down.
    """
    pairs = instruction.attribute("source_target_pairs")
    if pairs:
        return [np.array([int(a), int(b)]) for a, b in _PAIR.findall(pairs) if a != b]
    mesh = _MESH.search(instruction.attributes)
    if mesh:
        return _of_mesh(mesh[1])
    text = instruction.attribute("replica_groups").strip()
    if text in ("", "{}"):
        return [np.arange(devices)]
    iota = _IOTA.fullmatch(text)
    if iota:
        return list(_iota(iota[1], iota[2], iota[3]))
    if not text.startswith("{{"):
        raise ValueError(f"replica_groups={text} of {instruction.name} is not understood")
    return [
        np.array([int(n) for n in group.split(",")]) for group in re.findall(r"[\d, ]+\d|\d", text)
    ]


def axes_of(groups: Sequence[np.ndarray], axes: Sequence[str], shape: Sequence[int]) -> str:
    """Names of the mesh's axes along which the members of groups differ, joined by "+".

    Args:
        groups: from `device_groups`.
        axes: names of the mesh's axes.
        shape: their sizes.
    """
    differ = np.zeros(len(axes), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(shape)))
        differ |= (places != places[:, :1]).any(axis=1)
    return "+".join(name for name, used in zip(axes, differ, strict=True) if used) or NO_AXIS


def _overlaps(e: Executed) -> bool:
    return e.asynchronous or e.instruction.opcode == "recv" or _async_stage(e) == "Start"


def _async_stage(e: Executed) -> str:
    """Whether a fused collective is written down as "Start" or "Done"; empty if as neither."""
    if not e.fused:
        return ""
    stages = (
        _ASYNC_STAGE.search(i.attributes)
        for i in e.computation.instructions.values()
        if i.opcode == "custom-call"
    )
    return next((stage[1] for stage in stages if stage), "")


def _slices(instruction: Instruction) -> int:
    """How many slices a collective between slices joins: of "{1,2}x{0:3}" two."""
    target = _TARGET.search(instruction.attributes)
    count = 0
    for part in target[1].split(",") if target else ():
        first, _, last = part.partition(":")
        count += int(last or first) - int(first) + 1
    return max(count, 1)


def _between_slices(instruction: Instruction, kind: str, slices: int) -> float:
    """Bytes that a device receives from other slices; what arrives is the collective's result."""
    result = instruction.shapes[0].bytes
    if kind == "reduce-scatter":
        return result * (slices - 1)
    return result * (slices - 1) / slices * (2 if kind == "all-reduce" else 1)


def _received(e: Executed, kind: str, groups: Sequence[np.ndarray]) -> float:
    n = max((len(group) for group in groups), default=1)
    operand = sum(given.bytes for given in e.computation.operands(e.instruction))
    if n == 1:
        return 0.0
    share = {
        "all-gather": n - 1,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }
    return share[kind] * operand


def _iota(dims: str, source: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in an array of one shape, its axes exchanged, cut into another shape."""
    sizes = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    array = np.arange(np.prod(sizes(source))).reshape(sizes(source))
    return array.transpose(sizes(order) if order else range(array.ndim)).reshape(sizes(dims))


def _of_mesh(text: str) -> list[np.ndarray]:
    """Groups written as a mesh of XLA's own and the axes of it that they extend over.

    An axis `'a':(before)size` is the part of that size of `a` with `before` parts in front.
    """
    head, _, used = text.rpartition("{")
    names, _, ids = head.partition("]")
    axes = [(name, int(size)) for name, size in _MESH_AXIS.findall(names.partition("[")[2])]
    count = int(np.prod([size for _, size in axes]))
    found = _IOTA.search(ids)
    if found:
        devices = _iota(str(count), found[2], found[3])
    else:
        listed = re.findall(r"\d+", ids.rpartition("]")[2]) or re.findall(r"\d+", ids)
        devices = np.array([int(n) for n in listed]) if listed else np.arange(count)
    wanted = {name: (before, size) for name, before, size in _MESH_USED.findall(used.rstrip("} "))}
    sizes, inside = [], []
    for name, size in axes:
        before, part = wanted.get(name, ("", ""))
        pieces = [int(before), int(part), size // int(before) // int(part)] if part else [size]
        chosen = [False, True, False] if part else [name in wanted]
        sizes += pieces
        inside += chosen
    order = sorted(range(len(sizes)), key=lambda axis: inside[axis])  # those of a group last
    length = int(np.prod([size for size, used in zip(sizes, inside, strict=True) if used]))
    return list(devices.reshape(sizes).transpose(order).reshape(-1, length))
