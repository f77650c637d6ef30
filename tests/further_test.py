"""A rating and a judge's scores reach the tables of an evaluation, from files alone."""

import json

import numpy as np
import pytest

from flowrl_jax import evaluate as command
from flowrl_jax import report
from flowrl_jax.errors import InputError
from flowrl_jax.evaluation import codeforces, judgements
from flowrl_jax.evaluation.further import further_figures
from flowrl_jax.evaluation.judge import JudgeConfig
from flowrl_jax.evaluation.paper_table import TABLES
from flowrl_jax.evaluation.results import paper_columns
from flowrl_jax.graded import read_records, write_records
from flowrl_jax.report.page import page
from tests.tiny_runs import tiny_arguments

N = 16
CONFIG = JudgeConfig(endpoint="http://localhost:1/v1", model="stand-in", repeats=2)


def record(prompt, correct):
    return {
        "prompt_id": prompt,
        "prompt": f"problem {prompt}",
        "responses": [f"way {i} of {prompt}" for i in range(len(correct))],
        "correct": correct,
        "form": ["form" if right else None for right in correct],
        "answer": [None] * len(correct),
        "reward": [float(right) for right in correct],
        "outcome": ["correct" if right else "wrong" for right in correct],
        "length": [3] * len(correct),
        "truncated": [False] * len(correct),
        "kl": [0.0] * len(correct),
        "settings": {"benchmark": "codeforces", "run": "own"},
    }


def first_right(place):
    """Attempts of which the one at `place` is the first that passes; None: none does."""
    return [place is not None and i >= place for i in range(N)]


# Row -> contest, problem, attempts: 2 and 1 contests' points are worked out below by hand.
ROWS = (("10A", 0), ("10B", 2), ("20A", None), ("20B1", 1), ("30A", 0))
PEOPLE = {"10": [(1900, 1500), (1500, 900), (1200, 400)], "20": [(2000, 2000), (1000, 500)]}


def attempts():
    return [record(row, first_right(place)) for row, (_, place) in enumerate(ROWS)]


@pytest.fixture
def folder(tmp_path):
    """Standings of contests 10 and 20; of 30 there are none."""
    place = tmp_path / "codeforces"
    place.mkdir()
    contests = [
        {"contest": name, "problems": {"A": 500, ("B" if name == "10" else "B1"): 1000},
         "standings": [{"rating": r, "points": p} for r, p in people]}
        for name, people in PEOPLE.items()
    ]  # fmt: skip
    (place / "problems.json").write_text(json.dumps([name for name, _ in ROWS]))
    (place / "contests.json").write_text(json.dumps(contests))
    (place / "ratings.json").write_text(json.dumps({"800": 3, "1400": 5, "2500": 2}))
    return place


def rating_by_hand(people, points):
    """The least whole rating whose expected place is at most the place of these points."""
    place = 1 + sum((p > points) + 0.5 * (p == points) for _, p in people)
    best = max(r for r, _ in people) + 100
    for rating in range(best):
        expected = 1 + sum(1 / (1 + 10 ** ((rating - r) / 400)) for r, _ in people)
        if expected <= place:
            return rating
    return best


def test_rating_of_verdicts(folder):
    rated = codeforces.rate(attempts(), codeforces.load_standings(folder))
    # Contest 10: 500, and 1000 less two failed attempts; contest 20: 1000 less one.
    each = [rating_by_hand(PEOPLE["10"], 500 + 900), rating_by_hand(PEOPLE["20"], 950)]
    assert rated.summary["rating"]["mean"] == pytest.approx(np.mean(each), abs=1.0)
    assert rated.summary["rating"]["low"] == pytest.approx(min(each), abs=1.0)
    assert rated.summary["rating"]["high"] == pytest.approx(max(each), abs=1.0)
    people = np.array([800] * 3 + [1400] * 5 + [2500] * 2)
    assert rated.summary["percentile"]["mean"] == pytest.approx(
        100 * np.mean(people < np.mean(each))
    )
    assert (rated.contests, rated.unknown) == (2, ["30"])
    assert rated.describe() == "rating over 2 of 3 contests; without standings: 30"
    (folder / "ratings.json").unlink()
    assert list(codeforces.rate(attempts(), codeforces.load_standings(folder)).summary) == [
        "rating"
    ]


