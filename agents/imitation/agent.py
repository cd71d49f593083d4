"""Imitation: a search finds out what each training instance loses under each mask, and the policy learns to foresee it.

A greedy search orders the candidates: a path of static masks from dense to nothing. All training instances run under
all masks of this path. A network learns how likely each instance is to lose its quality under each mask (its *risk*),
and from that follows how far it should go: each step down the path saves FLOPs and adds risk, and is worth it as long
as the savings outweigh the risk times a multiplier. The policy learns these exchange rates, so that a margin on its
logits is the logarithm of another multiplier: a bolder or more cautious policy. (TR-BERT, Ye et al. 2021, and Dr.LLM
also warm up on searched decisions; there each instance's own luck under a decision is the target, here its risk.)

At several stages each looks again, and decides on what is left of the path: ``sd_gym.agents.imitation.staged``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sd_gym.agents.baselines.search import Per, greedy_path, losses_along, order_of
from sd_gym.agents.baselines.static import MASKS, nested_path, report
from sd_gym.agents.imitation.rates import component_logits, step_logits
from sd_gym.agents.imitation.staged import Induction, Stretch, Taught
from sd_gym.agents.learning.agent import Agent, LearnerSettings, OnRollout, learning_bias
from sd_gym.agents.learning.decisions import seen_together
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.envs.protocols import Split
from sd_gym.envs.spaces import flat_size, token_width, write_masks
from sd_gym.files import read_tensors, write_tensors
from sd_gym.policy import HIDDEN, DecisionPolicy, blinded
from sd_gym.policy.observations import to_tensors
from sd_gym.policy.token_encoder import TokenEncoder

ORDER_INSTANCES = 1000  # that the path of static masks is searched on
SEARCHED = "searched.safetensors"
CAUTION = (1.0, 1000.0)  # log-odds by which stages before a later one are more cautious; the last one runs all there
STARTS = 3  # stages at most that are offered as the first one that skips
SURE = 6.0  # log-odds of skipping at most: learning that goes on from the policy can still leave a decision


class Searched(NamedTuple):
    """What came of the search.

    Attributes:
        rows: Of the training split, int64 ``[n]``.
        path: Masks from dense to nothing, int64 ``[masks, components]``.
        lost: Quality that each instance loses under each mask, float32 ``[n, masks]``; negative where it gains.
    """

    rows: NDArray
    path: NDArray
    lost: NDArray


class ImitationSettings(LearnerSettings):
    """Settings of imitation.

    Attributes:
        path: Folder of a run of ``static`` whose masks are the path, or of one of ``imitation`` whose whole search is
            taken over (between one stage and several, its path); ``None``: the path is searched on the training split.
        per: What a step of a searched path skips: a ``sublayer``, or a whole ``layer``.
        instances: Training instances that run under the masks of the path, at most.
        epochs: Passes over them, for the risk and for the policy; a tenth of them is held out, and the best epoch on it
            is kept.
        batch_size: Of the supervised learning.
        weight_decay: Of AdamW.
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


