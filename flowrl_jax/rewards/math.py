"""The math reward of the released FlowRL: the text after the last "Answer:", compared as a string.

The rule is that of verl's `math_dapo`, which the release trains with, reward for reward: the last
300 characters of a response are searched, what is found and the reference answer are both brought
into one form by the rules of Minerva (arXiv 2206.14858, appendix D), and equal strings are right.
It knows no mathematics: `1/2` and `0.5` are different answers to it, units outside its list stay,
what stands before an answer's last `=` does not count, and `1, 2` is the number 12. That makes it
fast and predictable as a training signal, and no measure of accuracy to report.
"""

from __future__ import annotations

import re

TAIL = 300
"""Characters at the end of a response that are searched."""

_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

# Minerva's tables as the release has them. The order matters: each line sees what the one before
# it left.
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_DROPPED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots"),
    *("sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds"),
    *("meters", "meals", "edges", "students", "childrentickets", "multiples", "\\text{s}"),
    *("\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}"),
    *("\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r".*?\$(.*?)\$.*", r"$\1$"),  # only the first formula of a line counts
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),  # \frac12 is \frac{1}{2}
        (r"sqrt([^{])", r"sqrt{\1}"),  # \sqrt2 is \sqrt{2}
    )
)


def grade(response: str, answer: str, *, right: float = 1.0, wrong: float = -1.0) -> float:
    """Returns the reward of a response; never raises.

    Args:
        response: what the policy wrote, as text without special tokens.
        answer: the reference answer.
        right: the reward of a response with this answer; 1 as released.
        wrong: the reward of any other response; -1 as released.
    """
    return wrong if matched(response, answer) is None else right


def matched(response: str, answer: str) -> str | None:
    """Returns the normalised answer of a right response, None for any other."""
    found = extract(response)
    if found is None:
        return None
    form = normalize(found)
    return form if form == normalize(answer) else None


def extract(response: str) -> str | None:
    """Returns what follows the last "Answer:" (in any case) near the end of a response.

    It ends with its line. A line that is empty gives way to the next one that is not.
    """
    found = _ANSWER.findall(response[-TAIL:])
    return found[-1] if found else None


def normalize(answer: str) -> str:
    """Returns the form in which answers are compared."""
    text = answer.rpartition("=")[2]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for dropped in _DROPPED:
        text = text.replace(dropped, "")
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()
