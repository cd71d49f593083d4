"""Your own RL algorithm on the suite: PPO in one file, with nothing of sd_gym but a vector env and ``sd_gym.evaluate``.

    python examples/own_ppo.py --env SD/Classification-Mini-v0 --steps 50000

An episode is one decision, so there is nothing to discount: the advantage is the reward minus its expected value.
"""

import argparse
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import sd_gym

ENVS, STEPS = 64, 16  # a rollout is 1,024 decisions
EPOCHS, MINIBATCHES, CLIP, LEARNING_RATE = 4, 4, 0.2, 1e-3


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(layer(inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, outputs, gain))


def choices_of(space: gym.Space) -> list[int]:
    """How many choices each component of an action has; a Discrete space has one component."""
    if isinstance(space, gym.spaces.Discrete):
        return [int(space.n)]
    return [2] * space.n if isinstance(space, gym.spaces.MultiBinary) else space.nvec.tolist()


class Policy:
    """One categorical choice per component of an action; they are independent given the observation."""

    def __init__(self, features: int, space: gym.Space) -> None:
        self.sizes, self.shape = choices_of(space), space.shape
        self.logits = network(features, sum(self.sizes), gain=0.01)  # starts at even odds

    def choices(self, observations: torch.Tensor) -> list[torch.distributions.Categorical]:
        parts = self.logits(observations).split(self.sizes, dim=1)
        return [torch.distributions.Categorical(logits=part) for part in parts]

    def log_prob(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return sum(choice.log_prob(actions[:, i]) for i, choice in enumerate(self.choices(observations)))

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        """The most probable actions, ``[n, components]``, or ``[n]`` indices of masks."""
        parts = self.logits(torch.as_tensor(observations)).split(self.sizes, dim=1)
        return self.as_actions(torch.stack([part.argmax(dim=1) for part in parts], dim=1))

    def as_actions(self, choices: torch.Tensor) -> np.ndarray:
        """Choices ``[n, components]`` as actions of the env's space."""
        return choices.numpy().reshape(len(choices), *self.shape)


def learn(env: gym.vector.VectorEnv, total: int, seed: int) -> Iterator[tuple[int, Policy]]:
    """Yields, after each rollout, the number of decisions so far and the policy."""
    torch.manual_seed(seed)
    features = env.single_observation_space.shape[0]
    policy = Policy(features, env.single_action_space)
    value = network(features, 1, gain=1.0)
    parameters = [*policy.logits.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=1e-5)
    observations, info = env.reset(seed=seed)
    if "action_mask" in info:
        raise SystemExit("expected an env that decides once; with stages, rewards have to reach earlier decisions")
    for done in range(ENVS * STEPS, total + ENVS * STEPS, ENVS * STEPS):
        rollout = []
        for _ in range(STEPS):
            seen = torch.as_tensor(observations)
            with torch.no_grad():
                actions = torch.stack([choice.sample() for choice in policy.choices(seen)], dim=1)
                log_prob = policy.log_prob(seen, actions)
            observations, rewards, *_ = env.step(policy.as_actions(actions))
            rollout.append((seen, actions, log_prob, torch.as_tensor(rewards, dtype=torch.float32)))
        seen, actions, log_prob, rewards = map(torch.cat, zip(*rollout, strict=True))
        advantages = rewards - value(seen)[:, 0].detach()
        for part in (part for _ in range(EPOCHS) for part in torch.randperm(len(seen)).chunk(MINIBATCHES)):
            ratio = (policy.log_prob(seen[part], actions[part]) - log_prob[part]).exp()
            advantage = (advantages[part] - advantages[part].mean()) / (advantages[part].std() + 1e-8)
            surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
            error = (value(seen[part])[:, 0] - rewards[part]).square().mean()
            optimizer.zero_grad()
            (0.25 * error - surrogate).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
        yield done, policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="SD/Classification-Mini-v0")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    env = gym.make_vec(arguments.env, num_envs=ENVS)
    *_, (_, policy) = learn(env, arguments.steps, arguments.seed)
    result = sd_gym.evaluate(arguments.env, policy.act, split="test")
    print(
        f"{arguments.env}, {arguments.steps} decisions, seed {arguments.seed}: "
        f"{result['flops_ratio']:.1%} of the FLOPs, "
        f"{100 * result['quality_difference']:+.2f} points, {result['verdict']}"
    )


if __name__ == "__main__":
    main()
