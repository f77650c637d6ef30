"""The story reward by hand-made cases."""

import numpy as np
import pytest

from flowrl_jax import tasks
from flowrl_jax.errors import InputError

ROW = {"prompt": "Once upon a time, Tim met a fish.", "words": ["dog", "Ball"]}


def build(**options):
    return tasks.build(tasks.TaskConfig("stories", options))


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("The dog had a ball.", 1.25),
        ("The DOG had a ball!", 1.25),
        ('He said, "I see a dog and a ball."', 1.25),
        # "dog's" is a word of its own, and "dog-ball" is two words.
        ("The dog's ball, the dog-ball", 1.0),
        ("The dog had a ball", 1.0),
        ("The dog and the dog and the dog.", 0.75),
        ("dogs and balls.", 0.25),
        ("A hotdog and football.", 0.25),
        ("A cat,", 0.0),
        ("", 0.0),
        ("...", 0.25),
        ('"', 0.0),
    ],
)
def test_reward(response, reward):
    assert build().judge(response, ROW).reward == pytest.approx(reward)


def test_the_opening_does_not_count():
    assert build().judge("It swam.", ROW | {"words": ["fish"]}).reward == 0.25


def test_end_bonus_is_a_setting():
    assert build(end_bonus=1.0).judge("A dog.", ROW).reward == 1.5
    assert build(end_bonus=0).judge("A dog.", ROW).reward == 0.5


def test_canonical_form_is_the_set_of_words():
    task = build()
    assert task.judge("The dog had a ball.", ROW).form == "a ball dog had the"
    assert task.judge("A ball the dog had!", ROW).form == "a ball dog had the"
    assert task.judge("The dog had a ball", ROW).form is None
    assert task.judge("The dog sat.", ROW).form is None


def test_prompt_and_demonstration():
    assert build().prompt(ROW) == ROW["prompt"]
    with pytest.raises(InputError, match="no demonstrations"):
        build().demonstration(ROW, np.random.default_rng(0))


def test_row_without_words():
    with pytest.raises(InputError, match="give at least one"):
        build().judge("A dog.", ROW | {"words": []})
