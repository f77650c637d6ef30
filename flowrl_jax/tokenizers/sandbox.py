"""The sandbox of chat templates: what transformers offers them, and an end to whatever they do.

`render_jinja_template` of transformers' chat_template_utils.py says which settings, names and
filters a template may count on. Loops, calls and filters are counted here, and what an operation
would make is estimated before it starts: Python does not come back from it otherwise. The filters
`urlize` and `wordwrap`, whose time grows with the square of a text, and the random text `lipsum`
are left out.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

_MAX_STEPS = 200_000  # rounds of loops, calls and filters; a real template takes some hundreds
_MAX_SECONDS = 5.0  # of the processor; a real template takes milliseconds
_MAX_LENGTH = 10_000_000  # characters of anything that is made
_ITEM = 10  # characters that an item of a list counts as
_MAX_TOTAL = 200_000_000  # characters and items of everything that one rendering makes
_MAX_BITS = 10_000  # of integers; those of a few million would take hours

# What may make more than the sum of what it is given; at most the product.
_GROWING_FILTERS = frozenset({"batch", "center", "indent", "join", "replace", "slice", "tojson"})
_GROWING_METHODS = frozenset(
    {"center", "expandtabs", "join", "ljust", "replace", "rjust", "translate", "zfill"}
)
_FORMATTING = frozenset({"format", "format_map"})
_HOLDERS = (list, tuple, dict)
_PARTS = (str, *_HOLDERS)


class _Meter(threading.local):
    """What the rendering of this thread has cost."""

    steps = 0
    made = 0
    began = 0.0


class Sandbox(ImmutableSandboxedEnvironment):
    """What transformers offers templates, within bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_checked_parts,
        )
        self._meter = _Meter()
        self.restart()
        for name in ("urlize", "wordwrap"):
            del self.filters[name]
        self.filters["tojson"] = _to_json
        self.filters = {name: self._guarded(name, f) for name, f in self.filters.items()}
        self.filters |= {"_rounds": _rounds, "_sized": self._sized}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
            # A function: the class itself has methods that a template has no business with.
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }

    def metered(self, source: str) -> jinja2.Template:
        """Compiles a template whose loops and variables are watched."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "_rounds")
        for assigned in tree.find_all(nodes.Assign):
            assigned.node = _filtered(assigned.node, "_sized")
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filtered(block.filter, "_sized")
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [_filtered(node, "_sized") for node in joined.nodes]
        return self.from_string(tree)

    def restart(self) -> None:
        """Begins to count anew, before a template is rendered."""
        self._meter.steps = self._meter.made = 0
        self._meter.began = time.thread_time()

    def tick(self) -> None:
        """Counts a step.

        Raises:
            SecurityError: there have been too many, or they have taken too long.
        """
        self._meter.steps += 1
        if self._meter.steps > _MAX_STEPS:
            raise SecurityError(f"takes more than {_MAX_STEPS:,} steps")
        if time.thread_time() - self._meter.began > _MAX_SECONDS:
            raise SecurityError(f"takes more than {_MAX_SECONDS:g} seconds")

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls, and counts it: recursion is a loop too."""
        self.tick()
        method = getattr(obj, "__wrapped__", obj)
        text, name = (getattr(method, key, None) for key in ("__self__", "__name__"))
        if isinstance(text, str):
            given = [*args, *kwargs.values()]
            if name in _GROWING_METHODS:
                _check_product(text, *given)
            if name in _FORMATTING:
                _check_widths(text, given, "{")
        return self._sized(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes, unless the result is out of all proportion."""
        if isinstance(left, int) and isinstance(right, int):
            _check_integers(operator, left, right)
        elif operator == "*":
            _check_product(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_widths(left, right if isinstance(right, tuple) else [right], "*")
        return self._sized(super().call_binop(context, operator, left, right))

    def concat(self, pieces: Iterable[str]) -> str:
        """Joins what a template or a macro says."""
        return "".join(self._sized(piece) for piece in pieces)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that counts."""

        @functools.wraps(function)  # which keeps what jinja has noted on it
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, (*_PARTS, int))]
            for value in given:
                _checked_parts(value)
            if name in _GROWING_FILTERS:
                _check_product(*given)
            if name == "format" and given and isinstance(given[0], str):
                _check_widths(given[0], given[1:], "*")
            return self._sized(function(*args, **kwargs))

        return guarded

    def _sized(self, value: Any) -> Any:
        """Counts what has been made."""
        if isinstance(value, _PARTS):
            self._meter.made += len(value)
            if self._meter.made > _MAX_TOTAL:
                raise SecurityError(f"makes more than {_MAX_TOTAL:,} parts in all")
            _checked_parts(value)
        return value


class _Generation(Extension):
    """The tag `generation`, around what an assistant says; here it only renders its body.

    Names set inside stay inside, as in transformers, where the tag is a call block too.
    """

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Any) -> nodes.Node:
        """Parses up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """`namespace(...)` without names that Python keeps for itself."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"namespace: the name {name!r} begins with an underscore")
        super().__setitem__(name, value)


def _filtered(expression: Any, name: str) -> nodes.Filter:
    return nodes.Filter(expression, name, [], [], None, None)


@jinja2.pass_context  # and so not at compile time
def _rounds(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    environment: Any = context.environment
    for item in items:
        environment.tick()
        yield item


def _check_integers(operator: str, left: int, right: int) -> None:
    """Checks an operation on integers before it is done."""
    bits = [abs(left).bit_length(), abs(right).bit_length()]
    bits += [bits[0] * max(right, 0)] if operator == "**" else []
    if max(bits) > _MAX_BITS:
        raise SecurityError(f"computes with integers of more than {_MAX_BITS:,} bits")


def _check_product(*given: Any) -> None:
    """Checks what an operation makes that repeats some of what it is given."""
    if math.prod(max(_extent(value), 1) for value in given) > _MAX_TOTAL:
        raise SecurityError(f"makes something of more than {_MAX_LENGTH:,} parts")


def _extent(value: Any) -> int:
    """Parts of a value that an operation may repeat, or how often a number makes it do that."""
    if isinstance(value, int):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return len(value) + sum(len(item) for item in value if isinstance(item, _PARTS))
    return len(value) if isinstance(value, str) else 1


def _check_widths(text: str, given: Iterable[Any], variable: str) -> None:
    """Checks the widths that a text to be formatted asks for, in itself or by arguments."""
    widths = sum(int(digits[:9]) for digits in re.findall(r"\d+", text))
    numbers = [abs(value) for value in given if isinstance(value, int)]
    if text.count(variable, 1):
        widths += text.count(variable) * max(numbers, default=0)
    _check_length(widths)


def _checked_parts(value: Any) -> Any:
    """Checks a value that may become text: lists can hold each other many times over."""
    parts, left = 0, [value]
    while left:
        last = left.pop()
        if isinstance(last, str):
            parts += len(last)
        elif isinstance(last, _HOLDERS):
            parts += len(last) * _ITEM
            _check_length(parts)
            left.extend(last.values() if isinstance(last, dict) else last)
        _check_length(parts)
    return value


def _check_length(length: int) -> None:
    if length > _MAX_LENGTH:
        raise SecurityError(f"makes something of more than {_MAX_LENGTH:,} parts")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
