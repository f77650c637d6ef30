"""The report: one well-formed file without outside references, with the numbers it was given."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flowrl_jax import evaluation, report
from flowrl_jax.errors import InputError
from flowrl_jax.graded import samples_from_records, write_records
from flowrl_jax.metric_sinks import MetricsConfig
from flowrl_jax.metrics import MetricWriter
from flowrl_jax.report.__main__ import main
from flowrl_jax.report.page import page
from flowrl_jax.report.plane import colors, plane_svg
from flowrl_jax.report.plot import Line, line_chart, moving_average, nice_scale, text

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "<script>alert('1')</script> & \"</pre>\x00\x1b[0m\ud800"


class Document(HTMLParser):
    """Checks that every tag is closed in order, and collects attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def prose(self) -> str:
        """The text, each run of white space one blank."""
        return " ".join(" ".join(self.words).split())


def interval(mean: float, half: float = 0.0) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(accuracy: float, distinct: float) -> evaluation.Summary:
    return {"pass_at_1": interval(accuracy, 0.02), "distinct_correct_16": interval(distinct, 0.3)}


def run(points: dict[int, tuple[float, float]], log_z: bool = False) -> report.Run:
    steps = list(points)
    curves = {
        "reward": report.Curve(steps=range(1, 61), values=[math.sin(i) for i in range(60)]),
        "pass_at_1": report.Curve(steps=steps, values=[p[0] for p in points.values()]),
        "distinct_correct": report.Curve(steps=steps, values=[p[1] for p in points.values()]),
    }
    if log_z:
        line = report.Curve(steps=range(60), values=[float(i) for i in range(60)])
        band = dataclasses.replace(line, low=[i - 1.0 for i in range(60)], high=[math.nan] * 60)
        curves |= {"log_z": line, "log_z_monte_carlo": band}
    return report.Run(curves=curves, log_z_points=[(1.0, 0.5, 1.5, 1.2)] if log_z else ())


@pytest.fixture
def data() -> report.ReportData:
    return report.ReportData(
        title="Countdown",
        summary="What was done.",
        settings={"beta": 4.0, "model": HOSTILE},
        results={
            "warmup": summary(0.2, 2.0),
            "flowrl": summary(0.6, 4.0),
            "grpo": summary(0.7, 1.5),
        },
        start="warmup",
        differences={"FlowRL minus GRPO": {"pass_at_1": interval(-0.1, 0.05)}},
        runs={
            "flowrl": run({10: (0.4, 3.0)}, log_z=True),
            "grpo": run({10: (0.5, 2.5), 20: (math.nan, 1.0)}),
        },
        samples=[
            report.SampleGroup(
                prompt=HOSTILE,
                samples={
                    "warmup": [report.Sample(response="1 + 1", correct=False, truncated=True)],
                    "flowrl": [
                        report.Sample(response="3 * 4", correct=True, form="a"),
                        report.Sample(response="4 * 3", correct=True, form="a"),
                        report.Sample(response=HOSTILE, correct=True, form="b"),
                    ],
                    "grpo": [report.Sample(response="4 * 3", correct=True, form="a")],
                },
            )
        ],
        command="make quickstart",
        versions={"jax": "0.10.2"},
        seed=3,
        seconds=431.2,
    )


def test_page_is_well_formed_and_holds_everything(data) -> None:
    document = Document(page(data))
    for words in (
        "Countdown",
        "What was done.",
        "0.600",
        "0.580 to 0.620",
        "distinct in 16",
        "FlowRL minus GRPO",
        "\N{MINUS SIGN}0.100",
        "Accuracy and diversity",
        "Learning curves",
        "log Z, learned and estimated",
        "3 of 3 correct, 2 distinct",
        "make quickstart",
        "seed 3 · 7 min 11 s · jax 0.10.2",
        "warm-up",
    ):
        assert words in document.prose, words
    assert document.tags.count("figure") >= 3 + 2


