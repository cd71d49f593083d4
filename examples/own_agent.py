"""Your own agent: decisions with a reward above the mean of their batch become more probable.

python examples/own_agent.py
sd-gym train SD/Classification-Mini-v0 --import examples/own_agent.py --algo gradient --set learning_rate=0.005
"""

import torch
from pydantic import Field
from sd_gym.agents import Agent, AgentSettings, Rollout

import sd_gym


class Gradient(Agent):
    class Settings(AgentSettings):  # each field can be set by name; num_envs is inherited
        learning_rate: float = Field(0.003, gt=0)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.manual_seed(self.seed)
        self.network = self.new_policy()  # a DecisionPolicy of the env's sizes
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.settings.learning_rate)
        self.steps, self.observations = 0, None

    def learn(self, total_steps, logger, on_rollout):
        if self.observations is None:
            self.observations, _ = self.env.reset()
        while self.steps < total_steps:
            logits = self.network(torch.from_numpy(self.observations))
            decisions = self.network.choose(logits, lambda choice: torch.multinomial(choice.softmax(dim=1), 1)[:, 0])
            self.observations, rewards, _, _, infos = self.env.step(decisions.numpy())
            advantage = torch.from_numpy((rewards - rewards.mean()) / (rewards.std() + 1e-8))
            log_prob, _ = self.network.evaluate_decisions(logits, decisions)  # of each component, [n, components]
            self.optimizer.zero_grad()
            (-advantage * log_prob.sum(dim=1)).mean().backward()
            self.optimizer.step()
            self.steps += len(decisions)
            rollout = Rollout(self.steps, rewards, infos["final_info"])
            rollout.record(logger)
            logger.dump(self.steps)
            on_rollout(rollout)  # the policy is validated, a checkpoint is saved

    def policy(self):
        return self.network.with_margin(0.0).eval()  # a copy

    def state(self):  # of a checkpoint, from which --resume continues
        learned = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return learned | {"random": torch.get_rng_state(), "env": self.env.state(), "steps": self.steps}

    def load_state(self, state):
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.observations, self.steps = self.env.load_state(state["env"]), state["steps"]


sd_gym.register_agent("gradient", Gradient)
if __name__ == "__main__":
    print(sd_gym.train("SD/Classification-Mini-v0", "gradient", "runs/own-agent", steps=20_000)["quality_kept"])
