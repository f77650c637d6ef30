"""A vocabulary of given symbols, for tasks whose texts are made of few of them."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from flowrl_jax.errors import InputError


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
