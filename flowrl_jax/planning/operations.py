"""Operations of the matrix products of a compiled program, counted from its text.

Additions and multiplications of dots and convolutions (the TPU compiler turns dots into these) and
of Pallas kernels; elementwise work is left out. Two operations are one multiplication and one
addition.
"""

import math
import re
from collections.abc import Iterable

import numpy as np

from flowrl_jax.planning.hlo import Computation, Executed, Instruction, Module, Shape, executed

_COST = re.compile(r'"cost_estimate":\{[^{}]*?"?flops"?:"?(\d+)')
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_SPLASH_BLOCKS = {"fwd": "", "dq": "_dq", "dkv": "_dkv"}
_WINDOW = re.compile(r"(\w+)=([\dx_\-]+)")


def matmul_flops(program: Iterable[Executed]) -> float:
    """Operations of the dots and convolutions of a program, on one device.

    Args:
        program: from `hlo.executed`.
    """
    return sum(e.times * _product(e.computation, e.instruction) for e in program)


def kernel_flops(program: Iterable[Executed]) -> tuple[float, tuple[str, ...]]:
    """Operations of the Pallas kernels of a program, on one device.

    A kernel's own estimate counts where it has one. Those of splash attention have none: they are
    counted block by block, as many blocks as a causal mask leaves.

    Args:
        program: from `hlo.executed`.

    Returns:
        The operations, and the names of kernels that are not counted.
    """
    total, unknown = 0.0, set()
    for e in program:
        if 'custom_call_target="tpu_custom_call"' not in e.instruction.attributes:
            continue
        flops = _kernel(e.instruction)
        if flops is None:
            unknown.add(re.sub(r"[.\d]+$", "", e.instruction.name))
        total += e.times * (flops or 0.0)
    return total, tuple(sorted(unknown))


def branch_weight(module: Module):
    """What `hlo.executed` wants to choose branches by: their operations on matrices.

    Args:
        module: the branches are of.
    """

    def weight(branch: Computation) -> float:
        inside = list(executed(module, weight, branch.name))
        return matmul_flops(inside) + kernel_flops(inside)[0]

    return weight


def _product(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (operand.shapes[0] for operand in computation.operands(instruction))
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
        return 2.0 * instruction.shapes[0].size * math.prod(left.dims[axis] for axis in contracted)
    return _convolution(instruction, left, right)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> float:
    """Products of an element that exists and a weight; padding and holes are not multiplied."""
    labels, _, of_result = instruction.attribute("dim_labels").partition("->")
    of_left, _, of_right = labels.partition("_")
    window = dict(_WINDOW.findall(instruction.attribute("window")))
    result = instruction.shapes[0]
    size = lambda labels, shape, label: shape.dims[labels.index(label)]  # noqa: E731
    total = 2.0 * size(of_result, result, "b") * size(of_result, result, "f")
    total *= size(of_right, right, "i")
    groups = _numbers(instruction.attribute("batch_group_count"))
    total /= groups[0] if groups else 1
    for number, label in enumerate(sorted(filter(str.isdigit, of_left))):
        steps = {name: text.split("x")[number] for name, text in window.items()}
        total *= _meetings(
            size(of_left, left, label),
            size(of_right, right, label),
            size(of_result, result, label),
            steps,
        )
    return total


def _meetings(elements: int, weights: int, results: int, steps: dict[str, str]) -> int:
    """How many pairs of a result and a weight meet an element, along one axis of a window."""
    low = int(steps.get("pad", "0_0").partition("_")[0])
    stride, holes = int(steps.get("stride", "1")), int(steps.get("lhs_dilate", "1"))
    spread = int(steps.get("rhs_dilate", "1"))
    places = np.arange(results)[:, None] * stride - low + np.arange(weights)[None] * spread
    inside = (places >= 0) & (places <= (elements - 1) * holes) & (places % holes == 0)
    return int(inside.sum())


def _kernel(instruction: Instruction) -> float | None:
    estimate = _COST.search(instruction.attributes)
    if estimate:
        return float(estimate[1])
    splash = _SPLASH.search(instruction.attributes) or _SPLASH.search(instruction.name)
    return _splash(instruction, splash[1]) if splash else None


def _splash(instruction: Instruction, kind: str) -> float | None:
    """Operations of a kernel of splash attention; None where its text is not as expected.

    Its first argument is a table of blocks, whose width is the number of blocks that a row of them
    sees at most: fewer than all where attention has a window.
    """
    text = instruction.attribute("operand_layout_constraints")
    shapes = [
        (dtype, tuple(_numbers(dims))) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", text)
    ]
    tables = [dims for dtype, dims in shapes if dtype == "s8" and len(dims) == 3]
    arrays = [dims for dtype, dims in shapes if dtype in ("bf16", "f32") and len(dims) >= 3]
    suffix = _SPLASH_BLOCKS[kind]
    blocks = [
        re.search(rf"{name}{suffix}\W+(\d+)", instruction.attributes)
        for name in ("block_q", "block_kv")
    ]
    if not tables or len(arrays) < 2 or not all(blocks):
        return None
    block_q, block_kv = (int(found[1]) for found in blocks if found)
    *batch, queries, head = arrays[0]
    rows, columns = queries // block_q, arrays[1][-2] // block_kv
    if kind == "dkv":
        width = tables[0][1]
        seen = sum(min(rows - i * block_kv // block_q, width) for i in range(columns))
    else:
        width = tables[0][2]
        seen = sum(min(-(-(i + 1) * block_q // block_kv), width) for i in range(rows))
    products = _SPLASH_PRODUCTS[kind] + ('use_fused_bwd_kernel\\": true' in instruction.attributes)
    return 2.0 * products * seen * block_q * block_kv * head * math.prod(batch)
