"""What the compiler makes of a program: memory, operations, transfers, and an estimate of time."""

import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from flowrl_jax.learner import Learner
from flowrl_jax.planning import hlo
from flowrl_jax.planning.buffers import largest, moved_bytes
from flowrl_jax.planning.chips import Topology
from flowrl_jax.planning.collectives import Traffic, bytes_by_axes, traffic
from flowrl_jax.planning.formulas import (
    expected_flops,
    expected_movement,
    expected_traffic,
    model_flops,
)
from flowrl_jax.planning.hlo import unknown_loops
from flowrl_jax.planning.memory import estimated_bytes
from flowrl_jax.planning.operations import branch_weight, kernel_flops, matmul_flops
from flowrl_jax.planning.programs import Program
from flowrl_jax.planning.times import Seconds, estimate

_USED = re.compile(
    r"[Uu]sed ([\d.]+)([KMGT])i? of [\d.]+[KMGT]i? hbm|\(([\d.]+)([KMGT])\) exceeds available HBM"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LARGEST = 8


@dataclasses.dataclass(frozen=True)
class Measured:
    """A program on a device; sizes in bytes on one device.

    Attributes:
        name: of the program.
        estimated: whether it was not compiled: memory and operations are then of formulas.
        fits: whether there is room for it beside what is resident.
        peak_bytes: arguments, results that are not arguments, and temporaries; where the program
            does not fit, what it would need.
        argument_bytes: of the arguments.
        temporary_bytes: of everything else that lives while it runs.
        state_bytes: of the argument that it replaces: train state, or KV cache.
        alias_bytes: of arguments whose memory becomes a result's; both are padded as in memory.
        resident_bytes: of what lives on the device meanwhile and is not an argument.
        runs_per_step: how often the program runs in a step of the loop.
        largest_buffers: the largest arrays that it holds, and their bytes.
        model_flops: operations of the model's matrix products over all devices, nothing computed
            twice.
        flops: operations of the matrix products that it executes, over all devices: those of the
            compiled text and of its kernels.
        kernel_flops: of these, in kernels.
        flops_ratio: `flops` by `model_flops`.
        uncounted_kernels: names of kernels whose operations are not known and not in `flops`.
        unknown_loops: loops whose number of rounds is not known; they are counted once.
        collective_bytes: that one device receives, by the axes of the mesh that they go over.
        collectives: the same by kind too, see `collectives.Traffic`.
        seconds: an estimate, see `times.ASSUMPTIONS`.
        compute_seconds: of it, matrix products and kernels.
        memory_seconds: of it, reads and writes.
        network_seconds: of it, collectives.
        compile_seconds: on this machine.
        message: the compiler's, where it did not compile.
    """

    name: str
    estimated: bool = False
    fits: bool = False
    peak_bytes: float = 0.0
    argument_bytes: float = 0.0
    temporary_bytes: float = 0.0
    state_bytes: float = 0.0
    alias_bytes: float = 0.0
    resident_bytes: float = 0.0
    runs_per_step: int = 0
    largest_buffers: tuple[tuple[str, float], ...] = ()
    model_flops: float = 0.0
    flops: float = 0.0
    kernel_flops: float = 0.0
    flops_ratio: float = 0.0
    uncounted_kernels: tuple[str, ...] = ()
    unknown_loops: int = 0
    collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: tuple[Traffic, ...] = ()
    seconds: float = 0.0
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    compile_seconds: float = 0.0
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as the compiler left it.

    Attributes:
        executable: to be asked for its memory.
        module: its text.
        executed: the instructions that run.
    """

    executable: Any
    module: hlo.Module
    executed: tuple[hlo.Executed, ...]


def compile_program(lowered: Any) -> Compiled:
    """Compiles for devices that are not there, and reads the text of what comes out.

    Args:
        lowered: from `Program.lower`.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses it, for want of memory or otherwise.
    """
    # The executable of a large program does not give its text; a dump always has it.
    with tempfile.TemporaryDirectory(prefix="flowrl_plan_") as folder, _without_cache():
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        executable = lowered.compile(compiler_options=dump)
        texts = [file.read_text() for file in Path(folder).glob("*after_codegen.txt")]
        text = max(texts, key=len) if texts else executable.as_text()
    module = hlo.parse(text)
    return Compiled(executable, module, tuple(hlo.executed(module, branch_weight(module))))


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Keeps programs for absent devices out of jax's cache, which could not give them back."""
    settings: Any = jax.config
    kept = settings.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()


def measure(
    program: Program, learner: Learner, topology: Topology, resident: float, length: int
) -> Measured:
    """Compiles a program and says what it needs; without a compiler for the chip, estimates it.

    Args:
        program: from `programs.programs`.
        learner: of the run.
        topology: that it is compiled for.
        resident: bytes on a device that are not its arguments, from `memory.resident_bytes`.
        length: columns that a token attends to at most.
    """
    known = Measured(
        name=program.name,
        resident_bytes=resident,
        runs_per_step=program.runs,
        model_flops=model_flops(learner.model.config, program, length),
    )
    if not topology.chip.compiled:
        return _estimated(known, program, learner, topology, length)
    began = time.perf_counter()
    try:
        compiled = compile_program(program.lower())
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # the compiler's, and jax's own
        found = _refused(known, program, learner, topology, " ".join(str(error).split()))
        return dataclasses.replace(found, compile_seconds=time.perf_counter() - began)
    found = _with_memory(known, program, compiled, topology)
    found = _with_text(found, program, compiled, topology)
    return dataclasses.replace(found, compile_seconds=time.perf_counter() - began)


def padded_bytes(program: Program, executable: Any) -> float:
    """Bytes of the argument that a program replaces, as it lies in a device's memory.

    Args:
        program: from `programs.programs`.
        executable: it, compiled.
    """
    if program.replaced is None:
        return 0.0
    _, arguments = program.build()
    given, _ = executable.input_formats
    pairs = zip(
        jax.tree.leaves(arguments[program.replaced]),
        jax.tree.leaves(given[program.replaced]),
        strict=True,
    )
    return float(sum(_padded(x, layout) for x, layout in pairs))


def _padded(x: Any, layout: Any) -> int:
    """Bytes of an array's part, its last axes in memory rounded up to whole tiles."""
    shape = layout.sharding.shard_shape(x.shape)
    tile = layout.layout.tiling[0] if layout.layout.tiling else ()
    dims = [shape[axis] for axis in layout.layout.major_to_minor]
    dims = [1] * (len(tile) - len(dims)) + dims
    for back, size in enumerate(reversed(tile), start=1):
        dims[-back] = -(-dims[-back] // size) * size
    return math.prod(dims) * x.dtype.itemsize


def _refused(
    known: Measured, program: Program, learner: Learner, topology: Topology, text: str
) -> Measured:
    """A program that does not compile: for want of memory, by its own account, or otherwise."""
    found = _USED.search(text)
    if found is None:
        return dataclasses.replace(known, message=text[:300])
    size, unit = found[1] or found[3], found[2] or found[4]
    needed, (arguments, _) = float(size) * _UNITS[unit], estimated_bytes(program, learner)
    return dataclasses.replace(
        known,
        peak_bytes=needed,
        argument_bytes=arguments,
        temporary_bytes=needed - arguments,
        message=text[:300],
    )


def _with_memory(
    known: Measured, program: Program, compiled: Compiled, topology: Topology
) -> Measured:
    memory: Any = compiled.executable.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    return dataclasses.replace(
        known,
        fits=peak + known.resident_bytes <= topology.chip.memory,
        peak_bytes=float(peak),
        argument_bytes=float(memory.argument_size_in_bytes),
        temporary_bytes=float(memory.temp_size_in_bytes),
        state_bytes=padded_bytes(program, compiled.executable),
        alias_bytes=float(memory.alias_size_in_bytes),
        largest_buffers=tuple(largest(compiled.executed, _LARGEST)),
    )


def _with_text(
    known: Measured, program: Program, compiled: Compiled, topology: Topology
) -> Measured:
    mesh, executed = program.layout.mesh, compiled.executed
    in_kernels, uncounted = kernel_flops(executed)
    flops = matmul_flops(executed) + in_kernels
    exchanged = traffic(executed, mesh.axis_names, mesh.devices.shape)
    moved = moved_bytes(compiled.module, executed)
    return dataclasses.replace(
        _with_seconds(known, estimate(flops, moved, exchanged, topology.chip, mesh)),
        flops=flops * topology.count,
        kernel_flops=in_kernels * topology.count,
        flops_ratio=flops * topology.count / known.model_flops,
        uncounted_kernels=uncounted,
        unknown_loops=len(unknown_loops(compiled.module, executed)),
        collective_bytes=bytes_by_axes(exchanged),
        collectives=exchanged,
    )


def _with_seconds(known: Measured, seconds: Seconds) -> Measured:
    return dataclasses.replace(
        known,
        seconds=seconds.total,
        compute_seconds=seconds.compute,
        memory_seconds=seconds.memory,
        network_seconds=seconds.network,
    )


def _estimated(
    known: Measured, program: Program, learner: Learner, topology: Topology, length: int
) -> Measured:
    """A program for a chip whose compiler is not at hand."""
    config, mesh = learner.model.config, program.layout.mesh
    arguments, beside = estimated_bytes(program, learner)
    flops, exchanged = expected_flops(config, program, length), expected_traffic(config, program)
    seconds = estimate(
        flops / topology.count,
        expected_movement(program, arguments, beside),
        exchanged,
        topology.chip,
        mesh,
    )
    return dataclasses.replace(
        _with_seconds(known, seconds),
        estimated=True,
        fits=arguments + beside + known.resident_bytes <= topology.chip.memory,
        peak_bytes=arguments + beside,
        argument_bytes=arguments,
        temporary_bytes=beside,
        flops=flops,
        flops_ratio=flops / known.model_flops,
        collective_bytes=bytes_by_axes(exchanged),
        collectives=exchanged,
    )
