"""What would fit: other micro-batches, meshes and slices, by formula or by the compiler."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flowrl_jax.config import Config
from flowrl_jax.errors import InputError
from flowrl_jax.planning.chips import Topology, describe, grids, topology_name
from flowrl_jax.planning.measure import Measured, measure
from flowrl_jax.planning.memory import estimated_bytes, resident_bytes
from flowrl_jax.planning.programs import planned_learner, programs

_ROW_A_SHARD = -1  # of `train.micro_batch_size`: the smallest micro-batch


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings, and what the program that needs most would need with them.

    Attributes:
        settings: by name, `topology` among them where it is another one.
        program: that needs most.
        needed_bytes: on a device, what is resident included.
        fits: whether the device has them.
        estimated: whether they are of a formula; else the compiler was asked.
    """

    settings: Mapping[str, Any]
    program: str
    needed_bytes: float
    fits: bool
    estimated: bool


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """A config with other values.

    Args:
        config: to change.
        settings: values by dotted name, such as `{"train.micro_batch_size": 8}`.
    """
    for name, value in settings.items():
        section, _, field = name.partition(".")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def measure_all(
    config: Config,
    topology: Topology,
    names: Sequence[str],
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Measured]:
    """Compiles the programs of a run one by one, in the order in which a step runs them.

    Args:
        config: the settings.
        topology: to compile for.
        names: of the programs.
        say: is told what is being done.

    Raises:
        InputError: sizes do not divide, or the model's shape is not known; before anything
            compiles.
    """
    learner = planned_learner(config, topology.devices)
    resident = resident_bytes(config, learner)
    length = config.rollout.max_prompt_length + config.rollout.max_response_length
    for program in programs(config, learner):
        if program.name in names:
            if topology.chip.compiled:
                say(f"compiling {program.name} for {topology.name}")
            yield measure(program, learner, topology, resident[program.name], length)


def corrections(
    config: Config, topology: Topology, measured: Sequence[Measured]
) -> dict[str, float]:
    """Factors, by program, between the compiler and the formula of what lives beside arguments.

    Args:
        config: that was compiled.
        topology: that it was compiled for.
        measured: its programs.
    """
    learner = planned_learner(config, topology.devices)
    beside = {
        one.name: max(one.peak_bytes - one.argument_bytes, 0.0)
        for one in measured
        if not one.estimated and one.peak_bytes
    }
    return {
        program.name: beside[program.name] / estimated_bytes(program, learner)[1]
        for program in programs(config, learner)
        if program.name in beside
    }


def foresee(
    config: Config,
    topology: Topology,
    names: Sequence[str],
    correction: Mapping[str, float],
    settings: Mapping[str, Any],
) -> Choice:
    """What a run would need, by formula.

    Args:
        config: the settings, changed already.
        topology: that it would run on.
        names: of the programs.
        correction: from `corrections`.
        settings: what was changed, for the answer.

    Raises:
        InputError: sizes do not divide.
    """
    learner = planned_learner(config, topology.devices)
    resident = resident_bytes(config, learner)
    needed = {}
    for program in programs(config, learner):
        if program.name in names:
            arguments, beside = estimated_bytes(program, learner)
            beside *= correction.get(program.name, 1.0)
            needed[program.name] = arguments + beside + resident[program.name]
    most = max(needed, key=lambda name: needed[name])
    fits = needed[most] <= topology.chip.memory
    return Choice(settings, most, needed[most], fits, estimated=True)


def suggest(
    config: Config, topology: Topology, names: Sequence[str], measured: Sequence[Measured]
) -> list[Choice]:
    """What would fit where a run does not, by the formula set right by what was compiled.

    Args:
        config: the settings.
        topology: that the run does not fit on.
        names: of the programs.
        measured: the programs.

    Returns:
        Of each kind of change the smallest one that is enough: a smaller micro-batch, fewer
        prompts sampled at a time, full rematerialisation, more parts of tensor, a larger slice.
        Empty where none is.
    """
    correction = corrections(config, topology, measured)
    rollout = config.rollout
    prompts = rollout.prompts_per_batch or config.sampled_prompts
    rows = config.train.micro_batch_size or config.rows_per_update
    changes: list[list[Mapping[str, Any]]] = [
        [
            {"train.micro_batch_size": size}
            for size in reversed(micro_batches(config, topology))
            if size < rows
        ],
        [
            {"rollout.prompts_per_batch": size}
            for size in reversed(_divisors(config.sampled_prompts))
            if size < prompts
        ],
        [{"model.remat": "full"}] if config.model.remat != "full" else [],
        [
            {"mesh.tensor": size, "mesh.fsdp": -1, "train.micro_batch_size": _ROW_A_SHARD}
            for size in _divisors(topology.count)
            if size > max(config.mesh.tensor, 1)
        ],
        [_elsewhere(config, name) for name in slices(topology, topology.count + 1)],
    ]
    found = []
    for kind in changes:
        for settings in kind:
            choice = _foresee_if_it_divides(config, topology, names, correction, settings)
            if choice is not None and choice.fits:
                found.append(choice)
                break
    return found


