"""Progress of a long loop on stderr: a redrawn bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, TextIO

import jax
from tqdm import tqdm

PLAIN_INTERVAL = 10.0  # seconds between lines where nothing can be redrawn (a log file, CI)


class _Lines:
    """Turns a redrawn tqdm bar into a sequence of plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        # tqdm writes "\r<bar><padding>" for every redraw and a lone "\n" when it closes.
        line = text.strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


class Progress:
    """A progress bar with rate and time left.

    Used as a context manager around a loop; `update` is called once per finished piece of work. The
    rate is an exponential average, so the compilation in the first step does not spoil the estimate
    for long. Only process 0 shows anything. Print other lines through `print`, which keeps them off
    the bar's line.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        initial: int = 0,
        unit: str = "step",
        stream: TextIO | None = None,
        interval: float | None = None,
    ) -> None:
        """Starts the bar.

        Args:
          total: pieces of work in the whole job.
          description: shown before the bar.
          initial: pieces already done (a resumed run); they do not count into the rate.
          unit: name of one piece.
          stream: where to draw, stderr if None.
          interval: least seconds between two drawings; by default 0.1 on a terminal, else 10.
        """
        target = sys.stderr if stream is None else stream
        terminal = target.isatty()
        if interval is None:
            interval = 0.1 if terminal else PLAIN_INTERVAL
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit=unit,
            file=target if terminal else _Lines(target),
            mininterval=interval,
            miniters=1,
            dynamic_ncols=terminal,
            ncols=None if terminal else 100,
            ascii=not terminal,
            disable=jax.process_index() != 0,
        )

    def update(self, count: int = 1, **figures: Any) -> None:
        """Reports finished work.

        Args:
          count: pieces finished since the last call.
          **figures: numbers or strings shown after the bar, e.g. reward=0.41.
        """
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(count)

    def print(self, line: str) -> None:
        """Prints a line on stdout without breaking the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Draws the bar once more and ends it."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
