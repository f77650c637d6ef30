"""A self-contained report of a run: results, learning curves, diversity, log Z, pass rates
and samples.

data = report.load(["runs/quickstart"])      # or build ReportData by hand
report.write("runs/quickstart/report.html", data)
report.write_plane("docs/accuracy_diversity.svg", data, title="Countdown, held-out problems")
print(report.render_table(data.results))
"""

from __future__ import annotations

from pathlib import Path

from flowrl_jax.errors import InputError
from flowrl_jax.report.data import (
    HELD_OUT,
    SERIES,
    Curve,
    Evaluation,
    ReportData,
    Run,
    Sample,
    SampleGroup,
    from_dict,
    to_dict,
)
from flowrl_jax.report.load import load, load_run
from flowrl_jax.report.page import page
from flowrl_jax.report.plane import equal_accuracy, plane_svg, stand_alone, trajectory
from flowrl_jax.report.table import render_table

__all__ = [
    "HELD_OUT",
    "SERIES",
    "Curve",
    "Evaluation",
    "ReportData",
    "Run",
    "Sample",
    "SampleGroup",
    "equal_accuracy",
    "from_dict",
    "load",
    "load_run",
    "render_table",
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

    Raises:
      InputError: the file cannot be written.
    """
    _write(Path(path), page(data))


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); name another file"
        ) from error


def write_plane(
    path: str | Path, data: ReportData, *, title: str = "Accuracy and diversity"
) -> None:
    """Writes the accuracy-diversity plane as an SVG file of its own, e.g. for a README.

    Args:
      path: the file; its folder is made if absent.
      data: results and runs.
      title: written above the picture.

    Raises:
      InputError: no policy has both pass@1 and distinct correct solutions, or the file cannot be
        written.
    """
    svg = plane_svg(data)
    if svg is None:
        raise InputError(
            "the accuracy-diversity plane needs pass_at_1 and distinct_correct_k of some policy;"
            " evaluate one, or train with evaluations"
        )
    _write(Path(path), stand_alone(svg, title))
