"""Reads the text of an optimised XLA module: computations, instructions and how often each runs.

The text is what `compiled.as_text()` and XLA's dumps hold. Only what planning asks about is read:
shapes, operands, loops and calls; an instruction's other attributes stay text.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"\}(, execution_thread=.*)?$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}")
_COMMENT = re.compile(r"/\*.*?\*/")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OPEN, _CLOSE = "([{", ")]}"
_FORWARDING = ("copy", "bitcast", "reshape", "convert", "copy-done", "copy-start")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array on one device.

    Attributes:
        dtype: as XLA names it, such as "bf16".
        dims: its sizes.
        tile: that the last axes of memory are padded to; empty without one.
        minor: axes from the one that is adjacent in memory outwards; empty where not said.
        space: memory it lives in: 0 the device's large one (HBM), others are small and fast.
    """

    dtype: str
    dims: tuple[int, ...]
    tile: tuple[int, ...] = ()
    minor: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes of the elements, padding not counted."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return self.size * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique within the module.
        shapes: the arrays of its result; several for a tuple, nested ones one after the other.
        opcode: such as "fusion" or "all-gather-start".
        operands: names of the instructions whose results it takes.
        arguments: the text between its parentheses.
        attributes: the text after them.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def attribute(self, name: str) -> str:
        """The text of an attribute, up to the comma that ends it; empty without one."""
        found = re.search(rf"(?:^|[\s,]){re.escape(name)}=", self.attributes)
        return _balanced(self.attributes, found.end(), ",") if found else ""

    def called(self, name: str) -> list[str]:
        """Names of the computations that an attribute refers to."""
        return re.findall(r"%?([\w.\-]+)", self.attribute(name))

    @functools.cached_property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order; the last one called `root` is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Its parameters by number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda parameter: int(parameter.arguments))

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results an instruction of this computation takes."""
        return [self.instructions[n] for n in instruction.operands if n in self.instructions]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program for one of several devices that all run it.

    Attributes:
        computations: by name.
        entry: name of the one that runs.
        aliased: numbers of the entry's parameters whose memory becomes a result's.
    """

    computations: dict[str, Computation]
    entry: str
    aliased: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction as it runs.

    Attributes:
        instruction: the line.
        computation: that it is a line of.
        times: how often it runs.
        loops: names of the loops it is in, outermost first.
        fused: name of the computation of the fusion it is part of; its result then has no memory
            of its own. Empty outside fusions.
        asynchronous: whether others run while it does.
    """

    instruction: Instruction
    computation: Computation
    times: float = 1.0
    loops: tuple[str, ...] = ()
    fused: str = ""
    asynchronous: bool = False


def parse(text: str) -> Module:
    """Reads a module.

    Args:
        text: of an optimised module, or of one that is still to be optimised.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, name, root, lines = "", "", "", {}
    for line in _logical_lines(text):
        if name and _END.match(line):
            computations[name] = Computation(name, lines, root or next(reversed(lines), ""))
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], _COMMENT.sub("", found[3]))
            lines[instruction.name] = instruction
            root = instruction.name if found[1] else root
        elif found := _COMPUTATION.match(line):
            name, root, lines = found[2], "", {}
            entry = name if found[1] else entry
    if entry not in computations:
        raise ValueError("no ENTRY computation in the module's text")
    header = text[: text.find("\n")] if text.startswith("HloModule") else ""
    return Module(computations, entry, frozenset(map(int, _ALIAS.findall(_aliases(header)))))


def _aliases(header: str) -> str:
    at = header.find("input_output_alias=")
    return _balanced(header, at + len("input_output_alias="), ",") if at >= 0 else ""


def _logical_lines(text: str) -> Iterator[str]:
    """Lines; those of one instruction, whose attributes may hold line breaks, joined."""
    held: list[str] = []
    for line in text.splitlines():
        begins = not line or _INSTRUCTION.match(line) or _COMPUTATION.match(line)
        if held and (begins or _END.match(line)):
            yield "\n".join(held)
            held = []
        held.append(line)
    if held:
        yield "\n".join(held)


def _balanced(text: str, start: int, stops: str) -> str:
    """The text from `start` to the first of `stops` or closing bracket outside all brackets."""
    depth, quoted, end = 0, False, start
    while end < len(text):
        char = text[end]
        if char == '"' and text[end - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            if depth == 0 and (char in stops or char in _CLOSE):
                break
            depth += (char in _OPEN) - (char in _CLOSE)
        end += 1
    return text[start:end]


def _instruction(name: str, rest: str) -> Instruction:
    if rest.startswith("("):
        result = f"({_balanced(rest, 1, '')})"
    else:
        result = _balanced(rest, 0, " ")
    opcode = _OPCODE.match(rest, len(result))
    if opcode is None:  # a line that is no instruction after all
        return Instruction(name, (), "", (), "", rest)
    arguments = "" if opcode[1] == "constant" else _balanced(rest, opcode.end(), "")
    if opcode[1] == "constant":
        arguments = rest[opcode.end() : rest.find(")", opcode.end())]
    after = opcode.end() + len(arguments) + 1
    operands = () if opcode[1] == "constant" else tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, _shapes(result), opcode[1], operands, arguments, rest[after:])


