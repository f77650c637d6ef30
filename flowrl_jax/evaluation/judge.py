"""Diversity as a language model judges it: a score from 1 to 5 for a prompt's responses.

The measure of arXiv 2509.15207, appendix E, and of its release: a judge reads all responses to a
problem and says how varied their approaches are, whether right or wrong. Departures from the
release, all of which make the figure mean what it says:

- the judge reads whole responses; the release cuts each to its first 300 characters (`cut=300`);
- every prompt is judged several times, the responses in another order each time;
- a call that fails, or whose reply is no score, is counted and never becomes a score; the release
  puts 3 in its place;
- model, endpoint, wording and seed are recorded with the scores.

The wording is ours, the scale's thresholds are the paper's: judge and wording both move the figure,
so compare figures of one judge only.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowrl_jax.errors import InputError, require
from flowrl_jax.evaluation.statistics import bootstrap

SYSTEM = (
    "You compare solutions of one problem and rate how varied their approaches are. You reply with"
    " a single digit and nothing else."
)
_QUESTION = """Below are a problem and {count} numbered solutions of it. Rate how varied the \
solutions are in their approach: the idea or method that is used, not the wording, the layout, \
the length or the final answer. Whether a solution is right does not matter.

Group the solutions by approach and look at the largest group:
1 - it has {one} or more of the {count} solutions
2 - it has {two} to {one_less}
3 - it has {three} to {two_less}
4 - it has {four} to {three_less}
5 - it has fewer than {four}

Problem:
{problem}

{solutions}

