"""Your own env, from a YAML file, in one call.

python examples/own_env.py
sd-gym envs --import examples/own_env.py
sd-gym train My/StrictReviews-v0 --import examples/own_env.py
"""

from pathlib import Path

import gymnasium as gym

import sd_gym

ENV = sd_gym.register_env(Path(__file__).with_name("own_env.yaml"))


def main(steps=20_000, output="runs/own-env", **settings):
    for instance in sd_gym.instances(ENV, "test", **settings)[:3]:
        print(instance["id"], instance["label"], instance["text"])
    envs = gym.make_vec(ENV, num_envs=8, **settings)
    envs.reset(seed=0)
    _, rewards, *_ = envs.step(envs.action_space.sample())
    print("rewards of random decisions", rewards.round(2))
    return sd_gym.train(ENV, "ppo", output, steps=steps, **settings)


if __name__ == "__main__":
    print(main()["quality_kept"])
