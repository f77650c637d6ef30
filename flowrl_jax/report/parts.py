"""What several sections of the page are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowrl_jax.evaluation import Summary
from flowrl_jax.report.data import ReportData
from flowrl_jax.report.plane import colors
from flowrl_jax.report.plot import mark, text, whisker
from flowrl_jax.report.table import figure, heading


def signed(value: float) -> str:
    """A statistic with a proper minus sign, which the terminal's table does without."""
    return figure(value).replace("-", "\N{MINUS SIGN}")


def dot(color: str) -> str:
    """A policy's colour, beside its name."""
    return f'<i class="dot" style="--c:{color}"></i>'


def interval_table(
    table: Mapping[str, Summary],
    rows: Mapping[str, tuple[str, str]],
    metrics: Sequence[str],
    corner: str,
    *,
    zero: bool = False,
) -> str:
    """A table of means with intervals.

    Args:
      table: row -> metric -> interval.
      rows: row -> its heading and colour.
      metrics: the columns.
      corner: heading of the rows' names.
      zero: whether the place of zero is marked, and colours are not.

    Returns:
      HTML.
    """
    spans = {}
    for metric in metrics:
        edges = [v for s in table.values() if metric in s for v in s[metric].values()]
        edges += [0.0] if zero else []
        spans[metric] = (min(edges, default=0.0), max(edges, default=1.0))
    head = "".join(
        f'<th scope="col" title="{text(heading(m)[1])}">{text(heading(m)[0])}</th>' for m in metrics
    )
    body = []
    for name, summary in table.items():
        label, color = rows[name]
        cells = []
        for metric in metrics:
            if metric not in summary:
                cells.append("<td>-</td>")
                continue
            v = summary[metric]
            picture = whisker((v["mean"], v["low"], v["high"]), spans[metric], color, zero=zero)
            cells.append(
                f"<td><b>{signed(v['mean'])}</b>{picture}"
                f"<small>{signed(v['low'])} to {signed(v['high'])}</small></td>"
            )
        title = text(label) if zero else dot(color) + text(label)
        body.append(f'<tr><th scope="row">{title}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="card scroll"><table><thead><tr><th scope="col">{corner}</th>{head}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def legend(data: ReportData, policies: Sequence[str]) -> str:
    """Names of policies with the lines and marks that charts draw them with."""
    palette = colors(data)
    items = []
    for policy in policies:
        color = palette[policy]
        shape = shape_of(data, policy)
        sign = mark(shape, 13, 6, 3.6, f'fill="{color}"')
        items.append(
            '<li><svg viewBox="0 0 26 12" aria-hidden="true">'
            f'<path d="M1 6H25" stroke="{color}" stroke-width="2"/>{sign}</svg>'
            f"{text(data.label(policy))}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def shape_of(data: ReportData, policy: str) -> int:
    """Index of a policy's mark, see `plot.mark`."""
    trained = [name for name in data.policies if name != data.start]
    return trained.index(policy) if policy in trained else 3
