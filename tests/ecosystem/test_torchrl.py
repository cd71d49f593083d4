"""TorchRL: ``GymEnv`` makes an env by its id, ``GymWrapper`` takes a vector env.

A vector env has to be made with ``autoreset_mode="Disabled"``, which TorchRL prefers. It refuses ``NextStep``, and in
``SameStep`` it makes tensors of all infos, which it cannot of the instances' ids.
"""

import gymnasium as gym
import numpy as np
import pytest

import sd_gym  # noqa: F401  (registers the ids)
from tests.ecosystem import ID, SMALL

PINS = ["torchrl==0.14.1"]
pytest.importorskip("torchrl")


def make_vec(mode="Disabled"):
    return gym.make_vec(ID, num_envs=4, autoreset_mode=mode, **SMALL)


def test_an_env_by_its_id_passes_the_checker_and_rolls_out():
    from torchrl.envs import GymEnv, check_env_specs

    env = GymEnv(ID, **SMALL)
    check_env_specs(env)
    rollout = env.rollout(5, break_when_any_done=False)
    assert rollout.batch_size == (5,)
    assert rollout["next", "terminated"].all()


def test_a_wrapped_vector_env_gives_the_same_observations_and_rewards():
    from torchrl.envs import GymWrapper, check_env_specs

    env, ours = GymWrapper(make_vec()), make_vec()
    check_env_specs(env)
    env.set_seed(3, static_seed=True)  # which resets
    ours.reset(seed=3)
    observations, _ = ours.reset()
    rollout = env.rollout(3, break_when_any_done=False)
    for step in range(3):
        np.testing.assert_array_equal(rollout["observation"][:, step], observations)
        final, rewards, terminated, *_ = ours.step(rollout["action"][:, step])
        np.testing.assert_array_equal(rollout["next", "observation"][:, step], final)
        np.testing.assert_allclose(rollout["next", "reward"][:, step, 0], rewards.astype(np.float32))
        observations, _ = ours.reset(options={"reset_mask": terminated})


def test_modes_that_it_cannot_wrap():
    from torchrl.envs import GymWrapper

    with pytest.raises(RuntimeError, match="must be one of SAME_STEP or DISABLED"):
        GymWrapper(make_vec("NextStep"))
    with pytest.raises((RuntimeError, TypeError), match="tensordict"):  # if it wraps it one day: say so above
        GymWrapper(make_vec("SameStep"))


def test_a_collector_gathers_decisions():
    from torchrl.collectors import Collector
    from torchrl.envs import GymWrapper

    collector = Collector(GymWrapper(make_vec()), frames_per_batch=16, total_frames=32)
    batches = list(collector)
    collector.shutdown()
    assert [batch.numel() for batch in batches] == [16, 16]
    assert all(batch["next", "terminated"].all() for batch in batches)
