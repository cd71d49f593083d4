"""Random mixtures of static masks: what a policy can reach without its input, and so has to beat."""

import math

import numpy as np
import torch
from sd_gym.agents.baselines import search
from sd_gym.agents.baselines.static import StaticAgent
from sd_gym.agents.learning.agent import OnRollout
from sd_gym.agents.learning.decisions import Version, policy_rows
from stable_baselines3.common.logger import Logger

from sd_gym.envs.exact import hull, lower_hull
from sd_gym.envs.protocols import mean_flops
from sd_gym.envs.table import TableCore
from sd_gym.policy import DecisionPolicy

POINTS = 40  # operating points, evenly in FLOPs
LOSSES = 3.0  # loss of the boldest point on policy rows, in epsilons
DRAWS = 100_000  # to compute the logit of a mixture


class HullAgent(StaticAgent):
    """Masks on the lower hull of mean loss and FLOPs on policy rows, and mixtures of neighbours on it.

    The masks are those of ``static``; on a table, all masks. A mixture chooses by a hash of the input, so the same
    input always gets the same decision. With several stages there are no mixtures.
    """

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search the masks, and keep those on the hull, by falling FLOPs."""
        core, split = self.env.core, self.env.core.split("train")
        if isinstance(core, TableCore) and self.settings.path is None:
            corners = hull(core.split("train"))
            masks = core.from_masks(core.masks[corners.number])
        else:
            super().learn(total_steps, logger, on_rollout)
            masks, rows = np.unique(self.masks, axis=0), policy_rows(core)
            loss = search.path_losses(split, rows, masks).mean(axis=0)
            corners = lower_hull(loss, mean_flops(split, rows, masks))
            masks = masks[corners.number]
        saves = corners.flops < 1 - 1e-9  # dense is first, even if a mask loses less
        self.masks = np.concatenate([np.zeros_like(masks[:1]), masks[saves]])
        self._loss = np.append(0.0, corners.loss[saves])
        self._flops = np.append(1.0, corners.flops[saves])

    def operating_points(self) -> list[Version]:
        """Masks of the hull and mixtures of them, evenly spaced in FLOPs."""
        if not self.env.core.stage_actions.is_whole:  # a mixture chooses a whole decision
            return super().operating_points()
        bold = self._loss > LOSSES * self.env.core.config.reward.epsilon
        last = int(bold.argmax()) if bold.any() else len(bold) - 1
        targets = np.linspace(self._flops[0], self._flops[last], POINTS + 1)[1:]
        return [Version(self._mixture(flops)) for flops in targets] if last else []

    def _mixture(self, flops: float) -> DecisionPolicy:
        """The policy with these mean FLOPs that mixes the two neighbouring masks."""
        number = int((self._flops > flops).sum())  # of the cheap mask
        costs = self._flops[number - 1 : number + 1]
        expensive, cheap = self.masks[number - 1 : number + 1]
        share = float((flops - costs[1]) / (costs[0] - costs[1]))  # of inputs that get the expensive mask
        if not 0 < share < 1:
            return self._mask_policy(expensive if share >= 1 else cheap)
        nvec, differ = self.env.core.nvec, np.flatnonzero(expensive != cheap)
        # Each component that differs adds logistic noise to the preference of a mask.
        noise = np.random.default_rng(0).logistic(size=(DRAWS, len(differ))).sum(axis=1)
        logit = math.log(share / (1 - share)) if len(differ) == 1 else -float(np.quantile(noise, 1 - share))
        logits = torch.zeros(int(nvec.sum()))
        logits[int(nvec[: differ[0]].sum()) + int(expensive[differ[0]])] = logit
        policy = self._constant_policy(logits, noise="hash")
        policy.codebook = torch.from_numpy(np.stack([expensive, cheap]))
        return policy
