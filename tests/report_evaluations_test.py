"""The report's parts about evaluations: what is read, the heat map, the samples, a real browser."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from html import escape
from pathlib import Path

import pytest

from flowrl_jax import report
from flowrl_jax.errors import InputError
from flowrl_jax.graded import write_records
from flowrl_jax.metric_sinks import MetricsConfig
from flowrl_jax.metrics import MetricWriter
from flowrl_jax.report import heatmap, samples
from flowrl_jax.report.__main__ import main
from flowrl_jax.report.page import page

HOSTILE = "<script>alert('1')</script> & \"</pre></details>\x00\x1b[0m\u202e"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def record(problem: int, right: int, *, n: int = 4, **more) -> dict:
    """A problem of which the first `right` responses are correct, in two solutions."""
    forms = [f"f{i % 2}" if i < right else None for i in range(n)]
    return {
        "prompt_id": problem,
        "prompt": f"problem number {problem}",
        "responses": [f"response {i} to {problem}" for i in range(n)],
        "correct": [form is not None for form in forms],
        "form": forms,
        "answer": [form or "x" for form in forms],
        "reward": [float(form is not None) for form in forms],
        "outcome": ["wrong" if form is None else "correct" for form in forms],
        "length": [3] * n,
        "truncated": [False] * n,
        "kl": [0.0] * n,
        **more,
    }


def benchmark(folder: Path, name: str, counts: list[int], **more) -> Path:
    """A file as `evaluate --benchmarks` writes it."""
    file = folder / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"settings": {"benchmark": name, "run": folder.parent.name}}
    write_records(file, [record(p, right, **{**stamp, **more}) for p, right in enumerate(counts)])
    return file


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs with a benchmark both were evaluated on, the second on one problem less."""
    one, two = tmp_path / "one", tmp_path / "two"
    benchmark(one / "benchmarks", "aime24", [0, 1, 4])
    benchmark(two / "benchmarks", "aime24", [2, 0])
    (one / "benchmarks" / "aime24.judge.jsonl").write_text("what a judge wrote\n")
    with MetricWriter(one, config=MetricsConfig(tensorboard=False, table=False)) as writer:
        for step in (1, 2):
            found = {"eval/pass_at_1": 0.5, "eval/pass_at_1_low": 0.4, "eval/pass_at_1_high": 0.6}
            writer.write(step, found)
    return one, two


def test_runs_and_files_are_read_together(runs, tmp_path) -> None:
    data = report.load(list(runs))
    assert data.title == "one, two" and list(data.evaluations) == ["aime24"]
    found = data.evaluations["aime24"]
    assert found.problems == [0, 1, 2] and found.rates["one"] == [0.0, 0.25, 1.0]
    assert found.rates["two"][:2] == [0.5, 0.0] and math.isnan(found.rates["two"][2])
    assert found.figures["one"]["pass_at_4"]["mean"] == pytest.approx(2 / 3)
    assert found.figures["one"]["maj_at_4"]["mean"] == pytest.approx(1 / 3)
    # Both were given 0 and 1, somebody solved them; 2 was given to one policy alone.
    assert [group.problem for group in data.samples] == [0, 1, 2]
    assert list(data.samples[0].samples) == ["one", "two"]
    # The same from the files themselves, from their folder, and from a folder of the runs.
    files = [run / "benchmarks" / "aime24.jsonl" for run in runs]
    assert report.load(files).evaluations["aime24"].rates["one"] == found.rates["one"]
    assert report.load(files).title == "aime24"
    assert list(report.load([runs[1] / "benchmarks"]).evaluations) == ["aime24"]
    assert list(report.load([tmp_path]).evaluations["aime24"].rates) == ["one", "two"]
    assert list(report.load([tmp_path, runs[0]]).evaluations["aime24"].rates) == ["one", "two"]


def test_interval_of_a_curve_is_read(runs) -> None:
    curve = report.load_run(runs[0]).curves["pass_at_1"]
    assert (curve.low, curve.high) == ([0.4, 0.4], [0.6, 0.6])


def test_runs_of_one_name_are_told_apart(tmp_path) -> None:
    for name in ("a", "b"):
        benchmark(tmp_path / name / "flowrl" / "benchmarks", "aime24", [1])
    data = report.load([tmp_path / "a" / "flowrl", tmp_path / "b" / "flowrl"])
    assert data.policies == ["a/flowrl", "b/flowrl"]
    files = [tmp_path / name / "flowrl" / "benchmarks" / "aime24.jsonl" for name in ("a", "b")]
    stamped = [benchmark(tmp_path / name / "x" / "out", "amc23", [1]) for name in ("a", "b")]
    assert len(report.load([*files, *stamped]).evaluations["amc23"].rates) == 2


