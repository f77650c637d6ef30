"""Command lines: a config file with overrides, one line per mistake, and exit codes.

0 done; 2 wrong input, one line on stderr; 3 stopped by the alarm after a saved checkpoint; 75
preempted after a saved checkpoint (start again with --resume); anything else is a fault.
"""

import ast
import inspect
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from flowrl_jax.config import Config, parse_config
from flowrl_jax.distributed import leave, leave_failed
from flowrl_jax.errors import InputError
from flowrl_jax.tasks.base import nearest

WRONG_INPUT = 2
ALARMED = 3
PREEMPTED = 75

_HELP = """{description}

  --config=FILE[:ARGUMENT]  a config file, e.g. configs/quickstart.py; ARGUMENT goes to its
                            get_config(), e.g. configs/quickstart.py:grpo
  --config.SECTION.FIELD=VALUE  changes a setting of it, e.g. --config.loss.beta=5; the fields of
                            a task's or data set's `options` are --config.task.options.NAME=VALUE,
                            those of a chat template --config.tokenizer.chat_options.NAME=VALUE
{flags}"""
_OVERRIDE = re.compile(r"--?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0")


class Alarmed(Exception):
    """The alarm has stopped the run, as its settings say; a checkpoint has been saved."""


class Preempted(Exception):
    """The machine is being taken away; a checkpoint has been saved."""


def config_flag_values(description: str) -> flags.FlagValues:
    """The flags of a command that takes `--config=FILE[:ARGUMENT]`, none of them parsed yet.

    Args:
        description: of the command, shown by --help.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, description, flag_values=values)
    return values


def run(
    main: Callable[[Config, flags.FlagValues], None],
    values: flags.FlagValues,
    arguments: Sequence[str] | None = None,
    *,
    own_settings: Callable[[flags.FlagValues], Mapping[str, Any]] | None = None,
) -> int:
    """Parses a command line, runs `main` and returns the exit code.

    Args:
        main: takes the config and the flags.
        values: from `config_flag_values`, with the command's own flags added.
        arguments: the words after the command; those of this process by default.
        own_settings: gives the settings where --config is absent; without it --config is needed.
    """
    try:
        return leave(_run(main, values, arguments, own_settings))
    except BaseException as error:
        return leave_failed(error)


def _run(
    main: Callable[[Config, flags.FlagValues], None],
    values: flags.FlagValues,
    arguments: Sequence[str] | None,
    own_settings: Callable[[flags.FlagValues], Mapping[str, Any]] | None,
) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if {"--help", "-h", "-help", "--helpshort"} & set(arguments):
            print(_help(values))
            return 0
        words, overrides = split_overrides(arguments)
        _parse_flags(values, words)
        file = values["config"].value
        if file or own_settings is None:
            config = load_config(_present(file), overrides)
        else:
            config = ml_collections.ConfigDict(own_settings(values))
            override(config, overrides)
        main(parse_config(config), values)
        return 0
    except InputError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return WRONG_INPUT
    except Alarmed as error:
        print(f"stopped: {_one_line(error)}", file=sys.stderr)
        return ALARMED
    except Preempted as error:
        print(f"preempted: {error}", file=sys.stderr)
        return PREEMPTED


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of a command line.

    Returns:
        The other words, and the text of each setting by its name ("a.b"); the last one counts.

    Raises:
        InputError: a setting has no value.
    """
    words: list[str] = []
    overrides: dict[str, str] = {}
    remaining = iter(arguments)
    for word in remaining:
        found = _OVERRIDE.fullmatch(word)
        if not found:
            words.append(word)
            continue
        name, text = found.groups()
        text = next(remaining, None) if text is None else text
        if text is None:
            raise InputError(f"{word} has no value: write {word}=VALUE")
        overrides[name] = text
    return words, overrides


