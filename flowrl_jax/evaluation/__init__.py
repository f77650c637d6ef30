"""Statistics of graded samples: accuracy, votes, diversity, ratings, and the paper's tables.

Here are the ones that every evaluation reports; `voting`, `diversity`, `rating`, `paper_table`,
`judge` and `benchmarks` are imported by their names.
"""

from flowrl_jax.evaluation.statistics import (
    EqualAccuracy,
    Summary,
    bootstrap,
    distinct_at_equal_accuracy,
    distinct_correct,
    effective_solutions,
    good_turing_coverage,
    miss_probability,
    paired_difference,
    pass_at_k,
    prompt_values,
    summarize,
    value_at_accuracy,
)

__all__ = [
    "EqualAccuracy",
    "Summary",
    "bootstrap",
    "distinct_at_equal_accuracy",
    "distinct_correct",
    "effective_solutions",
    "good_turing_coverage",
    "miss_probability",
    "paired_difference",
    "pass_at_k",
    "prompt_values",
    "summarize",
    "value_at_accuracy",
]
