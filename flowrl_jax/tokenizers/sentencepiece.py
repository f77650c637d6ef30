"""Vocabularies of sentencepiece: NAME.model, as of Llama 2, Gemma or T5."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

from flowrl_jax.errors import InputError
from flowrl_jax.tokenizers.base import checked_eos, checked_text
from flowrl_jax.tokenizers.files import AddedToken, Metadata, read_metadata

_SPACE = "▁"
# A serialised message that is appended to another is merged into it: field 3 of a model is its
# normaliser, field 3 of that whether a text gets a leading space.
_WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """A sentencepiece vocabulary (Llama 2, Gemma, T5 style, or `train_symbol_tokenizer`'s).

    Special and added tokens that a tokenizer_config.json beside the file names are heeded; without
    one the special pieces are the vocabulary's own.

    Args:
        path: the .model file.
        eos_ids: the ids that end a response, where they differ from the vocabulary's own; some
            models (stories260K) end a text with their opening id.

    Raises:
        InputError: the file is missing or is no sentencepiece model, a file beside it is damaged,
            or an id of `eos_ids` lies outside the vocabulary.
    """

    def __init__(self, path: str | os.PathLike[str], *, eos_ids: Sequence[int] | None = None):
        file = Path(path)
        self._file = file
        self._processor, self._continued, self._pieces = _open(file)
        metadata = read_metadata(file.parent)
        self._added = self._added_ids(metadata)
        self._legacy = metadata.legacy
        added_ids = [i for i, _ in self._added.values()]
        self.vocab_size = max([len(self._pieces) - 1, *added_ids]) + 1
        special_ids = self._special_ids()
        own = self._own_special_ids()
        named = {name: token.content for name, token in metadata.named.items()}
        pieces = {name: self._pieces[i] for name, i in own.items()}
        self.special_tokens: Mapping[str, str] = pieces | named
        own |= {name: special_ids[text] for name, text in named.items()}
        self.bos_id = own.get("bos_token")
        if eos_ids is None:
            eos_ids = () if "eos_token" not in own else (own["eos_token"],)
        self.eos_ids = checked_eos(eos_ids, self.vocab_size, file)
        # Many vocabularies (Llama 2) have no padding id. Any id would do, since masks tell what
        # counts; an end id is the one a reader of raw token rows understands.
        candidates = (own.get("pad_token"), own.get("eos_token"), *self.eos_ids, self.bos_id, 0)
        self.pad_id = next(i for i in candidates if i is not None)
        # sentencepiece itself drops its control pieces; an end id may be an ordinary piece.
        dropped = {i for i, token in self._added.values() if token.special}
        self._silent = frozenset({*self.eos_ids, *dropped} - {self._processor.unk_id()})
        self._shown = {
            i: text
            for text, (i, token) in self._added.items()
            if not token.special and self._piece_id(text) is None
        }
        self._ordinary = _Splitter(
            (token, i) for i, token in self._added.values() if not token.special
        )
        contents = {text: token for text, (_, token) in self._added.items()}
        self._special = _Splitter(
            (contents.get(text, AddedToken(text)), i) for text, i in special_ids.items()
        )

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of `text`, without opening and ending ids.

        Args:
            text: what to encode.
            special: whether the text of a special piece ("</s>") stands for it. By default it is
                ordinary characters, so a prompt cannot smuggle in a special id. What follows a
                special piece is not given a leading space, unless tokenizer_config.json says
                `legacy`, as with transformers' LlamaTokenizer.

        Raises:
            InputError: the text is not valid Unicode.
        """
        splitter = self._special if special else self._ordinary
        ids: list[int] = []
        for start, part in splitter(checked_text(text, self._file)):
            if isinstance(part, int):
                ids.append(part)
            else:
                opens = start == 0 or (self._legacy and not part.startswith(" "))
                ids.extend((self._processor if opens else self._continued).encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special ids contribute nothing.

        An id beyond the vocabulary (a model's embedding may be padded to a round size, and an
        untrained row can be sampled) reads as the unknown piece.
        """
        texts: list[str] = []
        run: list[int] = []
        processor = self._processor
        for i in map(int, ids):
            if i in self._silent:
                continue
            if i not in self._shown:
                run.append(i if 0 <= i < len(self._pieces) else self._processor.unk_id())
                continue
            texts += [processor.decode(run), self._shown[i]]
            run, processor = [], self._continued
        return "".join([*texts, processor.decode(run)])

    def boundaries(self) -> Callable[[int], bool]:
        """Returns a function that tells after which ids of a text it can be cut.

        That is after ids that show, other than parts of a character and white space: sentencepiece
        drops white space at the beginning.
        """
        processor, silent, shown, pieces = self._processor, self._silent, self._shown, self._pieces
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def is_boundary(i: int) -> bool:
            if i in silent:
                return False
            is_piece = 0 <= i < len(pieces) and i not in shown
            if is_piece and processor.is_byte(i):
                decoder.decode(_byte(pieces[i]))
                return not decoder.getstate()[0]
            decoder.reset()
            return not is_piece or (bool(pieces[i].strip(_SPACE)) and not processor.is_control(i))

        return is_boundary

    def _own_special_ids(self) -> dict[str, int]:
        processor = self._processor
        ids = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
            "pad_token": processor.pad_id(),
        }
        return {name: i for name, i in ids.items() if i >= 0}

    def _special_ids(self) -> dict[str, int]:
        """The text and id of everything that `encode(special=True)` looks for."""
        processor = self._processor
        ids = {
            piece: i
            for i, piece in enumerate(self._pieces)
            if processor.is_control(i) or processor.is_unknown(i)
        }
        return ids | {text: i for text, (i, _) in self._added.items()}

    def _added_ids(self, metadata: Metadata) -> dict[str, tuple[int, AddedToken]]:
        """Added tokens by text; those without an id get the next free one, or their piece's."""
        known = {token.content: (i, token) for i, token in metadata.added.items()}
        following = max([len(self._pieces) - 1, *metadata.added]) + 1
        for token in metadata.missing(known):
            i = self._piece_id(token.content)
            if i is None:
                i, following = following, following + 1
            known[token.content] = (i, token)
        for text, (i, _) in known.items():
            own = self._piece_id(text)
            if own is not None and i != own:
                raise InputError(
                    f"tokenizer {self._file}: {text!r} is id {own} here and id {i} in the files"
                    " beside it; copy all of them from one model"
                )
        return known

    def _piece_id(self, text: str) -> int | None:
        i = self._processor.piece_to_id(text)
        return i if self._pieces[i] == text else None


class _Splitter:
    """Cuts a text at certain tokens.

    Args:
        tokens: token and id of each; the longest that fits at a place counts.
    """

    def __init__(self, tokens: Iterable[tuple[AddedToken, int]]):
        ordered = sorted(tokens, key=lambda entry: -len(entry[0].content))
        self._ids = [i for _, i in ordered]
        self._pattern = re.compile("|".join(f"({_pattern(token)})" for token, _ in ordered))

    def __call__(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Yields where each part starts, and it: text between tokens, or the id of one."""
        start = 0
        if self._ids:
            for match in self._pattern.finditer(text):
                if match.start() > start:
                    yield start, text[start : match.start()]
                assert match.lastindex
                yield match.start(), self._ids[match.lastindex - 1]
                start = match.end()
        if start < len(text):
            yield start, text[start:]


def _pattern(token: AddedToken) -> str:
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")


def _byte(piece: str) -> bytes:
    """The byte of a piece like <0x0A>."""
    return bytes([int(piece[3:-1], 16)])


def _open(
    file: Path,
) -> tuple[sentencepiece.SentencePieceProcessor, sentencepiece.SentencePieceProcessor, list[str]]:
    """The vocabulary for a text's beginning, that for what follows a special piece, the pieces."""
    if not file.is_file():
        raise InputError(f"tokenizer {file}: no such file; give a sentencepiece file NAME.model")
    wrong = f"tokenizer {file}: not a sentencepiece model; give one, or a tokenizer.json"
    content = file.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        continued = sentencepiece.SentencePieceProcessor(model_proto=content + _WITHOUT_PREFIX)
        pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        processor.decode([processor.unk_id()])
    except (RuntimeError, UnicodeDecodeError):
        raise InputError(wrong) from None
    # An empty file is no error to sentencepiece: it gives a vocabulary without pieces.
    if not pieces:
        raise InputError(wrong)
    return processor, continued, pieces
