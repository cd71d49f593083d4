"""A small env of a user's own data."""

import gymnasium as gym
import pytest

CUSTOM = "SD/Classification-Custom-v0"


@pytest.fixture
def settings(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone), "max_source_length": 12}


def split_of(settings, **more):
    return gym.make(CUSTOM, **settings, **more).unwrapped.core.split("train")
