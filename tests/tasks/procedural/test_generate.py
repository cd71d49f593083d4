"""The generated tasks: seeded, disjoint, and of all levels."""

from collections import Counter

import pytest

from sd_gym.config import SPLITS
from sd_gym.tasks.procedural import LEVELS, TASKS, generate_split, vocabulary


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_seeded_disjoint_and_hold_all_levels(task):
    splits = {name: generate_split(task, name, 800) for name in SPLITS}
    assert splits["train"] == generate_split(task, "train", 800)
    assert splits["train"] != generate_split(task, "train", 800, seed=1)
    texts = {name: {i.source for i in split} for name, split in splits.items()}
    assert all(len(texts[name]) == 800 for name in SPLITS)
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert set(Counter(i.difficulty for i in splits["test"])) == set(LEVELS)
    assert len({i.id for i in splits["test"]}) == 800


@pytest.mark.parametrize("task", TASKS)
def test_instances_range_widely_in_length_and_stay_in_the_vocabulary(task):
    instances = generate_split(task, "train", 800)
    lengths = [len(i.source.split()) for i in instances]
    assert max(lengths) > 3 * min(lengths)
    words = set(vocabulary())
    for instance in instances:
        assert set(instance.source.split()) <= words
        assert set(instance.target.split()) <= words


def test_the_longest_instances_are_the_hard_ones_on_average():
    for task in TASKS:
        instances = generate_split(task, "train", 800)
        mean = {}
        for level in LEVELS:
            lengths = [len(i.source.split()) for i in instances if i.difficulty == level]
            mean[level] = sum(lengths) / len(lengths)
        assert mean[1] < mean[4]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown procedural task 'poetry'"):
        generate_split("poetry", "train", 3)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate_split("classification", "dev", 3)
    with pytest.raises(ValueError, match="at least 1"):
        generate_split("classification", "train", 0)