def test_page_refers_to_nothing_outside_itself(data) -> None:
    html = page(data)
    document = Document(html)
    assert not {"script", "link", "img", "iframe", "object", "use"} & set(document.tags)
    names = {name for name, _ in document.attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action"} & names
    assert not {name for name in names if name.startswith("on")}
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", html)
    assert "default-src 'none'" in html


def test_hostile_text_stays_text(data) -> None:
    hostile = dataclasses.replace(
        data, title=HOSTILE, labels={"flowrl": HOSTILE}, command=HOSTILE, versions={HOSTILE: "1"}
    )
    html = page(hostile)
    document = Document(html)
    assert "script" not in document.tags and "\x00" not in html and "\x1b" not in html
    html.encode("utf-8")  # an unpaired surrogate could not be written
    assert document.prose.count("<script>alert('1')</script>") >= 6


def test_same_solution_has_one_number_and_is_filled_where_it_is_found_first(data) -> None:
    html = page(data)
    badges = re.findall(r'<span class="(badge[^"]*)">([^<]*)</span>', html)
    assert badges == [
        ("badge", "wrong"),
        ("badge", "1 cut"),
        ("badge new", "solution 1"),
        ("badge new", "solution 2"),
        ("badge", "solution 1"),
    ]


def test_empty_parts_are_left_out() -> None:
    document = Document(page(report.ReportData(title="Nothing yet")))
    assert document.tags.count("section") == 0
    only_run = report.ReportData(title="One run", runs={"a": run({1: (0.1, 1.0), 2: (0.2, 2.0)})})
    assert "Learning curves" in Document(page(only_run)).prose
    only_results = report.ReportData(title="x", results={"a": {"mean_length": interval(5.0)}})
    assert "Accuracy and diversity" not in Document(page(only_results)).prose


def test_data_survives_json(data) -> None:
    plain = dataclasses.replace(
        data,
        runs={"flowrl": run({10: (0.4, 3.0)})},
        settings={"beta": 4.0},
        samples=data.samples[:0],
    )
    back = report.from_dict(json.loads(json.dumps(report.to_dict(plain), default=list)))
    assert page(back) == page(plain)
    with pytest.raises(InputError, match="colour"):
        report.from_dict({"title": "x", "colour": "red"})
    with pytest.raises(InputError, match="response"):
        report.from_dict(
            {"title": "x", "samples": [{"prompt": "p", "samples": {"a": [{"correct": True}]}}]}
        )


def test_wrong_data_are_refused() -> None:
    with pytest.raises(InputError, match="start='sft' is not among the results"):
        report.ReportData(title="x", start="sft", results={"a": summary(0.1, 1)})
    with pytest.raises(InputError, match="results of a, m lack"):
        report.ReportData(title="x", results={"a": {"m": {"mean": 1.0}}})


def test_trajectory_joins_start_evaluations_and_end(data) -> None:
    assert report.trajectory(data, "flowrl") == [(0.2, 2.0), (0.4, 3.0), (0.6, 4.0)]
    assert report.trajectory(data, "grpo") == [(0.2, 2.0), (0.5, 2.5), (0.7, 1.5)]
    assert report.trajectory(data, "warmup") == [(0.2, 2.0)]
    with_zero = dataclasses.replace(data, runs={"flowrl": run({0: (0.22, 2.2), 5: (0.3, 2.4)})})
    assert report.trajectory(with_zero, "flowrl")[0] == (0.22, 2.2)
    compared = report.equal_accuracy(data)
    assert compared is not None
    first, second, at = compared
    assert (first, second) == ("flowrl", "grpo")
    assert at.accuracy[-1] == 0.6 and at.first[-1] == 4.0
    assert at.second[-1] == pytest.approx(2.0)  # half-way from (0.5, 2.5) to (0.7, 1.5)
    assert "pass@1 = 0.600" in Document(page(data)).prose


def test_plane_is_an_svg_file_of_its_own(data, tmp_path) -> None:
    report.write_plane(tmp_path / "docs" / "plane.svg", data, title=HOSTILE)
    root = ElementTree.parse(tmp_path / "docs" / "plane.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    labels = {e.text for e in root.iter(f"{space}text") if e.get("class") == "name"}
    assert labels == {"FlowRL", "GRPO", "warm-up"}
    titles = [e.text or "" for e in root.iter(f"{space}title")]
    assert any("FlowRL, end: pass@1 0.600, distinct 4.00" in title for title in titles)
    with pytest.raises(InputError, match="needs pass_at_1"):
        report.write_plane(tmp_path / "x.svg", report.ReportData(title="x"))


def test_plane_marks_lie_where_the_numbers_say(data) -> None:
    svg = plane_svg(data)
    assert svg is not None
    root = ElementTree.fromstring(svg)
    ticks = [(float(e.get("x", 0)), float(e.get("y", 0)), e) for e in root.iter("text")]
    ticks = [(x, y, e) for x, y, e in ticks if e.get("class") == "tick"]
    along_x = {float(e.text or 0): x for x, _, e in ticks if e.get("text-anchor") == "middle"}
    along_y = {float(e.text or 0): y - 3.8 for _, y, e in ticks if e.get("text-anchor") == "end"}
    circle = next(e for e in root.iter("circle") if e.get("r") == "7.0")  # FlowRL's end, (0.6, 4)
    assert float(circle.get("cx", 0)) == pytest.approx(along_x[0.6], abs=0.2)
    assert float(circle.get("cy", 0)) == pytest.approx(along_y[4.0], abs=0.2)


def test_labels_of_policies_that_end_together_do_not_overlap() -> None:
    results = {f"policy{i}": summary(0.5 + i / 1000, 3.0) for i in range(4)}
    svg = plane_svg(report.ReportData(title="x", results=results))
    assert svg is not None
    boxes = []
    for element in ElementTree.fromstring(svg).iter("text"):
        if element.get("class") == "name":
            x, y = float(element.get("x", 0)), float(element.get("y", 0))
            left = x if element.get("text-anchor") == "start" else x - 60
            boxes.append((left, y - 11, left + 60, y + 3))
    assert len(boxes) == 4
    for a, b in itertools.combinations(boxes, 2):
        assert a[0] >= b[2] or a[2] <= b[0] or a[1] >= b[3] or a[3] <= b[1]


def test_colors_are_distinct_and_the_start_is_grey(data) -> None:
    palette = colors(data)
    assert palette["warmup"] == "var(--c0)" and len(set(palette.values())) == 3


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.213, 0.658), (-3.2, 17), (4.9, 4.9), (0, 0), (1e-5, 3e-5), (0, 87_000), (-2, -1)],
)
def test_scale_covers_the_data_with_a_few_round_ticks(low: float, high: float) -> None:
    scale = nice_scale([low, math.nan, high], 10, 110)
    room = 1e-9 * (scale.high - scale.low)
    assert scale.low <= low + room and high <= scale.high + room
    assert scale(scale.low) == 10 and scale(scale.high) == pytest.approx(110)
    assert 3 <= len(scale.ticks) <= 9
    np.testing.assert_allclose(np.diff(scale.ticks), scale.ticks[1] - scale.ticks[0])
    labels = scale.labels()
    assert len(set(labels)) == len(labels)
    shown = [float(t.replace("k", "e3")) for t in labels]
    np.testing.assert_allclose(shown, scale.ticks, rtol=1e-6, atol=1e-9)


