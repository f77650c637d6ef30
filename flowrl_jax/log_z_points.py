"""Learned log Z of single prompts beside their Monte-Carlo estimates: `log_z.jsonl` of a run.

One line a step, `{"step": 3, "points": [[prompt_id, estimate, low, high, log_z], ...]}`, of the
step's last update and at most `MOST` of its prompts: enough for a picture of how well log Z is
learned, and small beside the metrics.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np

from flowrl_jax.metric_sinks import complete_lines, truncate_lines

FILE = "log_z.jsonl"
LOG_Z_ROWS = "log_z/rows"
"""Name under which a step's metrics carry `[B, 3]` rows: prompt id, estimate, log Z."""
MOST = 64
"""Prompts of a step that are kept."""

Point = tuple[float, float, float, float]


class LogZPoints:
    """Writes the file of a run; nothing appears before the first rows.

    Args:
        folder: of the run.
        resume_step: None for a new run, else the last step whose line is kept.
    """

    def __init__(self, folder: Path, resume_step: int | None):
        self._path = folder / FILE
        self._written = False
        if resume_step is not None and self._path.is_file():
            truncate_lines(self._path, resume_step)

    def write(self, step: int, rows: np.ndarray) -> None:
        """Appends a step's line.

        Args:
            step: of the run.
            rows: `[B, 3]` float, prompt id, estimate and log Z of each response.
        """
        points = prompt_points(rows)
        if points:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "points": points}) + "\n")
            self._written = True

    def flush(self) -> None:
        """Makes what was written survive the death of the machine."""
        if self._written:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())


def prompt_points(rows: np.ndarray) -> list[list[float]]:
    """Means over the responses to each prompt, with the 95 % interval of the estimate's.

    The interval is Student's, for responses to a prompt are few.

    Args:
        rows: `[B, 3]` float, prompt id, estimate and log Z of each response.

    Returns:
        `[prompt_id, estimate, low, high, log_z]` of at most `MOST` prompts, those of the lowest
        ids; prompts with one response, or with a number that is not finite, have none.
    """
    points = []
    rows = np.asarray(rows, np.float64)
    for prompt in np.unique(rows[:, 0]):
        estimates, log_z = rows[rows[:, 0] == prompt, 1:].T
        count = estimates.size
        if count < 2 or not np.isfinite([estimates, log_z]).all():
            continue
        half = student_95(count - 1) * float(estimates.std(ddof=1)) / math.sqrt(count)
        mean = float(estimates.mean())
        values = [mean, mean - half, mean + half, float(log_z.mean())]
        points.append([int(prompt), *(round(value, 6) for value in values)])
        if len(points) == MOST:
            break
    return points


def student_95(degrees: int) -> float:
    """The 0.975 quantile of Student's t, to 0.2 % from 3 degrees of freedom on.

    Args:
        degrees: of freedom, at least 1. Up to 2 the values are exact; from 3 on they are the
            Cornish-Fisher expansion about the normal's (Abramowitz and Stegun, 26.7.5).
    """
    if degrees <= 2:
        return (12.706205, 4.302653)[degrees - 1]
    x, n = 1.959964, degrees
    return (
        x
        + (x**3 + x) / (4 * n)
        + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * n**2)
        + (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * n**3)
        + (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / (92160 * n**4)
    )


def read_points(folder: Path) -> list[Point]:
    """The points of the last step that a run wrote.

    Args:
        folder: of the run.

    Returns:
        (estimate, low, high, log Z) of each prompt; empty where the run wrote none.

    Raises:
        InputError: the file is damaged before its last line.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return []
    last = None
    for _, last in complete_lines(path):  # noqa: B007
        pass
    return [(a, b, c, d) for _, a, b, c, d in last["points"]] if last else []
