"""What is dropped at a token level, and what never is."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from sd_gym.config import BackboneConfig
from sd_gym.data.instance import Instance
from sd_gym.tasks.encoding import droppable_tokens
from tests.envs.conftest import SMALL


@pytest.mark.parametrize("ranking", ["attention", "idf", "position", "random"])
def test_token_levels_drop_tokens_but_never_the_question(ranking):
    settings = {**SMALL, "token_shares": [0.0, 0.3, 0.6], "token_ranking": ranking}
    env = gym.make("SD/QuestionAnswering-Mini-v0", **settings)
    check_env(env.unwrapped)
    assert env.action_space.nvec.tolist() == [2] * env.unwrapped.core.n_switches + [3]
    core = env.unwrapped.core
    split, rows = core.split("test"), np.arange(len(core.split("test")))
    ratios = []
    for level in range(3):
        decisions = np.zeros((len(rows), len(core.nvec)), dtype=np.int64)
        decisions[:, -1] = level
        kept = split.tokens.kept(rows, decisions[:, -1]) if level else None
        ratios.append(split.costs.flops_ratio(rows, decisions))
        if level:
            np.testing.assert_array_equal(kept.sum(axis=1), split.tokens.kept_length(rows, decisions[:, -1]))
            for row in rows:
                tokens = split.encoded.input_ids[row, : kept.shape[1]][torch.from_numpy(kept[row])]
                text = core.backbone.tokenizer.decode(tokens)
                question = split.instances[row].source[split.instances[row].protected[1][0] :]
                assert question in text
                assert text.startswith("answer :")
    assert (ratios[0] == 1).all()
    # Where there is a single fact, a third of it is next to nothing, and ranking by attention costs something.
    assert ratios[2].mean() < ratios[1].mean() < 1


def test_a_special_token_that_a_text_has_is_not_dropped(tiny_tokenizer):
    """As an attached policy, which sees tokens alone, does not drop it."""
    texts = [Instance("", "good [SEP] food", 0), Instance("", "good [CLS] [SEP]", 0)]
    droppable = droppable_tokens(texts, tiny_tokenizer, BackboneConfig(name="x"))
    assert droppable.tolist() == [[False, True, False, True, False], [False, True, False, False, False]]


def test_ranking_by_attention_costs_nothing_where_nothing_is_dropped():
    settings = {**SMALL, "token_shares": [0.0, 0.001, 0.5], "token_ranking": "attention"}
    core = gym.make("SD/Summarization-Mini-v0", **settings).unwrapped.core
    split, rows = core.split("test"), np.arange(SMALL["test_size"])
    decisions = np.zeros((len(rows), len(core.nvec)), dtype=np.int64)
    decisions[:, -1] = 1  # a thousandth of the tokens rounds to 0
    assert (split.tokens.kept_length(rows, decisions[:, -1]) == split.encoded.source_length).all()
    assert (split.costs.flops_ratio(rows, decisions) == 1).all()
    quality, quality_ref = split.scoring.quality(rows, decisions)
    np.testing.assert_array_equal(quality, quality_ref)
    # Where tokens are dropped, ranking them is counted: the same lengths cost more than by position.
    decisions[:, -1] = 2
    by_position = gym.make("SD/Summarization-Mini-v0", **settings | {"token_ranking": "position"}).unwrapped.core
    assert (split.costs.flops(rows, decisions) > by_position.split("test").costs.flops(rows, decisions)).all()
