"""Creates a virtual environment and installs this project with pinned requirements in it.

uv does the installing because it takes seconds; wherever it cannot (no wheel for the platform, an
index it cannot read), pip does the same work. Both run from a temporary folder, so that the
environment holds what was asked for, pip for its user, and nothing else.

    python3 scripts/bootstrap.py .venv --requirements requirements.txt [--extra cuda]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

UV = "uv==0.13.8"

# uv reads other variables than pip. Whoever has set pip up for a mirror expects it to be used.
# (pip's variable, uv's variable, what separates several values in uv's; pip's are split by spaces)
UV_SETTINGS = (
    ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", " "),
    ("PIP_EXTRA_INDEX_URL", "UV_INDEX", " "),
    ("PIP_FIND_LINKS", "UV_FIND_LINKS", ","),
)


def uv_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Adds to an environment what uv must know of pip's settings.

    Args:
      environment: the variables of the process; what they say to uv itself is kept.

    Returns:
      A copy in which uv finds packages where pip would.
    """
    result = dict(environment)
    for pip_name, uv_name, separator in UV_SETTINGS:
        if values := environment.get(pip_name, "").split():
            result.setdefault(uv_name, separator.join(values))
    return result


def first_success(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> bool:
    """Runs commands that do the same work, in order of preference, until one succeeds.

    Args:
      commands: each a program and its arguments.
      environment: the variables they see.

    Returns:
      True if one succeeded. Only the last one's complaints are shown: each has a successor that
      may still do the work.
    """
    for number, command in enumerate(commands, 1):
        hidden = subprocess.DEVNULL if number < len(commands) else None
        if subprocess.run(command, env=environment, stderr=hidden, check=False).returncode == 0:
            return True
    return False


def installers(tools: Path, python: str, environment: Mapping[str, str]) -> list[list[str]]:
    """Prepares the programs that can install packages.

    Args:
      tools: an empty folder for them.
      python: the interpreter to install for.
      environment: the variables pip sees.

    Returns:
      The beginnings of install commands, the fastest first.
    """
    try:
        venv.create(tools, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:
        sys.exit(
            f"{sys.executable} cannot create a virtual environment with pip: "
            "install its venv package (Debian and Ubuntu: apt install python3-venv)"
        )
    own_python = str(tools / "bin" / "python")
    pip = [own_python, "-m", "pip"]
    result = [[*pip, "--python", python, "install", "-q", "--no-compile"]]
    if first_success([[*pip, "install", "-q", "--no-compile", UV]], environment):
        result.insert(0, [own_python, "-m", "uv", "pip", "install", "-q", "--python", python])
    return result


def main() -> None:
    """Parses the arguments, installs, and exits with a line that says what could not be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the virtual environment")
    parser.add_argument("--requirements", required=True, help="file of pinned requirements")
    parser.add_argument("--extra", help="extra of pyproject.toml to add, such as cuda")
    parser.add_argument("--optional", help="file of requirements that may fail to install")
    arguments = parser.parse_args()

    python = arguments.folder / "bin" / "python"
    if not python.exists():
        venv.create(arguments.folder, symlinks=True)
    environment = uv_environment(os.environ)
    project = f".[{arguments.extra}]" if arguments.extra else "."
    with tempfile.TemporaryDirectory() as tools:
        commands = installers(Path(tools), str(python), environment)
        packages = ["-r", arguments.requirements, "-e", project, "pip"]
        if not first_success([[*command, *packages] for command in commands], environment):
            sys.exit(f"{arguments.requirements} could not be installed; the reason stands above")
        if arguments.optional:
            if len(commands) > 1:
                # torch for the CPU lies on an index of its own, which uv knows by this name.
                # Where that index is out of reach, waiting for it would cost seconds.
                environment.setdefault("UV_HTTP_RETRIES", "1")
                commands.insert(0, [*commands[0], "--torch-backend=cpu"])
            packages = ["-r", arguments.optional, "-c", arguments.requirements]
            if not first_success([[*command, *packages] for command in commands], environment):
                print(f"{arguments.optional} could not be installed: tests that need it will skip")


if __name__ == "__main__":
    main()
