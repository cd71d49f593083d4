"""REINFORCE (Williams 1992) with the dynamic barrier.

For each drawn instance several decisions are sampled. They give two gradients: that of the FLOPs,
``E[grad log pi(a|x) * A_flops]``, and that of the quality loss. Both advantages are losses minus a baseline, the mean
of the other samples for the same instance (Kool et al. 2019). The barrier weighs the second gradient (Zhang et al.
2024, section 3.3): while the quality is kept the FLOPs may fall, but less and less towards the limit.

A lost instance is rare, and its loss is attributed to all skipped sublayers. So the gradient of the quality loss is
mostly noise. The FLOPs of a decision are known without running it. So a network, the foresight, learns the expected
quality loss from all scored decisions, and the gradients are taken over many decisions that are never run. The backbone
runs a few decisions of the policy at a time, for the foresight and for the barrier's estimate of the loss. (This is a
critic of actions, like those of model-based contextual bandits; with ``foresight=False`` the few scored decisions give
the gradients.)
"""

import time
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.learning.agent import INFO_KEYS, Agent, LearnerSettings, OnRollout, Rollout
from sd_gym.agents.learning.curves import CurveLogger
from sd_gym.agents.reinforce.barrier import DynamicBarrier
from sd_gym.agents.reinforce.foresight import Foresight
from sd_gym.agents.reinforce.staged_foresight import StagedForesight, dense_logits
from stable_baselines3.common.logger import Logger
from torch import Tensor

from sd_gym.envs.protocols import SCORES, Observations, Split
from sd_gym.policy import DecisionPolicy, blinded, bounded
from sd_gym.policy.observations import to_tensors
from sd_gym.switch import PassState


class ReinforceSettings(LearnerSettings):
    """Settings of REINFORCE; a rollout scores ``num_envs * samples`` decisions.

    Attributes:
        samples: Scored decisions per instance of a rollout.
        foresight: Whether a network predicts the quality loss (``Foresight``, ``StagedForesight``).
        imagined: Instances per update whose losses are predicted.
        tries: Predicted decisions per instance.
        updates: Updates of the policy, and steps of the foresight, after each rollout; 1 without foresight.
        fit_batch: Scored decisions per step of the foresight.
        control: Aim of the barrier: the quality loss stays within a limit (``constrained``) or is minimal
            (``lexicographic``).
        limit: Share of the env's epsilon that may be lost: a policy that loses all of it cannot be shown to keep it.
        alpha: How fast the barrier restores a violated quality.
        beta: Upper limit of that speed. At 1 the quality would fall for as long as the FLOPs fall.
        highest_multiplier: Upper limit of the barrier's multiplier.
        memory: Decay of the barrier's running means.
        exploration: Lowest probability of any choice while learning.
    """

    space: ClassVar = LearnerSettings.space | {
        "learning_rate": (5e-5, 1e-2),  # from the default with a ``start``
        "samples": [2, 4],
        "updates": [1, 2, 4, 8],
        "limit": (0.1, 1.0),
        "alpha": (1.0, 100.0),
        "beta": (1.0, 100.0),
    }

    num_envs: int = Field(32, ge=2)
    learning_rate: float = Field(2e-3, gt=0)
    samples: int = Field(2, ge=2)
    foresight: bool = True
    imagined: int = Field(256, ge=2)
    tries: int = Field(8, ge=2)
    updates: int = Field(4, ge=1)
    fit_batch: int = Field(256, ge=1)
    control: Literal["constrained", "lexicographic"] = "constrained"
    limit: float = Field(0.3, gt=0, le=1)
    alpha: float = Field(30.0, gt=0)
    beta: float = Field(30.0, gt=0)
    highest_multiplier: float = Field(100.0, gt=0)
    memory: float = Field(0.99, ge=0, lt=1)
    exploration: float = Field(0.001, ge=0, lt=0.25)


class SampledDecisions(NamedTuple):
    """Several decisions on each of some instances: row ``k * instances + i`` is the ``k``-th on instance ``i``."""

    logits: Tensor  # with gradient, [instances, sum(nvec)]; of rollouts through several stages [n, sum(nvec)]
    decisions: Tensor  # int64 [n, components]; of a single stage, 0 for components of others
    flops: Tensor  # FLOPs ratios, float32 [tries, instances]
    loss: Tensor  # quality lost, scored or predicted, float32 [tries, instances]
    stages: int = 1  # stages that each decision stands for