def test_own_problems_of_other_words_are_other_problems(tmp_path) -> None:
    write_records(tmp_path / "a.jsonl", [record(0, 1), record(1, 1)])
    write_records(tmp_path / "b.jsonl", [record(0, 1, prompt="another"), record(1, 3)])
    data = report.load([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert list(data.results) == ["a", "b"]
    assert data.evaluations[report.HELD_OUT].problems == [0, 1, 0]
    assert data.results["b"]["pass_at_1"]["mean"] == 0.5
    assert data.samples[0].prompt == "problem number 1"  # the one that both were given


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "does not hold judged samples"),
        ("{\n", "line 1 is not a JSON object"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"prompt_id": 0}\n', "does not hold judged samples"),
        ('{"prompt_id": 0, "correct": 3}\n', "does not hold judged samples"),
        (json.dumps(record(0, 1, form=[None] * 4)), "does not hold judged samples"),
        (json.dumps(record(0, 1, outcome=["wrong"])), "does not hold judged samples"),
        (f"{json.dumps(record(0, 1))}\n" * 2, "prompt_id 0 is there 2 times"),
        ("\udcff\n", "does not hold judged samples"),
    ],
)
def test_damaged_file_is_one_line(tmp_path, capsys, content, words) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main([str(file), f"--output={tmp_path / 'r.html'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(file) in error and words in error
    assert not (tmp_path / "r.html").exists()


def test_output_that_cannot_be_written_is_one_line(runs, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(runs[0]), f"--output={tmp_path / 'file' / 'r.html'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be written" in error
    with pytest.raises(InputError, match="problems=-1"):
        report.load([runs[0]], problems=-1)


def cells(html: str) -> list[tuple[str, str]]:
    """(class, title) of the heat maps' cells."""
    return re.findall(r'<rect class="(h\w+)"[^>]*><title>([^<]*)</title>', html)


def test_heat_map_has_a_cell_of_every_problem_and_policy(runs) -> None:
    found = cells(page(report.load(list(runs))))
    assert found == [
        ("h3", "problem 1, one: 0.25 (1 of 4), mean of policies 0.12"),
        ("h0", "problem 1, two: 0.00 (0 of 4), mean of policies 0.12"),
        ("h0", "problem 0, one: 0.00 (0 of 4), mean of policies 0.25"),
        ("h5", "problem 0, two: 0.50 (2 of 4), mean of policies 0.25"),
        ("h10", "problem 2, one: 1.00 (4 of 4), mean of policies 1.00"),
        ("hx", "problem 2, two: not evaluated"),
    ]


def test_shades_tell_none_and_all_from_nearly() -> None:
    assert [heatmap.shade(x) for x in (0.0, 1e-9, 1 - 1e-9, 1.0)] == [0, 1, 9, 10]
    ramp = [heatmap.shade(i / 100) for i in range(101)]
    assert ramp == sorted(ramp) and set(ramp) == set(range(11))


def evaluation(problems: int, policies: int) -> report.ReportData:
    rates = {f"p{i}": [(j * 7 + i) % 17 / 16 for j in range(problems)] for i in range(policies)}
    found = report.Evaluation(
        problems=range(problems), rates=rates, samples=dict.fromkeys(rates, 16)
    )
    return report.ReportData(title="x", evaluations={"set": found})


def test_heat_map_stays_within_its_picture_and_small() -> None:
    html = page(evaluation(500, 6))
    picture = re.search(r"<svg class=\"plot\" viewBox=\"0 0 (\d+) (\d+)\".*?</svg>", html)
    assert picture is not None and len(html) < 800_000
    rects = list(ElementTree.fromstring(picture[0]).iter("rect"))
    boxes = {tuple(float(r.get(k, 0)) for k in ("x", "y", "width", "height")) for r in rects}
    assert len(boxes) == 500 * 6
    assert all(x + w <= float(picture[1]) and y + h <= float(picture[2]) for x, y, w, h in boxes)
    assert min(w for _, _, w, _ in boxes) >= 12
    # More problems than can be told apart share cells, and the page says so.
    many = page(evaluation(3000, 1))
    assert len(cells(many)) == 1000 and "a column is 3 problems of like difficulty" in many


def group(responses: list[report.Sample], problem: int = 0) -> report.SampleGroup:
    return report.SampleGroup(prompt=HOSTILE, samples={"p": responses}, problem=problem)


def test_responses_are_grouped_by_solution_and_outcome() -> None:
    right = [report.Sample(response=f"r{i}", correct=True, form="ab"[i % 3 == 0]) for i in range(6)]
    wrong = [
        report.Sample(response="w", correct=False, outcome="no_answer", truncated=i == 0)
        for i in range(3)
    ]
    html = samples.samples_section(report.ReportData(title="x", samples=[group(right + wrong)]))
    words = " ".join(re.sub(r"<[^>]*>", " ", html).split())
    assert "6 of 9 correct, 2 distinct" in words
    assert "✓ 4 \N{MULTIPLICATION SIGN} solution 1" in words
    assert "✗ 3 \N{MULTIPLICATION SIGN} no answer 1 cut w" in words
    assert "left out" not in words and "<script" not in html


def test_what_is_left_out_of_the_samples_is_counted() -> None:
    long = "start " + "x" * 9000 + " end"
    listed = [report.Sample(response=f"{long}{i}", correct=False) for i in range(5)]
    listed += [report.Sample(response=str(i), correct=True, form=str(i)) for i in range(20)]
    html = samples.samples_section(report.ReportData(title="x", samples=[group(listed)]))
    assert "and 9 more groups with 13 responses, left out" in html
    html = samples.samples_section(report.ReportData(title="x", samples=[group(listed[:5])]))
    assert "and 2 more with 2 other texts, left out" in html
    assert "6,611 characters left out" in html and "end0</pre>" in html
    assert len(html) < 10_000


def test_samples_of_a_page_are_bounded(monkeypatch) -> None:
    groups = [group([report.Sample(response="y" * 500, correct=False)], i) for i in range(30)]
    monkeypatch.setattr(samples, "MAX_CHARACTERS", 20_000)
    html = samples.samples_section(report.ReportData(title="x", samples=groups))
    shown = html.count("<details class")
    assert 1 < shown < 30 and f"{shown} of 30 problems" in html and len(html) < 22_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
@pytest.mark.parametrize("width", [1400, 390])
def test_browser_shows_every_section_and_has_nothing_to_say(runs, tmp_path, width) -> None:
    hostile = [record(0, 2, prompt=HOSTILE, responses=[HOSTILE] * 4)]
    write_records(runs[1] / "samples.jsonl", hostile)
    assert main([str(tmp_path), f"--output={tmp_path / 'report.html'}"]) == 0
    # A page of ours measures it: the report runs no script, and windows have a least width.
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<title></title><iframe width="{width}" height="900" srcdoc="{escape(html)}"></iframe>'
        "<script>onload = () => document.title = document.querySelector('iframe')"
        ".contentDocument.documentElement.scrollWidth</script>",
        encoding="utf-8",
    )
    dom, log = browse(tmp_path, tmp_path / "report.html", width)
    assert "CONSOLE" not in log, log
    for heading in ("Evaluations", "Problem by problem", "Learning curves", "Samples by solution"):
        assert f"<h2>{heading}</h2>" in dom
    assert "<script" not in dom and dom.count("<rect") >= 6
    wide = re.search(r"<title>(\d+)</title>", browse(tmp_path, frame, width)[0])
    assert wide is not None and int(wide[1]) <= width


def browse(folder: Path, file: Path, width: int) -> tuple[str, str]:
    """What the page became in the browser, and what the browser logged."""
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        " --disable-background-networking --disable-component-update --disable-sync"
        " --enable-logging=stderr --v=0 --dump-dom"
    )
    assert CHROMIUM is not None
    profile = folder / f"browser-{file.stem}-{width}"
    size = f"--window-size={width},900"
    command = [CHROMIUM, *options.split(), f"--user-data-dir={profile}", size, file.as_uri()]
    dom, log = folder / f"{profile.name}.html", folder / f"{profile.name}.log"
    # Its helpers may outlive it and hold pipes open: it writes to files, and its session is ended.
    with dom.open("wb") as out, log.open("wb") as errors:
        browser = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True)
        try:
            assert browser.wait(timeout=60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    return dom.read_text(encoding="utf-8"), log.read_text(encoding="utf-8", errors="replace")
