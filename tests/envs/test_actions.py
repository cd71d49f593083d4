"""Every spelling of a decision: numbers, masks, codebooks; and what is refused."""

from dataclasses import asdict

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_gym.envs import ConfigError
from sd_gym.envs.actions import StageActions
from tests.envs.conftest import ID, MASKS, MINI, SMALL, assert_same, make_vec, random_actions

WAYS = [
    lambda action: action.astype(np.float32),
    lambda action: action.astype(bool),
    lambda action: action.astype(np.uint8),
    lambda action: action.tolist(),
    lambda action: [float(one) for one in action.ravel()] if action.ndim == 1 else action.astype(float).tolist(),
    torch.from_numpy,
    lambda action: torch.from_numpy(action).float().requires_grad_(),
    lambda action: list(torch.from_numpy(action)),
]


@pytest.mark.parametrize("way", WAYS)
def test_whole_numbers_of_any_type_are_actions(way):
    single, vector = gym.make(ID, **SMALL), make_vec()
    vector.reset(seed=0)
    actions = random_actions(vector, np.random.default_rng(0))
    expected = make_vec()
    expected.reset(seed=0)
    assert_same(vector.step(way(actions)), expected.step(actions))
    traces = []
    for action in (actions[0], way(actions[0])):
        single.reset(seed=0)
        traces.append(single.step(action))
    assert_same(*traces)


@pytest.mark.parametrize("bad", [0.5, np.nan, np.inf])
def test_other_numbers_are_none(bad):
    env = gym.make(ID, **SMALL).unwrapped
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape)
    action[0] = bad
    with pytest.raises(ValueError, match=f"must be .*, got {bad}"):
        env.step(action)


@pytest.fixture(scope="module")
def cores():
    """Cores of one Mini env, by the way in which decisions are said."""
    return {
        action: gym.make(MINI[0], **SMALL, action=action).unwrapped.core
        for action in ("multi_discrete", "multi_binary", "discrete")
    }


@settings(deadline=None)
@given(data=st.data())
def test_all_actions_come_to_the_outcome_of_the_decision_they_stand_for(cores, data):
    core = cores["multi_discrete"]
    split, rows = core.split("train"), np.array(data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=4)))
    codebook = cores["discrete"].actions.codebook
    bits = st.lists(st.integers(0, 1), min_size=core.n_switches, max_size=core.n_switches)
    binary = np.array([data.draw(bits) for _ in rows], dtype=np.int8)
    number = np.array([data.draw(st.integers(0, len(codebook) - 1)) for _ in rows])
    for action, actions, meant in (
        ("multi_binary", binary, np.column_stack([binary, np.zeros(len(rows), dtype=int)])),
        ("discrete", number, codebook[number]),
    ):
        decisions = cores[action].actions.decisions(actions, len(rows))
        outcome, expected = cores[action].score(split, rows, decisions), core.score(split, rows, meant)
        np.testing.assert_equal(asdict(outcome), asdict(expected))


@pytest.mark.parametrize(("action", "skipped"), [("multi_binary", [1, 0, 1, 0, 0, 0]), ("discrete", 2)])
def test_the_info_holds_the_skip_vector(tiny, action, skipped):
    env = gym.make(**tiny, action=action)
    env.reset(seed=0)
    *_, info = env.step(np.array(skipped))
    expected = [*skipped, 0] if action == "multi_binary" else MASKS[2]
    np.testing.assert_array_equal(info["decision"], expected)
    assert info["decision"].dtype == np.int64


def test_numbers_are_actions_and_spaces_are_an_envs_own(tiny):
    first, second = gym.make(**tiny, action="discrete"), gym.make(**tiny, action="discrete")
    assert first.unwrapped.core is second.unwrapped.core
    first.action_space.seed(1)
    second.action_space.seed(1)
    assert [first.action_space.sample() for _ in range(9)] == [second.action_space.sample() for _ in range(9)]
    first.reset(seed=0)
    *_, info = first.unwrapped.step(3)
    np.testing.assert_array_equal(info["decision"], MASKS[3])


