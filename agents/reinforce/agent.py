"""REINFORCE (Williams 1992) under the dynamic barrier; reads from top to bottom.

For each drawn instance several decisions are sampled and scored, in one batched run of the backbone. Two gradients come
of them: that of the FLOPs, ``E[grad log pi(a|x) * A_flops]``, and that of the quality loss, both advantages as losses
minus a baseline. The barrier says how much the second weighs (Zhang et al. 2024, section 3.3): while the quality is
kept the FLOPs fall as they like, and the nearer the limit the less of it.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from sd_gym.agents.learning.agent import INFO_KEYS, Agent, LearnerSettings, OnRollout, Rollout, initial_bias
from sd_gym.agents.reinforce.barrier import DynamicBarrier
from stable_baselines3.common.logger import Logger
from torch import Tensor

from sd_gym.policy import DecisionPolicy, bounded


class ReinforceSettings(LearnerSettings):
    """Settings of REINFORCE; a rollout scores ``num_envs * samples`` decisions, and as many greedy ones as instances.

    Rollouts are small, as each is used once.

    Attributes:
        samples: Decisions sampled for each instance.
        baseline: What a sample's value is compared with: that of the greedy decision for the same input
            (``self_critical``, Rennie et al. 2017) or the mean of the other samples (``leave_one_out``, Kool et al.
            2019).
        control: The barrier's control function: the quality loss stays within the env's epsilon (``constrained``) or is
            as low as can be (``lexicographic``).
        alpha: The barrier's: how fast a violated quality is restored.
        beta: The barrier's: how fast at most; at 1 the quality would fall for as long as the FLOPs do.
        highest_multiplier: The barrier's cap.
        memory: The barrier's.
        exploration: No choice of a component is less probable than this while learning.
        autoregressive: Whether a choice may depend on those before it.
    """

    num_envs: int = Field(16, ge=2)
    learning_rate: float = Field(2e-3, gt=0)
    samples: int = Field(2, ge=2)
    baseline: Literal["self_critical", "leave_one_out"] = "leave_one_out"
    control: Literal["constrained", "lexicographic"] = "constrained"
    alpha: float = Field(30.0, gt=0)
    beta: float = Field(30.0, gt=0)
    highest_multiplier: float = Field(100.0, gt=0)
    memory: float = Field(0.95, ge=0, lt=1)
    exploration: float = Field(0.001, ge=0, lt=0.25)
    autoregressive: bool = False


class ReinforceAgent(Agent):
    """REINFORCE: descends ``E[(flops + lambda * quality loss - baseline) * grad log pi(a|x)]``."""

    Settings = ReinforceSettings
    settings: ReinforceSettings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.settings
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.network = self.new_policy(autoregressive=settings.autoregressive).eval()
            for layer in self.network.body if settings.network is None else ():
                if isinstance(layer, torch.nn.Linear):  # as Stable-Baselines3 does: the features start at full size
                    torch.nn.init.orthogonal_(layer.weight, gain=2**0.5)
                    torch.nn.init.zeros_(layer.bias)
        with torch.no_grad():
            if settings.start is not None:
                self.network.load_state_dict(self._load_start(settings.start).state_dict(), strict=False)
            else:
                self.network.begin_at(initial_bias(self.env.core.nvec, settings.initial_skip_rate))
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        self.barrier = DynamicBarrier(
            settings.control,
            limit=self.env.config.epsilon,
            alpha=settings.alpha,
            beta=settings.beta,
            highest=settings.highest_multiplier,
            memory=settings.memory,
        )
        self.random = np.random.default_rng(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.steps = 0

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn until ``total_steps`` decisions were scored, the greedy ones included."""
        core, settings, batch = self.env.core, self.settings, self.env.num_envs
        split = core.split(core.config.split)
        started, before = time.monotonic(), self.steps
        while self.steps < total_steps:
            rows = self.random.integers(len(split), size=batch)
            logits = self.network(torch.from_numpy(core.observe(split, rows)))
            # Row k * batch + i is sample k of instance i.
            repeated = logits.repeat(settings.samples, 1)
            decisions = self.network.choose(repeated, self._draw)
            drawn = len(decisions)
            if settings.baseline == "self_critical":
                decisions = torch.cat([decisions, self.network.choose(logits)])
            outcome = core.score(split, np.resize(rows, len(decisions)), decisions.numpy())
            flops = torch.from_numpy(outcome.flops_ratio).float().view(-1, batch)
            loss = torch.from_numpy(outcome.quality_ref - outcome.quality).float().view(-1, batch)

            log_probs = self.network.log_probs(repeated, decisions[:drawn], settings.exploration)
            entropy = -sum((log_prob.exp() * log_prob).sum(dim=1) for log_prob in log_probs).mean()
            taken = [log_prob.gather(1, decisions[:drawn, [i]]) for i, log_prob in enumerate(log_probs)]
            log_prob = torch.cat(taken, dim=1).sum(dim=1).view(settings.samples, batch)
            f_halves = self._halves(log_prob * self._advantage(flops))
            q_halves = self._halves(log_prob * self._advantage(loss))
            weight = self.barrier.weigh(float(loss[: settings.samples].mean()), f_halves, q_halves)
            gradient = (f_halves[0] + f_halves[1]) / 2 + weight.multiplier * (q_halves[0] + q_halves[1]) / 2
            if settings.entropy:
                gradient = gradient - settings.entropy * self._flat_gradient(entropy)
            rate = settings.learning_rate * (1 - self.steps / total_steps)
            self._step(gradient, rate)

            self.steps += len(decisions)
            infos = {key: getattr(outcome, key)[:drawn] for key in INFO_KEYS if key != "is_success"}
            infos["is_success"] = outcome.cost[:drawn] == 0
            rewards = self.env.objective.rewards(*(infos[key] for key in ("quality", "quality_ref", "flops_ratio")))
            rollout = Rollout(self.steps, rewards, infos)  # of what was explored, as for the other agents
            rollout.record(logger)
            logger.record("train/entropy_loss", -entropy.item())
            logger.record("train/learning_rate", rate)
            for name, value in weight._asdict().items():
                logger.record(f"train/{name}", value)
            logger.record("time/fps", int((self.steps - before) / (time.monotonic() - started)))
            logger.dump(self.steps)
            on_rollout(rollout)

    def policy(self) -> DecisionPolicy:
        """A copy of the network."""
        copy = self.new_policy(autoregressive=self.settings.autoregressive)
        copy.load_state_dict(self.network.state_dict())
        return copy.eval()

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, the barrier's averages, the random states and the env's."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "barrier": self.barrier.state(),
            "random": self.random.bit_generator.state,
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "multiplier": self.env.objective.multiplier,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.barrier.load_state(state["barrier"])
        self.random.bit_generator.state = state["random"]
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]
        self.env.objective.multiplier = state["multiplier"]

    def _draw(self, logits: Tensor) -> Tensor:
        """Draws ``[n]`` from the logits ``[n, size]`` of one component, by this agent's own generator."""
        probabilities = bounded(logits, self.settings.exploration).exp()
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def _advantage(self, values: Tensor) -> Tensor:
        """Values of the samples ``[samples, batch]`` minus their baseline; behind them stand the greedy ones'."""
        samples = self.settings.samples
        if self.settings.baseline == "self_critical":
            return values[:samples] - values[samples:]
        return (values - values.mean(dim=0)) * samples / (samples - 1)

    def _halves(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``[parameters]`` of the mean of ``terms [samples, batch]``, one from each half of the instances."""
        half = terms.shape[1] // 2
        return self._flat_gradient(terms[:, :half].mean()), self._flat_gradient(terms[:, half:].mean())

    def _flat_gradient(self, scalar: Tensor) -> Tensor:
        gradients = torch.autograd.grad(scalar, self.parameters, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _step(self, gradient: Tensor, rate: float) -> None:
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
