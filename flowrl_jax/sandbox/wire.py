"""Messages between the parts of a sandbox, each after its length.

`send` and `receive` are for parts that trust each other; a program's process is talked to in bytes.
"""

from __future__ import annotations

import marshal
import os
import select
import time

TYPE_CHECKING = False  # typing's own would be an import that costs milliseconds of every start
if TYPE_CHECKING:
    from typing import Any

_HEAD = 8


class Ended(Exception):
    """The other side is gone."""


class Late(Exception):
    """The other side did not answer in time."""


class TooLong(Exception):
    """A message is longer than allowed."""


def send(descriptor: int, message: Any, deadline: float = float("inf")) -> None:
    """Writes a message.

    Args:
        descriptor: of a pipe.
        message: of plain data.
        deadline: on `time.monotonic`'s clock.

    Raises:
        Ended: nobody reads any more.
        Late: the message is not taken before the deadline.
    """
    send_bytes(descriptor, marshal.dumps(message), deadline)


def framed(message: Any) -> bytes:
    """Returns what `send` writes."""
    return _framed(marshal.dumps(message))


def send_bytes(descriptor: int, body: bytes, deadline: float = float("inf")) -> None:
    """Writes a message of bytes; arguments and exceptions as those of `send`."""
    left = memoryview(_framed(body))
    os.set_blocking(descriptor, False)
    while left:
        _wait(descriptor, select.POLLOUT, deadline)
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            continue
        except OSError as error:
            raise Ended from error


def receive(descriptor: int, deadline: float = float("inf")) -> Any:
    """Reads a message; arguments and exceptions as those of `receive_bytes`."""
    return marshal.loads(receive_bytes(descriptor, deadline))


def receive_bytes(descriptor: int, deadline: float = float("inf"), longest: int = 1 << 62) -> bytes:
    """Reads a message of bytes.

    Args:
        descriptor: of a pipe.
        deadline: on `time.monotonic`'s clock.
        longest: bytes that the message may have.

    Raises:
        Ended: nobody writes any more.
        Late: the message is not complete before the deadline.
        TooLong: it is longer than allowed.
    """
    length = int.from_bytes(_read(descriptor, _HEAD, deadline), "big")
    if length > longest:
        raise TooLong
    return _read(descriptor, length, deadline)


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(_HEAD, "big") + body


def _read(descriptor: int, length: int, deadline: float) -> bytes:
    parts = []
    while length:
        _wait(descriptor, select.POLLIN, deadline)
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            raise Ended
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Late
        if poll.poll(None if left == float("inf") else left * 1000):
            return
