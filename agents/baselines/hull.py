"""Coins between static masks: what can be had without a look at the input, and so what a policy has to beat."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.baselines import search
from sd_gym.agents.baselines.static import StaticAgent
from sd_gym.agents.learning.agent import OnRollout
from sd_gym.agents.learning.decisions import Version, policy_rows
from stable_baselines3.common.logger import Logger

from sd_gym.envs.exact import hull, lower_hull
from sd_gym.envs.table import TableCore
from sd_gym.policy import DecisionPolicy

POINTS = 40  # operating points, evenly in FLOPs
LOSSES = 3.0  # epsilons that the boldest point may lose on policy rows
DRAWS = 100_000  # that the odds of a coin are set by


class HullAgent(StaticAgent):
    """Masks on the lower hull of mean loss and FLOPs on policy rows, and coins between neighbours on it.

    The masks are those that ``static`` finds; of a table all of them. A hash of the input tosses the coin, so that the
    same input is always decided on alike. Where an env has several stages there are no coins.
    """

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search the masks, and keep those on the hull: from dense down in FLOPs."""
        core, split = self.env.core, self.env.core.split("train")
        if isinstance(core, TableCore) and self.settings.path is None:
            found = hull(core.split("train"))
            masks = core.from_masks(core.masks[found.number])
        else:
            super().learn(total_steps, logger, on_rollout)
            masks, rows = np.unique(self.masks, axis=0), policy_rows(core)
            loss = search.path_losses(split, rows, list(masks), lambda scored: None).mean(axis=0)
            flops = [split.costs.flops_ratio(rows, np.tile(mask, (len(rows), 1))).mean() for mask in masks]
            found = lower_hull(loss, np.array(flops))
            masks = masks[found.number]
        saves = found.flops < 1 - 1e-9  # dense comes first, also where a mask loses less
        self.masks = [np.zeros_like(core.nvec), *masks[saves]]
        self._loss, self._flops = np.append(0.0, found.loss[saves]), np.append(1.0, found.flops[saves])

    def operating_points(self) -> list[Version]:
        """Masks of the hull and coins between them, evenly in FLOPs."""
        if not self.env.core.steps.is_whole:  # a coin is tossed once for a whole decision
            return super().operating_points()
        bold = self._loss > LOSSES * self.env.core.config.reward.epsilon
        last = int(bold.argmax()) if bold.any() else len(bold) - 1
        wanted = np.linspace(self._flops[0], self._flops[last], POINTS + 1)[1:]
        return [Version(self._coin(flops)) for flops in wanted] if last else []

    def _coin(self, flops: float) -> DecisionPolicy:
        """The coin between the two masks around so many FLOPs that spends these on the mean."""
        number = int((self._flops > flops).sum())  # of the cheap one; they come down in FLOPs
        dear, cheap = self._flops[number - 1 : number + 1]
        return self._tossed(self.masks[number - 1], self.masks[number], float((flops - cheap) / (dear - cheap)))

    def _tossed(self, one: NDArray, other: NDArray, share: float) -> DecisionPolicy:
        """A policy that takes one mask for a share of the inputs, and else another."""
        if not 0 < share < 1:
            return self._mask_policy(one if share >= 1 else other)
        logits = torch.zeros(int(self.env.core.nvec.sum()))
        differ = np.flatnonzero(one != other)
        logits[int(self.env.core.nvec[: differ[0]].sum()) + int(one[differ[0]])] = odds(share, len(differ))
        policy = self._constant_policy(logits, noise="hash")
        policy.codebook = torch.from_numpy(np.stack([one, other]))
        return policy


def odds(share: float, components: int) -> float:
    """By how much a mask has to be preferred to be taken so often, if it differs from another in so many components.

    The noise of each adds a logistic number.
    """
    if components == 1:
        return math.log(share / (1 - share))
    noise = np.random.default_rng(0).logistic(size=(DRAWS, components)).sum(axis=1)
    return -float(np.quantile(noise, 1 - share))
