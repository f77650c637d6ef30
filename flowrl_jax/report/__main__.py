"""python -m flowrl_jax.report RUN [RUN...]: one HTML page of runs and their evaluations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowrl_jax import report
from flowrl_jax.errors import InputError
from flowrl_jax.report.load import PROBLEMS


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report of runs and evaluations, and prints its results.

    Args:
      arguments: command line without the program's name; None takes the process's.

    Returns:
      Exit code: 0, or 2 after one line on stderr about a wrong input.
    """
    parser = argparse.ArgumentParser(prog="python -m flowrl_jax.report", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run or of several, or a file of samples that `evaluate` wrote",
    )
    parser.add_argument(
        "--output",
        help="the HTML file; default RUN/report.html for one folder, else report.html here",
    )
    parser.add_argument("--plane", help="also write the accuracy-diversity plane to this SVG file")
    parser.add_argument(
        "--problems",
        type=int,
        default=PROBLEMS,
        help="problems of each evaluation whose samples are shown (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    only = Path(options.runs[0])
    folder = only if len(options.runs) == 1 and only.is_dir() else Path()
    output = Path(options.output or folder / "report.html")
    try:
        data = report.load(options.runs, problems=options.problems)
        report.write(output, data)
        if options.plane:
            report.write_plane(options.plane, data)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if data.results:
        labels = {policy: data.label(policy) for policy in data.results}
        print(report.render_table(data.results, labels))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
