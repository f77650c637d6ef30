"""Text to token ids and back, behind one small protocol."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from flowrl_jax.errors import InputError

_SUPPORTED = "a sentencepiece file NAME.model, or a folder that holds tokenizer.model"


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer.

    Attributes:
        vocab_size: number of ids the tokenizer knows; a model may have more rows than that.
        pad_id: the id that fills unused positions. It may equal an end id: masks, never ids,
            tell which positions count.
        bos_id: the id that opens a text, or None where the vocabulary has none.
        eos_ids: the ids that end a response; empty where the vocabulary has none.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without opening and ending ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special ids contribute nothing."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece vocabulary (Llama 2, Gemma, T5 style, or `train_symbol_tokenizer`'s).

    Args:
        path: the .model file.
        eos_ids: the ids that end a response, where they differ from the vocabulary's own; some
            models (stories260K) end a text with their opening id.

    Raises:
        InputError: the file is missing or is no sentencepiece model, or an id of `eos_ids` lies
            outside the vocabulary.
    """

    def __init__(self, path: str | os.PathLike[str], *, eos_ids: Sequence[int] | None = None):
        file = Path(path)
        processor = _open(file)
        size = processor.get_piece_size()
        self._processor = processor
        self.vocab_size = size
        own_eos = processor.eos_id()
        self.bos_id = _present(processor.bos_id())
        if eos_ids is None:
            self.eos_ids: tuple[int, ...] = () if own_eos < 0 else (own_eos,)
        else:
            self.eos_ids = tuple(int(i) for i in eos_ids)
        for i in self.eos_ids:
            if not 0 <= i < size:
                raise InputError(
                    f"eos id {i}: outside the {size} ids of {file}; give ids from 0 to {size - 1}"
                )
        # Many vocabularies (Llama 2) have no padding id. Any id would do, since masks tell what
        # counts; an end id is the one a reader of raw token rows understands.
        self.pad_id = next(
            i for i in (processor.pad_id(), own_eos, *self.eos_ids, processor.bos_id(), 0) if i >= 0
        )
        # sentencepiece itself drops its control pieces; an end id may be an ordinary piece.
        self._silent = frozenset(self.eos_ids)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without opening and ending ids.

        The text of a special piece ("</s>") is encoded as ordinary characters, so a prompt
        cannot smuggle in a special id.
        """
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special ids contribute nothing.

        An id beyond the vocabulary (a model's embedding may be padded to a round size, and an
        untrained row can be sampled) reads as the unknown piece.
        """
        unknown = self._processor.unk_id()
        kept = [
            int(i) if 0 <= int(i) < self.vocab_size else unknown
            for i in ids
            if int(i) not in self._silent
        ]
        return self._processor.decode(kept)


def train_symbol_tokenizer(path: str | os.PathLike[str], symbols: Iterable[str]) -> None:
    """Writes a sentencepiece model in which each given symbol is one piece and nothing else is.

    Ids are 0 padding, 1 opening, 2 end, 3 unknown, then the symbols in the given order. The
    longest symbol at a position wins ("35" before "3"), white space is neither added nor removed,
    and equal input gives a byte-identical file.

    Args:
        path: where to write; the folder is created. The file appears whole or not at all.
        symbols: the pieces, each once.

    Raises:
        InputError: there is no symbol, or one is empty, given twice, or has white space in it.
    """
    pieces = list(symbols)
    if not pieces:
        raise InputError("symbols: empty; a tokenizer needs at least one symbol")
    seen: set[str] = set()
    for piece in pieces:
        if not piece or any(c.isspace() for c in piece):
            raise InputError(f"symbol {piece!r}: empty or has white space; give visible characters")
        if piece in seen:
            raise InputError(f"symbol {piece!r}: given twice; give each symbol once")
        seen.add(piece)
    model = io.BytesIO()
    # The type "bpe" is the one that accepts a vocabulary made of user symbols alone; with the
    # symbols as training text no character is left for it to learn.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pieces),
        model_writer=model,
        model_type="bpe",
        vocab_size=len(pieces) + 4,
        user_defined_symbols=pieces,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write beside the target and rename, so a reader in another process never sees half a file.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.getvalue())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def load_tokenizer(
    path: str | os.PathLike[str], *, eos_ids: Sequence[int] | None = None
) -> Tokenizer:
    """Opens the tokenizer at `path`, choosing the kind by what lies there.

    Args:
        path: a sentencepiece file NAME.model, or a folder that holds tokenizer.model.
        eos_ids: the ids that end a response, where they differ from the vocabulary's own.

    Raises:
        InputError: nothing supported lies there.
    """
    place = Path(path)
    if place.is_dir():
        if (place / "tokenizer.model").is_file():
            return SentencePieceTokenizer(place / "tokenizer.model", eos_ids=eos_ids)
        if not (place / "tokenizer.json").is_file():
            raise InputError(f"tokenizer {place}: no tokenizer.model inside; give {_SUPPORTED}")
        place = place / "tokenizer.json"
    if not place.exists():
        raise InputError(f"tokenizer {place}: no such file or folder; give {_SUPPORTED}")
    if place.suffix == ".json":
        raise InputError(f"tokenizer {place}: this format is not supported; give {_SUPPORTED}")
    return SentencePieceTokenizer(place, eos_ids=eos_ids)


def _open(file: Path) -> sentencepiece.SentencePieceProcessor:
    if not file.is_file():
        raise InputError(f"tokenizer {file}: no such file; give {_SUPPORTED}")
    wrong = f"tokenizer {file}: not a sentencepiece model; give {_SUPPORTED}"
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())
    except RuntimeError:
        raise InputError(wrong) from None
    # An empty file is no error to sentencepiece: it gives a vocabulary without pieces.
    if not processor.get_piece_size():
        raise InputError(wrong)
    return processor


def _present(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