class ReinforceAgent(Agent[ReinforceSettings]):
    """REINFORCE: descends ``E[(flops + lambda * quality loss - baseline) * grad log pi(a|x)]``."""

    staged, uses_reward = True, False
    Settings = ReinforceSettings
    refining_rate = 5e-5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = self.new_policy().eval()
            for layer in self.network.body.modules() if settings.network is None else ():
                if isinstance(layer, torch.nn.Linear):  # the initialisation of Stable-Baselines3
                    torch.nn.init.orthogonal_(layer.weight, gain=2**0.5)
                    torch.nn.init.zeros_(layer.bias)
            core, tokens = self.env.core, None if self.channels is None else self._observe
            if core.is_staged:
                self._act, new_foresight = self._rollout, partial(StagedForesight, core, self._split, tokens)
            else:
                self._act, new_foresight = self._decide_at_once, partial(Foresight, core.observation_space, core.nvec)
            self.foresight = new_foresight() if settings.foresight else None
        self._standardise_encoders(self.network, *([] if self.foresight is None else [self.foresight]))
        self._initialise(self.network)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate)
        limit, highest = settings.limit * self.env.config.reward.epsilon, settings.highest_multiplier
        self.barrier = DynamicBarrier(settings.control, limit, settings.alpha, settings.beta, highest, settings.memory)
        self.random = np.random.default_rng(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.steps = 0

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn until ``total_steps`` decisions were scored; see ``BaseAgent.learn``."""
        logger = CurveLogger(logger, total_steps, self.steps)
        started, before = time.monotonic(), self.steps
        starts = min(self.foresight.learning_starts, total_steps // 4) if self.foresight else 0
        while self.steps < total_steps:
            rate = self.settings.learning_rate * (1 - self.steps / total_steps)
            sampled, infos = self._explore()
            mean_loss = float(sampled.loss.mean())
            if self.foresight is None:
                self._update(sampled, mean_loss, rate, logger)
            else:
                for _ in range(self.settings.updates):
                    logger.record_mean("train/foresight_loss", self._fit(self.foresight))
                    if self.steps >= starts:
                        self._update(self._imagine(self.foresight), mean_loss, rate, logger)
            self.steps += len(sampled.decisions)
            rewards = self.env.objective.rewards(*(infos[key] for key in SCORES))
            rollout = Rollout(self.steps, rewards, infos, len(self.env.core.stages))
            rollout.record(logger)
            logger.record("train/learning_rate", rate)
            logger.record("time/fps", int((self.steps - before) / (time.monotonic() - started)))
            logger.dump(self.steps)
            on_rollout(rollout)

    def policy(self) -> DecisionPolicy:
        """A copy of the network."""
        return deepcopy(self.network).eval()

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, foresight, the barrier's averages and random states."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "foresight": self.foresight.state() if self.foresight else None,
            "barrier": self.barrier.state(),
            "random": self.random.bit_generator.state,
            "generator": self.generator.get_state(),
            "steps": self.steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a ``state``."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.foresight:
            self.foresight.load_state(state["foresight"])
        self.barrier.load_state(state["barrier"])
        self.random.bit_generator.state = state["random"]
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]

    def _explore(self) -> tuple[SampledDecisions, dict[str, NDArray]]:
        """Score and remember a few decisions of the policy; returns them and the infos of the rollout."""
        settings, core = self.settings, self.env.core
        rows = self.random.integers(len(self._split), size=self.env.num_envs)
        tiled = np.tile(rows, settings.samples)
        logits, decisions, state, observed = self._act(rows)
        outcome = core.score(self._split, tiled, decisions.numpy(), state)
        lost = torch.from_numpy(outcome.cost).float()
        if self.foresight:
            self.foresight.remember(tiled, decisions, lost / self._split.scoring.highest, observed)
        infos = {key: getattr(outcome, key) for key in INFO_KEYS if key != "is_success"}
        infos["is_success"] = outcome.cost <= core.config.reward.epsilon
        flops = torch.from_numpy(outcome.flops_ratio).float()
        shape = settings.samples, -1
        return SampledDecisions(logits, decisions, flops.view(shape), lost.view(shape)), infos

    def _fit(self, foresight: Foresight) -> float:
        """A step of the foresight on remembered decisions, or several with stages; returns the last error."""
        size = self.settings.fit_batch
        if isinstance(foresight, StagedForesight):
            return foresight.fit_stages(size, self.random, lambda observations: self._sample(observations, 1)[1])
        drawn = torch.from_numpy(self.random.integers(len(foresight.rows), size=size))
        return foresight.fit(self._observe(foresight.rows[drawn].numpy()), drawn)

    def _imagine(self, foresight: Foresight) -> SampledDecisions:
        """Decisions of the policy that are never run: their FLOPs are known, and their loss is predicted."""
        settings, stages = self.settings, len(self.env.core.stages)
        tries, shape = settings.tries, (settings.tries, -1)
        if isinstance(foresight, StagedForesight):  # one stage of each decision represents all, so it counts for all
            states = foresight.recent(settings.imagined, self.random)
            logits, choices = self._sample(states.observations, tries)
            probabilities, flops = foresight.predict(states, foresight.with_choices(states, choices))
            loss = (probabilities[:, 0] - probabilities[:, 1]) * self._split.scoring.highest
            own = foresight.without_other_stages(states, logits, choices)
            return SampledDecisions(*own, stages * flops.view(shape), stages * loss.view(shape), stages)
        rows = self.random.integers(len(self._split), size=settings.imagined)
        observations = self._observe(rows)
        logits, decisions = self._sample(observations, tries)
        ratios = self._split.costs.flops_ratio(np.tile(rows, tries), decisions.numpy())
        loss = foresight.loss(observations, decisions) * self._split.scoring.highest
        return SampledDecisions(logits, decisions, torch.from_numpy(ratios).float().view(shape), loss.view(shape))

    def _update(self, sampled: SampledDecisions, mean_loss: float, rate: float, logger: Logger) -> None:
        """One step down both gradients; ``mean_loss`` is the mean quality loss of the rollout."""
        log_prob, entropy = self.network.evaluate_decisions(
            sampled.logits, sampled.decisions, self.settings.exploration
        )
        log_prob, entropy = log_prob.sum(dim=1).view_as(sampled.loss), sampled.stages * entropy.mean()
        f_halves = self._halves(log_prob * leave_one_out(sampled.flops))
        q_halves = self._halves(log_prob * leave_one_out(sampled.loss))
        weight = self.barrier.weigh(mean_loss, f_halves, q_halves)
        gradient = (f_halves[0] + f_halves[1]) / 2 + weight.multiplier * (q_halves[0] + q_halves[1]) / 2
        if self.settings.entropy:
            gradient = gradient - self.settings.entropy * self._flat_gradient(entropy)
        self._step(gradient, rate)
        logger.record("train/entropy_loss", -entropy.item())
        for name, value in weight._asdict().items():
            logger.record(f"train/{name}", value)

    @property
    def _split(self) -> Split:
        return self.env.core.split(self.env.config.split)

    def _sample(self, observations: Tensor | dict[str, Tensor], tries: int) -> tuple[Tensor, Tensor]:
        """Logits, and several decisions of the policy on each observation (``SampledDecisions``)."""
        logits = self.network(observations)
        return logits, self.network.choose(logits.repeat(tries, 1), self._draw)

    def _decide_at_once(self, rows: NDArray) -> tuple[Tensor, Tensor, None, None]:
        return *self._sample(self._observe(rows), self.settings.samples), None, None

    def _rollout(self, rows: NDArray) -> tuple[Tensor, Tensor, PassState | None, Tensor]:
        """Logits, decisions stage by stage, the state of the pass, and flat observations ``[n, stages, size]``.

        The logits of each component are those of its stage.
        """
        core = self.env.core
        of_stages = []
        observed = []

        def decide(observations: Observations) -> NDArray:
            inputs = to_tensors(observations)
            of_stages.append(self.network(inputs))
            flat = inputs["stage"] if isinstance(inputs, dict) else inputs
            observed.append(blinded(flat, core.stages) if self.blind else flat)
            return self.network.choose(of_stages[-1], self._draw).numpy()

        decisions, state = core.rollout(self._split, np.tile(rows, self.settings.samples), decide)
        component = np.repeat(np.arange(len(core.nvec)), core.nvec)  # of each logit
        logits = dense_logits(core.nvec)  # switches before the first stage run
        for components, of_stage in zip(core.stage_actions.components, of_stages, strict=True):
            logits = torch.where(torch.from_numpy(np.isin(component, components)), of_stage, logits)
        return logits, torch.from_numpy(decisions), state, torch.stack(observed, dim=1)

    def _draw(self, logits: Tensor) -> Tensor:
        """Draws ``[rows]`` from logits ``[rows, size]`` with the agent's generator."""
        probabilities = bounded(logits, self.settings.exploration).exp()
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def _halves(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients ``[parameters]`` of the mean of ``terms [tries, instances]``, from each half of the instances."""
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


def leave_one_out(values: Tensor) -> Tensor:
    """Values ``[tries, instances]`` less the mean of the other tries on the same instance (Kool et al. 2019)."""
    tries = len(values)
    return (values - values.mean(dim=0)) * tries / (tries - 1)
