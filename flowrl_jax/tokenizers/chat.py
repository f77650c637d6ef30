"""Conversations as the text that a model was trained on: chat templates, rendered in a sandbox.

Templates are programs that come with a model. They are rendered as transformers renders them
(`render_jinja_template` of its chat_template_utils.py says which settings, names and filters a
template may count on), and stop with an error where they would not come to an end.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from flowrl_jax.errors import InputError
from flowrl_jax.tokenizers.files import read_object

_MAX_STEPS = 200_000  # rounds of loops and calls; a real template takes some hundreds
_MAX_LENGTH = 10_000_000  # characters or items of anything that an operator makes
_OWN_NAMES = ("messages", "add_generation_prompt")


class ChatTemplate:
    """A chat template.

    Args:
        source: the template, in Jinja.
        special_tokens: texts it knows by name, "bos_token" and the like.
        name: where it is from, for messages.

    Attributes:
        source: the template, in Jinja.

    Raises:
        InputError: it is not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, name: str):
        self.source = source
        self._name = name
        self._special_tokens = dict(special_tokens)
        try:
            environment = _Environment()
            self._template = environment.metered(source)
        except Exception as error:
            raise InputError(
                f"chat template {name}: not a template ({_line(error)}); mend it, or name another"
                " in tokenizer.chat_template"
            ) from None
        self._environment = environment

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns a conversation as text, special tokens included.

        Args:
            messages: each with "role" and "content"; entries that are None are left out.
            add_generation_prompt: whether the text ends where the model's answer begins.
            options: what else the template knows by name, such as {"enable_thinking": False}; they
                win over special tokens.

        Raises:
            InputError: the template refuses the conversation, fails, does what the sandbox forbids
                or does not come to an end.
        """
        options = dict(options or {})
        for name in _OWN_NAMES:
            if name in options:
                raise InputError(f"tokenizer.chat_options has {name!r}, which is not an option")
        variables: dict[str, Any] = {"tools": None, "documents": None}
        variables |= self._special_tokens | options
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        self._environment.meter.steps = 0
        try:
            return self._template.render(
                messages=given, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # whatever a program can do wrong, jinja passes on
            raise InputError(
                f"chat template {self._name}: {_line(error)}; change the conversation"
                " (tokenizer.system_prompt, tokenizer.chat_options) or name another template in"
                " tokenizer.chat_template"
            ) from None


def load_chat_template(
    path: str | os.PathLike[str], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """Reads the chat template in a file, or the one that belongs to a tokenizer.

    Args:
        path: a file with a template; or a tokenizer as `load_tokenizer` takes it, whose template
            is chat_template.jinja or `chat_template` of tokenizer_config.json or of
            chat_template.json, in this order. Of several templates the one named "default" counts.
        special_tokens: of the tokenizer.

    Returns:
        The template, or None where there is none.

    Raises:
        InputError: a file is damaged, or holds no template that can be used.
    """
    place = Path(path)
    if place.is_dir() or place.name == "tokenizer.json" or place.suffix == ".model":
        return _of_tokenizer(place if place.is_dir() else place.parent, special_tokens)
    source = _read(place) if place.suffix != ".json" else _in_json(place)
    if source is None:
        raise InputError(f"chat template {place}: has no chat_template; give a .jinja file")
    return ChatTemplate(source, special_tokens, name=str(place))


def _of_tokenizer(folder: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(_read(file), special_tokens, name=str(file))
    for name in ("tokenizer_config.json", "chat_template.json"):
        source = _in_json(folder / name)
        if source is not None:
            return ChatTemplate(source, special_tokens, name=str(folder / name))
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"chat template {file}: {error.strerror}; give a file") from None
    except ValueError:
        raise InputError(f"chat template {file}: not UTF-8; copy it anew from the model") from None


def _in_json(file: Path) -> str | None:
    value = read_object(file).get("chat_template")
    if isinstance(value, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in value
    ):
        value = {str(entry["name"]): entry["template"] for entry in value}
    if isinstance(value, dict):
        if "default" not in value:
            raise InputError(
                f"{file}: none of its chat templates ({', '.join(value)}) is named default; save"
                " one to a file and name that in tokenizer.chat_template"
            )
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise InputError(f"{file}: chat_template is a {type(value).__name__}, not text; mend it")
    return value


class _Meter(threading.local):
    """Steps that the rendering of this thread has taken."""

    steps = 0


class _Environment(ImmutableSandboxedEnvironment):
    """What transformers offers templates, with an end to every loop."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.meter = _Meter()
        self.filters |= {"tojson": _to_json, "_rounds": _rounds, "_sized": _sized}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
            # A function: the class itself has methods that a template has no business with.
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }

    def metered(self, source: str) -> jinja2.Template:
        """Compiles a template whose loops and variables are watched."""
        tree = self.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "_rounds")
        for assigned in tree.find_all(nodes.Assign):
            assigned.node = _filtered(assigned.node, "_sized")
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filtered(block.filter, "_sized")
        return self.from_string(tree)

    def tick(self) -> None:
        """Counts a step."""
        self.meter.steps += 1
        if self.meter.steps > _MAX_STEPS:
            raise SecurityError(f"takes more than {_MAX_STEPS:,} steps")

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls, and counts it: recursion is a loop too."""
        self.tick()
        return _sized(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes, unless the result is out of all proportion."""
        if operator == "*":
            _check_product(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_length(abs(left).bit_length() * max(right, 0))
        return _sized(super().call_binop(context, operator, left, right))


class _Generation(Extension):
    """The tag `generation`, around what an assistant says; here it only renders its body.

    Names set inside stay inside, as in transformers, where the tag is a call block too.
    """

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Any) -> nodes.Node:
        """Parses up to `endgeneration`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _Namespace(Namespace):
    """`namespace(...)` without names that Python keeps for itself."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"namespace: the name {name!r} begins with an underscore")
        super().__setitem__(name, value)


def _filtered(expression: Any, name: str) -> nodes.Filter:
    return nodes.Filter(expression, name, [], [], None, None)


@jinja2.pass_context  # and so not at compile time
def _rounds(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    environment: Any = context.environment
    for item in items:
        environment.tick()
        yield item


def _sized(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_length(len(value))
    return value


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            _check_length(len(value) * times)


def _check_length(length: int) -> None:
    if length > _MAX_LENGTH:
        raise SecurityError(f"makes something of more than {_MAX_LENGTH:,} parts")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return text[:300] if line is None else f"line {line}: {text[:300]}"
