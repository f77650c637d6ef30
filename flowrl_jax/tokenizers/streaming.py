"""Ids that arrive one after the other, as text that never has to be taken back."""

from __future__ import annotations

from collections.abc import Iterable

from flowrl_jax.tokenizers.base import Tokenizer


class StreamDecoder:
    """Turns ids into text as they arrive.

    All that `push` and `finish` return, joined, is `tokenizer.decode` of all ids, whatever they
    are; a character whose bytes are spread over several ids appears when it is complete. The cost
    is that of decoding each id twice.

    Args:
        tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._start()

    def _start(self) -> None:
        self._is_boundary = self._tokenizer.boundaries()
        self._pending: list[int] = []
        # The last id that was decoded. In front of the next ones it makes them a continuation:
        # alone, they would lose the white space that they begin with.
        self._last: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these ids complete; often some of it comes with later ones.

        Args:
            ids: the next of the text.
        """
        end = 0
        for i in map(int, ids):
            self._pending.append(i)
            if self._is_boundary(i):
                end = len(self._pending)
        if not end:
            return ""
        done, self._pending = self._pending[:end], self._pending[end:]
        text = self._text(done)
        self._last = done[-1:]
        return text

    def finish(self) -> str:
        """Returns the rest of the text, incomplete characters included, and starts a new one."""
        text = self._text(self._pending)
        self._start()
        return text

    def _text(self, ids: list[int]) -> str:
        said = len(self._tokenizer.decode(self._last))
        return self._tokenizer.decode([*self._last, *ids])[said:]