def load_config(argument: str, overrides: Mapping[str, str]) -> ml_collections.ConfigDict:
    """Runs a config file and changes settings of it.

    Args:
        argument: `FILE` or `FILE:ARGUMENT`; ARGUMENT is passed to the file's `get_config`. The file
            may import its neighbours by the name of their folder, wherever the command is started.
        overrides: texts by name, e.g. {"loss.beta": "5"}; a text is read as the type of the value
            that it replaces.

    Raises:
        InputError: the file is missing or fails, a name is unknown or a text is not of its type.
    """
    path, _, parameter = argument.partition(":")
    if not Path(path).is_file():
        raise InputError(f"--config={argument}: no file {path}; name one, such as those in configs")
    root = str(Path(path).absolute().parent.parent)
    sys.path.insert(0, root)
    try:
        config = _get_config(path, parameter)
    except InputError:
        raise
    except Exception as error:
        if parameter and isinstance(error, KeyError) and error.args == (parameter,):
            raise InputError(
                f"--config={argument}: {path} does not know {parameter!r}; see the docstring of"
                " its get_config()"
            ) from error
        raise InputError(_config_fault(path, error)) from error
    finally:
        sys.path.remove(root)
    override(config, overrides)
    return config


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> None:
    """Changes settings.

    Args:
        config: is changed.
        overrides: texts by name, as for `load_config`.

    Raises:
        InputError: a name is unknown or a text is not of its type.
    """
    config.unlock()  # for options that are not named yet
    for name, text in overrides.items():
        _override(config, name, text)


def _get_config(path: str, parameter: str) -> ml_collections.ConfigDict:
    get_config = runpy.run_path(path).get("get_config")
    if not callable(get_config):
        raise InputError(f"config file {path} has no function get_config(): define it")
    if parameter and not inspect.signature(get_config).parameters:
        raise InputError(
            f"--config={path}:{parameter}: its get_config() takes no argument; leave it out"
        )
    config = get_config(*([parameter] if parameter else []))
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"config file {path}: get_config() gives a {type(config).__name__}; return a ConfigDict"
        )
    return config


def _override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    flag = f"--config.{name}={text}"
    *sections, last = name.split(".")
    section, path = config, "config"
    for part in sections:
        if part not in section:
            raise InputError(f"{flag}: {path} has no field {part!r}; {nearest(part, section)}")
        section, path = section[part], f"{path}.{part}"
        if not isinstance(section, ml_collections.ConfigDict):
            raise InputError(f"{flag}: {path} is a single setting; write --{path}={text}")
    if last in section:
        section[last] = _read(text, section[last], flag)
    elif path.endswith((".options", ".chat_options")):
        # Whoever they belong to, a task, a data set or a template, knows which options there are.
        section[last] = _literal(text, text)
    else:
        raise InputError(f"{flag}: {path} has no field {last!r}; {nearest(last, section)}")


def _read(text: str, old: Any, flag: str) -> Any:
    """The value that a text stands for where `old` stood."""
    if isinstance(old, ml_collections.ConfigDict):
        value = _literal(text, None)
        if not isinstance(value, dict):
            raise InputError(f"{flag} replaces a section of settings: give fields of it one by one")
        return ml_collections.ConfigDict(value)
    if isinstance(old, bool):
        if text.lower() not in _TRUE + _FALSE:
            raise InputError(f"{flag} is not a truth value: give True or False")
        return text.lower() in _TRUE
    if isinstance(old, int | float):
        try:
            return type(old)(text)
        except ValueError:
            kind = "an integer" if isinstance(old, int) else "a number"
            raise InputError(f"{flag} is not {kind}: give one, such as {old}") from None
    if isinstance(old, tuple | list):
        value = _literal(text, text)
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    return None if old is None and text == "None" else text


def _literal(text: str, otherwise: Any) -> Any:
    """What a text means in Python, if it means anything."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return otherwise


def _parse_flags(values: flags.FlagValues, words: list[str]) -> None:
    try:
        rest = values(["flowrl_jax", *words])
    except flags.Error as error:
        raise InputError(_one_line(error)) from error
    if len(rest) > 1:
        raise InputError(f"argument {rest[1]!r} is not a flag: flags start with --")


def _present(file: str | None) -> str:
    if not file:
        raise InputError("--config is missing: name a config file, e.g. configs/quickstart.py")
    return file


def _config_fault(path: str, error: Exception) -> str:
    """What went wrong in a config file, and in which line of it."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.abspath(frame.filename) == os.path.abspath(path)
    ]
    if isinstance(error, SyntaxError):
        path, lines = error.filename or path, [error.lineno]
        error = SyntaxError(error.msg)
    place = f"{path} line {lines[-1]}" if lines else path
    return f"config file {place}: {type(error).__name__}: {_one_line(error)}; mend the file"


def _help(values: flags.FlagValues) -> str:
    own = [values[name] for name in values if name != "config"]
    shown = [f"  --{flag.name}: {flag.help}" for flag in own]
    return _HELP.format(description=values["config"].help, flags="\n".join(sorted(shown)))


def _one_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())