def test_all_rows_are_rated_or_none(folder):
    standings = codeforces.load_standings(folder)
    for records in (attempts()[:-1], [*attempts(), record(5, first_right(0))]):
        with pytest.raises(InputError, match=r"problems.json has 5 problems and \d rows"):
            codeforces.rate(records, standings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("problems.json", "[", "problems.json is not JSON"),
        ("problems.json", "{}", "is no list of problems"),
        ("problems.json", '["10A", "tenB"]', "entry 1 is 'tenB'"),
        ("problems.json", '["99A"]', "has none of the contests"),
        ("problems.json", '["10A", "11A", "10A"]', "has 10A twice"),
        ("ratings.json", "[1500]", "ratings.json does not say how many"),
        ("contests.json", "[]", "contests.json is not a list of contests"),
    ],
)
def test_damaged_standings_name_the_file(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        codeforces.load_standings(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    (folder / "problems.json").unlink()
    with pytest.raises(InputError, match=r"problems.json cannot be read"):
        codeforces.load_standings(folder)


def test_entry_of_a_contest_from_replies():
    def row(handle, points, penalty):
        return {"party": {"members": [{"handle": handle}]}, "points": points, "penalty": penalty}

    standings = {"status": "OK", "result": {
        "contest": {"id": 10},
        "problems": [{"contestId": 10, "index": "A", "points": 500.0}, {"index": "B"}],
        "rows": [row("ann", 500.0, 3), row("guest", 400.0, 0), row("bo", 0.0, 0)],
    }}  # fmt: skip
    changes = {"result": [{"handle": "bo", "oldRating": 900}, {"handle": "ann", "oldRating": 1700}]}
    assert codeforces.contest_entry(standings, changes) == {
        "contest": "10",
        "problems": {"A": 500.0, "B": None},
        "standings": [
            {"rating": 1700, "points": 500.0, "penalty": 3},
            {"rating": 900, "points": 0.0, "penalty": 0},
        ],
    }
    with pytest.raises(InputError, match="not what Codeforces replies"):
        codeforces.contest_entry({"status": "FAILED"}, changes)


def judge(samples, scores, config=CONFIG):
    """Writes judgements as the judge does: scores[prompt] = one of each repeat, None: failed."""
    lines = [config.record()]
    for task in judgements.judge_tasks(read_records(samples), config):
        prompt = int(task["key"].partition("/")[2])
        score = scores[prompt][task["repeat"]]
        lines.append({"key": task["key"], "repeat": task["repeat"], "asked": task["asked"],
                      "score": score, "failure": None if score else "unparsable"})  # fmt: skip
    path = judgements.scores_path(samples)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def judged(tmp_path):
    """Two benchmarks of three prompts each, judged alike: one prompt has no score."""
    for name, scores in (("aime24", ([1, 2], [3, None], [None, None])),
                         ("aime25", ([5, 5], [4, 4], [4, 5]))):  # fmt: skip
        stamp = {"settings": {"benchmark": name, "run": "own"}}
        records = [record(p, first_right(8)) | stamp for p in range(3)]
        write_records(tmp_path / f"{name}.jsonl", records)
        judge(tmp_path / f"{name}.jsonl", scores)
    return tmp_path


def further(folder, *names):
    samples = {name: folder / f"{name}.jsonl" for name in names}
    records = {name: read_records(path) for name, path in samples.items()}
    return further_figures(records, samples, None)


def test_scores_of_a_judge(judged):
    found = further(judged, "aime24", "aime25")
    means = {"aime24": (1.5 + 3) / 2, "aime25": (5 + 4 + 4.5) / 3}
    for name, mean in means.items():
        assert found.summary[name]["judge_score"]["mean"] == pytest.approx(mean)
    assert found.columns["judge_score"]["mean"] == pytest.approx((1.5 + 3 + 5 + 4 + 4.5) / 5)
    assert found.notes == [
        "aime24: diversity by stand-in over 2 of 3 prompts; 3 judgements failed",
        "aime25: diversity by stand-in over 3 of 3 prompts",
    ]


def test_papers_figure_needs_both_benchmarks_of_one_judge(judged):
    for change in ("one alone", "two judges"):
        names = ("aime24",) if change == "one alone" else ("aime24", "aime25")
        if change == "two judges":
            other = JudgeConfig(endpoint=CONFIG.endpoint, model="another", repeats=2)
            judge(judged / "aime25.jsonl", ([5, 5],) * 3, other)
        found = further(judged, *names)
        assert "judge_score" not in found.columns and "judge both" in found.notes[-1]
        assert found.summary["aime24"]["judge_score"]["mean"] == pytest.approx(2.25)


def test_judgements_of_other_responses_do_not_count(judged):
    path = judged / "aime25.jsonl"
    records = read_records(path)
    records[1]["responses"][3] = "another way"
    write_records(path, records)
    found = further(judged, "aime25")
    assert found.summary["aime25"]["judge_score"]["mean"] == pytest.approx(4.75)
    assert found.notes[0].endswith("over 2 of 3 prompts; 2 are missing: run the judge again")
    # A judge that is at work has written half a line.
    scores = judgements.scores_path(path)
    scores.write_text(scores.read_text()[:-5])
    assert "3 are missing" in further(judged, "aime25").notes[0]
    scores.unlink()
    assert further(judged, "aime25").notes == []


@pytest.mark.parametrize(
    ("line", "content", "message"),
    [
        (0, "no judge", "line 1 has no settings of a judge"),
        (0, json.dumps(CONFIG.record() | {"question": "?"}), "another version .question differ"),
        (2, '{"key": "/0"}', "line 3 is no judgement"),
        (2, '{"key": "/0", "repeat": 0, "asked": "", "score": NaN}', "line 3 is no judgement"),
        (2, '{"key": [], "repeat": 0, "asked": "", "score": 3}', "line 3 is no judgement"),
    ],
)
def test_damaged_judgements_name_file_and_line(judged, line, content, message):
    path = judgements.scores_path(judged / "aime24.jsonl")
    lines = path.read_text().splitlines()
    lines[line] = content
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=message) as error:
        further(judged, "aime24")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_command_prints_and_writes_both(judged, folder, tmp_path, monkeypatch, capsys):
    """The command reads what a run's folder has; nothing is sampled."""
    write_records(judged / "codeforces.jsonl", attempts())
    read = lambda config, run, chosen, out: {  # noqa: E731
        name: read_records(out / f"{name}.jsonl") for name in chosen
    }
    monkeypatch.setattr(command, "run_benchmarks", read)
    names = "--benchmarks=aime24,aime25,codeforces"
    words = [*tiny_arguments(), f"--out={judged}", f"--json={tmp_path}/a.json"]
    assert command.main([*words, names, f"--codeforces={folder}"]) == 0
    shown = capsys.readouterr().out
    summary = json.loads((tmp_path / "a.json").read_text())
    rating = summary["benchmarks"]["codeforces"]["rating"]
    papers = next(line for line in shown.splitlines() if "1549.47" in line)
    until = papers.index("1549.47") + len("1549.47")  # figures end one below the other
    ours = [line[:until].split()[-1] for line in shown.splitlines() if line.startswith("policy")]
    assert f"{rating['mean']:.2f}" in ours, shown
    assert f"[{rating['low']:.2f}, {rating['high']:.2f}]" in shown
    assert "FlowRL (paper)" in shown and "2.28" in shown and "3.60" in shown
    assert "judged diversity" in shown and "without standings: 30" in shown
    assert len(summary["notes"]) == 3
    # Without the folder there is no rating, and that is said.
    assert command.main([*words, names]) == 0
    assert "no rating without --codeforces" in capsys.readouterr().out
    assert command.main([*words, "--benchmarks=aime24", f"--codeforces={folder}"]) == 2
    assert "goes with --benchmarks=codeforces" in capsys.readouterr().err


def test_figures_of_both_kinds_share_a_row():
    values = {"humanevalplus": {"avg_at_16": np.array([0.0, 1.0])}}
    interval = {"mean": 1500.0, "low": 1400.0, "high": 1600.0}
    more = {"codeforces_rating": interval, "judge_score": interval}
    found = paper_columns(values, TABLES["code_7b"].columns, more=more)
    assert list(found) == ["humanevalplus", "codeforces_rating"]
    assert found["codeforces_rating"] == interval


def test_report_shows_the_score_of_a_judge(judged):
    data = report.load([judged / "aime24.jsonl", judged / "aime25.jsonl"])
    found = data.evaluations["aime25"].figures["own"]
    assert found["judge_score"]["mean"] == pytest.approx(4.5)
    assert "judged diversity" in page(data)
    judgements.scores_path(judged / "aime25.jsonl").unlink()
    data = report.load([judged / "aime25.jsonl"])
    assert "judge_score" not in data.evaluations["aime25"].figures["own"]
    assert "judged diversity" not in page(data)
