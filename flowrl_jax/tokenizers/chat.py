"""Conversations as the text that a model was trained on: chat templates, rendered in a sandbox.

Templates are programs that come with a model; `sandbox.Sandbox` says what they may do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.tokenizers.files import read_object
from flowrl_jax.tokenizers.sandbox import Sandbox

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
            sandbox = Sandbox()
            self._template = sandbox.metered(source)
        except Exception as error:
            raise InputError(
                f"chat template {name}: not a template ({_line(error)}); mend it, or name another"
                " in tokenizer.chat_template"
            ) from None
        self._sandbox = sandbox

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
        self._sandbox.restart()
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
                f"{file}: none of its chat templates ({', '.join(value)[:200]}) is named"
                " default; save one to a file and name that in tokenizer.chat_template"
            )
        value = value["default"]
    if value is not None and not isinstance(value, str):
        raise InputError(f"{file}: chat_template is a {type(value).__name__}, not text; mend it")
    return value


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return text[:300] if line is None else f"line {line}: {text[:300]}"