def largest_micro_batch(
    config: Config,
    topology: Topology,
    measured: Sequence[Measured],
    say: Callable[[str], None],
) -> Choice | None:
    """The largest `train.micro_batch_size` whose train step the compiler finds room for.

    Args:
        config: the settings.
        topology: to compile for.
        measured: programs that are compiled already, for a first guess.
        say: is told what is being done.

    Returns:
        It, or None where not even one response a shard fits.
    """
    changes = [{"train.micro_batch_size": size} for size in micro_batches(config, topology)]
    return _last_that_fits(config, topology, ["train_step"], measured, changes, say)


def smallest_slice(
    config: Config,
    topology: Topology,
    names: Sequence[str],
    measured: Sequence[Measured],
    say: Callable[[str], None],
) -> Choice | None:
    """The smallest slice of the chip that the compiler finds room on, with one response a shard.

    Args:
        config: the settings; mesh axes other than fsdp keep their sizes.
        topology: names the chip.
        names: of the programs.
        measured: programs that are compiled already, for a first guess.
        say: is told what is being done.

    Returns:
        It, or None where no slice is large enough.
    """
    changes = [_elsewhere(config, name) for name in reversed(slices(topology, 1))]
    return _last_that_fits(config, topology, names, measured, changes, say)


def micro_batches(config: Config, topology: Topology) -> list[int]:
    """Sizes that `train.micro_batch_size` can have, the smallest first.

    Args:
        config: the settings.
        topology: whose devices share a micro-batch.
    """
    rows, found = config.rows_per_update, []
    for size in _divisors(rows):
        try:
            planned_learner(changed(config, {"train.micro_batch_size": size}), topology.devices)
        except InputError:
            continue
        found.append(size)
    return found


def slices(topology: Topology, least: int) -> list[str]:
    """Names of the slices of a chip with so many devices at least, the smallest first.

    Args:
        topology: names the chip.
        least: devices.
    """
    chip = topology.chip
    names = [topology_name(chip, grid) for grid in grids(chip)]
    return [name for name in names if describe(name, topology.slices).count >= least]


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _elsewhere(config: Config, name: str) -> dict[str, Any]:
    """The same run on another slice: an axis of the mesh takes what devices there are."""
    sizes = dataclasses.asdict(config.mesh)
    free = {} if -1 in sizes.values() else {"mesh.fsdp": -1}
    return {"topology": name, **free, "train.micro_batch_size": _ROW_A_SHARD}


def _apply(
    config: Config, topology: Topology, settings: Mapping[str, Any]
) -> tuple[Config, Topology]:
    rest = {name: value for name, value in settings.items() if name != "topology"}
    if "topology" in settings:
        topology = describe(settings["topology"], topology.slices)
    return changed(config, rest), topology


def _foresee_if_it_divides(
    config: Config,
    topology: Topology,
    names: Sequence[str],
    correction: Mapping[str, float],
    settings: Mapping[str, Any],
) -> Choice | None:
    try:
        return foresee(*_apply(config, topology, settings), names, correction, settings)
    except InputError:
        return None


def _last_that_fits(
    config: Config,
    topology: Topology,
    names: Sequence[str],
    measured: Sequence[Measured],
    changes: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
) -> Choice | None:
    """The last of some changes, each of which needs more than the one before, that fits."""
    correction = corrections(config, topology, measured)
    foreseen = [
        choice
        for settings in changes
        if (choice := _foresee_if_it_divides(config, topology, names, correction, settings))
    ]
    tried: dict[int, Choice] = {}

    def fits(index: int) -> bool:
        settings = foreseen[index].settings
        tried[index] = _compiled(*_apply(config, topology, settings), names, settings, say)
        return tried[index].fits

    guess = sum(choice.fits for choice in foreseen) - 1
    last = last_true(len(foreseen), guess, fits)
    return None if last is None else tried[last]


def last_true(count: int, guess: int, holds: Callable[[int], bool]) -> int | None:
    """The last number from 0 on for which something holds that holds up to some number.

    Two questions are enough where the guess is right. Where it is not, growing steps lead to both
    sides of the border and halves of what is between to the border.

    Args:
        count: of numbers.
        guess: where to begin.
        holds: is asked as rarely as may be.

    Returns:
        The number, or None where it holds for none.
    """
    low, high, step = -1, count, 1
    at = min(max(guess, 0), count - 1)
    while low + 1 < high:
        if holds(at):
            low = at
        else:
            high = at
        if low >= 0 and high < count:
            at = (low + high) // 2
        else:
            at = min(low + step, high - 1) if low >= 0 else max(high - step, 0)
        step *= 2
    return low if low >= 0 else None


def _compiled(
    config: Config,
    topology: Topology,
    names: Sequence[str],
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> Choice:
    """What the compiler says; it is not asked further once a program does not fit."""
    most, needed, estimated = "", 0.0, False
    for one in measure_all(config, topology, names, say):
        if one.peak_bytes + one.resident_bytes > needed:
            most, needed = one.name, one.peak_bytes + one.resident_bytes
        estimated = one.estimated
        if not one.fits:
            return Choice(settings, one.name, one.peak_bytes + one.resident_bytes, False, estimated)
    return Choice(settings, most, needed, True, estimated)
