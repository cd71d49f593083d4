"""What libraries expect of a vector env: autoreset, seeds, masks, copies.

The tests against other libraries are in ``tests/ecosystem``.
"""

import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.envs.conftest import COPIES, ID, MINI, MODES, SMALL, N, assert_same, continued, make_vec, random_actions

masks = st.lists(st.booleans(), min_size=N, max_size=N).filter(any).map(np.array)
seeds = st.lists(st.none() | st.integers(0, 9), min_size=N, max_size=N)
resets = st.fixed_dictionaries(
    {}, optional={"mask": masks, "seed": seeds, "options": st.just({"instance": "train-7", "split": "train"})}
)


@pytest.mark.parametrize("keys", [{}, {"action": "multi_binary", "observation": "tokens"}])
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 99), calls=st.lists(st.none() | resets, max_size=8), draws=st.integers(0, 99))
def test_a_vector_env_with_a_seed_an_env_is_a_sync_vector_env(mode, keys, first, calls, draws):
    ours = make_vec(mode, **keys)
    theirs = SyncVectorEnv([lambda: gym.make(ID, **SMALL, **keys)] * N, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is mode
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    assert_same(ours.reset(seed=[first, first + 1, first + 2]), theirs.reset(seed=first))
    assert ours.np_random_seed == theirs.np_random_seed == (first, first + 1, first + 2)
    random, ended = np.random.default_rng(draws), np.zeros(N, dtype=bool)
    for call in calls:
        if call is None:
            if mode == AutoresetMode.DISABLED and ended.any():
                with pytest.raises(gym.error.ResetNeeded, match=f"{np.flatnonzero(ended).tolist()}"[1:-1]):
                    ours.step(ours.action_space.sample())
                continue
            actions = random_actions(ours, random)
            step = ours.step(actions)
            ended = step[2]
            assert_same(step, theirs.step(actions))
        else:
            options = {**call.get("options", {}), **({"reset_mask": call["mask"]} if "mask" in call else {})}
            seed = call.get("seed", [None] * N)
            ended = ended & ~call.get("mask", np.ones(N, dtype=bool))
            assert_same(ours.reset(seed=seed, options=dict(options)), theirs.reset(seed=seed, options=dict(options)))


@pytest.mark.parametrize("spelled", ["NextStep", AutoresetMode.NEXT_STEP])
def test_the_mode_belongs_to_the_env_not_to_the_class(spelled):
    next_step, default = make_vec(spelled), gym.make_vec(ID, num_envs=N, **SMALL)
    assert next_step.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert default.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert gym.make_vec(next_step.spec).metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    with pytest.raises(ValueError, match="autoreset_mode must be one of NextStep, SameStep, Disabled, got 'never'"):
        make_vec("never")


def test_rllib_is_told_that_it_would_lose_episodes():
    sampler = {"__name__": "ray.rllib.env.single_agent_env_runner", "make_vec": make_vec}
    with pytest.raises(ValueError, match="loses every second one-step episode"):
        exec("make_vec()", sampler)
    exec("env = make_vec('NextStep')", sampler)
    assert sampler["env"].num_envs == N


def test_vector_kwargs_reach_the_vectorizers_of_gymnasium():
    keys = {"autoreset_mode": AutoresetMode.SAME_STEP, "observation_mode": "same", "copy": True}
    theirs = gym.make_vec(ID, num_envs=N, vectorization_mode="sync", vector_kwargs=keys, **SMALL)
    assert_same(theirs.reset(seed=3), make_vec().reset(seed=[3, 4, 5]))


def test_one_seed_seeds_one_generator_for_all_as_ever():
    env = make_vec()
    of_list, _ = env.reset(seed=[5, 6, 7])
    env.reset(seed=5)
    rows = np.random.Generator(np.random.PCG64(np.random.SeedSequence(5))).integers(60, size=2 * N)
    *_, infos = env.step(np.zeros(env.action_space.shape, dtype=np.int64))
    assert list(infos["instance"]) == [f"train-{row}" for row in rows[N:]]
    np.testing.assert_array_equal(env.reset(seed=[5, 6, 7])[0], of_list)
    with pytest.raises(ValueError, match="expected 3 seeds, one per env, got 2"):
        env.reset(seed=[1, 2])


def test_bad_reset_masks():
    env = make_vec(AutoresetMode.DISABLED)
    some = np.array([True, False, False])
    with pytest.raises(gym.error.ResetNeeded, match="the first reset has to be one of all envs"):
        env.reset(options={"reset_mask": some})
    env.reset(options={"split": "test"})
    for mask, error in (([True] * N, TypeError), (some.astype(int), TypeError), (some[:2], ValueError)):
        with pytest.raises(error, match=r"expected an? .*reset_mask"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="at least one True"):
        env.reset(options={"reset_mask": ~np.ones(N, dtype=bool)})
    with pytest.raises(ValueError, match="reset to the split 'train' while the others are on 'test'"):
        env.reset(options={"reset_mask": some, "split": "train"})


def test_a_masked_reset_stays_on_the_split_and_leaves_its_options_alone():
    env = make_vec(AutoresetMode.DISABLED)
    env.reset(seed=0, options={"split": "test"})
    *_, ended, _, _ = env.step(env.action_space.sample())
    options = {"reset_mask": ended}
    _, infos = env.reset(options=options)
    assert all(identity.startswith("test-") for identity in infos["instance"])
    assert list(options) == ["reset_mask"]
    _, infos = env.reset(options={"reset_mask": ended, "split": "validation"})
    assert all(identity.startswith("validation-") for identity in infos["instance"])


@pytest.mark.parametrize("seed", [4, [4, 5, 6]])
@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_state_goes_on_exactly(mode, seed):
    env, other = make_vec(mode), make_vec(mode)
    env.reset(seed=seed)
    for step in range(4):
        if step:
            observations = other.unwrapped.load_state(env.unwrapped.state())
            np.testing.assert_array_equal(observations, env.unwrapped._episodes.observe())
        traces = [continued(one, step) for one in ((env, other) if step else (env,))]
        assert_same(traces[0], traces[-1])


@pytest.mark.parametrize("twin_of", COPIES)
@pytest.mark.parametrize("seed", [11, [11, 12, 13]])
@pytest.mark.parametrize("mode", MODES)
def test_a_copied_vector_env_goes_on_with_the_running_episodes(mode, seed, twin_of):
    env = make_vec(mode)
    env.reset(seed=seed)
    continued(env, seed=0, steps=1)
    twin = twin_of(env)
    assert twin.unwrapped.core is env.unwrapped.core
    assert_same(continued(env, seed=1), continued(twin, seed=1))


def test_a_pickled_env_holds_no_backbone():
    env = make_vec()
    env.reset(seed=0)
    assert len(pickle.dumps(env)) < 30_000  # three observations are in it


def test_a_vector_step_draws_new_instances_and_is_seeded():
    env = gym.make_vec(MINI[0], num_envs=8, **SMALL)
    traces = []
    for _ in range(2):
        first, _ = env.reset(seed=5)
        second, *_ = env.step(np.zeros(env.action_space.shape, dtype=np.int64))
        traces.append((first, second))
        assert not np.array_equal(first, second)
    np.testing.assert_array_equal(traces[0], traces[1])


@pytest.mark.parametrize("num_envs", [0, -1, 1.5, True])
def test_a_vector_env_has_at_least_one_env(num_envs):
    with pytest.raises(ValueError, match="num_envs: expected an integer of at least 1, got "):
        gym.make_vec(MINI[0], num_envs=num_envs, **SMALL)
