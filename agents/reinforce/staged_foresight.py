"""A loss model of several stages: what a decision leads to, foreseen at each stage from what is observed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.reinforce.foresight import Foresight
from torch import Tensor
from torch.nn import functional as F

from sd_gym.envs.protocols import Core, Split
from sd_gym.envs.spaces import flat_size

MEMORY = 2**25  # numbers that were observed, at two bytes: 64 MiB
RECENT = 4096  # decisions in whose states the policy learns
Choose = Callable[[Tensor | dict[str, Tensor]], Tensor]
FITS = 2  # steps between two updates of the policy, which each stage has to share


def certain(nvec: NDArray) -> Tensor:
    """Logits ``[sum(nvec)]`` that choose 0 of each component for certain: of what is not decided, and runs."""
    logits = torch.full((int(nvec.sum()),), -1e9)
    logits[torch.from_numpy(np.cumsum([0, *nvec[:-1]]))] = 0.0
    return logits


class StageStates(NamedTuple):
    """Stages that remembered decisions have come to."""

    rows: Tensor  # of their instances, int64 [n]
    stage: Tensor  # number of the stage, int64 [n]
    seen: Tensor | dict[str, Tensor]  # what was observed there, float32 [n, size], or with tokens beside it
    decisions: Tensor  # as they were made before the stage, int64 [n, components]; 0 from there on


class StagedForesight(Foresight):
    """A network from a stage's observation, and the decisions up to it, to the quality lost and FLOPs saved at the end.

    What the last stage decides leads to what was scored. What an earlier one decides leads to what is foreseen at the
    next stage, when the policy decides there as it does now (expected SARSA, van Seijen et al. 2009, of one draw). So
    states that older policies have come to stay worth learning from.

    ``tokens`` leads from rows ``[n]`` to their tokens, which are not remembered; ``None``: no tokens are observed.
    """

    learning_starts = 2048  # a policy that learns sooner over-reacts to losses that it cannot attribute

    def __init__(self, core: Core, split: Split, tokens: Callable[[NDArray], dict[str, Tensor]] | None = None) -> None:
        super().__init__(core.observation_space, core.nvec, outputs=3)
        size = flat_size(core.observation_space)
        torch.nn.init.zeros_(self.network.get_parameter(f"{len(self.network) - 1}.bias")[2:])
        self._costs = split.costs
        self._last = len(core.stages) - 1
        self._memory = MEMORY // (len(core.stages) * size)
        self._tokens = tokens
        self._own = torch.zeros(len(core.stages), len(core.nvec), dtype=torch.bool)  # what each stage decides
        for own, components in zip(self._own, core.steps.components, strict=True):
            own[torch.from_numpy(components)] = True
        self._before = self._own.cumsum(dim=0) - self._own.long()  # and what is decided by then
        self._component = torch.from_numpy(np.repeat(np.arange(len(core.nvec)), core.nvec))  # of each logit
        self._certain = certain(core.nvec)
        self.seen = torch.zeros(0, len(core.stages), size, dtype=torch.float16)  # all that was observed but tokens

    def remember(self, rows: NDArray, decisions: Tensor, lost: Tensor, seen: Tensor | None = None) -> None:
        """Add what was scored and what was ``seen`` at each stage, ``[n, stages, size]``; the oldest is forgotten."""
        super().remember(rows, decisions, lost)
        assert seen is not None  # of several stages it is always known
        self.seen = torch.cat([self.seen, seen.half()])
        kept = slice(max(0, len(self.rows) - self._memory), None)
        self.rows, self.decisions, self.lost = self.rows[kept], self.decisions[kept], self.lost[kept]
        self.seen = self.seen[kept]

    def states(self, drawn: Tensor, stage: Tensor) -> StageStates:
        """Of the remembered decisions ``drawn [n]``, each at the stage ``[n]``."""
        rows, decisions = self.rows[drawn], self.decisions[drawn].long() * self._before[stage]
        shown = self.seen[drawn, stage].float()
        seen = shown if self._tokens is None else {"stage": shown, **self._tokens(rows.numpy())}
        return StageStates(rows, stage, seen, decisions)

    def recent(self, n: int, random: np.random.Generator) -> StageStates:
        """So many that decisions of late have come to, each stage as often."""
        newest = len(self.rows)
        drawn = random.integers(max(0, newest - RECENT), newest, size=n)
        return self.states(torch.from_numpy(drawn), self._stages(n, random))

    def with_choices(self, states: StageStates, choices: Tensor) -> Tensor:
        """Decisions up to the stages, int64 ``[tries * n, components]``, where ``choices`` of that size are made."""
        tries = len(choices) // len(states.rows)
        return torch.where(self._own[states.stage].repeat(tries, 1), choices, states.decisions.repeat(tries, 1))

    def own_alone(self, states: StageStates, logits: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[n, sum(nvec)]`` and choices, but what is not of the stage is 0 for certain."""
        own = self._own[states.stage]
        alone = torch.where(own[:, self._component], logits, self._certain)
        return alone, choices * own.repeat(len(choices) // len(own), 1)

    @torch.no_grad()
    def outlook(self, states: StageStates, decisions: Tensor) -> tuple[Tensor, Tensor]:
        """How probable it is that quality is lost and gained, ``[tries * n, 2]``; and FLOPs ratios ``[tries * n]``."""
        tries = len(decisions) // len(states.rows)
        outputs = self(states.seen, decisions)
        saved = torch.where(states.stage == self._last, 0.0, outputs[:, 2].view(tries, -1)).flatten()
        return outputs[:, :2].sigmoid(), self._flops(states.rows.repeat(tries), decisions) - saved

    def fit_stages(self, size: int, random: np.random.Generator, choose: Choose) -> float:
        """``FITS`` steps on so many remembered states each; returns the last error.

        ``choose`` is the policy: from observations of ``n`` to choices ``[n, components]``.
        """
        error = 0.0
        for _ in range(FITS):
            drawn = torch.from_numpy(random.integers(len(self.rows), size=size))
            error = self._fit_stages(drawn, self._stages(size, random), choose)
        return error

    def _fit_stages(self, drawn: Tensor, stage: Tensor, choose: Choose) -> float:
        """One step of AdamW: the cross-entropy of losses and gains, and the squared error of what is saved later."""
        here, lost = self.states(drawn, stage), self.lost[drawn]
        decisions = self.with_choices(here, self.decisions[drawn].long())
        targets, saved = torch.stack([lost, -lost], dim=1).clamp(0, 1), torch.zeros(len(drawn))
        early = torch.nonzero(stage < self._last)[:, 0]
        if len(early):
            then = self.states(drawn[early], stage[early] + 1)
            targets[early], flops = self.outlook(then, self.with_choices(then, choose(then.seen)))
            saved[early] = self._flops(here.rows[early], decisions[early]) - flops
        outputs = self(here.seen, decisions)
        error = F.binary_cross_entropy_with_logits(outputs[:, :2], targets)
        return self.step(error + F.mse_loss(torch.where(stage < self._last, outputs[:, 2], 0.0), saved))

    def _flops(self, rows: Tensor, decisions: Tensor) -> Tensor:
        """FLOPs ratios, float32 ``[n]``, when all that is not decided runs."""
        return torch.from_numpy(self._costs.flops_ratio(rows.numpy(), decisions.numpy())).float()

    def _stages(self, n: int, random: np.random.Generator) -> Tensor:
        return torch.from_numpy(random.integers(self._last + 1, size=n))

    def state(self) -> dict[str, Any]:
        """Weights, optimizer and memory."""
        return {**super().state(), "seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        super().load_state(state)
        self.seen = state["seen"]
