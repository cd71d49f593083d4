"""Your own objective: the best quality within a budget of FLOPs, instead of the fewest FLOPs for a quality.

python examples/own_objective.py
sd-gym train SD/Classification-Mini-v0 --import examples/own_objective.py --set objective=budget --set epsilon=0.02
"""

import gymnasium as gym
import numpy as np

import sd_gym

BUDGET = 0.3  # of the dense FLOPs


def budget(quality, quality_ref, flops_ratio, **constants):
    """Rewards [n] of n decisions; the constants are epsilon, penalty and cost_scale of the env."""
    over = np.maximum(0, flops_ratio - BUDGET)
    return np.where(over > 0, -over, quality / np.maximum(quality_ref, 0.01))


def main(env_id="SD/Classification-Mini-v0", steps=20_000, output="runs/own-objective", **settings):
    """gym.make takes the function itself; YAML files, --set and run folders need its registered name."""
    env = gym.make(env_id, objective=budget, **settings)
    env.reset(seed=0)
    _, reward, *_ = env.step(np.zeros(env.action_space.shape, dtype=int))
    print(f"everything runs: reward {reward:.2f}")
    return sd_gym.train(env_id, "ppo", output, steps=steps, objective="budget", **settings)


sd_gym.register_objective("budget", budget)
if __name__ == "__main__":
    print(main()["flops_ratio"])
