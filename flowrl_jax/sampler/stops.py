"""Stop strings, found inside the jitted loop.

An automaton (Aho and Corasick, 1975) reads the characters of a text and knows after each the
longest end of the text that begins a stop string. Lifted to tokens, it is a table that a loop on
any device looks up once per row and token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flowrl_jax.errors import InputError

_ASCII = 128


class Decoder(Protocol):
    """What is needed of a tokenizer; see `flowrl_jax.tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special ids contribute nothing."""
        ...

    def boundaries(self) -> Callable[[int], bool]:
        """Returns a function that tells after which ids of a text it can be cut."""
        ...


@struct.dataclass
class StopTable:
    """What each token does to the search for the stop strings; an argument of jitted programs.

    Attributes:
        next_state: `[states, V]` of the smallest integer dtype: the state after a token, and the
            number of states where a stop string ends inside it. State 0 is that of an empty text.
    """

    next_state: jax.Array

    @classmethod
    def build(cls, tokenizer: Decoder, stop_strings: Sequence[str], vocab_size: int) -> StopTable:
        """Works the table out from what each token adds to a text that goes before it.

        A response continues its prompt: a first token's leading space counts. Special tokens leave
        the state as it is. Stop strings are ASCII, which the parts of other characters that a
        token may end or begin with never are: a match does not depend on how they continue. One
        exception: some tokenizers decode ASCII bytes beside damaged UTF-8 as damaged too, while
        the table takes them as they are.

        Args:
            tokenizer: of the tokens.
            stop_strings: at least one, each of at least one character.
            vocab_size: V, the columns of the model's logits.

        Raises:
            InputError: there is no stop string, one is empty or not ASCII, or no token of the
                tokenizer is a letter or digit.
        """
        _check(stop_strings)
        texts = _token_texts(tokenizer, vocab_size)
        return cls(jnp.asarray(_lift(*_automaton(stop_strings), texts)))


def advance(table: StopTable, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reads one token per row.

    Args:
        table: of the stop strings.
        state: `[S]` int32, zeros before the first token.
        token: `[S]` int32.

    Returns:
        The states `[S]` int32 after the tokens, 0 after a hit, and `[S]` bool: whether a stop
        string ended inside the token.
    """
    following = table.next_state[state, token].astype(jnp.int32)
    hit = following == table.next_state.shape[0]
    return jnp.where(hit, 0, following), hit


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Returns the text before the stop string that ends first, the longest of several there.

    Args:
        text: of a response.
        stop_strings: none of them empty.
    """
    starts = [(text.find(stop), len(stop)) for stop in stop_strings]
    ends = [(start + size, start) for start, size in starts if start >= 0]
    return text[: min(ends)[1]] if ends else text


def _check(stop_strings: Sequence[str]) -> None:
    if isinstance(stop_strings, str) or not stop_strings:
        raise InputError(
            f"stop strings {stop_strings!r}: not a list of texts; give at least one, or leave"
            " stop strings out"
        )
    for stop in stop_strings:
        if not stop:
            raise InputError("stop string '': is empty and would end every response; leave it out")
        if not stop.isascii():
            raise InputError(
                f"stop string {stop!r}: has characters outside ASCII, which tokens may hold in"
                " parts; give ASCII stop strings, or the token's id as an end id"
            )


def _token_texts(tokenizer: Decoder, vocab_size: int) -> list[str]:
    """What each id adds to a text; a token alone would lose the white space that it begins with."""
    anchor = _anchor(tokenizer, vocab_size)
    said = len(tokenizer.decode([anchor]))
    return [tokenizer.decode([anchor, i])[said:] for i in range(vocab_size)]


def _anchor(tokenizer: Decoder, vocab_size: int) -> int:
    for i in range(vocab_size):
        text = tokenizer.decode([i])
        if text.isascii() and text.isalnum() and tokenizer.boundaries()(i):
            return i
    raise InputError(
        f"stop strings: none of {vocab_size} tokens is of letters or digits, so texts cannot be"
        " told apart; leave stop strings out"
    )


def _automaton(stop_strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The characters' automaton.

    Returns:
        The class of each ASCII character `[128]`, 0 for those of no stop string, and the state
        after a state and a class `[states + 1, classes]`; the last state is a hit and stays.
    """
    prefixes = sorted({stop[:size] for stop in stop_strings for size in range(len(stop))}, key=len)
    # What lies beyond a stop string inside another cannot be reached.
    prefixes = [p for p in prefixes if not any(stop in p for stop in stop_strings)]
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    letters = sorted(set("".join(stop_strings)))
    classes = np.zeros(_ASCII, np.int32)
    classes[[ord(letter) for letter in letters]] = np.arange(1, len(letters) + 1)
    moves = np.zeros((len(prefixes) + 1, len(letters) + 1), np.int32)
    moves[-1] = len(prefixes)
    for prefix, state in number.items():
        for place, letter in enumerate(letters, start=1):
            read = prefix + letter
            if read.endswith(tuple(stop_strings)):
                moves[state, place] = len(prefixes)
            else:
                ends = (read[start:] for start in range(len(read) + 1))
                moves[state, place] = next(number[end] for end in ends if end in number)
    return classes, moves


def _lift(classes: np.ndarray, moves: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The state after each state and token: every token's characters read from every state."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    read = np.where(codes < _ASCII, classes[np.minimum(codes, _ASCII - 1)], 0)
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    states = len(moves) - 1
    dtype = next(d for d in (np.int8, np.int16, np.int32) if states <= np.iinfo(d).max)
    table = np.repeat(np.arange(states, dtype=dtype)[:, None], len(texts), axis=1)
    tokens = np.arange(len(texts))
    for place in range(int(lengths.max(initial=0))):
        tokens = tokens[lengths[tokens] > place]
        table[:, tokens] = moves[table[:, tokens], read[starts[tokens] + place]]
    return table
