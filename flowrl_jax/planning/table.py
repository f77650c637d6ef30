"""What a plan says, for people."""

from collections.abc import Iterator
from typing import Any

from flowrl_jax.planning.chips import GIB

_COLUMNS = (
    ("program", 11),
    ("GiB", 8),
    ("arguments", 10),
    ("other", 7),
    ("resident", 9),
    ("TFLOP", 11),
    ("x model", 8),
    ("GB in", 9),
    ("s", 10),
    ("compiled in", 13),
)


def table(found: dict[str, Any]) -> str:
    """A plan as text.

    Args:
        found: from `plan.plan`.
    """
    return "\n".join(
        [
            *_head(found),
            *(_row(program, found) for program in found["programs"].values()),
            *_exchanged(found),
            *_whole_step(found),
            *_not_fitting(found),
            *_searched(found),
            *_notes(found),
        ]
    )


def gib(size: float) -> str:
    """A size in GiB."""
    return short(size / GIB)


def short(number: float) -> str:
    """A number with no more digits than it deserves."""
    if abs(number) < 1:
        return f"{number:.2g}"
    return f"{number:.1f}" if abs(number) < 100 else f"{number:.0f}"


def _head(found: dict[str, Any]) -> Iterator[str]:
    chip, model = found["chip"], found["model"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    several = f" in {found['slices']} slices" if found["slices"] > 1 else ""
    yield (
        f"{found['devices']} x {chip['name']}{several}, {gib(chip['memory'])} GiB each;"
        f" mesh {mesh}; {found['micro_batch_size']} responses at a time"
    )
    yield (
        f"{model['parameters'] / 1e9:.2f}e9 parameters; {model['attention']} attention;"
        f" remat {model['remat']}"
        + ("; ESTIMATED by formulas, not compiled" if found["estimated"] else "")
    )
    first, *rest = _COLUMNS
    yield f"{first[0]:{first[1]}}" + "".join(f"{name:>{width}}" for name, width in rest)


def _row(program: dict[str, Any], found: dict[str, Any]) -> str:
    peak, resident = program["peak_bytes"], program["resident_bytes"]
    if not peak:
        return f"{program['name']:11} does not compile: {program['message']}"
    sent = sum(program["collective_bytes"].values())
    cells = (
        gib(peak),
        gib(program["argument_bytes"]),
        gib(peak - program["argument_bytes"]),
        gib(resident),
        short((program["flops"] or program["model_flops"]) / 1e12),
        f"{program['flops_ratio']:.2f}" if program["flops_ratio"] else "-",
        short(sent / 1e9) if program["seconds"] else "-",
        short(program["seconds"]) if program["seconds"] else "-",
        "no" if program["estimated"] else f"{program['compile_seconds']:.0f} s",
    )
    widths = [width for _, width in _COLUMNS[1:]]
    line = f"{program['name']:11}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
    )
    over = peak + resident - found["chip"]["memory"]
    return line + ("" if program["fits"] else f"  {gib(over)} GiB too many")


def _exchanged(found: dict[str, Any]) -> Iterator[str]:
    """What each program sends, by kind and axes, where that is not little."""
    for program in found["programs"].values():
        total = sum(program["collective_bytes"].values())
        parts = [
            f"{one['kind']} over {one['axes']} {short(one['bytes'] / 1e9)} GB"
            f" ({one['waiting_bytes'] / one['bytes']:.0%} synchronous)"
            for one in program["collectives"]
            if one["bytes"] > 0.02 * total
        ]
        if parts:
            yield f"{program['name']} receives on a device: {', '.join(parts)}"
        if program["uncounted_kernels"]:
            yield (
                f"{program['name']}: operations of {', '.join(program['uncounted_kernels'])} are"
                " not counted"
            )


def _whole_step(found: dict[str, Any]) -> Iterator[str]:
    if found["step_seconds"] is None:
        return
    parts = ", ".join(
        f"{name} {program['runs_per_step']} x {short(program['seconds'])} s"
        for name, program in found["programs"].items()
    )
    yield f"One step of the loop: about {short(found['step_seconds'])} s ({parts})"


def _not_fitting(found: dict[str, Any]) -> Iterator[str]:
    if found["fits"]:
        return
    if not found["suggestions"]:
        yield "Does not fit; no smaller micro-batch and no larger slice of this chip would do."
    for choice in found["suggestions"]:
        yield f"Would fit, by an estimate: {_choice(choice)}"


def _searched(found: dict[str, Any]) -> Iterator[str]:
    for name, choice in found.get("search", {}).items():
        what = name.replace("_", " ")
        how = "by an estimate" if found["estimated"] else "compiled"
        yield f"The {what}, {how}: " + (_choice(choice) if choice else "none fits")


def _choice(choice: dict[str, Any]) -> str:
    settings = " ".join(
        f"--topology={value}" if name == "topology" else f"--config.{name}={value}"
        for name, value in choice["settings"].items()
    )
    return f"{settings}: {choice['program']} needs {gib(choice['needed_bytes'])} GiB"


def _notes(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "GiB on a device; resident: what stays there beside a program's arguments. TFLOP: matrix"
        " products over all devices, and how many times the model's own."
    )
    yield "GB in: what a device receives from others. Seconds are estimates, and assume that"
    yield from (f"  - {assumption}" for assumption in found["assumptions"])
