"""Exact numbers as answers write them: integers, decimals, fractions, percentages, powers of 10."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MOST_DIGITS = 400
"""Characters of a number that is read; a longer one is left to others."""
AGREED_DIGITS = 6
"""Digits that a decimal needs to stand for a fraction that no decimal equals."""

_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"([+-]?)({_DECIMAL})")
_POWER = re.compile(
    rf"([+-]?)(?:({_DECIMAL})(?:\\times|\\cdot|\*|x))?10\^\{{?([+-]?\d{{1,3}})\}}?"
    rf"|([+-]?)({_DECIMAL})[eE]([+-]?\d{{1,3}})"
)
_FRACTION = re.compile(
    rf"([+-]?)(\d*)\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}"
    rf"|([+-]?)\(?([+-]?{_DECIMAL})\)?/\(?([+-]?{_DECIMAL})\)?"
)


class Number(NamedTuple):
    """A number as it is written.

    Attributes:
        value: exactly.
        digits: significant ones of a decimal; 0 where it is written as an integer or a fraction.
        places: digits after the point.
        percent: it has a percent sign.
    """

    value: Fraction
    digits: int = 0
    places: int = 0
    percent: bool = False

    def equals(self, other: Number) -> bool:
        """Whether both are one number.

        A percentage stands for itself and for its hundredth. A decimal stands for a fraction that
        no decimal equals if it is that one rounded or cut off to six significant digits or more.
        """
        if self.percent != other.percent:
            plain, percent = (other, self) if self.percent else (self, other)
            bare = percent._replace(percent=False)
            hundredth = bare._replace(value=bare.value / 100, places=bare.places + 2)
            return plain.equals(bare) or plain.equals(hundredth)
        if self.value == other.value:
            return True
        return _stands_for(self, other) or _stands_for(other, self)


def _stands_for(decimal: Number, exact: Number) -> bool:
    if decimal.digits < AGREED_DIGITS or exact.digits or _terminates(exact.value):
        return False
    unit = Fraction(1, 10**decimal.places)
    return abs(decimal.value - exact.value) < unit and decimal.value * exact.value > 0


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def read_number(text: str) -> Number | None:
    """Returns the number that an answer in normal form is; None if it is none or too long."""
    if not text or len(text) > MOST_DIGITS or not any(mark.isdecimal() for mark in text):
        return None
    if not text.isascii():
        return None
    percent = False
    for sign in ("\\%", "%", "percent"):
        if text.endswith(sign):
            text, percent = text.removesuffix(sign), True
            break
    while text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1]
    number = _read(text)
    return number._replace(percent=percent) if number is not None else None


def _read(text: str) -> Number | None:
    if found := _PLAIN.fullmatch(text):
        return _decimal(found[1], found[2])
    if found := _POWER.fullmatch(text):
        if found[3] is not None:
            base, exponent = _decimal(found[1], found[2] or "1"), int(found[3])
        else:
            base, exponent = _decimal(found[4], found[5]), int(found[6])
        scale = Fraction(10) ** exponent
        return Number(base.value * scale, base.digits, max(base.places - exponent, 0))
    if found := _FRACTION.fullmatch(text):
        if found[3] is not None:
            sign, whole, top, bottom = found[1], found[2], found[3], found[4]
        else:
            sign, whole, top, bottom = found[5], "", found[6], found[7]
        if Fraction(bottom) == 0 or (whole and top[0] in "+-"):
            return None
        value = Fraction(whole or 0) + Fraction(top) / Fraction(bottom)
        return Number(-value if sign == "-" else value)
    return None


def _decimal(sign: str, text: str) -> Number:
    value = Fraction(text if not text.endswith(".") else text[:-1])
    whole, point, part = text.partition(".")
    digits = len((whole + part).lstrip("0")) if point else 0
    return Number(-value if sign == "-" else value, digits, len(part))
