"""Tianshou: its collector and its PPO on single envs that it vectorizes itself."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import sd_gym  # noqa: F401  (registers the ids)
from tests.ecosystem import ID, SMALL

PINS = ["tianshou==2.0.1"]
pytest.importorskip("tianshou")


def two_choices(logits):
    """A distribution over decisions whose components all have two choices."""
    categorical = torch.distributions.Categorical(logits=logits.view(len(logits), -1, 2))
    return torch.distributions.Independent(categorical, 1)


@pytest.mark.slow  # it compiles
def test_ppo_learns():
    from tianshou.algorithm import PPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.trainer import OnPolicyTrainerParams
    from tianshou.utils.net.common import MLP

    def make():
        return gym.make(ID, token_shares=[0.0, 0.3], **SMALL)

    envs, space = DummyVectorEnv([make] * 4), make().action_space
    assert set(space.nvec) == {2}
    width = make().observation_space.shape[0]

    class Actor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = MLP(input_dim=width, output_dim=2 * len(space.nvec), hidden_sizes=[16])

        def forward(self, obs, state=None, info=None):
            return self.layers(obs), state

    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = MLP(input_dim=width, output_dim=1, hidden_sizes=[16])

        def forward(self, obs, **_):
            return self.layers(obs)

    policy = ProbabilisticActorPolicy(
        actor=Actor(), dist_fn=two_choices, action_space=space, action_scaling=False, action_bound_method=None
    )
    algorithm = PPO(policy=policy, critic=Critic(), optim=AdamOptimizerFactory(lr=1e-3))
    before = [parameter.clone() for parameter in policy.parameters()]
    collector = Collector(algorithm, envs, VectorReplayBuffer(64, 4))
    result = algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=64,
            collection_step_num_env_steps=32,
            test_step_num_episodes=0,
            batch_size=16,
        )
    )
    assert result.train_step == result.train_episode == 64
    assert any(not torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))
    assert np.isin(collector.buffer.act, (0, 1)).all()
