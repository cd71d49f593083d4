import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sd_gym
from sd_gym.config import RewardConfig
from sd_gym.envs import ConfigError
from sd_gym.objectives import Lagrangian, Objective, lexicographic

unit = st.floats(0, 1)
CUSTOM = "SD/Classification-Custom-v0"


@given(unit, unit, unit, unit, st.floats(0.01, 100), st.floats(0.01, 10))
def test_where_gains_are_ignored_any_kept_instance_beats_any_lost_one(
    quality_ref, lost, kept_ratio, broken_ratio, penalty, scale
):
    constants = {"epsilon": 0.0, "penalty": penalty, "cost_scale": scale, "gains": "ignored"}
    reference = np.array([quality_ref])
    kept = lexicographic(reference, reference, np.array([kept_ratio]), **constants)[0]
    broken = lexicographic(reference - lost - 1e-9, reference, np.array([broken_ratio]), **constants)[0]
    assert 0 <= kept <= 1
    assert -penalty <= broken < 0
    assert kept > broken


@given(unit, unit, unit, st.floats(0.01, 100), st.floats(0.01, 10))
def test_the_range_is_as_documented(quality, quality_ref, ratio, penalty, scale):
    outcome = (np.array([value]) for value in (quality, quality_ref, ratio))
    reward = lexicographic(*outcome, epsilon=0.01, penalty=penalty, cost_scale=scale)[0]
    assert -penalty / scale <= reward <= 1 + penalty / scale


def test_values_by_hand():
    quality, reference = np.array([1.0, 0.0, 0.7, 0.5]), np.array([1.0, 1.0, 1.0, 0.0])
    ratio = np.array([0.25, 0.5, 0.75, 0.5])
    constants = {"epsilon": 0.1, "penalty": 4.0, "cost_scale": 0.8}
    by_hand = {"counted": [0.75, 0.5 - 5.0, 0.25 - 1.5, 0.5 + 2.5], "ignored": [0.75, -4.0, -1.0, 0.5]}
    for gains, expected in by_hand.items():
        objective = Objective(RewardConfig(gains=gains, **constants))
        for _ in range(2):  # always alike
            np.testing.assert_allclose(objective.rewards(quality, reference, ratio), expected)
    np.testing.assert_allclose(lexicographic(quality, reference, ratio, **constants), by_hand["counted"])


def test_the_lagrangian_follows_the_mean_quality():
    objective = Lagrangian(multiplier=2.0, rate=0.5, epsilon=0.1, cost_scale=1.0)
    quality, reference, ratio = np.array([1.0, 0.0]), np.array([1.0, 1.0]), np.array([0.5, 0.25])
    # What is missing is 1 - 0.1 - 1 = -0.1 and 1 - 0.1 - 0 = 0.9; 0.8 in all.
    np.testing.assert_allclose(objective.rewards(quality, reference, ratio), [0.5 + 2 * 0.1, 0.75 - 2 * 0.9])
    assert objective.multiplier == pytest.approx(2.0 + 0.5 * 0.8)
    for _ in range(100):  # far more quality than asked for
        objective.rewards(np.array([1.0]), np.array([1.0]), np.array([0.5]))
    assert objective.multiplier == 0.0


def stingy(quality, quality_ref, flops_ratio, **constants):
    return quality - quality_ref - constants["penalty"] * flops_ratio


@pytest.mark.parametrize("objective", [stingy, "stingy"])
def test_an_own_objective_gives_the_rewards(objective, settings):
    sd_gym.register_objective("stingy", stingy)
    arguments = {**settings, "objective": objective, "penalty": 3.0}
    single = gym.make(CUSTOM, **arguments)
    vector = gym.make_vec(CUSTOM, num_envs=2, **arguments)
    action = np.array([1, 0, 1, 0, 1, 1, 0])
    _, info = single.reset(seed=0)
    vector.reset(options={"instance": [info["instance"]] * 2})
    _, reward, _, _, info = single.step(action)
    _, rewards, *_ = vector.step(np.stack([action] * 2))
    expected = info["quality"] - info["quality_ref"] - 3.0 * info["flops_ratio"]
    assert reward == pytest.approx(expected)
    np.testing.assert_array_equal(rewards, [reward, reward])
    written = single.unwrapped.config.model_dump()["reward"]["objective"]
    assert written == ("stingy" if objective == "stingy" else f"{__name__}:stingy")
    hash(single.unwrapped.config)


def test_an_objective_that_changes_its_arguments_changes_nothing_else(settings):
    def careless(quality, quality_ref, flops_ratio, **_):
        quality -= quality_ref
        flops_ratio *= 0
        return quality

    env = gym.make_vec(CUSTOM, num_envs=4, objective=careless, **settings)
    env.reset(seed=0)
    *_, infos = env.step(np.zeros(env.action_space.shape, dtype=int))
    assert (infos["final_info"]["flops_ratio"] == 1).all()
    np.testing.assert_array_equal(infos["final_info"]["quality"], infos["final_info"]["quality_ref"])


def test_objectives_are_checked_when_an_env_is_made(settings):
    with pytest.raises(
        ConfigError,
        match=r"config key 'reward.objective': unknown objective 'lexicographi'; did you mean 'lexicographic'",
    ):
        gym.make(CUSTOM, **settings, objective="lexicographi")
    with pytest.raises(
        ConfigError, match=r"gains='ignored' is an option of the objective lexicographic, not of .*:stingy"
    ):
        gym.make(CUSTOM, **settings, objective=stingy, gains="ignored")
    with pytest.raises(ConfigError, match=r"'.*<lambda>' must take \(quality, .*; unneeded ones may be"):
        gym.make(CUSTOM, **settings, objective=lambda quality, flops: flops)
    with pytest.raises(ValueError, match="must take"):
        sd_gym.register_objective("narrow", lambda quality, quality_ref, flops_ratio: flops_ratio)
    with pytest.raises(ValueError, match="needs a name of its own"):
        sd_gym.register_objective("lexicographic", stingy)


@pytest.mark.parametrize("wrong", [lambda *args, **constants: 1.0, lambda quality, *args, **constants: quality / 0])
def test_an_objective_has_to_give_a_finite_reward_for_each_decision(wrong):
    objective = Objective(RewardConfig(objective=wrong, epsilon=0, penalty=1, cost_scale=1))
    one = np.ones(3)
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match="a finite reward for each of 3 decisions"):
        objective.rewards(one, one, one)
