"""Other conventions around an env."""

import gymnasium as gym

from sd_gym.envs.wrappers import SafetyWrapper


def test_the_safety_wrapper_has_a_cost_beside_the_reward(tiny):
    env = SafetyWrapper(gym.make(**tiny))
    env.action_space.seed(0)
    costs = []
    for seed in range(20):
        env.reset(seed=seed)
        observation, reward, cost, terminated, truncated, info = env.step(env.action_space.sample())
        assert observation in env.observation_space
        assert (terminated, truncated) == (True, False)
        assert (reward, cost) == (1 - info["flops_ratio"], info["cost"])
        assert (type(reward), type(cost)) == (float, float)
        costs.append(cost)
    assert min(costs) == 0 < max(costs)