@pytest.mark.parametrize(
    ("action", "given", "message"),
    [
        ("multi_discrete", np.zeros((2, 6), dtype=int), r"shape \(2, 7\) \(6 switches, 1 = skip, and the token level"),
        ("multi_binary", np.zeros((2, 7), dtype=int), r"shape \(2, 6\) \(6 switches, 1 = skip, for each of 2"),
        ("multi_binary", np.full((2, 6), 2), r"component 0 must be in 0..1, got 2"),
        ("discrete", np.array([0, 4]), r"component 0 must be in 0..3, got 4"),
        ("discrete", np.array([0, -1]), r"component 0 must be in 0..3, got -1"),
        ("discrete", np.array([0.5, 1]), r"must be integers \(the index of one of 4 masks\), got 0.5"),
        ("discrete", np.zeros((2, 7), dtype=int), r"expected actions of shape \(2,\) \(the index of one of 4 masks"),
    ],
)
def test_bad_actions(tiny, action, given, message):
    env = gym.make_vec(**tiny, action=action, num_envs=2).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0, 0], [1, 0]]", r"have 2 components, expected 7: one for each of 6 switches, and the token level"),
        ("[[0, 0, 0, 0, 0, 2, 0]]", r"components from 0 to 2; expected 0 or 1 for a switch"),
        ("[[0, 0, 0], [1, 0]]", r"expected a list of masks of one length"),
        ("[]", r"expected a list of masks, such as"),
        ("[[0.5, 0, 0, 0, 0, 0, 0]]", r"expected a list of masks, such as"),
        ("{", r"expected a list of masks"),
        ("[" * 100_000, r"expected a list of masks"),
    ],
)
def test_wrong_codebooks(tiny, tmp_path, text, message):
    (tmp_path / "codebook.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"SD/Classification-Custom-v0: config key 'codebook': .*{message}"):
        gym.make(**tiny | {"codebook": str(tmp_path)}, action="discrete")


def test_keys_that_do_not_go_together(tiny, tmp_path):
    with pytest.raises(ConfigError, match="action 'discrete' chooses from a codebook, but the config key 'codebook'"):
        gym.make(**tiny | {"codebook": None}, action="discrete")
    with pytest.raises(FileNotFoundError, match=r"no codebook at .*missing.json; expected a JSON file"):
        gym.make(**tiny | {"codebook": str(tmp_path / "missing.json")}, action="discrete")
    with pytest.raises(ConfigError, match="'multi_binary' has a bit for each switch and none for the tokens"):
        gym.make(**tiny, action="multi_binary", token_shares=[0.0, 0.5])
    with pytest.raises(ConfigError, match="unknown observation 'token'; did you mean 'tokens'"):
        gym.make(**tiny, observation="token")
    with pytest.raises(ConfigError, match=r"'action'.*got 'continuous'"):
        gym.make(**tiny, action="continuous")


def test_a_codebook_may_drop_tokens(tiny, tmp_path):
    (tmp_path / "codebook.json").write_text("[[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]")
    tiny["codebook"] = str(tmp_path)
    env = gym.make(**tiny, action="discrete", token_shares=[0.0, 0.5])
    env.reset(seed=0)
    *_, info = env.step(1)
    assert info["flops_ratio"] < 1
    with pytest.raises(ConfigError, match="a token level below 1"):
        gym.make(**tiny, action="discrete")


@pytest.mark.parametrize("env_id", MINI)
def test_the_codebooks_of_the_mini_envs_are_nested_and_good(env_id):
    core = gym.make(env_id, train_size=60, validation_size=20, test_size=200, action="discrete").unwrapped.core
    masks, split, rows = core.actions.codebook, core.split("test"), np.arange(200)
    assert 10 <= len(masks) <= 16
    assert not masks[0].any()
    assert (np.diff(masks, axis=0) >= 0).all()
    outcomes = [core.score(split, rows, np.tile(mask, (200, 1))) for mask in masks]
    flops = [outcome.flops_ratio.mean() for outcome in outcomes]
    assert (np.diff(flops) < 0).all()
    assert flops[-1] < 0.2
    right = np.array([outcome.quality for outcome in outcomes])
    assert np.sum(right.mean(axis=1) > 0.9) >= 4
    # What an oracle saves that takes the cheapest of them which keeps the quality, against the best one for all.
    kept = right >= core.score(split, rows, np.tile(masks[0], (200, 1))).quality
    assert np.where(kept, np.array(flops)[:, None], 1).min(axis=0).mean() < 0.25


@pytest.mark.parametrize("wrap", [lambda shown: shown, lambda shown: {"stage": shown, "tokens": None}])
def test_an_action_counts_for_the_stage_that_is_observed(wrap):
    steps = StageActions([np.array([0, 2]), np.array([1])], np.array([2, 2, 3]))
    decided = steps.observed_to_decisions(
        wrap(np.array([[1.0, 0.0, 0.3], [0.0, 1.0, 0.2]])), np.array([[1, 2], [1, 2]])
    )
    assert decided.tolist() == [[1, 0, 2], [0, 1, 0]]
    assert not steps.is_whole


def test_one_stage_decides_what_is_its_own():
    middle = StageActions([np.array([1])], np.array([2, 2, 3]))
    assert middle.to_decisions(np.zeros(2, dtype=int), np.array([[1], [0]])).tolist() == [[0, 1, 0], [0, 0, 0]]
    assert StageActions([np.arange(3)], np.array([2, 2, 3])).is_whole
