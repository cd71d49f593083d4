"""Envs of a user's own task, metric or ranking, by their names in the configuration."""

import gymnasium as gym
import numpy as np
import pytest

import sd_gym
from sd_gym.envs import ConfigError
from sd_gym.errors import DataError
from sd_gym.tasks.classification import CLASSIFICATION
from sd_gym.tasks.data import load_split
from sd_gym.tasks.summarization import TextToText
from tests.tasks.conftest import CUSTOM, split_of

pytestmark = pytest.mark.usefixtures("own_names")


def test_a_metric_of_a_whole_data_set(settings):
    sd_gym.register_metric("wrong", of_all=lambda predictions, labels: (predictions != labels).sum())
    split, rows = split_of(settings, metric="wrong"), np.arange(32)
    dense = np.zeros((32, len(split.backbone.board) + 1), dtype=np.int64)
    assert split.scoring.metrics(rows, dense) == {"wrong": 32 - split.scoring.run(rows, dense).sum()}


def test_a_task_has_fields_of_its_own(reviews, settings):
    sd_gym.register_task("copying", TextToText("text", "label_text", ("exact_match",)))
    with pytest.raises(DataError, match="no field 'label_text'; copying needs text, label_text"):
        load_split(str(reviews), "copying", "train")
    with pytest.raises(ConfigError, match="gives a label, but copying needs a text"):
        gym.make(CUSTOM, **settings, task="copying", metric="exact_match").reset()

    class Stars(type(CLASSIFICATION)):
        texts, reference = ("review",), "stars"

        def instance(self, row, identity, origin, **rest):
            return super().instance({"label": row["stars"], "text": row["review"]}, identity, origin, **rest)

    sd_gym.register_task("stars", Stars())
    reviews.write_text(reviews.read_text().replace('"text"', '"review"').replace('"label"', '"stars"'))
    split = split_of(settings, task="stars")
    assert set(split.facts()) >= {"label"}
    assert len(split) == 32


@pytest.mark.parametrize("key", ["task", "quality.metric", "tokens.ranking"])
def test_names_that_nobody_registered(key, settings):
    with pytest.raises(ConfigError, match=f"config key '{key}': unknown .*'nothing'.*Known"):
        gym.make(CUSTOM, **settings, **{key: "nothing"})


def test_what_cannot_be_registered():
    with pytest.raises(ValueError, match="either of_text or of_all"):
        sd_gym.register_metric("empty")
    with pytest.raises(ValueError, match="'rouge' is taken"):
        sd_gym.register_metric("rouge", of_text=len)
    with pytest.raises(ValueError, match="'idf' is taken"):
        sd_gym.register_ranking("idf", len)
    with pytest.raises(TypeError, match=r"has to be an instance of sd_gym"):
        sd_gym.register_task("mine", TextToText)
