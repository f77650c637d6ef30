"""python -m flowrl_jax.report --workdir=DIR: writes DIR/report.html from the files of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowrl_jax import report
from flowrl_jax.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report of a run, or of a folder of runs, and prints its results.

    Args:
      arguments: command line without the program's name; None takes the process's.

    Returns:
      Exit code: 0, or 2 after one line on stderr about a wrong input.
    """
    parser = argparse.ArgumentParser(prog="python -m flowrl_jax.report", description=__doc__)
    parser.add_argument("--workdir", required=True, help="folder of a run, or of several runs")
    parser.add_argument("--output", help="the HTML file; default DIR/report.html")
    parser.add_argument("--plane", help="also write the accuracy-diversity plane to this SVG file")
    options = parser.parse_args(arguments)
    output = Path(options.output or Path(options.workdir) / "report.html")
    try:
        data = report.load_workdir(options.workdir)
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
