"""What reinforcement-learning libraries expect of an env: autoreset, seeds, copies, actions, SB3's ``VecEnv``.

The tests against other libraries are in ``tests/ecosystem``.
"""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import (
    NormalizeObservation,
    RecordEpisodeStatistics,
    TransformObservation,
    TransformReward,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import VecMonitor

import sd_gym  # noqa: F401  (registers the ids)
from sd_gym.envs import ConfigError
from sd_gym.envs.sb3 import SwitchableVecEnv
from tests.envs.conftest import SMALL, STEP_INFO

ID = "SD/Classification-Mini-v0"
N = 3
MODES = list(AutoresetMode)


def make_vec(mode=AutoresetMode.SAME_STEP, n=N, **keys):
    return gym.make_vec(ID, num_envs=n, autoreset_mode=mode, **SMALL, **keys)


def random_actions(env, random):
    """Decisions that skip a fifth of the switches; there is one token level."""
    actions = (random.random(env.action_space.shape) < 0.2).astype(env.action_space.dtype)
    return np.minimum(actions, env.action_space.high)


def assert_same(ours, theirs):
    """Equal in type, dtype, keys and values, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (tuple, list)) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            assert_same(mine, yours)
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


masks = st.lists(st.booleans(), min_size=N, max_size=N).filter(any).map(np.array)
seeds = st.lists(st.none() | st.integers(0, 9), min_size=N, max_size=N)
resets = st.fixed_dictionaries(
    {}, optional={"mask": masks, "seed": seeds, "options": st.just({"instance": "train-7", "split": "train"})}
)


@pytest.mark.parametrize("keys", [{}, {"action": "multi_binary", "observation": "tokens", "info_text": True}])
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 99), calls=st.lists(st.none() | resets, max_size=8), draws=st.integers(0, 99))
def test_a_vector_env_with_a_seed_an_env_is_a_sync_vector_env(mode, keys, first, calls, draws):
    ours = make_vec(mode, **keys)
    theirs = SyncVectorEnv([lambda: gym.make(ID, **SMALL, **keys)] * N, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is mode
    assert (ours.observation_space, ours.action_space) == (theirs.observation_space, theirs.action_space)
    assert_same(ours.reset(seed=[first, first + 1, first + 2]), theirs.reset(seed=first))
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


def test_vector_kwargs_reach_the_vectorizers_of_gymnasium():
    keys = {"autoreset_mode": AutoresetMode.SAME_STEP, "observation_mode": "same", "copy": True}
    theirs = gym.make_vec(ID, num_envs=N, vectorization_mode="sync", vector_kwargs=keys, **SMALL)
    assert_same(theirs.reset(seed=3), make_vec().reset(seed=[3, 4, 5]))


def test_a_seed_an_env_gives_what_single_envs_of_these_seeds_give():
    vector, singles = make_vec(), [gym.make(ID, **SMALL) for _ in range(N)]
    observations, infos = vector.reset(seed=[20, 21, 22])
    assert vector.np_random_seed == (20, 21, 22)
    first = [single.reset(seed=20 + number) for number, single in enumerate(singles)]
    for _ in range(4):
        np.testing.assert_array_equal(observations, [observation for observation, _ in first])
        assert list(infos["instance"]) == [info["instance"] for _, info in first]
        observations, *_, infos = vector.step(np.zeros(vector.action_space.shape, dtype=np.int64))
        first = [single.reset() for single in singles]


def test_one_seed_seeds_one_generator_for_all_as_ever():
    env = make_vec()
    of_list, _ = env.reset(seed=[5, 6, 7])
    env.reset(seed=5)
    rows = np.random.Generator(np.random.PCG64(np.random.SeedSequence(5))).integers(60, size=2 * N)
    *_, infos = env.step(np.zeros(env.action_space.shape, dtype=np.int64))
    assert list(infos["instance"]) == [f"train-{row}" for row in rows[N:]]
    np.testing.assert_array_equal(env.reset(seed=[5, 6, 7])[0], of_list)
    with pytest.raises(ValueError, match="expected 3 seeds, one an env, got 2"):
        env.reset(seed=[1, 2])


def test_bad_reset_masks():
    env = make_vec(AutoresetMode.DISABLED)
    some = np.array([True, False, False])
    with pytest.raises(gym.error.ResetNeeded, match="the first reset has to be one of all envs"):
        env.reset(options={"reset_mask": some})
    env.reset(options={"split": "test"})
    for mask, error in (([True] * N, TypeError), (some.astype(int), TypeError), (some[:2], ValueError)):
        with pytest.raises(error, match="reset_mask"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match="true somewhere"):
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


def continued(env, seed, steps=3):
    """What the next steps give; where autoreset is disabled, all envs are reset before each."""
    random, trace = np.random.default_rng(seed), []
    for _ in range(steps):
        if env.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
            trace.append(env.reset(options={"reset_mask": np.ones(env.num_envs, dtype=bool)}))
        trace.append(env.step(random_actions(env, random)))
    return trace


COPIES = [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))]


@pytest.mark.parametrize("twin_of", COPIES)
def test_a_copied_env_goes_on_with_the_running_episode(twin_of):
    env = gym.make(ID, **SMALL)
    env.action_space.seed(0)
    env.reset(seed=11)
    env.step(env.action_space.sample())
    env.reset()
    twin = twin_of(env)
    assert twin.unwrapped.core is env.unwrapped.core
    assert twin.unwrapped._episode.split is env.unwrapped._episode.split
    for one in (env, twin):
        one.trace = [one.step(one.action_space.sample()), one.reset(), one.step(one.action_space.sample())]
    assert_same(env.trace, twin.trace)


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
    assert len(pickle.dumps(env)) < 20_000


def test_reset_and_step_infos_have_the_same_keys_and_shapes():
    env = gym.make(ID, **SMALL)
    _, reset_info = env.reset(seed=0)
    *_, step_info = env.step(env.action_space.sample())
    assert set(reset_info) == set(step_info) == STEP_INFO
    for key in STEP_INFO:
        assert type(reset_info[key]) is type(step_info[key])
        assert np.shape(reset_info[key]) == np.shape(step_info[key])
    assert reset_info["instance"] == step_info["instance"]
    assert not any(np.any(reset_info[key]) for key in STEP_INFO - {"instance", "difficulty"})


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


def test_an_unknown_key_is_a_type_error_too():
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ConfigError, match=r"unknown config key 'frameskip'.*Known keys") as caught:
            make(ID, frameskip=4)
        assert isinstance(caught.value, TypeError)
        assert "unexpected keyword argument 'frameskip'" in str(caught.value)


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
            assert_same(info, plain_info)
            if statistics is None:
                np.testing.assert_array_equal(terminal, last[row])


@pytest.mark.parametrize("mode", MODES)
def test_sb3_sees_tokens_in_every_mode(mode):
    env = SwitchableVecEnv(make_vec(mode, observation="tokens"))
    before = env.reset()
    after, _, _, infos = env.step(np.zeros((N, len(env.action_space.nvec)), dtype=np.int64))
    assert not np.array_equal(before["tokens"], after["tokens"])
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
