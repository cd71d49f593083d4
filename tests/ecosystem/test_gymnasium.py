"""Gymnasium's own vector wrappers, each in every autoreset mode that it accepts.

Left out are those for pictures and for spaces of other kinds, and ``NumpyToTorch``: it makes tensors of all infos of a
vector env, which it cannot of texts, such as the instances' ids.
"""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorObservationWrapper
from gymnasium.wrappers import vector as wrappers

import sd_gym  # noqa: F401  (registers the ids)
from tests.ecosystem import ID, SMALL

PINS = ["gymnasium==1.4.0"]
pytest.importorskip("gymnasium", minversion="1.4")  # older ones count episodes wrongly in SAME_STEP

SAME_STEP, NEXT_STEP, DISABLED = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED
MODES = (SAME_STEP, NEXT_STEP, DISABLED)


class Halved(VectorObservationWrapper):
    """Any wrapper of a user's own."""

    def observations(self, observations):
        return observations / 2


def flipped(env):
    """The action space with 1 = run."""
    single = env.single_action_space
    return wrappers.TransformAction(env, lambda actions: single.nvec - 1 - actions, single_action_space=single)


SAME = np.asarray
REFUSES_SAME_STEP = (NEXT_STEP, DISABLED)  # as all of Gymnasium's observation wrappers do
# name: how it wraps, the modes that it accepts, what it makes of observations and of rewards (None: see below)
WRAPPERS = {
    "of the user's own": (Halved, REFUSES_SAME_STEP, lambda x: x / 2, SAME),
    "TransformObservation": (
        lambda env: wrappers.TransformObservation(env, np.negative),
        REFUSES_SAME_STEP,
        np.negative,
        SAME,
    ),
    "VectorizeTransformObservation": (
        lambda env: wrappers.VectorizeTransformObservation(
            env, gym.wrappers.TransformObservation, func=np.negative, observation_space=env.single_observation_space
        ),
        REFUSES_SAME_STEP,
        np.negative,
        SAME,
    ),
    "FlattenObservation": (wrappers.FlattenObservation, REFUSES_SAME_STEP, SAME, SAME),
    "ReshapeObservation": (
        lambda env: wrappers.ReshapeObservation(env, (2, env.single_observation_space.shape[0] // 2)),
        REFUSES_SAME_STEP,
        lambda x: x.reshape(len(x), 2, -1),
        SAME,
    ),
    "RescaleObservation": (
        lambda env: wrappers.RescaleObservation(env, np.float32(-1), np.float32(1)),
        REFUSES_SAME_STEP,
        lambda x: x / 10,
        SAME,
    ),
    "DtypeObservation": (lambda env: wrappers.DtypeObservation(env, np.float64), REFUSES_SAME_STEP, SAME, SAME),
    "NormalizeObservation": (wrappers.NormalizeObservation, (NEXT_STEP,), None, SAME),
    "TransformReward": (lambda env: wrappers.TransformReward(env, lambda x: 3 * x), MODES, SAME, lambda x: 3 * x),
    "ClipReward": (lambda env: wrappers.ClipReward(env, -1, 1), MODES, SAME, lambda x: np.clip(x, -1, 1)),
    "NormalizeReward": (wrappers.NormalizeReward, MODES, SAME, None),
    "RecordEpisodeStatistics": (wrappers.RecordEpisodeStatistics, MODES, SAME, SAME),
    "DictInfoToList": (wrappers.DictInfoToList, MODES, SAME, SAME),
}


def decide(env, steps=4):
    """(observations decided on, rewards, terminal observations, infos) of some steps with decisions, in any mode."""
    mode, random = env.metadata["autoreset_mode"], np.random.default_rng(0)
    observations, _ = env.reset(seed=5)
    trace = []
    for _ in range(steps):
        actions = (random.random(env.action_space.shape) < 0.2).astype(np.int64)
        actions[:, -1] = 0
        after, rewards, terminated, truncated, infos = env.step(actions)
        assert terminated.all()
        assert not truncated.any()
        assert after in env.observation_space
        if mode == SAME_STEP:
            one = isinstance(infos, dict)
            final = np.stack(infos["final_obs"] if one else [info["final_obs"] for info in infos])
            trace.append((observations, rewards, final, infos))
            observations = after
            continue
        trace.append((observations, rewards, after, infos))
        if mode == NEXT_STEP:
            observations, nothing, terminated, _, _ = env.step(actions)
            assert not nothing.any()
            assert not terminated.any()
        else:
            observations, _ = env.reset(options={"reset_mask": terminated | truncated})
    return trace


def make(mode):
    return gym.make_vec(ID, num_envs=3, autoreset_mode=mode, **SMALL)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, row in WRAPPERS.items() for mode in row[1]])
def test_a_wrapper_works_in_the_modes_that_it_accepts(name, mode):
    wrap, _, of_observations, of_rewards = WRAPPERS[name]
    plain, wrapped = decide(make(SAME_STEP)), decide(wrap(make(mode)))
    for (seen, rewards, _, _), (observations, their_rewards, final, _) in zip(plain, wrapped, strict=True):
        if of_observations is not None:
            np.testing.assert_allclose(observations, of_observations(seen), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(final, of_observations(seen), rtol=1e-5, atol=1e-6)
        if of_rewards is not None:
            np.testing.assert_allclose(their_rewards, of_rewards(rewards))


def test_observations_are_normalised_by_what_was_seen():
    env = wrappers.NormalizeObservation(make(NEXT_STEP))
    seen = np.concatenate([row[0] for row in decide(env, steps=20)][10:])
    assert abs(seen.mean()) < 0.2
    assert 0.5 < seen.std() < 1.5


@pytest.mark.parametrize("mode", MODES)
def test_rewards_are_normalised_and_episodes_counted(mode):
    env = wrappers.RecordEpisodeStatistics(make(mode))
    for _, rewards, _, infos in decide(env):
        np.testing.assert_allclose(infos["episode"]["r"], rewards)
        assert infos["episode"]["l"].tolist() == [1, 1, 1]
    assert env.episode_count == 12
    scaled = decide(wrappers.NormalizeReward(make(mode)), steps=20)
    plain = decide(make(mode), steps=20)
    ratio = np.concatenate([row[1] for row in plain[10:]]) / np.concatenate([row[1] for row in scaled[10:]])
    assert (ratio > 0).all()  # by one positive scale, which moves slowly
    assert ratio.std() < 0.5 * ratio.mean()


def test_actions_are_transformed():
    env = flipped(make(SAME_STEP))
    env.reset(seed=0)
    *_, infos = env.step(np.tile(env.single_action_space.nvec - 1, (3, 1)))
    assert (infos["final_info"]["flops_ratio"] == 1).all()


def test_its_benchmark_runs():
    from gymnasium.utils.performance import benchmark_vector_step

    assert benchmark_vector_step(make(DISABLED), target_duration=0, seed=0) > 0


@pytest.mark.parametrize("mode", [SAME_STEP, NEXT_STEP])
def test_its_asynchronous_vectorizer_takes_single_envs(mode):
    env = gym.make_vec(ID, num_envs=2, vectorization_mode="async", vector_kwargs={"autoreset_mode": mode}, **SMALL)
    alone = gym.make(ID, **SMALL)
    np.testing.assert_array_equal(env.reset(seed=4)[0][1], alone.reset(seed=5)[0])
    env.close()
