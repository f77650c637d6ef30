"""What the rest of the program asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from flowrl_jax.errors import InputError


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: the largest id plus one; a model may have more rows than that.
        pad_id: the id that fills unused positions. It may equal an end id: masks, never ids,
            tell which positions count.
        bos_id: the id that opens a text, or None where the vocabulary has none.
        eos_ids: the ids that end a response; empty where the vocabulary has none.
        special_tokens: the texts that a chat template knows by name, "bos_token" and the like.
    """

    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of `text`, without opening and ending ids.

        Args:
            text: what to encode.
            special: whether the text of a special token ("</s>") stands for that token, as in a
                rendered conversation. By default it is plain characters, so that a prompt cannot
                smuggle in a special id.

        Raises:
            InputError: the text is not valid Unicode, or the vocabulary cannot express it.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special ids contribute nothing."""
        ...

    def boundaries(self) -> Callable[[int], bool]:
        """Returns a function to call with the ids of a text, one by one from the first.

        It tells whether the text can be cut after that id: the id shows, and no later one changes
        what it and those before it say. `StreamDecoder` stands on it.
        """
        ...


def checked_text(text: str, name: object) -> str:
    """Returns a text that every vocabulary can at least be asked for.

    Args:
        text: what is to be encoded.
        name: of the tokenizer, for the message.

    Raises:
        InputError: half of a surrogate pair is in it, which JSON can smuggle into a string.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"tokenizer {name}: character {error.start} of {text[:40]!r} is half of a surrogate"
            " pair, not Unicode; mend the text"
        ) from None
    return text


def checked_eos(ids: Sequence[int], vocab_size: int, name: object) -> tuple[int, ...]:
    """Returns the ids that end a response, each inside the vocabulary.

    Args:
        ids: as asked for.
        vocab_size: the largest id plus one.
        name: of the tokenizer, for the message.

    Raises:
        InputError: an id lies outside the vocabulary.
    """
    for i in ids:
        if not 0 <= i < vocab_size:
            raise InputError(
                f"eos id {i}: outside the {vocab_size} ids of {name}; give ids from 0 to"
                f" {vocab_size - 1}, in tokenizer.eos_ids or generation_config.json"
            )
    return tuple(int(i) for i in ids)
