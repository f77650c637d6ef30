"""What the files beside a vocabulary say: special tokens, added tokens, what ends a response.

The rules are those of transformers 5 (`PreTrainedTokenizerBase._from_pretrained`): a
tokenizer_config.json with `added_tokens_decoder` says everything; without that field the older
special_tokens_map.json and added_tokens.json are read as well and have the last word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.models.hf_fields import read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands.

    Attributes:
        content: the text.
        lstrip: whether it swallows white space before it.
        rstrip: whether it swallows white space after it.
        single_word: whether it counts only where no letter or digit touches it.
        normalized: whether it is looked for after normalisation.
        special: whether decoding leaves it out.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What the files beside a vocabulary say.

    Attributes:
        named: special tokens by name ("bos_token").
        added: added tokens by id.
        extra: special tokens without a name.
        legacy: `legacy` of tokenizer_config.json, see `SentencePieceTokenizer.encode`.
    """

    named: Mapping[str, AddedToken]
    added: Mapping[int, AddedToken]
    extra: tuple[AddedToken, ...]
    legacy: bool

    def missing(self, known: Mapping[str, Any]) -> list[AddedToken]:
        """The special tokens that a vocabulary lacks, in the order in which they get ids."""
        wanted = {token.content: token for token in (*self.named.values(), *self.extra)}
        return [token for content, token in wanted.items() if content not in known]


def read_object(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one where there is no such file.

    Raises:
        InputError: as `read_json`.
    """
    return read_json(file) if file.exists() else {}


def read_metadata(folder: Path) -> Metadata:
    """Reads tokenizer_config.json, special_tokens_map.json and added_tokens.json of a folder.

    Args:
        folder: that holds the vocabulary; none of the files has to be there.

    Raises:
        InputError: a file is damaged or a field has the wrong type.
    """
    file = folder / "tokenizer_config.json"
    fields = read_object(file)
    if fields.get("added_tokens_decoder") is not None:
        added = _added_tokens(fields["added_tokens_decoder"], file)
    else:
        map_file = folder / "special_tokens_map.json"
        fields = fields | read_object(map_file)
        added = {}
    by_content = {token.content: token for token in added.values()}
    named = {}
    for name in NAMES:
        if fields.get(name) is not None:
            token = _token(fields[name], f"{file}: {name}")
            named[name] = dataclasses.replace(by_content.get(token.content, token), special=True)
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    if not isinstance(extra, list):
        raise InputError(
            f"{file}: additional_special_tokens={_shown(extra)} is no list; copy it anew"
        )
    extras = tuple(_token(token, f"{file}: additional_special_tokens") for token in extra)
    if not added:
        special = {token.content for token in (*named.values(), *extras)}
        added = _old_added_tokens(folder / "added_tokens.json", special)
    return Metadata(named, added, extras, bool(fields.get("legacy", False)))


def generation_eos(folder: Path) -> tuple[int, ...] | None:
    """Returns the ids that end a response by generation_config.json, None where it names none.

    Args:
        folder: of the model.

    Raises:
        InputError: the file is damaged, or `eos_token_id` is neither an id nor a list of ids.
    """
    file = folder / "generation_config.json"
    value = read_object(file).get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(i) is not int for i in ids):
        raise InputError(
            f"{file}: eos_token_id={_shown(value)} is neither an id nor a list of ids; mend it, or"
            " set tokenizer.eos_ids"
        )
    return tuple(dict.fromkeys(ids))


def _shown(value: Any) -> str:
    """A value for a message, whatever a damaged file has put there."""
    return repr(value)[:120]


def _token(value: Any, place: str) -> AddedToken:
    """A token written as text or as an object with `content` and flags."""
    if isinstance(value, str):
        value = {"content": value}
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content:
        raise InputError(f"{place}={_shown(value)} is neither text nor a token; copy the file anew")
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(
            f"{place}={_shown(value)}: its flags are not true or false; copy the file anew"
        )
    return AddedToken(content, **({"normalized": not flags.get("special", True)} | flags))


def _added_tokens(value: Any, file: Path) -> dict[int, AddedToken]:
    place = f"{file}: added_tokens_decoder"
    if not isinstance(value, dict):
        raise InputError(f"{place} is a JSON {type(value).__name__}, not an object; copy it anew")
    tokens = {}
    for key, entry in value.items():
        if not key.isdecimal() or len(key) > 9:
            raise InputError(f"{place}: {_shown(key)} is not an id; copy the file anew")
        if not isinstance(entry, dict):
            raise InputError(f"{place}[{key}]={_shown(entry)} is not an object; copy the file anew")
        tokens[int(key)] = _token({"special": False, **entry}, f"{place}[{key}]")
    return dict(sorted(tokens.items()))


def _old_added_tokens(file: Path, special: set[str]) -> dict[int, AddedToken]:
    tokens = {}
    for content, i in read_object(file).items():
        if type(i) is not int or i < 0 or not content:
            raise InputError(
                f"{file}: {_shown(content)} has the id {_shown(i)}; copy the file anew"
            )
        known = content in special
        tokens[i] = AddedToken(content, normalized=not known, special=known)
    return dict(sorted(tokens.items()))
