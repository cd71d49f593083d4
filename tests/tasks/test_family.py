"""Tasks, metrics and token rankings of one's own, by their names in an env's configuration."""

import gymnasium as gym
import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

import sd_gym
from sd_gym.envs import ConfigError
from sd_gym.tasks.classification import CLASSIFICATION
from sd_gym.tasks.data import DataError, load_split
from sd_gym.tasks.ranking import ByPosition
from sd_gym.tasks.summarization import TextToText

CUSTOM = "SD/Classification-Custom-v0"
pytestmark = pytest.mark.usefixtures("own_names")


@pytest.fixture
def settings(reviews, tiny_backbone):
    return {"dataset": str(reviews), "backbone": str(tiny_backbone), "max_source_length": 12}


def split_of(settings, **more):
    return gym.make(CUSTOM, **settings, **more).unwrapped.core.split("train")


def test_a_metric_of_a_whole_data_set(settings):
    sd_gym.register_metric("wrong", of_all=lambda predictions, labels: (predictions != labels).sum())
    split, rows = split_of(settings, metric="wrong"), np.arange(32)
    dense = np.zeros((32, len(split.backbone.board) + 1), dtype=np.int64)
    assert split.scoring.metrics(rows, dense) == {"wrong": 32 - split.scoring.run(rows, dense).sum()}


def test_a_metric_of_texts_has_its_mean_and_several_scores_by_name():
    sd_gym.register_metric("letters", of_text=lambda text, references: {"a": text.count("a"), "b": 0.0})
    from sd_gym.tasks.metrics import corpus_metric, text_metrics, text_quality

    assert text_metrics("letters", ["aa", "b"], [["x"], ["y"]]) == {"a": 1.0, "b": 0.0}
    assert text_quality("letters", "aa", ["x"]) == 1.0
    with pytest.raises(ValueError, match="'letters' is one of texts"):
        corpus_metric("letters", np.zeros(2), np.zeros(2))


def test_the_metrics_of_a_data_set_are_those_of_scikit_learn():
    from sd_gym.tasks.metrics import corpus_metric

    random = np.random.default_rng(0)
    predictions, labels = random.integers(2, size=(2, 40))
    assert corpus_metric("accuracy", predictions, labels) == pytest.approx((predictions == labels).mean())
    assert corpus_metric("f1", predictions, labels) == f1_score(labels, predictions)
    assert corpus_metric("matthews", predictions, labels) == matthews_corrcoef(labels, predictions)


def test_a_ranking_says_which_tokens_go_first(settings):
    sd_gym.register_ranking(
        "last-first",
        lambda encoded, board, rarity: -np.arange(encoded.input_ids.numel()).reshape(encoded.input_ids.shape),
    )
    split = split_of(settings, token_ranking="last-first", token_shares=[0.0, 0.5])
    row = int(split.encoded.source_length.argmax())
    length = split.encoded.source_length[row]
    (kept,) = split.tokens.kept(np.array([row]), np.array([1]))
    words = length - 2  # [CLS] and [SEP] stay
    left = words - words // 2
    assert kept.tolist() == [True] * (1 + left) + [False] * (words // 2) + [True]
    sd_gym.register_ranking("short", lambda encoded, board, rarity: np.zeros(3))
    with pytest.raises(ValueError, match="'short' has to give a number for each token"):
        _ = split_of(settings, token_ranking="short", token_shares=[0.0, 0.5]).tokens.scores


def test_a_ranking_says_what_it_costs(settings):
    class Costly(ByPosition):
        costs_flops = True

        def flops(self, flops, length):
            return 1000 * length

    sd_gym.register_ranking("costly", Costly())
    settings |= {"token_shares": [0.0, 0.5], "vector_reward": True}
    free, costly = (gym.make(CUSTOM, **settings, token_ranking=name).unwrapped for name in ("position", "costly"))
    assert (free.reward_space.low[1], costly.reward_space.low[1]) == (-1, -2)
    rows, dropping = np.arange(4), np.zeros((4, len(free.core.nvec)), dtype=np.int64)
    dropping[:, -1] = 1
    costs = [env.core.split("train").costs for env in (free, costly)]
    length = free.core.split("train").encoded.source_length[rows]
    np.testing.assert_array_equal(costs[1].flops(rows, dropping) - costs[0].flops(rows, dropping), 1000 * length)
    np.testing.assert_array_equal(costs[1].flops(rows, 0 * dropping), costs[0].flops(rows, 0 * dropping))
    assert (costs[1].reading_ratio(rows, dropping) > costs[0].reading_ratio(rows, dropping)).all()


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
    with pytest.raises(TypeError, match=r"has to be an object of a subclass of sd_gym"):
        sd_gym.register_task("mine", TextToText)
