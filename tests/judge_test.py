"""The judge of diversity, against a stand-in server that answers well, badly, late or not."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flowrl_jax import judge as command
from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import judge as module
from flowrl_jax.evaluation.judge import Judge, JudgeConfig, parse_score, question
from flowrl_jax.graded import write_records

QUICK = {"backoff": 0.01, "timeout": 5.0}


def completion(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Server:
    """Answers with what `answer(number, body)` gives: a status and JSON, bytes, or headers too."""

    def __init__(self, answer):
        self.answer, self.requests, self.headers = answer, [], []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                status, content, *headers = outer.answer(number, body)
                drops = content if isinstance(content, tuple) else ()
                raw = b"".join(drops) or content
                raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in (headers[0] if headers else {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    for drop in drops or (raw,):
                        self.wfile.write(drop)
                        time.sleep(0.05 if drops else 0)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.jsonl"
    records = [
        {"prompt_id": p, "prompt": f"Problem {p} {{}}", "responses": [
            f"way {i} " + "x" * 400 for i in range(16)]}
        for p in range(3)
    ]  # fmt: skip
    write_records(path, records)
    return path


def run(samples, server, *more):
    words = [
        f"--samples={samples}", f"--endpoint={server.endpoint}", "--model=stand-in",
        "--backoff=0.01", f"--json={samples.parent}/summary.json", *more,
    ]  # fmt: skip
    code = command.main(words)
    summary = samples.parent / "summary.json"
    return code, json.loads(summary.read_text()) if summary.exists() else None


def lines(samples):
    text = samples.with_name(samples.name + ".judge.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def judgement(answer, **changes):
    with Server(answer) as server:
        config = JudgeConfig(endpoint=server.endpoint, model="m", **{**QUICK, **changes})
        return Judge(config)("?"), len(server.requests)


def test_scores_are_means_over_orders_and_prompts(samples):
    by_problem = {"Problem 0": "2", "Problem 1": "4", "Problem 2": "Score: 5"}

    def answer(number, body):
        return completion(
            next(v for k, v in by_problem.items() if k in body["messages"][1]["content"])
        )

    with Server(answer) as server:
        code, summary = run(samples, server)
        assert code == 0
        assert len(server.requests) == 9
        path, body = server.requests[0]
        assert path == "/v1/chat/completions"
        assert body["model"] == "stand-in" and body["temperature"] == 0
        assert all("Authorization" not in headers for headers in server.headers)
    assert summary["score"]["mean"] == pytest.approx(11 / 3)
    assert summary["counts"] == {"1": 0, "2": 3, "3": 0, "4": 3, "5": 3}
    assert summary["failures"] == {} and summary["prompts_without_score"] == 0
    assert summary["spread"] == 0.0
    assert summary["judge"]["model"] == "stand-in"
    assert "the largest group" in summary["judge"]["question"]
    header, *records = lines(samples)
    assert header == summary["judge"]
    assert len(records) == 9 and {r["reply"] for r in records} == set(by_problem.values())


def test_every_repeat_reads_whole_responses_in_another_order(samples):
    with Server(lambda *_: completion("3")) as server:
        run(samples, server, "--repeats=4")
        texts = [b["messages"][1]["content"] for _, b in server.requests if
                 "Problem 1" in b["messages"][1]["content"]]  # fmt: skip
    orders = {tuple(line.split()[1] for line in t.splitlines() if line.startswith("way "))
              for t in texts}  # fmt: skip
    assert len(orders) == 4
    assert all(sorted(map(int, found)) == list(range(16)) for found in orders)
    assert all(text.count("x" * 400) == 16 for text in texts)
    recorded = [r for r in lines(samples)[1:] if r["key"] == "/1"]
    assert {tuple(map(str, r["order"])) for r in recorded} == orders


def test_cut_of_the_paper(samples):
    with Server(lambda *_: completion("3")) as server:
        run(samples, server, "--cut=300", "--repeats=1")
        text = server.requests[0][1]["messages"][1]["content"]
    assert "x" * 290 in text and "x" * 300 not in text


def test_a_judge_that_writes_nonsense_gives_no_score(samples):
    """Failures are counted, and no 3 stands in for them."""
    replies = {"Problem 0": "1", "Problem 1": "I cannot say", "Problem 2": "12"}

    def answer(number, body):
        return completion(
            next(v for k, v in replies.items() if k in body["messages"][1]["content"])
        )

    with Server(answer) as server:
        code, summary = run(samples, server)
    assert code == 0
    assert summary["score"]["mean"] == 1.0
    assert summary["failures"] == {"unparsable": 6}
    assert summary["prompts_without_score"] == 2
    assert sum(r["score"] is None for r in lines(samples)[1:]) == 6


def test_no_score_at_all_is_an_error(samples, capsys):
    with Server(lambda *_: completion("three")) as server:
        code, summary = run(samples, server)
    assert code == 2 and summary is None
    assert "9 times unparsable" in capsys.readouterr().err


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_fault_that_passes_is_tried_again(status):
    answer = lambda number, _: completion("4") if number == 2 else (status, {})  # noqa: E731
    found, calls = judgement(answer)
    assert (found.score, found.failure, found.calls, calls) == (4, None, 3, 3)


def test_a_fault_that_stays_is_given_up():
    found, calls = judgement(lambda *_: (500, {}), attempts=3)
    assert (found.score, found.failure, calls) == (None, "status 500", 3)


def test_a_request_that_cannot_succeed_is_not_repeated():
    found, calls = judgement(lambda *_: (400, {"error": "too long"}))
    assert (found.score, found.failure, calls) == (None, "status 400", 1)


def test_a_server_says_when_to_come_back():
    answer = lambda number, _: completion("4") if number else (429, {}, {"Retry-After": "1"})  # noqa: E731
    began = time.monotonic()
    found, _ = judgement(answer)
    assert found.score == 4 and time.monotonic() - began >= 1.0


def test_garbage_in_place_of_an_answer():
    for content in (b"<html>", {"choices": []}, {"choices": [{"message": {"content": None}}]}, []):
        found, calls = judgement(lambda *_, content=content: (200, content), attempts=2)
        assert (found.score, found.failure) == (None, "no completion in the answer")
        assert calls == 2


def test_a_slow_server_is_cut_off():
    def answer(number, body):
        if number == 0:
            time.sleep(1.0)
        return completion("2")

    began = time.monotonic()
    found, calls = judgement(answer, timeout=0.2)
    assert (found.score, calls) == (2, 2) and time.monotonic() - began < 0.9
    found, _ = judgement(lambda *_: time.sleep(0.5) or completion("2"), timeout=0.1, attempts=2)
    assert (found.score, found.failure) == (None, "timeout")


def test_a_server_that_drips_is_cut_off():
    """Every byte comes in time, all of them would not."""
    began = time.monotonic()
    found, _ = judgement(lambda *_: (200, (b" ",) * 60), timeout=0.2, attempts=1)
    assert found.failure == "timeout" and time.monotonic() - began < 1.0


def test_nobody_listens():
    with Server(lambda *_: completion("1")) as server:
        endpoint = server.endpoint
    found = Judge(JudgeConfig(endpoint=endpoint, model="m", attempts=2, **QUICK))("?")
    assert found.score is None and found.failure == "no connection (ConnectionRefusedError)"
    assert found.calls == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(status, samples, capsys):
    with Server(lambda *_: (status, {})) as server:
        code, _ = run(samples, server, "--parallel=1")
        assert code == 2 and len(server.requests) == 1
    error = capsys.readouterr().err
    assert f"answered {status}" in error and error.count("\n") <= 3


def test_redirects_are_not_followed(samples):
    with Server(lambda *_: completion("5")) as other:
        moved = lambda *_: (302, {}, {"Location": other.endpoint})  # noqa: E731
        found, _ = judgement(moved)
        assert found.failure == "status 302" and not other.requests


def test_the_key_is_sent_and_not_written(samples, monkeypatch, capsys):
    monkeypatch.setenv("MY_JUDGE_KEY", "sesame-123")
    with Server(lambda *_: completion("5")) as server:
        code, _ = run(samples, server, "--key_env=MY_JUDGE_KEY")
        assert code == 0
        assert server.headers[0]["Authorization"] == "Bearer sesame-123"
    output = capsys.readouterr()
    written = [path.read_text() for path in samples.parent.iterdir()]
    assert not any("sesame" in text for text in [*written, output.out, output.err])
    assert command.main([f"--samples={samples}", "--endpoint=http://x", "--model=m",
                         "--key_env=NO_SUCH_KEY"]) == 2  # fmt: skip
    assert "NO_SUCH_KEY" in capsys.readouterr().err


def test_an_interrupted_command_goes_on_and_tries_failures_again(samples):
    broken = threading.Event()

    def answer(number, body):
        if "Problem 1" in body["messages"][1]["content"] and not broken.is_set():
            return 400, {}
        return completion("4")

    with Server(answer) as server:
        code, summary = run(samples, server)
        assert code == 0 and summary["failures"] == {"status 400": 3}
        scores = samples.with_name(samples.name + ".judge.jsonl")
        whole = scores.read_bytes()
        scores.write_bytes(whole[:-20])  # killed in writing a line
        lost = json.loads(whole.splitlines()[-1])
        server.requests.clear()
        broken.set()
        code, summary = run(samples, server)
        assert code == 0 and summary["failures"] == {} and summary["score"]["mean"] == 4.0
        assert len(server.requests) == 3 + (lost["score"] is not None)
        server.requests.clear()
        assert run(samples, server)[1] == summary and not server.requests


def test_scores_of_another_measurement_are_refused(samples, capsys):
    with Server(lambda *_: completion("4")) as server:
        run(samples, server)
        code, _ = run(samples, server, "--cut=300")
        assert code == 2 and "another cut" in capsys.readouterr().err
        # Other responses to the same prompts are judged anew.
        records = [json.loads(line) for line in samples.read_text().splitlines()]
        records[0]["responses"][3] = "changed"
        write_records(samples, records)
        server.requests.clear()
        assert run(samples, server)[0] == 0 and len(server.requests) == 3


def test_thresholds_are_the_papers():
    text = question("?", ["r"] * 16)
    for part in ("1 - it has 14 or more", "2 - it has 11 to 13", "3 - it has 7 to 10",
                 "4 - it has 4 to 6", "5 - it has fewer than 4"):  # fmt: skip
        assert part in text
    assert "1 - it has 7 or more" in question("?", ["r"] * 8)
    with pytest.raises(InputError, match="at least 8"):
        question("?", ["r"] * 7)


def test_replies_that_are_scores():
    for reply in ("4", " 4\n", "**4**", "Score: 4", "4/5", "Rating - 4."):
        assert parse_score(reply) == 4, reply
    for reply in ("", "0", "6", "45", "4 5", "3-4", "about 4 I think", "4.5", "-"):
        assert parse_score(reply) is None, reply


def test_orders_do_not_depend_on_the_process():
    assert module.order(0, "/7", 1, 5) == [3, 1, 0, 2, 4]
    assert module.order(0, "/7", 1, 16) != module.order(0, "/7", 2, 16)
    assert module.order(0, "/7", 1, 16) != module.order(1, "/7", 1, 16)


def test_wrong_settings_and_samples(samples, tmp_path, capsys):
    for changes in ({"endpoint": "localhost:8000"}, {"model": ""}, {"repeats": 0}, {"timeout": 0}):
        with pytest.raises(InputError):
            JudgeConfig(**{"endpoint": "http://x", "model": "m", **changes})
    (tmp_path / "bad.jsonl").write_text('{"prompt_id": 1}\n')
    words = ["--endpoint=http://127.0.0.1:1", "--model=m"]
    assert command.main([f"--samples={tmp_path}/bad.jsonl", *words]) == 2
    assert "lacks prompt, responses" in capsys.readouterr().err
    samples.write_text(samples.read_text() * 2)
    assert command.main([f"--samples={samples}", *words]) == 2
    assert "occurs twice" in capsys.readouterr().err
