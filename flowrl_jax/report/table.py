"""Names and number formats of the statistics, and the results as a table for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flowrl_jax.evaluation import Summary

# Metric name (a regular expression), heading, explanation; "k" is the number the pattern captures.
_HEADINGS: tuple[tuple[str, str, str], ...] = (
    (r"pass_at_(\d+)", "pass@k", "chance that at least one of k samples is correct (unbiased)"),
    (
        r"distinct_correct_(\d+)",
        "distinct in k",
        "expected number of different correct solutions among k samples (unbiased)",
    ),
    (
        r"effective_solutions",
        "effective solutions",
        "exponential of the entropy of the solutions among the correct samples; 0 if none is"
        " correct",
    ),
    (r"mean_length", "length", "response tokens"),
    (
        r"kl_to_reference",
        "KL to reference",
        "log-probability under the policy minus under the reference, nats per response",
    ),
    (r"truncated_fraction", "truncated", "responses cut at the token limit"),
    (r"avg_at_(\d+)", "Avg@k", "share of k samples that are correct"),
    (r"maj_at_(\d+)", "maj@k", "chance that the most frequent answer of k samples is correct"),
    (r"self_bleu", "self-BLEU", "likeness of a prompt's responses; low is diverse"),
    (r"vendi", "Vendi score", "effective number of different responses, by their n-grams"),
    (r"answer_entropy", "answer entropy", "of a prompt's answers, right or wrong, in nats"),
    (
        r"judge_score",
        "judged diversity",
        "from 1 to 5, how varied a language model finds a prompt's responses",
    ),
    (r"rating", "Codeforces rating", "mean over contests of the rating that earns the place"),
    (r"percentile", "percentile", "share of people with a lower rating"),
    (r"coverage", "coverage", "Good-Turing share of correct mass on solutions already seen"),
)


def heading(metric: str) -> tuple[str, str]:
    """Heading and explanation of a metric.

    Args:
      metric: a key of `evaluation.summarize`.

    Returns:
      (heading, explanation); a metric not known here is its own heading, without explanation.
    """
    if metric.startswith("outcome/"):
        return metric.removeprefix("outcome/").replace("_", " "), "share of the responses"
    for pattern, name, meaning in _HEADINGS:
        match = re.fullmatch(pattern, metric)
        if match:
            k = match[1] if match.groups() else ""
            name, meaning = (re.sub(r"\bk\b", k, part) if k else part for part in (name, meaning))
            return name, meaning.replace("at least one of 1 samples", "a sample")
    return metric, ""


def figure(value: float) -> str:
    """A statistic with three digits that matter: 0.412, 3.27, 18.4, 310."""
    size = abs(value)
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    # Adding zero turns -0.0 into 0.0.
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def render_table(results: Mapping[str, Summary], labels: Mapping[str, str] | None = None) -> str:
    """The results as plain text: one row per statistic, one column per policy.

    Args:
      results: policy name -> metric -> {"mean", "low", "high"}.
      labels: display names of the policies.

    Returns:
      Lines without trailing newline; each cell is the mean and its 95 % interval. A statistic that
      a policy lacks shows as a dash.
    """
    labels = labels or {}
    metrics = list(dict.fromkeys(m for summary in results.values() for m in summary))
    rows = [["", *(labels.get(policy, policy) for policy in results)]]
    for metric in metrics:
        cells = [heading(metric)[0]]
        for summary in results.values():
            if metric in summary:
                v = summary[metric]
                interval = f"[{figure(v['low'])}, {figure(v['high'])}]"
                cells.append(f"{figure(v['mean'])} {interval:<16}".rstrip())
            else:
                cells.append("-")
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    rule = "  ".join("-" * w for w in widths)
    return "\n".join([lines[0], rule, *lines[1:]])
