"""The paper's tables agree with themselves, and ours stand beside them in their units."""

import math

import pytest

from flowrl_jax.errors import InputError
from flowrl_jax.evaluation.benchmarks import BENCHMARKS, PAPER, RELEASE, benchmarks
from flowrl_jax.evaluation.paper_table import TABLES, render_paper_table


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_complete(name):
    table = TABLES[name]
    assert len(table.columns) == len(table.headings) == len(table.scale)
    assert all(len(row) == len(table.columns) for row in table.rows.values())
    assert "2509.15207" in table.source and "FlowRL" in table.rows


@pytest.mark.parametrize("name", ["math_7b", "math_32b", "ablation_7b"])
def test_averages_are_those_of_their_rows(name):
    """A mistyped figure would show: every average is the mean of six, to the last digit."""
    for method, row in TABLES[name].rows.items():
        assert sum(row[:6]) / 6 == pytest.approx(row[6], abs=0.011), method


def test_columns_are_benchmarks():
    columns = {column for table in TABLES.values() for column in table.columns}
    derived = {"average", "judge_score", "livecodebench_pass_at_16", "codeforces_rating",
               "codeforces_percentile"}  # fmt: skip
    assert columns - derived <= BENCHMARKS.keys()


OURS = {"ours": {
    "aime24": {"mean": 0.15, "low": 0.05, "high": 0.25},
    "average": {"mean": 0.4, "low": 0.375, "high": 0.42},
}}  # fmt: skip


def test_plain_table():
    text = render_paper_table(TABLES["math_7b"], OURS)
    lines = text.splitlines()
    assert lines[0].split()[-7:] == ["AIME24", "AIME25", "AMC23", "MATH500", "Minerva", "Olympiad",
                                     "Avg"]  # fmt: skip
    paper = next(line for line in lines if line.startswith("FlowRL (paper)"))
    assert paper.split()[2:] == ["15.41", "10.83", "54.53", "66.96", "31.41", "34.61", "35.63"]
    own = next(line for line in lines if line.startswith("ours"))
    assert own.split() == ["ours", "15.00", "-", "-", "-", "-", "-", "40.00"]
    assert "[5.00, 25.00]" in text and "[37.50, 42.00]" in text
    assert own.index("15.00") + 5 == paper.index("15.41") + 5  # one below the other
    assert lines[-1] == "Paper's figures: arXiv 2509.15207 v3, table 1."


def test_markdown_table():
    text = render_paper_table(TABLES["math_7b"], {"a|b": OURS["ours"]}, markdown=True)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {9}
    assert table[1] == "| --- |" + " ---: |" * 7
    assert "| a\\|b | 15.00 |" in text


def test_ratings_keep_their_units():
    ours = {"codeforces_rating": {"mean": 1500.0, "low": 1400.0, "high": 1600.0}}
    assert "1500.00" in render_paper_table(TABLES["code_7b"], {"ours": ours})
    missing = {"codeforces_rating": {"mean": math.nan, "low": math.nan, "high": math.nan}}
    assert "nan" not in render_paper_table(TABLES["code_7b"], {"ours": missing})


def test_a_column_that_the_paper_lacks_is_refused():
    with pytest.raises(InputError, match="column gsm8k is not in the paper's table"):
        render_paper_table(TABLES["math_7b"], {"ours": {"gsm8k": OURS["ours"]["aime24"]}})


def test_benchmarks_by_name():
    found = benchmarks("aime24,math500")
    assert list(found) == ["aime24", "math500"]
    assert found["aime24"].sampling == PAPER
    assert (PAPER.samples, PAPER.temperature, PAPER.top_p, PAPER.top_k) == (16, 0.6, 0.95, 0)
    assert RELEASE.top_k == 50
    for names, message in (("aime204", "did you mean 'aime24'"), ("aime24,aime24", "twice"),
                           ("", "unknown")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            benchmarks(names)
