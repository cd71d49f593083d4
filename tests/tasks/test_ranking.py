"""Rankings of tokens, and their FLOPs."""

import gymnasium as gym
import numpy as np
import pytest

import sd_gym
import sd_gym.execution.split
from sd_gym.tasks import ranking
from sd_gym.tasks.ranking import ByRarity
from tests.execution.conftest import SMALL
from tests.tasks.conftest import CUSTOM, split_of


@pytest.mark.usefixtures("own_names")
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
    sd_gym.register_ranking("nan", lambda encoded, board, rarity: np.full(encoded.input_ids.shape, np.nan))
    for name, got in (("short", r"\[3\]$"), ("nan", r"\[\d+, \d+\], some of them NaN")):
        with pytest.raises(ValueError, match=f"'{name}' has to give a number for each token, .*, got {got}"):
            _ = split_of(settings, token_ranking=name, token_shares=[0.0, 0.5]).tokens.scores


@pytest.mark.usefixtures("own_names")
def test_what_is_registered_again_replaces_the_first(settings):
    def kept(sign):
        sd_gym.register_ranking(
            "mine", lambda encoded, *_: sign * np.arange(encoded.input_ids.shape[1]) + 0.0 * encoded.input_ids.numpy()
        )
        split = split_of(settings, token_ranking="mine", token_shares=[0.0, 0.5])
        return split.tokens.kept(np.array([0]), np.array([1])).tolist()

    assert kept(1) != kept(-1)
    qualities = []
    for value in (1.0, 0.25):
        sd_gym.register_metric("constant", of_text=lambda text, references, value=value: value)
        split = split_of(settings, quality="metric", metric="constant")
        qualities.append(
            split.scoring.run(np.array([0]), np.zeros((1, len(split.backbone.board) + 1), dtype=np.int64))[0]
        )
    assert qualities == [1.0, 0.25]


@pytest.mark.usefixtures("own_names")
def test_a_ranking_says_what_it_costs(settings):
    class Costly(ByRarity):
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


def test_rarity_is_counted_once(monkeypatch):
    sd_gym.execution.split._rarity.cache_clear()
    counted = []
    inner = ranking.inverse_document_frequency
    monkeypatch.setattr(ranking, "inverse_document_frequency", lambda corpus: (counted.append(1), inner(corpus))[1])
    core = gym.make("SD/Summarization-Mini-v0", **SMALL).unwrapped.core
    for name in ("train", "test"):
        core.split(name).uncached(np.arange(3)).tokens.scores  # noqa: B018
    assert counted == [1]
