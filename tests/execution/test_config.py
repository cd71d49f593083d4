"""Configurations that do not fit their task are refused."""

import gymnasium as gym
import pytest

from sd_gym.envs import ConfigError


def test_quality_by_metric_needs_a_metric_of_texts(generator):
    with pytest.raises(ConfigError, match=r"config key 'quality.kind': 'metric' scores texts"):
        gym.make(
            "SD/Summarization-Custom-v0",
            dataset="x.jsonl",
            backbone=str(generator),
            quality="metric",
            metric="exact_match",
        )


def test_a_metric_of_another_task_is_refused(generator):
    with pytest.raises(
        ConfigError, match=r"'quality\.metric': summarization is measured by rouge, exact_match; got 'squad'"
    ):
        gym.make("SD/Summarization-Custom-v0", dataset="x.jsonl", backbone=str(generator), metric="squad")
