"""Stable-Baselines3's ``VecEnv`` around a vector env and its wrappers."""

import collections

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import (
    NormalizeObservation,
    RecordEpisodeStatistics,
    TransformObservation,
    TransformReward,
)
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecMonitor

from sd_gym.envs.sb3 import SwitchableVecEnv
from tests.agents.conftest import Points
from tests.envs.conftest import MODES, STEP_INFO, N, assert_same, make_vec, random_actions

masks = st.lists(st.booleans(), min_size=N, max_size=N).filter(any).map(np.array)
WRAPPERS = {
    "none": lambda env: env,
    "rewards": lambda env: TransformReward(env, lambda rewards: 10 * rewards),
    "observations": lambda env: TransformObservation(env, lambda observations: -observations),
    "normalised": NormalizeObservation,
}


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (mode, name)
        for mode in MODES
        for name in WRAPPERS
        if mode == AutoresetMode.NEXT_STEP or name != "normalised"
        if mode != AutoresetMode.SAME_STEP or name != "observations"
    ],
)
def test_sb3_sees_what_the_wrappers_around_a_vector_env_give(mode, name):
    plain, wrapped = SwitchableVecEnv(make_vec()), SwitchableVecEnv(WRAPPERS[name](make_vec(mode)))
    assert wrapped.observation_space == wrapped.env.single_observation_space
    statistics = wrapped.env.obs_rms if name == "normalised" else None
    change = {"observations": np.negative}.get(name, lambda observations: observations)
    for env in (plain, wrapped):
        env.seed(2)
    observations, expected = wrapped.reset(), plain.reset()
    for number in range(4):
        if statistics is None:
            np.testing.assert_array_equal(observations, change(expected))
        else:
            scaled = (expected - statistics.mean) / np.sqrt(statistics.var + 1e-8)
            np.testing.assert_allclose(observations, scaled, rtol=1e-5)
        assert [info["instance"] for info in wrapped.reset_infos] == [info["instance"] for info in plain.reset_infos]
        actions = random_actions(wrapped.env, np.random.default_rng(number))
        last = change(expected)
        observations, rewards, dones, infos = wrapped.step(actions)
        expected, plain_rewards, plain_dones, plain_infos = plain.step(actions)
        np.testing.assert_allclose(rewards, plain_rewards * (10 if name == "rewards" else 1), rtol=1e-6)
        np.testing.assert_array_equal(dones, plain_dones)
        for row, (info, plain_info) in enumerate(zip(infos, plain_infos, strict=True)):
            terminal, _ = info.pop("terminal_observation"), plain_info.pop("terminal_observation")
            assert [one.pop("episode")["r"] for one in (info, plain_info)] == pytest.approx(
                [rewards[row], plain_rewards[row]], rel=1e-5
            )
            assert_same(info, plain_info)
            if statistics is None:
                np.testing.assert_array_equal(terminal, last[row])


@pytest.mark.parametrize("mode", MODES)
def test_sb3_sees_tokens_in_every_mode(mode):
    env = SwitchableVecEnv(make_vec(mode, observation="tokens"))
    before = env.reset()
    after, _, _, infos = env.step(np.zeros((N, len(env.action_space.nvec)), dtype=np.int64))
    assert not np.array_equal(before["tokens"], after["tokens"])
    after["tokens"][:] = 7
    env.step(np.zeros((N, len(env.action_space.nvec)), dtype=np.int64))  # what is over stays as it was
    for row, info in enumerate(infos):
        np.testing.assert_array_equal(info["terminal_observation"]["tokens"], before["tokens"][row])


def test_sb3_gets_the_episodes_that_a_wrapper_counts():
    env = SwitchableVecEnv(RecordEpisodeStatistics(make_vec()))
    env.reset()
    _, rewards, _, infos = env.step(np.zeros((N, len(env.action_space.nvec)), dtype=np.int64))
    for reward, info, reset_info in zip(rewards, infos, env.reset_infos, strict=True):
        assert info["episode"]["r"] == pytest.approx(reward)
        assert info["episode"]["l"] == 1
        assert set(reset_info) == STEP_INFO


@pytest.mark.parametrize(("wrap", "stages"), [(None, 1), (VecMonitor, 1), (None, 3)])
def test_plain_sb3_logs_the_mean_return_of_episodes(wrap, stages):
    """With nothing around it; a ``VecMonitor`` changes nothing; rewards of several stages add up."""
    env = SwitchableVecEnv(make_vec(stages=["first", "encoder.1", "encoder.2"][:stages]))
    rewards, episodes, written = [], [], Points()

    def gather(found, _):
        rewards.append(found["rewards"])
        episodes.extend(info["episode"] for info in found["infos"] if "episode" in info)
        return True

    model = PPO("MlpPolicy", wrap(env) if wrap else env, n_steps=6, batch_size=6, n_epochs=1, device="cpu")
    model.set_logger(Logger(None, [written]))
    model.learn(6 * N, callback=gather)
    assert [episode["l"] for episode in episodes] == [stages] * (6 * N // stages)
    assert written.points[-1][1]["rollout/ep_rew_mean"] == pytest.approx(np.sum(rewards) / len(episodes), rel=1e-5)


def test_episodes_that_do_not_end_together_are_refused_where_steps_would_be_lost():
    serving = {"requests": 60, "max_batch": 4, "vectorization_mode": "sync"}
    env = SwitchableVecEnv(gym.make_vec("SD/Serving-TREC-Table-v0", num_envs=3, **serving))
    env.reset()
    with pytest.raises(ValueError, match="make the env with autoreset_mode=SAME_STEP"):
        collections.deque(env.step(np.zeros(3, dtype=np.int64)) for _ in range(100))


def test_attributes_and_methods_are_found_through_wrappers():
    inner = make_vec(render_mode="ansi").unwrapped
    env = VecMonitor(SwitchableVecEnv(RecordEpisodeStatistics(inner)))
    env.reset()
    assert env.has_attr("action_masks")
    assert not env.has_attr("no_such_thing")
    assert env.get_attr("episode_count") == [0] * N  # of the wrapper
    assert env.get_attr("objective", indices=[0, 2]) == [inner.objective] * 2
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        env.get_attr("no_such_thing")
    env.set_attr("episode_count", 7)
    assert env.get_attr("episode_count", indices=1) == [7]
    env.set_attr("mine", "new", indices=range(N))
    assert inner.mine == "new"
    with pytest.raises(ValueError, match="share their attributes"):
        env.set_attr("mine", "other", indices=0)
    masks = env.env_method("action_masks", indices=[1, 2])
    assert [mask.shape for mask in masks] == [(int(env.action_space.nvec.sum()),)] * 2
    assert np.all(masks)
    assert env.env_method("render") == list(inner.render())
    assert env.env_method("state", indices=0) == [inner.state()]
    assert env.env_is_wrapped(RecordEpisodeStatistics) == [True] * N
    assert env.env_is_wrapped(NormalizeObservation) == [False] * N
