"""Python values as JSON: plain data by value, everything else by a number.

Decoding makes plain data and nothing else, whoever wrote the JSON: no class of the sender's, hence
no `__eq__` of the sender's, comes across.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own would be an import that costs milliseconds of every start
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PLAIN_INT = 1 << 62
_COLLECTIONS: tuple[Any, ...] = (tuple, set, frozenset)
_TYPES = {
    kind.__name__: kind
    for kind in (bool, bytes, complex, dict, float, frozenset, int, list, object, set, str, tuple)
}
_NUMBERS = (("decimal", "Decimal"), ("fractions", "Fraction"))


def refuse(value: Any) -> int:
    """Raises, for values that are no plain data.

    Raises:
        TypeError: always.
    """
    raise TypeError(f"a {type(value).__name__} is no plain data")


def encode(value: Any, keep: Callable[[Any], int] = refuse) -> Any:
    """Returns a value as JSON can hold it.

    Args:
        value: anything; an instance of a subclass of list, dict, ... counts as one of these.
        keep: gives a number to what is no plain data.

    Raises:
        TypeError: it is no plain data, and `keep` is not given.
        RecursionError: it holds itself, or is nested too deep.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        small = -_PLAIN_INT < value < _PLAIN_INT
        return int(value) if small else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, keep) for item in list.__iter__(value)]
    for kind in _COLLECTIONS:
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        items = dict.items(value)
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in items]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).decode("latin-1")}
    for module, kind in _NUMBERS:  # not imported here: a sandbox starts in milliseconds
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], kind)):
            return {kind: str(value)}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, type) and value in _TYPES.values():
        return {"type": value.__name__}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), keep)
    return {"ref": keep(value)}


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda digits: int(digits, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": lambda text: text.encode("latin-1"),
    **{
        kind: lambda text, module=module, kind=kind: getattr(__import__(module), kind)(text)
        for module, kind in _NUMBERS
    },
    "range": lambda bounds: range(*bounds),
    "type": _TYPES.__getitem__,
}


def decode(coded: Any, find: Callable[[int], Any] = refuse) -> Any:
    """Returns the value that `encode` was given.

    Args:
        coded: what JSON held; it may come from a program that is not trusted.
        find: returns what a number stands for.

    Raises:
        Exception: it is nothing that `encode` returns.
    """
    if isinstance(coded, list):
        return [decode(item, find) for item in coded]
    if not isinstance(coded, dict):
        return coded
    ((kind, body),) = coded.items()
    if kind == "dict":
        return {decode(key, find): decode(item, find) for key, item in body}
    for collection in _COLLECTIONS:
        if kind == collection.__name__:
            return collection(decode(item, find) for item in body)
    return find(body) if kind == "ref" else _DECODERS[kind](body)