@functools.lru_cache(maxsize=100_000)
def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        order, _, rest = layout.partition(":")
        tile, space = _TILE.search(rest), _SPACE.search(rest)
        found.append(
            Shape(
                dtype,
                tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
                tuple(map(int, tile[1].split(","))) if tile else (),
                tuple(int(axis) for axis in order.split(",") if axis.isdigit()),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None where that depends on its data.

    XLA says it in the loop's configuration, or it follows from a counter that grows by one and is
    compared with a constant.

    Args:
        module: the loop is of.
        computation: the loop is a line of.
        loop: the instruction.
    """
    known = _TRIPS.search(loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[loop.called("condition")[0]]
    found = _comparison(module, condition)
    if found is None:
        return None
    index, limit = found
    start = _initial(module, computation, loop, index)
    return None if start is None else max(limit - start, 0)


def _comparison(module: Module, condition: Computation) -> tuple[int, int] | None:
    """Which element of a loop's state is compared, and the first number that ends the loop."""
    root = condition.instructions[condition.root]
    outer: dict[str, Instruction] = {}
    inner = condition
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls")[0]]
        given = condition.operands(root)
        outer = {p.name: given[i] for i, p in enumerate(inner.parameters)}
        root = inner.instructions[inner.root]
    if root.opcode != "compare" or len(root.operands) != 2:
        return None

    def source(name: str) -> Instruction:
        found = inner.instructions[name]
        while found.opcode in _FORWARDING or found.name in outer:
            found = outer.get(found.name) or inner.instructions[found.operands[0]]
        return found

    counter, limit = (source(name) for name in root.operands)
    direction = root.attribute("direction")
    if counter.opcode == "constant":
        counter, limit = limit, counter
        direction = {"GT": "LT", "GE": "LE"}.get(direction, direction)
    value = _integer(limit)
    if counter.opcode != "get-tuple-element" or value is None or direction not in ("LT", "LE"):
        return None
    return int(counter.attribute("index")), value + (direction == "LE")


def _integer(instruction: Instruction) -> int | None:
    constant = instruction.opcode == "constant"
    return int(instruction.arguments) if constant and instruction.arguments.isdigit() else None


def _initial(module: Module, computation: Computation, loop: Instruction, index: int) -> int | None:
    """The number that an element of a loop's state begins with; None where it is not a constant."""
    state = computation.operands(loop)[0]
    while state.opcode in _FORWARDING:
        state = computation.operands(state)[0]
    if state.opcode != "tuple":
        return None
    found = computation.instructions[state.operands[index]]
    while found.opcode in (*_FORWARDING, "broadcast") and found.operands:
        found = computation.instructions[found.operands[0]]
    if found.opcode == "fusion" and not found.operands:
        inner = module.computations[found.called("calls")[0]]
        constants = [i for i in inner.instructions.values() if i.opcode == "constant"]
        found = constants[0] if len(constants) == 1 else found
    return _integer(found)


def executed(
    module: Module, weight: Callable[[Computation], float], start: str = ""
) -> Iterator[Executed]:
    """Yields every instruction that runs, with how often.

    A loop whose trip count is not known is taken to run once. Of the branches of a conditional the
    heaviest one is taken to run.

    Args:
        module: the program.
        weight: of a branch.
        start: name of the computation that runs; the entry by default.
    """
    begin = module.computations[start or module.entry]
    yield from _executed(
        module, weight, begin, Executed(Instruction("", (), "", (), "", ""), begin)
    )


def unknown_loops(module: Module, program: Iterable[Executed]) -> list[str]:
    """Names of the loops whose number of rounds the text does not tell.

    Args:
        module: the program is of.
        program: from `executed`.
    """
    return [
        e.instruction.name
        for e in program
        if e.instruction.opcode == "while"
        and trip_count(module, e.computation, e.instruction) is None
    ]


def _executed(
    module: Module, weight: Callable[[Computation], float], computation: Computation, at: Executed
) -> Iterator[Executed]:
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        here = dataclasses.replace(at, instruction=instruction, computation=computation)
        if opcode.endswith("-start"):
            here = dataclasses.replace(here, asynchronous=True)
        yield here
        inner, names = here, []
        if opcode == "while":
            trips = trip_count(module, computation, instruction)
            times = at.times * (1 if trips is None else trips)
            inner = dataclasses.replace(here, times=times, loops=(*at.loops, instruction.name))
            names = instruction.called("body")
        elif opcode == "conditional":
            branches = instruction.called("branch_computations") or [
                *instruction.called("true_computation"),
                *instruction.called("false_computation"),
            ]
            names = [max(branches, key=lambda name: weight(module.computations[name]))]
        elif opcode == "fusion":
            names = instruction.called("calls")
            inner = dataclasses.replace(here, fused=names[0])
        elif opcode in ("call", "async-start"):
            names = instruction.called("calls") or instruction.called("to_apply")
        for name in names:
            yield from _executed(module, weight, module.computations[name], inner)
