"""Vocabularies of the `tokenizers` library: tokenizer.json, as of Qwen, Llama 3 or DeepSeek."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from flowrl_jax.errors import InputError
from flowrl_jax.tokenizers.base import checked_eos, checked_text
from flowrl_jax.tokenizers.files import AddedToken, Metadata, read_metadata

_SPACE = "▁"
_PATTERN = {"String": _SPACE}


class HuggingFaceTokenizer:
    """A tokenizer.json, with the special tokens that tokenizer_config.json beside it names.

    Tokens that the files beside it name and the vocabulary lacks are added to it, in the order in
    which transformers adds them. What tokenizer.json says about truncation, padding and opening
    ids is left out: prompts are padded here, and opened by a chat template or
    `tokenizer.add_bos`.

    Args:
        path: the tokenizer.json.
        eos_ids: the ids that end a response, where they differ from the `eos_token`.

    Raises:
        InputError: the file is missing or damaged, a file beside it is, or an id of `eos_ids` lies
            outside the vocabulary.
    """

    def __init__(self, path: str | os.PathLike[str], *, eos_ids: Sequence[int] | None = None):
        self._file = Path(path)
        metadata = read_metadata(self._file.parent)
        self._library = _open(self._file)
        _add_tokens(self._library, metadata)
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise InputError(f"tokenizer {self._file}: has no tokens; copy it anew from the model")
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_tokens: Mapping[str, str] = {
            name: token.content for name, token in metadata.named.items()
        }
        named = {name: vocabulary[text] for name, text in self.special_tokens.items()}
        self.bos_id = named.get("bos_token")
        if eos_ids is None:
            eos_ids = () if "eos_token" not in named else (named["eos_token"],)
        self.eos_ids = checked_eos(eos_ids, self.vocab_size, self._file)
        candidates = (named.get("pad_token"), named.get("eos_token"), *self.eos_ids, self.bos_id, 0)
        self.pad_id = next(i for i in candidates if i is not None)
        added = self._library.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self._silent = frozenset({*special, *self.eos_ids})
        self._lock = threading.Lock()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of `text`, without opening and ending ids.

        Args:
            text: what to encode.
            special: whether the text of a special token ("<|im_end|>") stands for it. By default it
                is ordinary characters, so a prompt cannot smuggle in a special id. Added tokens
                that are not special ("<think>" of Qwen3) are found either way.

        Raises:
            InputError: the text is not valid Unicode, or the vocabulary cannot express it.
        """
        checked_text(text, self._file)
        # The lock: the library has `special` as a property, not as an argument.
        with _explained(self._file, f"cannot encode {text[:40]!r}"), self._lock:
            self._library.encode_special_tokens = not special
            return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`.

        Special ids contribute nothing, and neither do ids without a token: a model's embedding may
        be padded to a round size, and an untrained row can be sampled. The clean-up of spaces that
        some tokenizer_config.json ask for is left out, as transformers 5 leaves it out of BPE.
        """
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._silent]
        return self._library.decode(kept, skip_special_tokens=True)

    def boundaries(self) -> Callable[[int], bool]:
        """Returns a function that tells after which ids of a text it can be cut.

        It knows the decoders of today's language models: bytes, and white space as "▁" with or
        without bytes for what the vocabulary lacks. A text of any other is not cut at all.
        """
        steps = _decoder_steps(self._library)
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return self._character_boundaries()
        if _is_piecewise(steps):
            has_bytes = any(step["type"] == "ByteFallback" for step in steps)
            return lambda i: self._shows(i, has_bytes)
        return lambda i: False

    def _character_boundaries(self) -> Callable[[int], bool]:
        """Cuts where the bytes so far end with a character."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def is_boundary(i: int) -> bool:
            token = self._token(i)
            if not token:
                return False
            decoder.decode(_token_bytes(token))
            return not decoder.getstate()[0]

        return is_boundary

    def _shows(self, i: int, has_bytes: bool) -> bool:
        """Whether an id is more than white space and no byte.

        One wrong byte spoils the whole run of bytes that it is in, so a run has to be over.
        """
        token = self._token(i)
        is_byte = has_bytes and len(token) == 6 and token.startswith("<0x") and token[5] == ">"
        return bool(token.strip(_SPACE + " ")) and not is_byte

    def _token(self, i: int) -> str:
        """The token of an id that decoding does not leave out, else nothing."""
        if i in self._silent or not 0 <= i < self.vocab_size:
            return ""
        return self._library.id_to_token(i) or ""


def _open(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise InputError(f"tokenizer {file}: no such file; give a tokenizer.json")
    with _explained(file, "not a tokenizer.json"):
        library = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    if any(step.get("stop") for step in _decoder_steps(library)):
        # The library ends the process's thread on a text shorter than what it should strip.
        raise InputError(
            f"tokenizer {file}: its decoder strips the end of texts, which is not supported; set"
            " `stop` of the decoder Strip to 0"
        )
    library.no_truncation()
    library.no_padding()
    return library


def _add_tokens(library: tokenizers.Tokenizer, metadata: Metadata) -> None:
    library.add_tokens([_library_token(token) for token in metadata.added.values()])
    known = {token.content: None for token in library.get_added_tokens_decoder().values()}
    library.add_tokens([_library_token(token) for token in metadata.missing(known)])


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
        special=token.special,
    )


def _decoder_steps(library: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    decoder: Any = library.decoder
    if decoder is None:
        return []
    return list(_flat(json.loads(decoder.__getstate__())))


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if step["type"] != "Sequence":
        yield step
    else:
        for inner in step["decoders"]:
            yield from _flat(inner)


def _is_piecewise(steps: list[dict[str, Any]]) -> bool:
    """Whether every token says the same wherever it stands, but for leading spaces and bytes."""
    kinds = [step["type"] for step in steps]
    if kinds == ["Metaspace"]:
        return True
    harmless = {"Replace", "ByteFallback", "Fuse", "Strip"}
    if not kinds or not set(kinds) <= harmless or "Replace" in kinds[1:]:
        return False
    for step in steps:
        if step["type"] in ("Replace", "Strip") and step["content"] != " ":
            return False
        if step.get("stop") or step.get("pattern", _PATTERN) != _PATTERN:
            return False
    return True


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies.

    Printable characters of Latin-1 stand for themselves, the other bytes for the characters from
    256 on in order; the rule is that of GPT-2's `bytes_to_unicode`.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


def _token_bytes(token: str) -> bytes:
    """The bytes that the library's byte-level decoder makes of a token."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


@contextlib.contextmanager
def _explained(file: Path, failure: str) -> Iterator[None]:
    """Turns what the library raises into an error that names the file and the failure."""
    try:
        yield
    except BaseException as error:
        # The library raises plain Exceptions and, where it did not expect a file's content, panics.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"tokenizer {file}: {failure} ({reason}); copy the file anew from the model"
        ) from None
