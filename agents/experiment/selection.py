"""Selection of an operating point: points are tested from dense to bold, with a guarantee."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.learning.decisions import (
    DENSE_MARGIN,
    FEW_ROWS,
    SplitPolicy,
    Version,
    decide_on,
    outcomes,
    policy_rows,
    versions,
)
from sd_gym.agents.runs.guarantee import POINTS, Tested, guarantee, sequence
from sd_gym.agents.runs.verdict import CONFIDENCE, Verdict, highest_loss, verdict

from sd_gym.envs.protocols import SCORES, Core
from sd_gym.objectives import Objective
from sd_gym.operating_points import OperatingPoint
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.table_export import TablePolicy

PASSES = 20  # most points of a sequence if each takes passes of a backbone
CURVE_ROWS = 1000  # most validation rows for a point of a curve
UNLABELLED = 10  # factor on epsilon without labels, as every changed answer then counts as lost, even a right one


class _Estimate:
    """FLOPs and losses of an operating point on policy rows, computed when needed: losses take passes."""

    def __init__(self, core: Core, version: Version, rows: NDArray) -> None:
        self._core = core
        self.version = version
        self._rows = rows

    @cached_property
    def _scored(self) -> dict[str, NDArray]:
        return outcomes(self._core, self.version.policy, self._core.split("train"), self._rows)

    @cached_property
    def flops(self) -> float:
        """FLOPs over dense FLOPs; without the FLOPs of deciding, if all versions share them."""
        core, policy = self._core, self.version.policy
        if isinstance(policy, SplitPolicy):
            return float(self._scored["flops_ratio_with_policy"].mean())
        if core.is_staged:  # decisions take the pass that gives the losses
            return float(self._scored["flops_ratio"].mean())
        split = core.split("train")
        return float(split.costs.flops_ratio(self._rows, decide_on(core, policy, split, self._rows)).mean())

    @cached_property
    def losses(self) -> NDArray:
        """Loss on each row, float32."""
        return (self._scored["quality_ref"] - self._scored["quality"]).astype(np.float32)

    def is_hopeless(self, epsilon: float) -> bool:
        """Whether it loses more than epsilon, by more than a standard error."""
        return bool(self.losses.mean() - self.losses.std() / len(self.losses) ** 0.5 > epsilon)


@dataclass
class Selection:
    """Validates the policies of a run during training, and selects an operating point at the end (Learn then Test).

    Operating points (``BaseAgent.operating_points``) are ordered from dense to bold by their losses on policy rows,
    which are rows of the training split. In that order they are tested on all rows of the validation split, each by
    ``verdict`` at the ``confidence``. The first failure ends the tests. The last point that passed is selected, or
    dense. So the selected point truly loses epsilon or more with probability ``1 - confidence`` at most
    (``sd_gym.agents.runs.guarantee``). Raises ``ValueError`` if the confidence is out of range.
    """

    core: Core  # scores the policies
    confidence: float = CONFIDENCE  # one-sided, of each test and so of the guarantee
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry per validation; see ``validate``
    tested: list[tuple[Version, Tested]] = field(default_factory=list)  # in the order of the tests
    selected: Version | None = None  # None: dense
    _points: list[_Estimate] | None = None  # the estimated points; None: nothing was selected

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"expected a confidence of at least 0.5 and below 1, got {self.confidence}")

    def validate(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """The results of a policy on evenly spaced rows of the validation split: a point of the curves."""
        split = self.core.split("validation")
        rows = np.linspace(0, len(split) - 1, min(len(split), CURVE_ROWS)).round().astype(np.int64)
        scored = outcomes(self.core, policy, split, rows)
        return {
            "step": step,
            **{name: float(scored[name].mean()) for name in (*SCORES, "flops_ratio_with_policy")},
            "quality_kept": self._keeps_quality(scored),
            "reward": float(objective.rewards(*(scored[name] for name in SCORES)).mean()),
        }

    def select(self, points: Sequence[Version]) -> Version | None:
        """Select a point, ``None``: dense. Versions of a policy are neighbours in the list, from cautious to bold."""
        paths = self._estimated(points)
        self._points = [point for path in paths for point in path]
        self.tested = []
        self.selected = None
        for version in self._order(paths):
            result = self._test(version)
            self.tested.append((version, result))
            if not result.passed:
                break
            self.selected = version
        return self.selected

    def _test(self, version: Version) -> Tested:
        split = self.core.split("validation")
        scored = outcomes(self.core, version.policy, split)
        return Tested(
            float(scored["flops_ratio"].mean()),
            float(scored["flops_ratio_with_policy"].mean()),
            float((scored["quality_ref"] - scored["quality"]).mean()),
            highest_loss(scored["quality"], scored["quality_ref"], self.confidence, split.scoring.highest),
            self._keeps_quality(scored),
        )

    def as_searched(self) -> Version | None:
        """After ``select``: the point that policy rows alone would choose, ``None``: dense.

        Of the points with a mean loss of at most epsilon there, without any test, it has the fewest FLOPs.
        """
        epsilon = self.core.config.reward.epsilon
        points = sorted(self._points or (), key=lambda point: point.flops)
        fitting = (point for point in points if point.flops < 1 and point.losses.mean() <= epsilon)
        return next((point.version for point in fitting), None)

    @property
    def margin(self) -> float:
        """The margin of the selected point, in log-odds from its policy; 1,000 for dense."""
        return DENSE_MARGIN if self.selected is None else self.selected.margin

    @property
    def origin(self) -> DecisionPolicy | TablePolicy | None:
        """The policy that the selected point is a version of; if dense is selected, that of the first tested point."""
        version = self.selected or next((version for version, _ in self.tested), None)
        of = None if version is None else version.origin
        return of if isinstance(of, DecisionPolicy | TablePolicy) else None

    def operating_points(self) -> list[OperatingPoint]:
        """The tested versions of the selected policy, and dense, the boldest first; margins are relative to it.

        Empty if nothing was selected.
        """
        if self._points is None:
            return []
        points, origin = [OperatingPoint(DENSE_MARGIN - self.margin, 0.0, 0.0, 1.0, True)], self.origin
        own = [
            (version, result)
            for version, result in self.tested
            if version is self.selected or (version.origin is not None and version.origin is origin)
        ]
        for version, result in [*self._cautious(own), *own]:
            values = result.loss, result.highest_loss, result.flops_ratio, result.passed
            points.append(OperatingPoint(version.margin - self.margin, *values))
        return points[::-1]

    def _cautious(self, own: list[tuple[Version, Tested]]) -> list[tuple[Version, Tested]]:
        """Stricter versions of the selected policy, from dense to bold, if no other version of it was tested."""
        origin = self.origin
        if self.selected is None or len(own) > 1 or not isinstance(origin, DecisionPolicy):
            return []
        found = [version for version in versions(self.core, origin) if version.margin > self.margin]
        most = PASSES // 2 if self.core.config.table is None else POINTS
        tested = [(version, self._test(version)) for version in found[:: max(1, math.ceil(len(found) / most))]]
        return [(version, result) for version, result in tested if result.flops_ratio < 1]

    def report(self) -> dict[str, Any]:
        """For ``result.json``: ``margin``, ``guarantee`` in words, and ``selection``, the tests in their order."""
        if self._points is None:
            return {"margin": 0.0, "selection": None, "guarantee": None}
        rows, epsilon = len(self.core.split("validation")), self.core.config.reward.epsilon
        points = [result._asdict() for _, result in self.tested]
        selection = {"rows": rows, "epsilon": epsilon, "confidence": self.confidence, "points": points}
        text = guarantee(rows, epsilon, self.confidence, self.selected is None)
        return {"margin": self.margin, "selection": selection, "guarantee": text}

    def _estimated(self, points: Sequence[Version]) -> list[list[_Estimate]]:
        """The points of each policy, up to the first one that is hopeless on policy rows."""
        core, few = self.core, policy_rows(self.core, FEW_ROWS)
        epsilon = core.config.reward.epsilon * (UNLABELLED if core.config.data.policy_labels == "dense" else 1)
        rows = few if core.is_staged and core.config.table is None else policy_rows(core)
        paths = []
        for _, path in groupby(points, key=lambda version: id(version if version.origin is None else version.origin)):
            versions = list(path)
            if len(versions) > 1:
                end = bisect_left(
                    versions, True, key=lambda version: _Estimate(core, version, few).is_hopeless(epsilon)
                )
                versions = versions[: end + 1]
            paths.append([_Estimate(core, version, rows) for version in versions])
        return paths

    def _order(self, paths: list[list[_Estimate]]) -> list[Version]:
        """The points in the order of the tests. A single path is in order already, and needs no losses."""
        points = [point for path in paths for point in path]
        if not points:
            return []
        losses = np.zeros((len(points), 1)) if len(paths) == 1 else np.stack([point.losses for point in points])
        # Variants of one policy do not exclude each other: on rows that it has learned on, its bold versions may seem
        # to lose less than they do.
        firsts = [path[0].version for path in paths]
        policies = [id(version if version.variant_of is None else version.variant_of) for version in firsts]
        number = np.repeat(np.unique(policies, return_inverse=True)[1], [len(path) for path in paths])
        flops, most = np.array([point.flops for point in points]), PASSES if self.core.config.table is None else POINTS
        return [points[index].version for index in sequence(flops, losses, number, most)]

    def _keeps_quality(self, scored: dict[str, NDArray]) -> bool:
        epsilon, highest = self.core.config.reward.epsilon, self.core.split("validation").scoring.highest
        return verdict(scored["quality"], scored["quality_ref"], epsilon, self.confidence, highest) == Verdict.KEPT
