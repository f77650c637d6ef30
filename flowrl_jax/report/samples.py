"""The page's part with responses, grouped by solution or, if wrong, by outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from flowrl_jax.report.data import HELD_OUT, ReportData, Sample, SampleGroup
from flowrl_jax.report.parts import dot
from flowrl_jax.report.plane import colors
from flowrl_jax.report.plot import text

MAX_CHARACTERS = 3_000_000  # of all responses and prompts of a page, so that browsers open it
MAX_TEXT = 2_400  # of a response: its beginning and its end
MAX_TEXTS = 3  # different responses of a group; more while they have SHORT characters together
MAX_GROUPS = 12  # of a policy's for one problem
SHORT = 240  # characters of a group that needs no unfolding
_GIST = 90


def samples_section(data: ReportData) -> str:
    """The section, empty where there are no samples.

    Args:
      data: the report's data.

    Returns:
      HTML. What is too much for a page is counted in it.
    """
    parts = []
    names = list(dict.fromkeys(group.evaluation for group in data.samples))
    for name in names:
        groups = [group for group in data.samples if group.evaluation == name]
        parts.append(_evaluation(data, name, groups, MAX_CHARACTERS // len(names), not parts))
    if not parts:
        return ""
    return (
        "<section><h2>Samples by solution</h2>"
        '<p class="note">Responses as drawn, equal solutions together with their number. A solution'
        " has one number for all policies of a problem, in the order in which they find it; wrong"
        " responses are together by outcome. Open a problem, then a group, to read.</p>"
        + "".join(parts)
        + "</section>"
    )


def _evaluation(
    data: ReportData, name: str, groups: Sequence[SampleGroup], room: int, first: bool
) -> str:
    """Problems until the characters are used up."""
    shown = []
    for group in groups:
        problem = _problem(data, group, opened=first and not shown)
        if shown and len(problem) > room:
            break
        room -= len(problem)
        shown.append(problem)
    found = data.evaluations.get(name)
    total = max(len(found.problems) if found else 0, len(groups))
    title = f'<h3 class="part">{text(name)} <small>{_shown(len(shown), total)}</small></h3>'
    return (title if total > len(shown) or name != HELD_OUT else "") + "".join(shown)


def _shown(count: int, total: int) -> str:
    if count == total:
        return f"all {total} problems"
    return (
        f"{count} of {total} problems: the first that all policies were given and one solved, then"
        " others; the rest are left out"
    )


def _problem(data: ReportData, group: SampleGroup, *, opened: bool) -> str:
    palette = colors(data)
    numbers: dict[str, int] = {}
    columns, counts = [], []
    for policy, samples in group.samples.items():
        label = f"{dot(palette[policy])}{text(data.label(policy))}"
        right = sum(sample.correct for sample in samples)
        forms = len({_form(sample) for sample in samples if sample.correct})
        counts.append(f"<span>{label} {right}/{len(samples)}</span>")
        columns.append(
            f'<section><h3>{label}</h3><p class="count">{right} of {len(samples)} correct,'
            f" {forms} distinct</p>{_policy(samples, numbers)}</section>"
        )
    which = "" if group.problem is None else f"problem {group.problem}"
    prompt = group.prompt.strip()
    return (
        f'<details class="card prompt"{" open" if opened else ""}><summary>'
        f'<b>{which}</b> <code>{text(_gist(prompt))}</code><span class="rates">'
        f"{''.join(counts)}</span></summary>"
        f'<pre class="whole">{_text(prompt)}</pre>'
        f'<div class="columns">{"".join(columns)}</div></details>'
    )


def _form(sample: Sample) -> str:
    return sample.form if sample.form is not None else sample.response


def _policy(samples: Sequence[Sample], numbers: dict[str, int]) -> str:
    """A policy's responses to one problem; `numbers` names the solutions and grows."""
    solutions: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.correct:
            solutions.setdefault(_form(sample), []).append(sample)
    items = []
    for form, found in sorted(solutions.items(), key=lambda item: -len(item[1])):
        new = form not in numbers
        number = numbers.setdefault(form, len(numbers) + 1)
        badge = f'<span class="badge{" new" if new else ""}">solution {number}</span>'
        items.append((found, _group(found, badge, right=True)))
    wrong = sorted((s for s in samples if not s.correct), key=_outcome)
    for outcome, listed in groupby(wrong, key=_outcome):
        found = list(listed)
        cut = sum(sample.truncated for sample in found)
        badge = f'<span class="badge">{text(outcome)}</span>'
        badge += f'<span class="badge">{cut} cut</span>' if cut else ""
        items.append((found, _group(found, badge, right=False)))
    left = items[MAX_GROUPS:]
    rest = (
        f'<li class="left">and {len(left)} more groups with {sum(len(g) for g, _ in left)}'
        " responses, left out</li>"
        if left
        else ""
    )
    return f'<ul class="answers">{"".join(html for _, html in items[:MAX_GROUPS])}{rest}</ul>'


def _outcome(sample: Sample) -> str:
    return (sample.outcome or "wrong").replace("_", " ")


def _group(samples: Sequence[Sample], badge: str, *, right: bool) -> str:
    """Responses that are one solution, or have one outcome; equal texts are written once."""
    texts = Counter(sample.response.strip() for sample in samples)
    pieces, listed = [], []
    for response, count in texts.most_common():
        if len(listed) >= MAX_TEXTS and sum(map(len, (*listed, response))) > SHORT:
            break
        listed.append(response)
        times = _times(count) if len(texts) > 1 else ""
        pieces.append(f'<div class="text">{times}<pre>{_text(response)}</pre></div>')
    if len(texts) > len(listed):
        pieces.append(_left(texts, len(listed)))
    sign = (
        '<span class="ok" title="correct">✓</span>'
        if right
        else '<span class="no" title="wrong">✗</span>'
    )
    head = f"{sign}{_times(len(samples))}{badge}"
    gist = _gist(next(iter(texts)))
    body = "".join(pieces)
    kind = "right" if right else "wrong"
    if sum(map(len, listed)) <= SHORT and not any(r.count("\n") > 2 for r in listed):
        return f'<li class="{kind}"><p>{head}</p>{body}</li>'
    return (
        f'<li class="{kind}"><details><summary>{head} <code>{text(gist)}</code></summary>'
        f"{body}</details></li>"
    )


def _times(count: int) -> str:
    return f'<span class="times">{count} \N{MULTIPLICATION SIGN}</span>'


def _left(texts: Mapping[str, int], shown: int) -> str:
    counts = sorted(texts.values(), reverse=True)[shown:]
    return f'<p class="left">and {sum(counts)} more with {len(counts)} other texts, left out</p>'


def _gist(response: str) -> str:
    """One line that tells a text from others."""
    line = " ".join(response[: 4 * _GIST].split())
    return line if len(line) <= _GIST else line[:_GIST] + "\N{HORIZONTAL ELLIPSIS}"


def _text(content: str) -> str:
    """A text for the page: whole, or its beginning and its end."""
    if not content:
        return "(empty)"
    if len(content) <= MAX_TEXT:
        return text(content)
    half = MAX_TEXT // 2
    left = f"{len(content) - 2 * half:,} characters left out"
    return f"{text(content[:half])}<em> … {left} … </em>{text(content[-half:])}"