Reply with one digit, 1, 2, 3, 4 or 5."""
_PAPER_COUNT = 16
_PAPER_GROUPS = (14, 11, 7, 4)  # least size of the largest group for scores 1, 2, 3 and 4
_LEAST_COUNT = 8  # below it thresholds fall together
_SCORE = re.compile(r"\W*(?:(?:score|rating)\W+)?([1-5])(?:\s*/\s*5)?\W*", re.IGNORECASE)
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FATAL = {
    401: "the key is missing or wrong: name the variable that holds it with --key_env",
    403: "the key may not use this model: correct --key_env or --model",
    404: "no such address or model: correct --endpoint or --model",
}
_MAX_REPLY = 1 << 20  # bytes
_MAX_WAIT = 60.0  # seconds between two attempts


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who judges, and how.

    Attributes:
        endpoint: address of an OpenAI-compatible server up to and with its version, such as
            http://localhost:8000/v1.
        model: name of the judge there.
        repeats: times each prompt is judged, every time in another order.
        seed: of the orders.
        cut: characters of each response that the judge reads, from its start; 0 for all. 300 as
            in the release.
        max_tokens: of the reply; a judge that thinks before it replies needs more.
        timeout: seconds that one call may take.
        attempts: calls for one judgement, where calls fail in a way that may pass.
        backoff: seconds before the second attempt; doubles with each, up to 60.
    """

    endpoint: str
    model: str
    repeats: int = 3
    seed: int = 0
    cut: int = 0
    max_tokens: int = 8
    timeout: float = 60.0
    attempts: int = 5
    backoff: float = 1.0

    def __post_init__(self):
        address = urllib.parse.urlsplit(self.endpoint)
        require(
            address.scheme in ("http", "https") and bool(address.netloc),
            f"--endpoint={self.endpoint} is no address: give one such as http://localhost:8000/v1",
        )
        require(bool(self.model), "--model is missing: name the judge")
        for field, least in (("repeats", 1), ("cut", 0), ("max_tokens", 1), ("attempts", 1)):
            value = getattr(self, field)
            require(value >= least, f"--{field}={value} must be at least {least}")
        require(self.timeout > 0, f"--timeout={self.timeout} must be more than 0 seconds")

    def record(self) -> dict[str, Any]:
        """What two scores must share to be of one measurement, as JSON."""
        shared = ("endpoint", "model", "repeats", "seed", "cut", "max_tokens")
        return {name: getattr(self, name) for name in shared} | {
            "temperature": 0,
            "system": SYSTEM,
            "question": _QUESTION,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """One reply of the judge, or none.

    Attributes:
        score: 1 to 5; None where the judgement failed.
        reply: the text the judge wrote; None where no text came.
        failure: why there is no score: "unparsable" or what went wrong with the call; None if there
            is one.
        calls: to the server.
    """

    score: int | None
    reply: str | None
    failure: str | None
    calls: int


class Refused(Exception):
    """A call that failed; `passing` if another may succeed, after `wait` seconds if known."""

    def __init__(self, reason: str, *, passing: bool, wait: float | None = None):
        super().__init__(reason)
        self.passing, self.wait = passing, wait


def question(problem: str, responses: Sequence[str], cut: int = 0) -> str:
    """What the judge is asked.

    With another number of responses than the paper's 16 the thresholds are the same shares of it,
    rounded up.

    Args:
        problem: the prompt.
        responses: in the order to be read, at least 8.
        cut: as `JudgeConfig.cut`.

    Raises:
        InputError: there are fewer than 8 responses.
    """
    count = len(responses)
    require(
        count >= _LEAST_COUNT,
        f"{count} responses are too few to be judged on this scale: give at least {_LEAST_COUNT}"
        f" samples per prompt, {_PAPER_COUNT} as in the paper",
    )
    groups = [-(-count * group // _PAPER_COUNT) for group in _PAPER_GROUPS]
    names = ("one", "two", "three", "four")
    sizes = dict(zip(names, groups, strict=True))
    sizes |= {f"{name}_less": size - 1 for name, size in sizes.items()}
    texts = [response[:cut] if cut else response for response in responses]
    solutions = "\n\n".join(f"Solution {i}:\n{text}" for i, text in enumerate(texts, start=1))
    return _QUESTION.format(count=count, problem=problem, solutions=solutions, **sizes)


def order(seed: int, key: str, repeat: int, count: int) -> list[int]:
    """The order in which the responses of a prompt are read.

    Args:
        seed: of the config.
        key: of the prompt.
        repeat: number of the judgement.
        count: of responses.
    """
    # random.Random of a text is the same in every process and version, unlike hash().
    places = list(range(count))
    random.Random(f"{seed}/{key}/{repeat}").shuffle(places)
    return places


def parse_score(reply: str) -> int | None:
    """The score in a reply that is a score and nothing else, such as "4", "Score: 4" or "4/5"."""
    found = _SCORE.fullmatch(reply)
    return int(found[1]) if found else None


class Judge:
    """Asks a judge, again where that may help.

    Args:
        config: who and how.
        key: of the server; empty for none. It is sent and never written anywhere.
    """

    def __init__(self, config: JudgeConfig, key: str = ""):
        self._config, self._key = config, key
        self._opener = urllib.request.build_opener(_NoRedirects())
        self._stopped = threading.Event()

    def __call__(self, text: str) -> Judgement:
        """Returns the judgement of a question.

        Raises:
            InputError: the server says that no question can be answered this way: wrong key, model
                or address.
        """
        wait = self._config.backoff
        for call in range(1, self._config.attempts + 1):
            try:
                reply = self._call(text)
            except Refused as refusal:
                if not refusal.passing or call == self._config.attempts or self._stopped.is_set():
                    return Judgement(score=None, reply=None, failure=str(refusal), calls=call)
                self._stopped.wait(min(_MAX_WAIT, wait if refusal.wait is None else refusal.wait))
                wait *= 2.0
                continue
            score = parse_score(reply)
            failure = "unparsable" if score is None else None
            return Judgement(score=score, reply=reply, failure=failure, calls=call)
        raise AssertionError("attempts is at least 1")

    def stop(self) -> None:
        """Lets what waits for another attempt give up."""
        self._stopped.set()

    def _call(self, text: str) -> str:
        config = self._config
        body = {
            "model": config.model,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": text},
            ],
            "temperature": 0,
            "max_tokens": config.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        address = config.endpoint.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            raw = self._read(request)
        except urllib.error.HTTPError as error:
            with error:
                raise _status(error, config) from None
        except TimeoutError:
            raise Refused("timeout", passing=True) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise Refused("timeout", passing=True) from None
            kind = type(reason).__name__ if isinstance(reason, Exception) else str(reason)
            raise Refused(f"no connection ({kind})", passing=True) from None
        return _content(raw)

    def _read(self, request: urllib.request.Request) -> bytes:
        """The body of the answer; a server that sends byte by byte is cut off in time as well."""
        limit = time.monotonic() + self._config.timeout
        raw = b""
        with self._opener.open(request, timeout=self._config.timeout) as answer:
            while chunk := answer.read1(65536):
                raw += chunk
                if time.monotonic() > limit:
                    raise TimeoutError
                if len(raw) > _MAX_REPLY:
                    raise Refused("reply too long", passing=False)
        return raw


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the key is for the address that was named."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _status(error: urllib.error.HTTPError, config: JudgeConfig) -> Refused:
    if error.code in _FATAL:
        raise InputError(
            f"{config.endpoint} answered {error.code} to model {config.model}: {_FATAL[error.code]}"
        ) from None
    after = error.headers.get("Retry-After", "")
    wait = float(after) if after.isdigit() else None
    return Refused(f"status {error.code}", passing=error.code in _RETRIED, wait=wait)


def _content(raw: bytes) -> str:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        # Cut off or from another program on the way: another attempt may bring the whole.
        raise Refused("no completion in the answer", passing=True)
    return content


def summarize_scores(
    records: Sequence[Mapping[str, Any]], prompts: int, *, seed: int = 0
) -> dict[str, Any]:
    """The mean score, with what it is a mean of.

    A prompt's score is the mean over its judgements that succeeded; prompts without one are left
    out and counted.

    Args:
        records: of the judgements: "key" of the prompt, "score" and "failure".
        prompts: how many were to be judged.
        seed: of the bootstrap over prompts.

    Returns:
        "score" {"mean", "low", "high"}; "spread", the mean standard deviation over a prompt's
        orders; "prompts", "prompts_without_score", "judgements", "failures" by reason; "counts" of
        scores 1 to 5.

    Raises:
        InputError: there is no score at all.
    """
    scores: dict[str, list[int]] = {}
    failures: dict[str, int] = {}
    for record in records:
        if record["score"] is None:
            failures[record["failure"]] = failures.get(record["failure"], 0) + 1
        else:
            scores.setdefault(record["key"], []).append(record["score"])
    if not scores:
        reasons = ", ".join(f"{count} times {reason}" for reason, count in failures.items())
        raise InputError(
            f"no prompt of {prompts} has a score ({reasons or 'nothing was judged'}): see that the"
            " endpoint answers, and start again"
        )
    everything = [score for found in scores.values() for score in found]
    return {
        "score": bootstrap({"score": np.array([np.mean(x) for x in scores.values()])}, seed=seed)[
            "score"
        ],
        "spread": float(np.mean([np.std(found) for found in scores.values()])),
        "prompts": prompts,
        "prompts_without_score": prompts - len(scores),
        "judgements": len(records),
        "failures": failures,
        "counts": {str(score): everything.count(score) for score in range(1, 6)},
    }
