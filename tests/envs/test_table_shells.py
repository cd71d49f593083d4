"""The envs on a table are those that libraries expect, without torch."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from stable_baselines3.common.env_util import make_vec_env

from sd_gym.envs import TableEnv, TableVectorEnv
from sd_gym.envs.sb3 import SwitchableVecEnv
from tests.envs.conftest import STEP_INFO, assert_same

ID = "SD/Table-v0"


def test_steps_are_those_of_the_env(full_table, table_source):
    """The same seeds and actions: the same observations, rewards and infos."""
    ours = gym.make_vec(ID, num_envs=5, table=full_table, gains="ignored", epsilon=0.0)
    theirs = gym.make_vec(table_source[0], num_envs=5, gains="ignored", epsilon=0.0, **table_source[1])
    assert ours.single_action_space == theirs.single_action_space
    assert ours.single_observation_space == theirs.single_observation_space
    assert_same(ours.reset(seed=3), theirs.reset(seed=3))
    random = np.random.default_rng(0)
    for _ in range(4):
        actions = random.integers(2, size=ours.action_space.shape)
        assert_same(ours.step(actions), theirs.step(actions))


def test_the_number_of_a_mask_stands_for_it(small_table, table_source):
    masks = np.array(json.loads((Path(small_table) / "codebook.json").read_text()))
    assert not masks[0].any()
    ours = gym.make(ID, table=small_table)
    theirs = gym.make(table_source[0], action="discrete", codebook=small_table, **table_source[1])
    assert ours.action_space == theirs.action_space == gym.spaces.Discrete(len(masks))
    for number, mask in enumerate(masks):
        assert_same(ours.reset(seed=number), theirs.reset(seed=number))
        came = ours.step(number)
        assert_same(came, theirs.step(number))
        np.testing.assert_array_equal(came[4]["decision"], mask)


@pytest.mark.filterwarnings("ignore:.*render_mode='rgb_array'")  # which gymnasium says of envs that draw nothing
def test_stable_baselines3_makes_several():
    envs = make_vec_env("SD/Classification-TREC-Table-v1", n_envs=2, seed=0)
    assert envs.reset().shape == (2, 64)
    assert envs.step(np.array([envs.action_space.sample(), envs.action_space.sample()]))[2].all()


def test_both_checkers_pass(table):
    env = gym.make(ID, table=table)
    check_env(env.unwrapped)
    check_sb3_env(env.unwrapped)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_envs_are_as_gymnasium_has_them(mode, table):
    """As ``SyncVectorEnv`` of single envs in all modes, seeds a list; a twin does the same."""
    ours, twin = (gym.make_vec(ID, num_envs=3, autoreset_mode=mode, table=table) for _ in range(2))
    made = [lambda: gym.make(ID, table=table) for _ in range(3)]
    theirs = SyncVectorEnv(made, autoreset_mode=mode)
    seeds = [4, 5, 6]
    observations, infos = ours.reset(seed=seeds)
    assert_same((observations, infos), twin.reset(seed=seeds))
    np.testing.assert_array_equal(observations, theirs.reset(seed=seeds)[0])
    ours.action_space.seed(0)
    for _ in range(4):
        actions = ours.action_space.sample()
        came = ours.step(actions)
        assert_same(came, twin.step(actions))
        for mine, yours in zip(came[:4], theirs.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(mine, yours)
        if mode == AutoresetMode.DISABLED:
            options = {"reset_mask": np.ones(3, dtype=bool)}
            assert_same(ours.reset(options=options), twin.reset(options=options))
            theirs.reset(options=options)
    assert set(came[4].get("final_info", came[4])) >= STEP_INFO


def test_copies_go_on_alike(table):
    env = gym.make_vec(ID, num_envs=3, table=table).unwrapped
    env.reset(seed=1)
    twins = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    assert all(twin.core is env.core for twin in twins)
    again = gym.make_vec(ID, num_envs=3, table=table).unwrapped
    again.reset(seed=9)
    again.load_state(json.loads(json.dumps(env.state())))
    actions = env.action_space.sample()
    came = env.step(actions)
    for twin in (*twins, again):
        assert_same(came, twin.step(actions))


def test_stable_baselines3_takes_it(table):
    env = SwitchableVecEnv(gym.make_vec(ID, num_envs=3, table=table).unwrapped)
    env.reset()
    actions = np.array([env.action_space.sample() for _ in range(3)])
    _, rewards, dones, infos = env.step(actions)
    assert rewards.shape == (3,)
    assert dones.all()
    assert set(infos[0]) >= STEP_INFO | {"terminal_observation"}


def test_neither_torch_nor_a_data_set_is_needed(table):
    program = (
        "import sys\n"
        "blocked = ('torch', 'transformers', 'datasets', 'tokenizers', 'stable_baselines3', 'scipy', 'sklearn',\n"
        "           'matplotlib', 'accelerate', 'tensorboard')\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in blocked:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import gymnasium as gym, sd_gym\n"
        f"for env in (gym.make('SD/Table-v0', table={table!r}),\n"
        f"            gym.make_vec('SD/Table-v0', num_envs=4, table={table!r})):\n"
        "    env.reset(seed=0)\n"
        "    env.step(env.action_space.sample())\n"
        "from sd_gym.envs.exact import hull\n"
        "print(hull(env.unwrapped.core.split('test')))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("shell", [TableEnv, TableVectorEnv])
def test_a_table_has_nothing_to_show(shell, full_table):
    with pytest.raises(ValueError, match="no texts, so there is nothing to show"):
        shell("table.yaml", table=full_table, render_mode="ansi")
