"""REINFORCE: when it begins to learn."""

import torch
from sd_gym.agents.registry import make_agent
from stable_baselines3.common.logger import configure


def test_reinforce_waits_for_its_foresight_but_learns_in_short_runs_too(staged_env, tmp_path):
    agent = make_agent("reinforce", staged_env, seed=0)
    first, moved = agent.policy().head.bias, []

    def on_rollout(rollout):
        moved.append(not torch.equal(agent.policy().head.bias, first))

    agent.learn(256, configure(str(tmp_path), []), on_rollout)  # rollouts of 32 decisions; it waits for a quarter
    assert moved == [False] * 2 + [True] * 6
