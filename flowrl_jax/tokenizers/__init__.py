"""Text to token ids and back, behind one small protocol, and conversations to text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flowrl_jax.errors import InputError
from flowrl_jax.tokenizers.base import Tokenizer
from flowrl_jax.tokenizers.chat import ChatTemplate, load_chat_template
from flowrl_jax.tokenizers.files import generation_eos
from flowrl_jax.tokenizers.huggingface import HuggingFaceTokenizer
from flowrl_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from flowrl_jax.tokenizers.streaming import StreamDecoder
from flowrl_jax.tokenizers.symbols import train_symbol_tokenizer

__all__ = [
    "ChatTemplate",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "generation_eos",
    "load_chat_template",
    "load_tokenizer",
    "train_symbol_tokenizer",
]

_SUPPORTED = "a folder with tokenizer.json or tokenizer.model, or one of these files"


def load_tokenizer(
    path: str | os.PathLike[str], *, eos_ids: Sequence[int] | None = None
) -> Tokenizer:
    """Opens the tokenizer at `path`, choosing the kind by what lies there.

    Args:
        path: a tokenizer.json, a sentencepiece file NAME.model, or a folder that holds one. Where
            a folder has both, tokenizer.json counts, as for transformers 5.
        eos_ids: the ids that end a response, where they differ from the vocabulary's own.

    Raises:
        InputError: nothing supported lies there, or it is damaged.
    """
    place = Path(path)
    if place.is_dir():
        place = _vocabulary(place)
    if not place.exists():
        raise InputError(f"tokenizer {place}: no such file or folder; give {_SUPPORTED}")
    if place.suffix == ".json":
        return HuggingFaceTokenizer(place, eos_ids=eos_ids)
    return SentencePieceTokenizer(place, eos_ids=eos_ids)


def _vocabulary(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    if (folder / "vocab.json").is_file():
        raise InputError(
            f"tokenizer {folder}: vocab.json without tokenizer.json, which also says how text is"
            " split; write it with transformers: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)"
        )
    raise InputError(
        f"tokenizer {folder}: no tokenizer.json or tokenizer.model inside; give {_SUPPORTED}"
    )
