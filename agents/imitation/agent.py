"""Imitation: a search scores training instances under each mask of a path, and the policy learns to predict the scores.

A greedy search orders the candidates: a path of static masks from dense to all skipped. All training instances run
under all masks of this path. A network learns how likely each instance is to lose its quality under each mask (its
*risk*). Each step down the path saves FLOPs and adds risk. It pays if the savings exceed the risk times a multiplier.
The policy learns the ratio of risk and savings of each step. A margin on its logits stands for another multiplier, and
so gives another operating point. (TR-BERT, Ye et al. 2021, and Dr.LLM also start from searched decisions. Their target
is the outcome of each instance under a decision; here it is the risk.)

With several stages each stage decides on its part of the path: ``sd_gym.agents.imitation.staged``.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.baselines.search import OnRound, Per, greedy_path, path_losses, path_steps
from sd_gym.agents.baselines.static import MASKS, nested_path, report_scored
from sd_gym.agents.imitation.path_logits import AVOIDED, LEAST_RISK, above_hull, component_logits, step_logits
from sd_gym.agents.imitation.staged import Combinations
from sd_gym.agents.learning.agent import Agent, LearnerSettings, OnRollout, observation_layers
from sd_gym.agents.learning.decisions import Version, row_batches, versions
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.envs.actions import write_masks
from sd_gym.envs.protocols import mean_flops
from sd_gym.envs.spaces import flat_size
from sd_gym.policy import HIDDEN, DecisionPolicy
from sd_gym.policy.choices import first_columns

ORDER_INSTANCES = 1000  # for the search of the path
NETWORKS = 5  # that predict the risk, each with other rows held out; the mean of their predictions is less noisy
PRICES = 2.0 ** (np.arange(-6, 4) / 3)  # of a lost instance, as multiples of the env's penalty; with several stages
Loss = Callable[[NDArray | slice], Tensor]  # of some instances
SURE = 6.0  # highest log-odds of skipping, so that learning can still change decisions in a warm start


class ImitationSettings(LearnerSettings):
    """Settings of imitation.

    Attributes:
        path: Folder of a run of ``imitation`` whose masks are the path, or of ``static`` where it does not try all
            masks; ``None``: search a path on the training split.
        per: What a step of a searched path skips: a ``sublayer``, or a whole ``layer``.
        instances: Largest number of training instances that run under the masks of the path.
        epochs: Passes over them, for the risk and for the policy; the best epoch on a held-out tenth is used.
        batch_size: Instances per minibatch.
        weight_decay: Weight decay of AdamW.
    """

    space: ClassVar = {
        "learning_rate": (2e-4, 1e-2),
        "epochs": [10, 20, 40, 80],
        "batch_size": [64, 128, 256],
        "weight_decay": (1e-4, 1e-1),
    }

    path: Path | None = None
    per: Per = "sublayer"
    instances: int = Field(10_000, ge=20)
    epochs: int = Field(40, ge=1)
    batch_size: int = Field(128, ge=1)
    weight_decay: float = Field(1e-2, ge=0)


class ImitationAgent(Agent[ImitationSettings]):
    """Runs training instances under the masks of a path, and learns their risk and which steps pay."""

    Settings = ImitationSettings
    path: NDArray  # masks from dense to all skipped, int64 [masks, components]; after learning
    staged = per_stage = True
    uses_reward = False
    validates = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        space = self.env.core.observation_space
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = self.new_policy().eval()
            self.risk_networks = [observation_layers(space, HIDDEN) for _ in range(NETWORKS)]
        self._standardise_encoders(self.network, *self.risk_networks)
        self._initialise(self.network)
        self.priced: list[DecisionPolicy] = []  # with several stages, a policy per price of a lost instance
        self.static: DecisionPolicy | None = None  # with an answer stage, the network with one mask for all inputs

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search and learn; ``total_steps`` plays no part."""
        core, on_round = self.env.core, partial(report_scored, on_rollout)
        if core.config.split != "train":
            raise ValueError(f"imitation learns on the rows of split=train, got an env with split={core.config.split}")
        split = core.split("train")
        rows = np.random.default_rng(self.seed).permutation(len(split))[: self.settings.instances]
        if self.settings.path is not None:
            self.path = nested_path(self.settings.path, core)
        else:
            self.path = greedy_path(core, split, rows[:ORDER_INSTANCES], on_round, per=self.settings.per)
        if core.is_staged:
            self._learn_stages(rows, on_round, logger)
        else:
            self._learn_once(rows, on_round, logger)

    def _learn_once(self, rows: NDArray, on_round: OnRound, logger: Logger) -> None:
        core, split = self.env.core, self.env.core.split("train")
        lost = path_losses(split, rows, self.path, on_round).astype(np.float32)
        flops = mean_flops(split, rows, self.path)
        risk = self._predict_risk(rows, lost[:, 1:], logger)
        reward = core.config.reward
        risk, ratios = F.pad(risk, (1, 0)), torch.from_numpy(flops)  # dense, the first mask, loses nothing
        steps = step_logits(risk, ratios)
        above = above_hull(risk, ratios, steps)
        against = AVOIDED * above / (above + max(reward.epsilon, LEAST_RISK))
        steps = steps - math.log(reward.penalty / reward.cost_scale)  # positive where a step pays
        logger.record("search/flops_ratio", float(flops[(steps > 0).sum(dim=1)].mean()))
        logits = component_logits(steps.clamp(-SURE, SURE), against, self.path, core.nvec)
        self.network.graded = bool(core.nvec.max() > 2)  # else each component has one step

        def loss(chosen: NDArray | slice) -> Tensor:
            return F.mse_loss(self._outputs(self.network, rows[chosen]), logits[chosen])

        self._fit(self.network, loss, "imitation/held_out_loss", len(rows), logger)
        self._average_tied_logits()

    def _learn_stages(self, rows: NDArray, on_round: OnRound, logger: Logger) -> None:
        """Learn a policy at each price of a loss, in ascending order; ``network`` is the one at the env's price."""
        embedded = None if self.channels is None else self._observe
        known = Combinations(self.env.core, rows, self.path, self.blind, embedded, on_round, self.seed)
        reward, start = self.env.core.config.reward, self.network
        start.codebook = known.codebook
        for share in PRICES:
            network = deepcopy(start)  # one that has learned another price is too sure to change
            if self.env.core.has_answer_stage and self.per_stage:
                self._judge_by_answer(network)
            objective = partial(known.objective, network, price=share * reward.penalty / reward.cost_scale)
            tag = "imitation/held_out_loss" if share == 1 else f"imitation/held_out_loss_at_{share:.2g}"
            self._fit(network, objective, tag, len(rows), logger)
            self.priced.append(network.eval())
        self.network = self.priced[PRICES.tolist().index(1.0)]
        if self.env.core.has_answer_stage and not self.blind:
            mask = known.best_mask(self.network, reward.penalty / reward.cost_scale)
            self.static = self.network.with_mask(mask) if mask.any() else None

    @torch.no_grad()
    def _judge_by_answer(self, network: DecisionPolicy) -> None:
        """Let the answer stage read FLOPs and the head's judgement only: learning from its text takes more rows."""
        core = self.env.core
        flat, read = flat_size(core.observation_space), torch.zeros(network.features)
        read[: len(core.stages) + 1] = read[flat - core.stage_observer.answer_size : flat] = 1
        weight = network.body.of_stage[-1][0].weight
        weight.mul_(read)
        weight.register_hook(lambda gradient: gradient * read)

    def save_extra(self, folder: Path) -> None:
        """Write the path as ``masks.json``."""
        write_masks(self.path, folder / MASKS)

    def policy(self) -> DecisionPolicy:
        """A copy of the network."""
        return deepcopy(self.network).eval()

    def selectable_policies(self) -> list[DecisionPolicy]:
        """The policy."""
        return [self.policy()]

    def operating_points(self) -> list[Version]:
        """Versions of the policy; with several stages the policies of all prices, and cautious versions of the last.

        With an answer stage also those of the policy with one mask, which saves more where masks are hard to foresee.
        """
        if not self.priced:
            return super().operating_points()
        *bolder, last = self.priced
        # Even the highest price may lose too much; without more cautious points dense would then be selected.
        cautious = [version for version in versions(self.env.core, last) if version.margin >= 0]
        points = cautious + [Version(policy, origin=policy) for policy in bolder]
        priced = [point._replace(variant_of=self.network) for point in points]
        return priced if self.static is None else priced + versions(self.env.core, self.static)

    def _outputs(self, network: nn.Module, rows: NDArray) -> Tensor:
        """Outputs ``[n, outputs]`` of a network on ``rows [n]`` of the training split.

        Rows are observed again each time, as all embedded tokens would need too much memory.
        """
        return torch.cat([network(self._observe(part)) for part in row_batches(self.env.core, rows)])

    def _predict_risk(self, rows: NDArray, lost: NDArray, logger: Logger) -> Tensor:
        """Learn to predict the quality ``lost [n, masks]`` of ``rows [n]`` under masks; returns the predictions.

        Losses and gains are separate outputs: where the backbone is often wrong, both may be likely.
        """
        highest = self.env.core.split("train").scoring.highest
        targets = torch.from_numpy(np.concatenate([lost, -lost], axis=1) / highest).clamp(0, 1)
        predicted = torch.zeros_like(targets)
        for number, layers in enumerate(self.risk_networks):
            head = nn.Linear(HIDDEN, targets.shape[1])  # it begins with the log-odds of the means
            with torch.no_grad():
                head.weight.zero_()
                head.bias.copy_(targets.mean(dim=0).clamp(1e-4, 1 - 1e-4).logit())
            network = nn.Sequential(layers, head)
            order = np.roll(np.arange(len(rows)), number * len(rows) // NETWORKS)  # the first ones are held out

            def loss(chosen: NDArray | slice, network: nn.Module = network, order: NDArray = order) -> Tensor:
                some = order[chosen]
                return F.binary_cross_entropy_with_logits(self._outputs(network, rows[some]), targets[some])

            self._fit(network, loss, f"imitation/risk_loss_{number}", len(rows), logger)
            with torch.no_grad():
                predicted += self._outputs(network, rows).sigmoid() / NETWORKS
        losing, gaining = predicted.chunk(2, dim=1)
        return (losing - gaining) * highest

    @torch.no_grad()
    def _average_tied_logits(self) -> None:
        """Give components that are skipped together, those of a layer, their mean logits."""
        nvec, head = self.env.core.nvec, self.network.head
        first = first_columns(nvec)
        for raised in path_steps(self.path):
            for choice in range(int(nvec[raised].max()) if len(raised) > 1 else 0):
                outputs = torch.from_numpy(first[raised] + choice)
                for values in head.parameters():
                    values[outputs] = values[outputs].mean(dim=0)

    def _fit(self, network: nn.Module, loss: Loss, tag: str, instances: int, logger: Logger) -> None:
        """Minimise a loss by AdamW; the epoch (0: untrained) that is best on the held-out first tenth is used."""
        settings, held_out = self.settings, max(1, instances // 10)
        generator = torch.Generator().manual_seed(self.seed)
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
        lowest, best = float("inf"), network.state_dict()
        for epoch in range(settings.epochs + 1):
            if epoch:
                # NumPy's indices: a tensor of one index would take a row instead of an array of one row.
                order = held_out + torch.randperm(instances - held_out, generator=generator).numpy()
                for rows in np.split(order, range(settings.batch_size, len(order), settings.batch_size)):
                    optimizer.zero_grad()
                    loss(rows).backward()
                    optimizer.step()
            with torch.no_grad():
                error = loss(slice(0, held_out)).item()
            logger.record(tag, error)
            logger.dump(epoch)
            if error < lowest:
                lowest, best = error, {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(best)
