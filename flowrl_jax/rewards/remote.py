"""Rewards from an HTTP endpoint: one POST of JSON for a response, JSON back.

A failure of the endpoint is never a reward: after its retries a request raises `Unavailable`, and
the task decides, by its settings and in sight, what becomes of the run.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from flowrl_jax.errors import InputError, require

_LONGEST = 1 << 20  # bytes of a reply
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


class Unavailable(Exception):
    """The endpoint gave no usable reply, whatever was tried."""


@dataclasses.dataclass(frozen=True)
class EndpointConfig:
    """Settings of an endpoint.

    Attributes:
        url: where to POST; http or https.
        token_env: name of the environment variable with a bearer token; empty for none.
        seconds: time of one attempt.
        total_seconds: time of a request with all its attempts and pauses.
        retries: further attempts after the first.
        pause: seconds before the second attempt; it doubles, up to 30, and is drawn at random
            between half and all of that.
        failures: requests in a row that fail before the circuit opens.
        open_seconds: time for which an open circuit fails requests at once; then one is tried.
    """

    url: str = ""
    token_env: str = ""
    seconds: float = 60.0
    total_seconds: float = 300.0
    retries: int = 5
    pause: float = 0.5
    failures: int = 5
    open_seconds: float = 30.0

    def __post_init__(self):
        require(
            self.url.startswith(("http://", "https://")),
            f"endpoint url={self.url!r}: give one that begins with http:// or https://",
        )
        for name in ("seconds", "total_seconds", "pause", "open_seconds"):
            value = getattr(self, name)
            require(value > 0, f"endpoint {name}={value}: a time; give more than 0")
        require(self.retries >= 0, f"endpoint retries={self.retries}: give 0 or more")
        require(self.failures >= 1, f"endpoint failures={self.failures}: give 1 or more")


class Endpoint:
    """Asks an endpoint, again where that may help; safe to use from several threads.

    Args:
        config: the settings.

    Raises:
        InputError: the token's variable is not set.
    """

    def __init__(self, config: EndpointConfig):
        self._config = config
        self._headers = {"Content-Type": "application/json"}
        if config.token_env:
            token = os.environ.get(config.token_env)
            if not token:
                raise InputError(
                    f"endpoint token_env={config.token_env!r}: no such variable in the environment;"
                    " set it, or leave token_env empty"
                )
            self._headers["Authorization"] = f"Bearer {token}"
        self._lock = threading.Lock()
        self._failed, self._open_until = 0, 0.0

    def ask(self, question: Any) -> dict[str, Any]:
        """Returns the endpoint's reply, a JSON object.

        Args:
            question: whatever JSON can hold.

        Raises:
            Unavailable: the circuit is open, the endpoint does not take the request, or there is
                no good reply in time.
        """
        self._enter()
        try:
            reply = self._try(json.dumps(question).encode())
        except Unavailable:
            with self._lock:
                self._failed += 1
                if self._failed >= self._config.failures:
                    self._open_until = time.monotonic() + self._config.open_seconds
            raise
        with self._lock:
            self._failed, self._open_until = 0, 0.0
        return reply

    def _enter(self) -> None:
        """Fails at once while the circuit is open; lets one request through when it may close."""
        now = time.monotonic()
        with self._lock:
            if now < self._open_until:
                raise Unavailable(f"{self._config.url}: failed {self._failed} times in a row")
            if self._failed >= self._config.failures:
                self._open_until = now + self._config.total_seconds

    def _try(self, body: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + self._config.total_seconds
        pause, cause = self._config.pause, ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                wait = pause * random.uniform(0.5, 1.0)
                if time.monotonic() + wait >= deadline:
                    break
                time.sleep(wait)
                pause = min(2 * pause, 30.0)
            try:
                return self._post(body, min(deadline, time.monotonic() + self._config.seconds))
            except urllib.error.HTTPError as error:
                cause = f"status {error.code}"
                error.close()
                if error.code not in _RETRIED:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                cause = str(error) or type(error).__name__
        raise Unavailable(f"{self._config.url}: {cause}")

    def _post(self, body: bytes, deadline: float) -> dict[str, Any]:
        request = urllib.request.Request(self._config.url, body, self._headers, method="POST")
        left = max(deadline - time.monotonic(), 0.001)
        found = bytearray()
        with urllib.request.urlopen(request, timeout=left) as reply:
            while part := reply.read1(1 << 16):
                found += part
                if len(found) > _LONGEST:
                    raise ValueError(f"a reply of more than {_LONGEST} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError("the reply did not end in time")
        value = json.loads(found)
        if not isinstance(value, dict):
            raise ValueError("the reply is no JSON object")
        return value
