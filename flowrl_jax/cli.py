"""Command lines: a config file with overrides, one line per mistake, and exit codes.

0 done; 2 wrong input, one line on stderr; 75 preempted after a saved checkpoint (start again with
--resume); anything else is a fault.
"""

import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from flowrl_jax.config import Config, parse_config
from flowrl_jax.errors import InputError

WRONG_INPUT = 2
PREEMPTED = 75


class Preempted(Exception):
    """The machine is being taken away; a checkpoint has been saved."""


def config_flag_values(description: str) -> flags.FlagValues:
    """Flags with `--config=FILE[:ARGUMENT]` and `--config.a.b=value`, none of them parsed yet.

    Args:
        description: of the command, shown by --help.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, f"{description}\nConfig file, e.g. configs/quickstart.py.",
        lock_config=True, flag_values=values,
    )
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    return values


def run(
    main: Callable[[Config, flags.FlagValues], None],
    values: flags.FlagValues,
    arguments: Sequence[str] | None = None,
) -> int:
    """Parses a command line, runs `main` and returns the exit code.

    Args:
        main: takes the config and the flags.
        values: from `config_flag_values`, with the command's own flags added.
        arguments: the words after the command; those of this process by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if {"--help", "-h", "--helpshort"} & set(arguments):
            print(values.main_module_help() or values.get_help())
            return 0
        return _run(main, values, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except Preempted as error:
        print(f"preempted: {error}", file=sys.stderr)
        return PREEMPTED


def _run(main, values: flags.FlagValues, arguments: list[str]) -> int:
    try:
        rest = values(["flowrl_jax", *arguments])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(_one_line(error)) from error
    if len(rest) > 1:
        raise InputError(f"argument {rest[1]!r} is not a flag: flags start with --")
    if values["config"].value is None:
        raise InputError("--config is missing: name a config file, e.g. configs/quickstart.py")
    main(parse_config(values["config"].value), values)
    return 0


def _one_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())
