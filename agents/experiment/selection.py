"""Which operating point is kept: tested from dense to bold, with a guarantee; never the highest mean reward."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import by_difficulty
from sd_gym.agents.learning.decisions import (
    DENSE_MARGIN,
    FEW_ROWS,
    SplitPolicy,
    Version,
    decide_and_score,
    evaluator,
    outcomes,
    policy_rows,
)
from sd_gym.agents.runs.guarantee import POINTS, Tested, guarantee, sequence
from sd_gym.agents.runs.verdict import CONFIDENCE, Verdict, highest_loss, verdict

from sd_gym.envs.protocols import Core
from sd_gym.objectives import Objective
from sd_gym.operating_points import OperatingPoint
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.table_export import TablePolicy

PASSES = 12  # points of a sequence where each takes passes of a backbone
CURVE_ROWS = 1000  # of the validation split, that each point of a curve is of


class _Estimate:
    """What policy rows say of an operating point, as far as it is asked for: losses take passes."""

    def __init__(self, core: Core, version: Version, rows: NDArray) -> None:
        self._core, self.version, self._rows = core, version, rows

    @cached_property
    def _scored(self) -> dict[str, NDArray]:
        return outcomes(self._core, self.version.policy, self._core.split("train"), self._rows)

    @cached_property
    def flops(self) -> float:
        """Over dense FLOPs; what a policy costs itself it also costs where it leaves everything running."""
        core, policy = self._core, self.version.policy
        if isinstance(policy, SplitPolicy):
            return float(self._scored["flops_ratio_with_policy"].mean())
        ratio = evaluator(core).flops_ratio(policy, core.split("train"), self._rows)
        return float((self._scored["flops_ratio"] if ratio is None else ratio).mean())

    @cached_property
    def losses(self) -> NDArray:
        """Of each row, float32."""
        return (self._scored["quality_ref"] - self._scored["quality"]).astype(np.float32)

    def is_hopeless(self, epsilon: float) -> bool:
        """Whether it loses more than epsilon, by more than a standard error."""
        return bool(self.losses.mean() - self.losses.std() / len(self.losses) ** 0.5 > epsilon)


@dataclass
class Selection:
    """Validates the policies of a run during training, and selects an operating point in the end (Learn then Test).

    Operating points (``BaseAgent.operating_points``) are ordered from dense to bold by what they lose on policy rows,
    rows of the training split. They are tested in that order on all rows of the validation split, each by ``verdict``
    at the ``confidence``. The first one that fails ends it, and the last one that passed is selected; dense, if none.
    So the probability that the selected one truly loses epsilon or more is at most ``1 - confidence``:
    ``sd_gym.agents.runs.guarantee``. Raises ``ValueError`` if the confidence is none.
    """

    core: Core  # scores the policies
    confidence: float = CONFIDENCE  # one-sided, of each test and so of the guarantee
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry per validation; see ``validate``
    tested: list[tuple[Version, Tested]] = field(default_factory=list)  # from dense to bold, in the order of the tests
    selected: Version | None = None  # None: dense
    _paths: list[list[_Estimate]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"expected a confidence of at least 0.5 and below 1, got {self.confidence}")

    def consider(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """Validate a policy, and return its entry, which the history now has."""
        self.history.append(self.validate(step, policy, objective))
        return self.history[-1]

    def validate(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """The entry of a policy, on rows of the validation split, drawn evenly: a point of the curves."""
        split = self.core.split("validation")
        rows = np.linspace(0, len(split) - 1, min(len(split), CURVE_ROWS)).round().astype(np.int64)
        scored = decide_and_score(self.core, policy, split, rows)
        names = ("quality", "quality_ref", "flops_ratio")
        return {
            "step": step,
            **{name: float(scored[name].mean()) for name in names},
            "quality_kept": self._kept(scored),
            "reward": float(objective.rewards(*(scored[name] for name in names)).mean()),
            "by_difficulty": by_difficulty(scored, split.difficulty[rows]),
        }

    def select(self, points: Sequence[Version]) -> Version | None:
        """The operating point to keep, ``None``: dense. Versions of a policy stand together, from cautious to bold."""
        self._paths = self._estimated(points)
        self.tested, self.selected = [], None
        for version in (point.version for point in self._order()):
            result = self._test(version)
            self.tested.append((version, result))
            if not result.passed:
                break
            self.selected = version
        return self.selected

    def as_searched(self) -> Version | None:
        """After ``select``: the point that policy rows alone would choose, ``None``: dense.

        It has the fewest FLOPs of those that lose no more than epsilon there, on the mean and without any test.
        """
        epsilon = self.core.config.reward.epsilon
        points = sorted((point for path in self._paths for point in path), key=lambda point: point.flops)
        fitting = (point for point in points if point.flops < 1 and point.losses.mean() <= epsilon)
        return next((point.version for point in fitting), None)

    @property
    def margin(self) -> float:
        """In log-odds, added to the policy that the selected one is a version of; 1,000 leaves everything running."""
        return DENSE_MARGIN if self.selected is None else self.selected.margin

    @property
    def origin(self) -> DecisionPolicy | TablePolicy | None:
        """The policy that the selected one is a version of; of dense, the first that was tested."""
        version = self.selected or next((version for version, _ in self.tested), None)
        of = None if version is None else version.of
        return of if isinstance(of, DecisionPolicy | TablePolicy) else None

    def operating_points(self) -> list[OperatingPoint]:
        """Those of the selected policy's versions that were tested, and dense, the boldest first.

        Margins count from the selected one on.
        """
        points, origin = [OperatingPoint(DENSE_MARGIN - self.margin, 0.0, 0.0, 1.0, True)], self.origin
        for version, result in self.tested:
            if version is self.selected or (version.of is not None and version.of is origin):
                values = result.loss, result.highest_loss, result.flops_ratio, result.passed
                points.append(OperatingPoint(version.margin - self.margin, *values))
        return points[::-1]

    def report(self) -> dict[str, Any]:
        """For ``result.json``: rows, epsilon and confidence of the tests, and the points in the order of the tests."""
        rows, epsilon = len(self.core.split("validation")), self.core.config.reward.epsilon
        values = {"rows": rows, "epsilon": epsilon, "confidence": self.confidence}
        return values | {"points": [result._asdict() for _, result in self.tested]}

    @property
    def guarantee(self) -> str:
        """In words, what is known of the selected point."""
        rows, epsilon = len(self.core.split("validation")), self.core.config.reward.epsilon
        return guarantee(rows, epsilon, self.confidence, self.selected is None)

    def _estimated(self, points: Sequence[Version]) -> list[list[_Estimate]]:
        """The points by policy; nothing bolder than the first of its versions that policy rows find hopeless."""
        core, epsilon, few = self.core, self.core.config.reward.epsilon, policy_rows(self.core, FEW_ROWS)
        rows = policy_rows(core, evaluator(core).rows_of_orders)
        paths = []
        for _, path in groupby(points, key=lambda version: id(version if version.of is None else version.of)):
            versions = list(path)
            if len(versions) > 1:
                end = bisect_left(versions, True, key=lambda one: _Estimate(core, one, few).is_hopeless(epsilon))
                versions = versions[: end + 1]
            paths.append([_Estimate(core, version, rows) for version in versions])
        return paths

    def _order(self) -> list[_Estimate]:
        """The sequence of the tests. One path alone needs no losses: it is in order as it is."""
        points = [point for path in self._paths for point in path]
        if not points:
            return []
        losses = np.zeros((len(points), 1)) if len(self._paths) == 1 else np.stack([point.losses for point in points])
        number = self._learned()
        flops, most = np.array([point.flops for point in points]), PASSES if self.core.config.table is None else POINTS
        return [points[one] for one in sequence(flops, losses, number, most)]

    def _learned(self) -> NDArray:
        """Of each point, a number that variants of one policy share, which do not oust each other.

        A policy knows the rows that it has learned on, where its bold versions may seem to lose less than others.
        """
        versions = [path[0].version for path in self._paths]
        known = [id(version if version.learned is None else version.learned) for version in versions]
        return np.repeat(np.unique(known, return_inverse=True)[1], [len(path) for path in self._paths])

    def _test(self, version: Version) -> Tested:
        scored = outcomes(self.core, version.policy, self.core.split("validation"))
        return Tested(
            float(scored["flops_ratio"].mean()),
            float(scored["flops_ratio_with_policy"].mean()),
            float((scored["quality_ref"] - scored["quality"]).mean()),
            highest_loss(scored["quality"], scored["quality_ref"], self.confidence),
            self._kept(scored),
        )

    def _kept(self, scored: dict[str, NDArray]) -> bool:
        epsilon = self.core.config.reward.epsilon
        return verdict(scored["quality"], scored["quality_ref"], epsilon, self.confidence) == Verdict.KEPT
