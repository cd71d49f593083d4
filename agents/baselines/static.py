"""The best static masks: what pruning reaches, by search instead of learning."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines import search
from sd_gym.agents.baselines.search import Per
from sd_gym.agents.learning.agent import Agent, AgentSettings, OnRollout, Rollout, decision_logits
from sd_gym.agents.learning.decisions import Version, policy_rows, score_masks
from stable_baselines3.common.logger import Logger

from sd_gym.envs.actions import read_masks, write_masks
from sd_gym.envs.protocols import Core
from sd_gym.policy import DecisionPolicy

MASKS = "masks.json"
CONFIDENCE = 0.9  # probability of the mask; below 1, so that learning can start from it


class StaticSettings(AgentSettings):
    """Settings of the search.

    Attributes:
        path: Folder of a run of ``static`` or ``imitation`` whose masks are used; ``None``: search.
        per: What a step of the search skips: a ``sublayer``, or a whole ``layer``, which is coarser and faster.
    """

    path: Path | None = None
    per: Per = "sublayer"


class StaticAgent(Agent[StaticSettings]):
    """One mask for all inputs, searched on policy rows.

    The operating points are all masks if they are few enough; else those of a greedy path and of a learned one.
    """

    Settings = StaticSettings
    searches = staged = is_control = True
    draws = False  # the learned path does, but a search takes minutes and other seeds find much the same masks
    validates = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masks = np.zeros((1, len(self.env.core.nvec)), dtype=np.int64)  # dense, until it has searched

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Search; ``total_steps`` is not used."""
        core = self.env.core
        split, rows = core.split("train"), policy_rows(core)
        if self.settings.path is not None:
            self.masks = searched_masks(self.settings.path, core.nvec)
            return
        per, units = self.settings.per, search.skip_units(core, self.settings.per)
        if search.can_try_all(core.nvec[[unit[0] for unit in units]], len(rows)):
            self.masks = search.all_masks(core.nvec, units)
            return
        on_round = partial(report_scored, on_rollout)
        greedy = search.greedy_path(core, split, rows, on_round, per=per)
        learned = search.learned_path(core, split, rows, on_round, self.seed, per=per)
        self.masks = np.concatenate([greedy, learned])

    def policy(self) -> DecisionPolicy:
        """The first mask: dense."""
        return self._mask_policy(self.masks[0])

    def operating_points(self) -> list[Version]:
        """All masks of the search."""
        return [Version(self._mask_policy(mask)) for mask in np.unique(self.masks, axis=0) if mask.any()]

    def save_extra(self, folder: Path) -> None:
        """Write ``masks.json``; and a few nested masks, ``codebook.json``, for envs with ``action="discrete"``."""
        write_masks(self.masks, folder / MASKS)
        write_masks(nested_masks(self.env.core, np.unique(self.masks, axis=0)), folder / "codebook.json")

    def _mask_policy(self, mask: NDArray) -> DecisionPolicy:
        return self._constant_policy(decision_logits(self.env.core.nvec, mask, CONFIDENCE))


def nested_masks(core: Core, masks: NDArray) -> NDArray:
    """The best chain of masks ``[masks, components]`` on policy rows; see ``search.nested_codebook``."""
    scored = score_masks(core, core.split("train"), policy_rows(core), masks)
    quality, flops = (np.array([of_mask.mean() for of_mask in scored[name]]) for name in ("quality", "flops_ratio"))
    return masks[search.nested_codebook(masks, quality, flops)]


def searched_masks(folder: Path, nvec: NDArray) -> NDArray:
    """The masks of a run of ``static``, or the path of a run of ``imitation``, int64 ``[masks, components]``.

    Raises ``FileNotFoundError`` if the folder holds no masks, ``ValueError`` if they do not fit ``nvec``.
    """
    file = folder / MASKS
    if not file.exists():
        raise FileNotFoundError(f"no {MASKS} in {folder}; expected a run of the agent static or imitation")
    return read_masks(file, nvec)


def nested_path(folder: Path, core: Core) -> NDArray:
    """The masks of a run from dense to all skipped, each skipping one candidate more than the last.

    Raises ``ValueError`` if they are no such path; see ``searched_masks``.
    """
    masks = searched_masks(folder, core.nvec)
    all_skipped = np.flatnonzero((masks == core.nvec - 1)[:, : core.n_skips].all(axis=1))
    path = masks[: all_skipped[0] + 1] if len(all_skipped) else masks[:0]
    steps = np.diff(path, axis=0)
    if len(path) < 2 or path[0].any() or (steps < 0).any() or (steps > 1).any() or not steps.any(axis=1).all():
        raise ValueError(
            f"the masks in {folder} are no path from dense to all skipped (static tries all masks if they are few). "
            "Leave path out, and imitation searches its own"
        )
    return path


def report_scored(on_rollout: OnRollout, scored: int) -> None:
    """Report the number of scored decisions as a rollout without rewards."""
    on_rollout(Rollout(scored, np.zeros(0), {}))
