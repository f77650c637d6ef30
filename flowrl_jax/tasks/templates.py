"""Wordings of a question: what stands around a problem before the policy sees it."""

from __future__ import annotations

from collections.abc import Mapping

from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import nearest

PLACE = "{problem}"

TEMPLATES: Mapping[str, str] = {
    # The structure is that of DAPO's template (arXiv 2503.14476), the wording is ours; the literal
    # `Answer: $Answer` is what the released reward looks for.
    "dapo": (
        "Work through the math problem below one step at a time. The response must end with a line"
        " of the form Answer: $Answer, where $Answer stands for the solution of the problem."
        f"\n\n{PLACE}\n\n"
        'The last line, which begins with "Answer:", must not be forgotten.\n'
    ),
    "boxed": (f"{PLACE}\n\nReason step by step and put the final answer within \\boxed{{}}.\n"),
    "plain": PLACE,
}
"""Name -> wording; the problem takes the place of {problem}, and other braces are themselves."""


def check(template: str) -> None:
    """Refuses what is neither a name in TEMPLATES nor a wording with {problem} in it.

    Raises:
        InputError: it is neither.
    """
    if template in TEMPLATES or template.count(PLACE) == 1:
        return
    if PLACE in template:
        raise InputError(f"template {template!r}: has {PLACE} more than once; write it once")
    raise InputError(
        f"template {template!r}: neither a known name nor a wording with {PLACE} in it;"
        f" {nearest(template, TEMPLATES)}"
    )


def render(template: str, problem: str) -> str:
    """Returns a problem in a wording.

    Args:
        template: a name in TEMPLATES, or a wording of one's own with {problem} in it.
        problem: the problem; white space around it is dropped, except by "plain".

    Raises:
        InputError: as for `check`.
    """
    check(template)
    wording = TEMPLATES.get(template, template)
    return wording.replace(PLACE, problem if template == "plain" else problem.strip())
