"""Your own policy network: any torch module from observations to logits.

python examples/own_network.py
sd-gym train SD/Classification-Mini-v0 --import examples/own_network.py --algo reinforce --set network=wide-and-deep
sd-gym evaluate runs/Classification-Mini-reinforce-0 --import examples/own_network.py
"""

from torch import nn

import sd_gym


class WideAndDeep(nn.Module):
    """The sum of a linear model and a deep one (Cheng et al. 2016)."""

    def __init__(self, observation_size, n_logits):
        super().__init__()
        self.wide = nn.Linear(observation_size, n_logits)
        self.deep = nn.Sequential(
            nn.Linear(observation_size, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, n_logits)
        )
        for layer in (self.wide, self.deep[-1]):  # at first the same for all inputs: the agent's initial_skip_rate
            nn.init.normal_(layer.weight, std=0.001)

    def forward(self, observations):
        """[n, features] to [n, logits]."""
        return self.wide(observations) + self.deep(observations)


def main(env_id="SD/Classification-Mini-v0", steps=20_000, output="runs/own-network", **settings):
    sd_gym.train(env_id, "ppo", output, steps=steps, network="wide-and-deep", **settings)
    return sd_gym.evaluate(env_id, output, split="validation")  # the network's FLOPs are counted


sd_gym.register_network("wide-and-deep", WideAndDeep)
if __name__ == "__main__":
    print(main()["flops_ratio_with_policy"])
