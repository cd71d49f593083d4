"""A reference for learners on a table: a policy that learns from all outcomes of the policy rows."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.learning.agent import AgentSettings, NotApplicableError, OnRollout, PrivilegedAgent
from sd_gym.agents.learning.decisions import SplitDecisions, Version
from stable_baselines3.common.logger import Logger

from sd_gym.envs.exact import MULTIPLIERS, ROWS, Curve, lower_hull, oracle, outcomes_of_all
from sd_gym.envs.protocols import Split
from sd_gym.envs.table import TableCore, TableSplit

PARTS = 24  # predicted principal components of the losses under all masks
TREES, LEAF = 100, 5  # trees of the forest; fewest rows per leaf
FOLDS = 5  # for predictions on training rows, which order the operating points


class Forecast:
    """Predicts the loss of each input under each mask: extremely randomised trees (Geurts et al. 2006) on observations.

    They predict the principal components of the losses under all masks. On the bundled tables an MLP, kernel ridge
    regression and boosting were not better.
    """

    def __init__(self, split: TableSplit) -> None:
        from sklearn.decomposition import PCA  # scikit-learn takes a second to import
        from sklearn.ensemble import ExtraTreesRegressor
        from sklearn.model_selection import KFold, cross_val_predict

        losses = np.concatenate([loss.astype(np.float32) for _, loss, _ in outcomes_of_all(split)])
        self._parts = PCA(min(PARTS, *losses.shape), svd_solver="randomized", random_state=0)
        trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, max_features=0.5, random_state=0)
        observations, targets = _observations(split), self._parts.fit_transform(losses)
        folds = KFold(min(FOLDS, len(observations)), shuffle=True, random_state=0)
        self._train_predictions = np.asarray(cross_val_predict(trees, observations, targets, cv=folds))
        self._trees = trees.fit(observations, targets)

    def parts(self, split: TableSplit) -> NDArray:
        """The predicted components of each row, ``[n, parts]``; those of ``train`` are cross-validated."""
        predicted = self._train_predictions if split.name == "train" else self._trees.predict(_observations(split))
        return np.asarray(predicted).reshape(len(split), -1)

    def losses(self, parts: NDArray) -> NDArray:
        """Losses ``[n, masks]`` from components ``[n, parts]``; dense loses nothing."""
        losses = self._parts.inverse_transform(parts)
        losses[:, 0] = 0
        return losses


def _observations(split: TableSplit) -> NDArray:
    """Observations at the first stage, float32 ``[n, features]``."""
    return split.tensors["observations"].reshape(len(split), -1).astype(np.float32)


@lru_cache(maxsize=4)
def forecast_of(core: TableCore) -> Forecast:
    """The forecast learned on the training split of a table."""
    return Forecast(core.split("train"))


def full_information(split: TableSplit) -> Curve:
    """The front, on a split, of a policy that learned from all outcomes of the training split.

    An input gets the mask with the least FLOPs plus multiplier times predicted loss, for each of ``MULTIPLIERS``; dense
    belongs to the front. The cost of the prediction is not counted.
    """
    forecast = forecast_of(split.core)
    parts = forecast.parts(split)
    curve = oracle(split, lambda rows: forecast.losses(parts[rows]))
    return lower_hull(np.append(curve.loss, 0.0), np.append(curve.flops, 1.0))


class ForecastPoint(NamedTuple):
    """The mask with the least FLOPs plus multiplier times predicted loss."""

    core: TableCore
    multiplier: float

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """Its decisions; the cost of the prediction is not counted."""
        assert isinstance(split, TableSplit)  # the agent refuses other envs
        forecast, numbers = forecast_of(self.core), []
        parts = forecast.parts(split)
        for some in np.split(rows, range(ROWS, len(rows), ROWS)):
            value = split.costs.of_masks(some) + self.multiplier * forecast.losses(parts[some])
            numbers.append(value.argmin(axis=1))
        masks = self.core.masks[np.concatenate(numbers)]
        return SplitDecisions(self.core.from_masks(masks), np.zeros(len(rows)))


class FullInformation(PrivilegedAgent[AgentSettings]):
    """Learns from the outcomes of all masks on all rows, which no env gives; for tables only."""

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
        """One point per multiplier, the price of a lost answer."""
        return [Version(ForecastPoint(self._core, float(multiplier))) for multiplier in MULTIPLIERS[5::3]]
