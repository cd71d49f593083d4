"""RLlib: its PPO, on single envs that it vectorizes itself and on the vector env."""

import gymnasium as gym
import pytest

import sd_gym  # noqa: F401  (registers the ids)
from tests.ecosystem import ID, SMALL

PINS = ["ray[rllib]==2.60.0"]
pytest.importorskip("ray.rllib")


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    import ray

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "keys"), [("sync", {}), ("vector_entry_point", {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP})]
)
def test_ppo_learns(mode, keys):
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    config = (
        PPOConfig()
        .environment(ID, env_config={**SMALL, **keys})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4, gym_env_vectorize_mode=mode)
        .training(train_batch_size_per_learner=64, minibatch_size=32, num_epochs=1)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[16]))
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    runners = algorithm.train()["env_runners"]
    algorithm.stop()
    assert runners["num_env_steps_sampled"] == runners["num_episodes"] == 64
    assert runners["episode_len_mean"] == 1


def test_the_mode_that_loses_episodes_is_refused():
    from ray.rllib.algorithms.ppo import PPOConfig

    config = PPOConfig().environment(ID, env_config=SMALL)
    config = config.env_runners(num_env_runners=0, gym_env_vectorize_mode="vector_entry_point")
    with pytest.raises(ValueError, match='add "autoreset_mode": "NextStep" to env_config'):
        config.build_algo()