class ImitationAgent(Agent):
    """Runs training instances under the masks of a path, learns their risk, and what is worth it."""

    Settings = ImitationSettings
    settings: ImitationSettings
    searched: Searched  # once it has learned, of several stages its path alone
    staged = per_stage = True
    validates = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.network = self.new_policy().eval()
            # Nobody pays for what foresees, so its token encoder is wide.
            self.foresight = nn.ModuleList([self._new_foresight() for _ in self.env.core.stages])
        self._begin(self.network, self.foresight)
        with torch.no_grad():
            if self.start is not None:
                self.network.load_state_dict(self.start.state_dict())
            else:
                self.network.initialise(learning_bias(self.env.core, self.settings.initial_skip_rate))

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search and learn; it takes as many decisions as it takes."""
        core = self.env.core
        split, taken = core.split("train"), self.settings.path
        if core.is_staged:
            self._learn_stages(split, logger, on_rollout)
            return
        if taken is not None and (taken / SEARCHED).exists():
            self.searched = read_searched(taken, len(split), core.nvec)
        else:
            self.searched = self._search(split, on_rollout)
        rows, path, lost = self.searched
        flops = np.array([split.costs.flops_ratio(rows, np.tile(mask, (len(rows), 1))).mean() for mask in path])
        risk = self._foresee(rows, lost[:, 1:], logger)
        multiplier = core.config.reward.penalty / core.config.reward.cost_scale
        worth = step_logits(F.pad(risk, (1, 0)), torch.from_numpy(flops)) - math.log(multiplier)
        logger.record("search/flops_ratio", float(flops[(worth > 0).sum(dim=1)].mean()))
        self._imitate(rows, component_logits(worth.clamp(-SURE, SURE), path, core.nvec), logger)
        self._tie(path)

    def _learn_stages(self, split: Split, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn what is to come from the last stage back, and the policy from that."""
        rows, path = self._rows_of(split), np.stack(self._path(split, partial(report, on_rollout)))
        self.searched = Searched(rows, path, np.zeros((len(rows), 0), dtype=np.float32))

        def fit(network: nn.Module, loss: Callable[[Tensor | slice], Tensor], tag: str) -> None:
            self._fit(network, loss, len(rows), tag, logger)

        induction = Induction(
            self.env.core,
            rows,
            path,
            self.foresight,
            fit,
            self._sees,
            self.channels is not None,
            partial(report, on_rollout),
            self.seed,
        )
        self._imitate_stages(induction.learn(), induction.stretches, logger)

    def _imitate_stages(self, taught: list[Taught], stretches: list[Stretch], logger: Logger) -> None:
        """Teach the policy what each stage shall say, of the stage's own components."""
        nvec = self.env.core.nvec
        choices = np.repeat(np.arange(len(nvec)), nvec)  # the component of each logit
        wanted = [
            component_logits(one.steps.flatten(0, 1).clamp(-SURE, SURE), stretch.ways, nvec).unflatten(
                0, one.steps.shape[:2]
            )
            for one, stretch in zip(taught, stretches, strict=True)
        ]
        counts = [torch.from_numpy(np.isin(choices, stretch.components)).float() for stretch in stretches]

        def loss(chosen: Tensor | slice) -> Tensor:
            errors, counted = 0.0, 0.0
            for one, logits, count in zip(taught, wanted, counts, strict=True):
                said = self.network(one.looks.of(chosen))
                errors = errors + (((said - logits[chosen].flatten(0, 1)) ** 2) * count).sum()
                counted = counted + len(said) * count.sum()
            return errors / counted

        self._fit(self.network, loss, len(taught[0].steps), "imitation/held_out_loss", logger)
        for stretch in stretches:
            self._tie(stretch.ways)

    def _rows_of(self, split: Split) -> NDArray:
        return np.random.default_rng(self.seed).permutation(len(split))[: self.settings.instances]

    def _path(self, split: Split, on_round: Callable[[int], None]) -> list[NDArray]:
        """The masks of the path: those of a run, or searched."""
        core, taken = self.env.core, self.settings.path
        if taken is None:
            return greedy_path(core, split, self._rows_of(split)[:ORDER_INSTANCES], on_round, per=self.settings.per)
        return nested_path(taken, core.nvec)

    def _search(self, split: Split, on_rollout: OnRollout) -> Searched:
        rows, on_round = self._rows_of(split), partial(report, on_rollout)
        path = self._path(split, on_round)
        return Searched(rows, np.stack(path), losses_along(split, rows, path, on_round).astype(np.float32))

    def save_extra(self, folder: Path) -> None:
        """Write ``masks.json``, the path, and, where it was decided once, ``searched.safetensors``, of ``Searched``."""
        write_masks(self.searched.path, folder / MASKS)
        if self.env.core.is_staged:
            return
        searched = self.searched._asdict().items()
        write_tensors(
            folder / SEARCHED, {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in searched}
        )

    def policy(self) -> DecisionPolicy:
        """A copy of the network."""
        return deepcopy(self.network).eval()

    def offers(self) -> list[DecisionPolicy]:
        """The policy; of several stages also such whose first ones are more cautious, or run all.

        Selection finds the margin of each, so that the thresholds of all stages are chosen together.
        """
        core, policy = self.env.core, self.policy()
        later = np.unique(np.linspace(1, len(core.stages) - 1, STARTS).round().astype(int)) if core.is_staged else []
        first = np.cumsum([0, *core.nvec[:-1]])  # the choice of each component that runs all
        offered = [policy]
        for stage, caution in product(later if len(core.stages) > 1 else [], CAUTION):
            before = np.concatenate(core.steps.components[:stage])
            more = self.policy()
            with torch.no_grad():
                more.head.bias[torch.from_numpy(first[before])] += caution
            offered.append(more)
        return offered

    def _new_foresight(self) -> nn.Sequential:
        """From observations to ``HIDDEN`` features of what they foretell."""
        space = self.env.core.observation_space
        size, encoder = flat_size(space), []
        if self.channels is not None:
            encoder = [TokenEncoder(token_width(space), stage_size=size)]
            size = encoder[0].size
        return nn.Sequential(*encoder, nn.Linear(size, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())

    def _sees(self, observations: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return blinded(observations, self.env.core.stages) if self.blind else observations

    def _of(self, network: nn.Module, rows: NDArray) -> Tensor:
        """What a network makes of ``rows [n]`` of the training split, ``[n, outputs]``; a row an instance.

        They are observed anew each time: embedding tokens again is cheap, and keeping them all is not.
        """
        core, made = self.env.core, []
        for part in seen_together(core, rows):
            made.append(network(self._sees(to_tensors(core.observe(core.split("train"), part)))))
        return torch.cat(made)

    def _foresee(self, rows: NDArray, lost: NDArray, logger: Logger) -> Tensor:
        """Learn what ``rows [n]`` lose under masks, ``lost [n, masks]``, and return what is expected of each.

        Losses and gains are foreseen each by itself, since both may be likely at once where the backbone is often
        wrong.
        """
        targets = torch.from_numpy(np.concatenate([lost, -lost], axis=1)).clamp(0, 1)
        head = nn.Linear(HIDDEN, targets.shape[1])
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(targets.mean(dim=0).clamp(1e-4, 1 - 1e-4).logit())
        network = nn.Sequential(self.foresight[0], head)

        def loss(chosen: Tensor | slice) -> Tensor:
            return F.binary_cross_entropy_with_logits(self._of(network, rows[chosen]), targets[chosen])

        self._fit(network, loss, len(rows), "imitation/risk_loss", logger)
        with torch.no_grad():
            losing, gaining = self._of(network, rows).sigmoid().chunk(2, dim=1)
        return losing - gaining

    def _imitate(self, rows: NDArray, logits: Tensor, logger: Logger) -> None:
        """Teach the policy these logits ``[n, sum(nvec)]`` on ``rows [n]``."""

        def loss(chosen: Tensor | slice) -> Tensor:
            return F.mse_loss(self._of(self.network, rows[chosen]), logits[chosen])

        self._fit(self.network, loss, len(rows), "imitation/held_out_loss", logger)

    @torch.no_grad()
    def _tie(self, path: NDArray) -> None:
        """Components that one step raises, those of a layer, have learned the same logits: they say their mean.

        Else some of them would be skipped without the others, which nothing was searched for.
        """
        nvec, head = self.env.core.nvec, self.network.head  # of a network of one's own, a bias alone
        first = np.cumsum([0, *nvec[:-1]])
        for raised in order_of(list(path)):
            for choice in range(int(nvec[raised].max()) if len(raised) > 1 else 0):
                outputs = torch.from_numpy(first[raised] + choice)
                for values in head.parameters():
                    values[outputs] = values[outputs].mean(dim=0)

    def _fit(
        self,
        network: nn.Module,
        loss: Callable[[Tensor | slice], Tensor],
        instances: int,
        tag: str,
        logger: Logger,
    ) -> None:
        """Minimise a loss of rows by AdamW, and keep the epoch that is the best on the first tenth, held out.

        What there was before the first epoch may stay: where nothing about an input tells its risk, the mean does.
        """
        settings, held_out = self.settings, max(1, instances // 10)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        lowest = float("inf")
        for epoch in range(settings.epochs + 1):
            if epoch:
                order = held_out + torch.randperm(instances - held_out, generator=generator)
                for rows in order.split(settings.batch_size):
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


def read_searched(folder: Path, instances: int, nvec: NDArray) -> Searched:
    """What a run of ``imitation`` has searched, for a training split of so many ``instances``.

    Raises:
        ValueError: If it is that of another env, or damaged.
    """
    tensors = {name: value.numpy() for name, value in read_tensors(folder / SEARCHED).items()}
    if tensors.keys() != set(Searched._fields) or [tensors[name].ndim for name in Searched._fields] != [1, 2, 2]:
        raise ValueError(f"{folder / SEARCHED} holds {', '.join(tensors)}; expected {', '.join(Searched._fields)}")
    searched = Searched(**tensors)
    if searched.path.shape[1:] != nvec.shape or searched.rows.max() >= instances:
        raise ValueError(
            f"what was searched in {folder} has {searched.path.shape[1]} components and rows up to "
            f"{searched.rows.max()}; expected {len(nvec)} components, and rows of a training split of {instances}"
        )
    return searched
