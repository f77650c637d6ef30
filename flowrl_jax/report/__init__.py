"""A self-contained report of a run: results, learning curves, diversity, log Z and samples.

data = report.load_workdir("runs/quickstart")      # or build ReportData by hand
report.write("runs/quickstart/report.html", data)
report.write_plane("docs/accuracy_diversity.svg", data, title="Countdown, held-out problems")
print(report.render_table(data.results))
"""

from __future__ import annotations

from pathlib import Path

from flowrl_jax.errors import InputError
from flowrl_jax.report.data import (
    SERIES,
    Curve,
    ReportData,
    Run,
    Sample,
    SampleGroup,
    from_dict,
    load_run,
    load_workdir,
    sample_groups,
    to_dict,
)
from flowrl_jax.report.page import page
from flowrl_jax.report.plane import equal_accuracy, plane_svg, stand_alone, trajectory
from flowrl_jax.report.table import render_table

__all__ = [
    "SERIES",
    "Curve",
    "ReportData",
    "Run",
    "Sample",
    "SampleGroup",
    "equal_accuracy",
    "from_dict",
    "load_run",
    "load_workdir",
    "render_table",
    "sample_groups",
    "to_dict",
    "trajectory",
    "write",
    "write_plane",
]


def write(path: str | Path, data: ReportData) -> None:
    """Writes a report as one HTML file that needs nothing else.

    Args:
      path: the file; its folder is made if absent.
      data: what to show.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(data), encoding="utf-8")


def write_plane(
    path: str | Path, data: ReportData, *, title: str = "Accuracy and diversity"
) -> None:
    """Writes the accuracy-diversity plane as an SVG file of its own, e.g. for a README.

    Args:
      path: the file; its folder is made if absent.
      data: results and runs.
      title: written above the picture.

    Raises:
      InputError: no policy has both pass@1 and distinct correct solutions.
    """
    svg = plane_svg(data)
    if svg is None:
        raise InputError(
            "the accuracy-diversity plane needs pass_at_1 and distinct_correct_k of some policy;"
            " evaluate one, or train with evaluations"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stand_alone(svg, title), encoding="utf-8")
