"""skrl: its PPO on the vector env."""

import gymnasium as gym
import pytest
import torch

import sd_gym  # noqa: F401  (registers the ids)
from tests.ecosystem import ID, SMALL

PINS = ["skrl==2.1.1"]
pytest.importorskip("skrl")


def test_wrapped_envs_step():
    from skrl.envs.wrappers.torch import wrap_env

    for made in (gym.make_vec(ID, num_envs=4, **SMALL), gym.make(ID, **SMALL)):
        env = wrap_env(made)
        env.reset()
        actions = torch.zeros(env.num_envs, len(env.action_space.nvec))
        for _ in range(2):
            if env.num_envs == 1:
                env.reset()
            observations, rewards, terminated, truncated, _ = env.step(actions)
        assert observations.shape == (env.num_envs, *env.observation_space.shape)
        assert rewards.abs().max() == 0  # dense: nothing saved, nothing lost
        assert terminated.all()
        assert not truncated.any()


def test_ppo_learns(tmp_path):
    from skrl.agents.torch.ppo import PPO
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, Model, MultiCategoricalMixin
    from skrl.trainers.torch import SequentialTrainer

    env = wrap_env(gym.make_vec(ID, num_envs=4, **SMALL))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}

    class Policy(MultiCategoricalMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces)
            MultiCategoricalMixin.__init__(self)
            self.layer = torch.nn.Linear(self.num_observations, int(self.action_space.nvec.sum()))

        def compute(self, inputs, role):
            return self.layer(inputs["observations"]), {}

    class Value(DeterministicMixin, Model):
        def __init__(self):
            Model.__init__(self, **spaces)
            DeterministicMixin.__init__(self)
            self.layer = torch.nn.Linear(self.num_observations, 1)

        def compute(self, inputs, role):
            return self.layer(inputs["observations"]), {}

    models = {"policy": Policy(), "value": Value()}
    before = models["policy"].layer.weight.clone()
    experiment = {"directory": str(tmp_path), "write_interval": 0, "checkpoint_interval": 0}
    settings = {"rollouts": 8, "learning_epochs": 1, "mini_batches": 2, "experiment": experiment}
    memory = RandomMemory(memory_size=8, num_envs=4, device="cpu")
    agent = PPO(models=models, memory=memory, cfg=settings, **spaces)
    SequentialTrainer(env=env, agents=agent, cfg={"timesteps": 16, "headless": True}).train()
    assert not torch.equal(models["policy"].layer.weight, before)
