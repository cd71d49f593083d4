"""What can be learned on a table if all outcomes of its policy rows are known: the reference of learners."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.learning.agent import AgentSettings, NotApplicableError, OnRollout, PrivilegedAgent
from sd_gym.agents.learning.decisions import SplitDecisions, Version
from stable_baselines3.common.logger import Logger

from sd_gym.envs.exact import MULTIPLIERS, ROWS, Curve, lower_hull, outcomes_of_all
from sd_gym.envs.protocols import Split
from sd_gym.envs.table import TableCore, TableSplit

PARTS = 24  # principal components of the losses under all masks, which are predicted
TREES, LEAF = 100, 5  # of the forest; rows of a leaf at least
FOLDS = 5  # that training rows are predicted in: operating points are ordered on them


class Forecast:
    """Predicts what each input loses under each mask: extremely randomised trees (Geurts et al. 2006) on observations.

    They predict the principal components of the losses that the rows of a split have under all masks. Of an MLP, kernel
    ridge regression and boosting none was better on the bundled tables.
    """

    def __init__(self, split: TableSplit) -> None:
        from sklearn.decomposition import PCA  # scikit-learn takes a second to import
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.model_selection import KFold, cross_val_predict

        losses = np.concatenate([loss.astype(np.float32) for _, loss, _ in outcomes_of_all(split)])
        self._parts = PCA(min(PARTS, *losses.shape), svd_solver="randomized", random_state=0)
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, max_features=0.5, random_state=0)
        seen, targets = _seen(split), self._parts.fit_transform(losses)
        folds = KFold(min(FOLDS, len(seen)), shuffle=True, random_state=0)
        out_of_fold = cross_val_predict(trees, seen, targets, cv=folds)
        self._of_train = np.asarray(out_of_fold)  # of rows that were not learned from
        self._trees = trees.fit(seen, targets)

    def parts(self, split: TableSplit) -> NDArray:
        """The components that are predicted of each row, ``[n, parts]``; of ``train`` without the row's own fold."""
        predicted = self._of_train if split.name == "train" else self._trees.predict(_seen(split))
        return np.asarray(predicted).reshape(len(split), -1)

    def losses(self, parts: NDArray) -> NDArray:
        """The losses that predicted components stand for, ``[n, masks]``; dense loses nothing."""
        losses = self._parts.inverse_transform(parts)
        losses[:, 0] = 0
        return losses


def _seen(split: TableSplit) -> NDArray:
    """What is observed at first, float32 ``[n, features]``."""
    return split.tensors["observations"].reshape(len(split), -1).astype(np.float32)


@lru_cache(maxsize=4)
def forecast_of(core: TableCore) -> Forecast:
    """The forecast that is learned on the training split of a table."""
    return Forecast(core.split("train"))


def full_information(split: TableSplit) -> Curve:
    """The front, read on a split, of what is learned on all outcomes of the training split.

    An input gets the mask of the least FLOPs plus multiplier times predicted loss, at each of ``MULTIPLIERS``; dense
    belongs to the front. What the prediction costs is not counted.
    """
    forecast, sums = forecast_of(split.core), np.zeros((2, len(MULTIPLIERS)))
    parts = forecast.parts(split)
    for rows, loss, flops in outcomes_of_all(split):
        predicted, at = forecast.losses(parts[rows]), np.arange(len(rows))
        for column, multiplier in enumerate(MULTIPLIERS):
            best = (flops + multiplier * predicted).argmin(axis=1)
            sums[:, column] += loss[at, best].sum(), flops[at, best].sum()
    return lower_hull(*np.column_stack([sums / len(split), [0.0, 1.0]]))


class ForecastPoint(NamedTuple):
    """The mask of the least FLOPs plus multiplier times predicted loss."""

    core: TableCore
    multiplier: float

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """Its decisions; what the prediction costs is not counted."""
        assert isinstance(split, TableSplit)  # the agent takes no other env
        forecast, numbers = forecast_of(self.core), []
        parts = forecast.parts(split)
        for some in np.split(rows, range(ROWS, len(rows), ROWS)):
            value = split.costs.of_masks(some) + self.multiplier * forecast.losses(parts[some])
            numbers.append(value.argmin(axis=1))
        masks = self.core.masks[np.concatenate(numbers)]
        return SplitDecisions(self.core.from_masks(masks), np.zeros(len(rows)))


class FullInformation(PrivilegedAgent[AgentSettings]):
    """Learns from the outcomes of all masks on all rows, which no env shows: for tables only."""

    draws = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        core = self.env.core
        if not isinstance(core, TableCore):
            raise NotApplicableError("full-information needs the outcomes of all masks, which only a table has")
        self._core: TableCore = core

    def learn(self, total_steps: int, logger: Logger, on_rollout: OnRollout) -> None:
        """Learn to predict the losses of all masks."""
        forecast_of(self._core)

    def operating_points(self) -> list[Version]:
        """One for each price of a lost answer."""
        return [Version(ForecastPoint(self._core, float(one))) for one in MULTIPLIERS[5::3]]
