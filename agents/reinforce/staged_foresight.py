"""A loss model for several stages: predicts the final outcome at each stage, from the observation there."""

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
from sd_gym.policy.choices import first_columns

MEMORY = 2**25  # observed numbers in memory, of two bytes each: 64 MiB
RECENT = 4096  # the policy learns on states of the last decisions
Choose = Callable[[Tensor | dict[str, Tensor]], Tensor]
FITS = 2  # steps between two updates of the policy; all stages share them


def dense_logits(nvec: NDArray) -> Tensor:
    """Logits ``[sum(nvec)]`` that choose 0, to run, for each component with certainty."""
    logits = torch.full((int(nvec.sum()),), -1e9)
    logits[torch.from_numpy(first_columns(nvec))] = 0.0
    return logits


class StageStates(NamedTuple):
    """States of remembered decisions at a stage."""

    rows: Tensor  # rows of the instances, int64 [n]
    stage: Tensor  # index of the stage, int64 [n]
    observations: Tensor | dict[str, Tensor]  # float32 [n, size], or with tokens
    decisions: Tensor  # made at earlier stages, int64 [n, components]; 0 from this stage on


class StagedForesight(Foresight):
    """A network from a stage's observation, and the decisions up to it, to the final loss and the FLOPs saved later.

    The target of the last stage is the scored outcome. The target of an earlier stage is the prediction at the next
    one, with a decision of the current policy there (expected SARSA, van Seijen et al. 2009, with one draw). So states
    of older policies remain useful.

    ``tokens`` maps rows ``[n]`` to their tokens, which are not remembered; ``None``: no tokens are observed.
    """

    learning_starts = 2048  # a policy that learns sooner over-reacts to losses that it cannot attribute

    def __init__(self, core: Core, split: Split, tokens: Callable[[NDArray], Any] | None = None) -> None:
        super().__init__(core.observation_space, core.nvec, outputs=3)
        size = flat_size(core.observation_space)
        torch.nn.init.zeros_(self.network.get_parameter(f"{len(self.network) - 1}.bias")[2:])
        self._costs = split.costs
        self._last = len(core.stages) - 1
        self._memory = MEMORY // (len(core.stages) * size)
        self._tokens = tokens
        self._own = torch.zeros(len(core.stages), len(core.nvec), dtype=torch.bool)  # the components of each stage
        for own, components in zip(self._own, core.stage_actions.components, strict=True):
            own[torch.from_numpy(components)] = True
        self._before = self._own.cumsum(dim=0) - self._own.long()  # and those of earlier stages
        self._component = torch.from_numpy(np.repeat(np.arange(len(core.nvec)), core.nvec))  # of each logit
        self._dense_logits = dense_logits(core.nvec)
        self.observed = torch.zeros(0, len(core.stages), size, dtype=torch.float16)  # observations but tokens

    def remember(self, rows: NDArray, decisions: Tensor, lost: Tensor, observed: Tensor | None = None) -> None:
        """Add scored decisions and the flat observations ``observed [n, stages, size]``; the oldest are forgotten."""
        super().remember(rows, decisions, lost)
        assert observed is not None  # there are stages
        self.observed = torch.cat([self.observed, observed.half()])
        kept = slice(max(0, len(self.rows) - self._memory), None)
        self.rows = self.rows[kept]
        self.decisions = self.decisions[kept]
        self.lost = self.lost[kept]
        self.observed = self.observed[kept]

    def states(self, drawn: Tensor, stage: Tensor) -> StageStates:
        """States of the remembered decisions ``drawn [n]``, each at its ``stage [n]``."""
        rows, decisions = self.rows[drawn], self.decisions[drawn].long() * self._before[stage]
        flat = self.observed[drawn, stage].float()
        observations = flat if self._tokens is None else {"stage": flat, **self._tokens(rows.numpy())}
        return StageStates(rows, stage, observations, decisions)

    def recent(self, n: int, random: np.random.Generator) -> StageStates:
        """States of recent decisions at random stages."""
        newest = len(self.rows)
        drawn = random.integers(max(0, newest - RECENT), newest, size=n)
        return self.states(torch.from_numpy(drawn), self._stages(n, random))

    def with_choices(self, states: StageStates, choices: Tensor) -> Tensor:
        """Decisions up to the stages, int64 ``[tries * n, components]``, with the stages' own from ``choices``."""
        tries = len(choices) // len(states.rows)
        return torch.where(self._own[states.stage].repeat(tries, 1), choices, states.decisions.repeat(tries, 1))

    def without_other_stages(self, states: StageStates, logits: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[n, sum(nvec)]`` and choices, in which components of other stages are 0 with certainty."""
        own = self._own[states.stage]
        alone = torch.where(own[:, self._component], logits, self._dense_logits)
        return alone, choices * own.repeat(len(choices) // len(own), 1)

    @torch.no_grad()
    def predict(self, states: StageStates, decisions: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of a loss and of a gain, ``[tries * n, 2]``; and final FLOPs ratios ``[tries * n]``."""
        tries = len(decisions) // len(states.rows)
        outputs = self(states.observations, decisions)
        saved = torch.where(states.stage == self._last, 0.0, outputs[:, 2].view(tries, -1)).flatten()
        return outputs[:, :2].sigmoid(), self._flops(states.rows.repeat(tries), decisions) - saved

    def fit_stages(self, size: int, random: np.random.Generator, choose: Choose) -> float:
        """``FITS`` steps of AdamW on ``size`` remembered states each; returns the last error.

        It is the cross-entropy of losses and gains, and the squared error of later savings. ``choose`` is the policy:
        it maps observations of ``n`` states to choices ``[n, components]``.
        """
        error = 0.0
        for _ in range(FITS):
            drawn, stage = torch.from_numpy(random.integers(len(self.rows), size=size)), self._stages(size, random)
            here, lost = self.states(drawn, stage), self.lost[drawn]
            decisions = self.with_choices(here, self.decisions[drawn].long())
            targets, saved = torch.stack([lost, -lost], dim=1).clamp(0, 1), torch.zeros(size)
            early = torch.nonzero(stage < self._last)[:, 0]
            if len(early):
                then = self.states(drawn[early], stage[early] + 1)
                targets[early], flops = self.predict(then, self.with_choices(then, choose(then.observations)))
                saved[early] = self._flops(here.rows[early], decisions[early]) - flops
            outputs = self(here.observations, decisions)
            predicted = torch.where(stage < self._last, outputs[:, 2], 0.0)
            loss = F.binary_cross_entropy_with_logits(outputs[:, :2], targets) + F.mse_loss(predicted, saved)
            error = self.step(loss)
        return error

    def _flops(self, rows: Tensor, decisions: Tensor) -> Tensor:
        """FLOPs ratios, float32 ``[n]``, if undecided components run."""
        return torch.from_numpy(self._costs.flops_ratio(rows.numpy(), decisions.numpy())).float()

    def _stages(self, n: int, random: np.random.Generator) -> Tensor:
        return torch.from_numpy(random.integers(self._last + 1, size=n))

    def state(self) -> dict[str, Any]:
        """Weights, optimizer and memory."""
        return {**super().state(), "observed": self.observed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state``."""
        super().load_state(state)
        self.observed = state["observed"]
