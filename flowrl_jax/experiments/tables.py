"""Rows of a comparison: means with their intervals, as a CSV file and as cells of a table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl_jax.experiments import analysis


def numbers(where: str, found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean and ends of the 95 % interval of every measure.

    Args:
        where: first part of the names.
        found: `[seeds, prompts]` each.

    Returns:
        `WHERE_NAME`, `WHERE_NAME_low` and `WHERE_NAME_high`.
    """
    row = {}
    for name, values in found.items():
        mean, low, high = analysis.interval(values)
        row |= {f"{where}_{name}": mean, f"{where}_{name}_low": low, f"{where}_{name}_high": high}
    return row


def cell(row: Mapping[str, Any], name: str) -> str:
    """Mean and interval of a measure of `numbers`; a dash where there is none."""
    if name not in row:
        return "-"
    return f"{row[name]:.3g} [{row[name + '_low']:.3g}, {row[name + '_high']:.3g}]"


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with six digits; a column is there if any row has it."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