def test_scale_keeps_probabilities_within_bounds() -> None:
    scale = nice_scale([0.1, 0.97], 0, 1, bounds=(0.0, 1.0))
    assert (scale.low, scale.high) == (0.0, 1.0)
    assert nice_scale([], 0, 1).high == 1.0
    # Data outside the bounds is shown all the same.
    assert nice_scale([-0.5, -0.1], 0, 1, bounds=(0.0, math.inf)).low <= -0.5


def test_moving_average_equals_numpy() -> None:
    values = np.random.default_rng(0).normal(size=30)
    values[7] = np.nan
    got = moving_average(values.tolist(), 5)
    expected = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(30)]
    np.testing.assert_allclose(got, expected)


def test_line_is_interrupted_where_a_value_is_missing() -> None:
    line = Line(label="a", color="red", x=range(6), y=[1, 2, math.nan, 3, math.inf, 4])
    root = ElementTree.fromstring(line_chart([line], label="x"))
    (path,) = (e.get("d", "") for e in root.iter("path"))
    assert path.count("M") == 3 and "nan" not in path
    assert len(list(root.iter("circle"))) == 4


def test_long_curves_stay_small() -> None:
    values = np.random.default_rng(0).normal(size=20_000).cumsum()
    line = Line(label="a", color="red", x=range(20_000), y=values.tolist(), style="smooth")
    assert len(line_chart([line], label="x")) < 20_000


def test_text_escapes_attributes_too() -> None:
    assert text("a\"'<&>\x01\n") == "a&quot;&#x27;&lt;&amp;&gt;\u2401\n"
    # What turns the direction of writing would show another text than the one that was judged.
    assert text("1\u202e2\x85") == "1\u27e6U+202E\u27e72\u27e6U+0085\u27e7"


