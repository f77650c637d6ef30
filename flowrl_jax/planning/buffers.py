"""What a compiled program holds in a device's memory and moves in and out of it, from its text."""

import re
from collections.abc import Iterable, Sequence

from flowrl_jax.planning.hlo import Computation, Executed, Instruction, Module, Shape

# These name memory that is there already, or are counted where their work is done.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start"}
_READERS = ("dynamic-slice", "slice", "gather")
_COST = re.compile(r'"cost_estimate":\{[^{}]*?"?bytes_accessed"?:"?(\d+)')


def held(program: Iterable[Executed]) -> set[Shape]:
    """Shapes of everything that has memory of its own while a program runs.

    Args:
        program: from `hlo.executed`.
    """
    shapes: set[Shape] = set()
    for e in program:
        if not e.fused:
            shapes.update(e.instruction.shapes)
    return shapes


def largest(program: Iterable[Executed], count: int) -> list[tuple[str, float]]:
    """The largest arrays in a device's memory.

    Args:
        program: from `hlo.executed`.
        count: how many.

    Returns:
        Shapes as XLA writes them, such as "bf16[8,1024]", and bytes; each shape once.
    """
    sizes = {_written(shape): shape.bytes for shape in held(program) if shape.space == 0}
    return sorted(sizes.items(), key=lambda item: -item[1])[:count]


def with_axes(shapes: Iterable[Shape], sizes: Sequence[int]) -> list[Shape]:
    """The shapes that have an axis of each of these sizes.

    Args:
        shapes: to look at, from `held`.
        sizes: of axes; a size that is given twice has to be there twice.
    """
    wanted = {size: sizes.count(size) for size in sizes}
    return [s for s in shapes if all(s.dims.count(size) >= n for size, n in wanted.items())]


def moved_bytes(module: Module, program: Iterable[Executed]) -> float:
    """Bytes that a device reads from its large memory and writes to it while a program runs.

    Every instruction is taken to read each operand and to write its result once. Of an array that
    is only sliced, or updated in place, the slice counts; a Pallas kernel's own estimate counts
    where it has one.

    Args:
        module: the program is of.
        program: from `hlo.executed`.
    """
    return sum(
        e.times * _moved(module, e.computation, e.instruction)
        for e in program
        if not e.fused and not _free(e.instruction.opcode)
    )


def _free(opcode: str) -> bool:
    return opcode in _FREE or opcode.endswith(("-done", "-update"))


def _written(shape: Shape) -> str:
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"


def _moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    operands = computation.operands(instruction)
    if instruction.opcode == "custom-call":
        estimate = _COST.search(instruction.attributes)
        if estimate:
            return float(estimate[1])
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        taken = zip(inner.parameters, operands, strict=False)
        read = sum(_read(inner, parameter, operand) for parameter, operand in taken)
        return read + _fusion_writes(inner, instruction)
    # What moves lies in large memory on one side alone where the other is near the processor.
    if instruction.opcode == "dynamic-update-slice":
        return _large(operands[1]) + (operands[1].bytes if _large(instruction) else 0.0)
    if instruction.opcode in _READERS:
        return _large(instruction) + (instruction.bytes if _large(operands[0]) else 0.0)
    written = instruction.shapes[:1] if instruction.opcode == "copy-start" else instruction.shapes
    return sum(map(_large, operands)) + sum(s.bytes for s in written if s.space == 0)


def _large(instruction: Instruction) -> float:
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _read(inner: Computation, parameter: Instruction, operand: Instruction) -> float:
    """Bytes of an operand that a fusion reads."""
    total = 0.0
    for user in inner.instructions.values():
        if parameter.name not in user.operands:
            continue
        if user.opcode in _READERS and user.operands[0] == parameter.name:
            total += user.bytes
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return _large(operand)
    return min(total, _large(operand))


def _fusion_writes(inner: Computation, instruction: Instruction) -> float:
    """Bytes that a fusion writes: of an array that it updates in place, the update's."""
    root = inner.instructions[inner.root]
    results = inner.operands(root) if root.opcode == "tuple" else [root]
    if len(results) != len(instruction.shapes):
        return _large(instruction)
    total = 0.0
    for result, shape in zip(results, instruction.shapes, strict=True):
        while result.opcode == "bitcast":
            result = inner.operands(result)[0]
        if shape.space == 0:
            update = result.opcode == "dynamic-update-slice"
            total += inner.operands(result)[1].bytes if update else shape.bytes
    return total