def test_table_shows_means_and_intervals() -> None:
    results = {"flowrl": {"pass_at_1": interval(0.5, 0.1), "kl_to_reference": interval(12.0, 1)}}
    results["grpo"] = {"pass_at_1": interval(-0.0001)}
    lines = report.render_table(results, {"flowrl": "FlowRL"}).splitlines()
    assert lines[0].split() == ["FlowRL", "grpo"]
    assert lines[2].split() == [
        "pass@1",
        "0.500",
        "[0.400,",
        "0.600]",
        "0.000",
        "[0.000,",
        "0.000]",
    ]
    assert lines[3].split() == ["KL", "to", "reference", "12.0", "[11.0,", "13.0]", "-"]
    assert lines[0].index("grpo") == lines[3].rindex("-")


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A job's folder written by the real writers: a warm-up, two runs, samples, a summary."""
    folder = tmp_path / "job"
    quiet = MetricsConfig(tensorboard=False, table=False)
    with MetricWriter(folder / "warmup", config=quiet) as writer:
        writer.write(1, {"train/loss": 1.0})
    for policy in ("grpo", "flowrl"):
        with MetricWriter(folder / policy, config=quiet) as writer:
            for step in range(1, 5):
                writer.write(step, {"rollout/reward_mean": math.nan if step == 2 else step / 10})
                if step % 2 == 0:
                    found = {"eval/pass_at_1": step / 10, "eval/distinct_correct_16": 1.0 * step}
                    writer.write(step, {**found, "eval/distinct_correct_16_low": 0.0})
    policies = {}
    for policy in ("warmup", "flowrl", "grpo"):
        records = [
            {
                "prompt_id": p,
                "prompt": f"make {p}",
                "responses": ["1 + 2", "2 + 1"],
                "correct": [p > 0, p > 1],
                "form": ["a" if p > 0 else None, "b" if p > 1 else None],
                "length": [3, 3],
                "truncated": [False, False],
                "kl": [0.0, 0.1],
            }
            for p in range(8)
        ]
        write_records(folder / policy / "samples.jsonl", records)
        policies[policy] = evaluation.summarize(samples_from_records(records), k=2)
    job = {"policies": policies, "seconds": 12.5, "start": "warmup", "unknown": 1}
    (folder / "summary.json").write_text(json.dumps(job))
    return folder


def test_workdir_is_read(workdir) -> None:
    data = report.load([workdir])
    assert data.title == "job" and data.seconds == 12.5
    assert data.policies == ["warmup", "flowrl", "grpo"] and list(data.runs) == ["flowrl", "grpo"]
    curves = data.runs["flowrl"].curves
    assert list(curves) == ["reward", "pass_at_1", "distinct_correct"]
    assert curves["distinct_correct"].steps == [2, 4]
    assert curves["distinct_correct"].values == [2.0, 4.0]
    np.testing.assert_array_equal(curves["reward"].values, [0.1, math.nan, 0.3, 0.4])
    # Prompt 0 is solved by nobody: it comes last.
    assert [group.prompt for group in data.samples] == [
        f"make {p}" for p in (1, 2, 3, 4, 5, 6, 7, 0)
    ]
    assert list(data.samples[0].samples) == ["warmup", "flowrl", "grpo"]
    Document(page(data))


def test_run_folder_alone_is_read(workdir) -> None:
    assert "reward" in report.load_run(workdir / "flowrl").curves
    assert report.load_run(workdir / "flowrl" / "metrics.jsonl").curves
    assert list(report.load([workdir / "grpo"]).runs) == ["grpo"]


def test_folder_without_a_run_is_refused(workdir, tmp_path) -> None:
    with pytest.raises(InputError, match="holds none of the metrics"):
        report.load_run(workdir / "warmup")
    with pytest.raises(InputError, match="absent does not exist"):
        report.load([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl and no judged samples"):
        report.load([tmp_path / "empty"])
    (workdir / "summary.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        report.load([workdir])


@pytest.mark.slow
def test_command_writes_report_and_picture(workdir, tmp_path) -> None:
    command = [sys.executable, "-m", "flowrl_jax.report", str(workdir)]
    done = subprocess.run(
        [*command, f"--plane={tmp_path / 'plane.svg'}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert str(workdir / "report.html") in done.stdout and "pass@1" in done.stdout
    Document((workdir / "report.html").read_text(encoding="utf-8"))
    ElementTree.parse(tmp_path / "plane.svg")


def test_command_names_a_wrong_folder_in_one_line(tmp_path, capsys) -> None:
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error
    assert not (tmp_path / "report.html").exists()
