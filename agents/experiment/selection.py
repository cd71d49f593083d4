"""Which operating point is kept: tested from dense to bold, with a guarantee; never the highest mean reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import by_difficulty
from sd_gym.agents.learning.decisions import DENSE_MARGIN, SplitPolicy, Version, decide_and_score, outcomes, policy_rows
from sd_gym.agents.runs.guarantee import Tested, guarantee, sequence
from sd_gym.agents.runs.verdict import CONFIDENCE, Verdict, highest_loss, verdict

from sd_gym.envs.protocols import Core
from sd_gym.objectives import Objective
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.card import OperatingPoint
from sd_gym.policy.table_export import TablePolicy

CURVE_ROWS = 1000  # of the validation split, that each point of a curve is of
STAGED_ROWS = 500  # policy rows where each point takes a pass of its own


class _Estimate(NamedTuple):
    """What policy rows say of an operating point."""

    version: Version
    flops: float  # over dense FLOPs; of a ``SplitPolicy`` with those of deciding
    losses: NDArray  # of each row, float32


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
    _estimates: list[_Estimate] = field(default_factory=list)

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
        self._estimates = self._estimated(points)
        self.tested, self.selected = [], None
        for number in self._order():
            version = self._estimates[number].version
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
        fitting = [one for one in self._estimates if one.flops < 1 and one.losses.mean() <= epsilon]
        return min(fitting, key=lambda one: one.flops).version if fitting else None

    @property
    def margin(self) -> float:
        """In log-odds, added to the policy that the selected one is a version of; 1,000 leaves everything running."""
        return DENSE_MARGIN if self.selected is None else self.selected.margin

    @property
    def origin(self) -> DecisionPolicy | TablePolicy | None:
        """The policy that the selected one is a version of; of dense, the first that was tested."""
        version = self.selected or next((version for version, _ in self.tested), None)
        return None if version is None else version.of

    def operating_points(self) -> list[OperatingPoint]:
        """Those of the selected policy's versions that were tested, and dense, the boldest first.

        Margins count from the selected one on.
        """
        points = [OperatingPoint(DENSE_MARGIN - self.margin, 0.0, 0.0, 1.0, True)]
        for version, result in self.tested:
            if version is self.selected or (version.of is not None and version.of is self.origin):
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

    def _estimated(self, points: Sequence[Version]) -> list[_Estimate]:
        """What policy rows say; of a policy nothing bolder than the first version that loses too much."""
        core, split, epsilon = self.core, self.core.split("train"), self.core.config.reward.epsilon
        rows = policy_rows(core, STAGED_ROWS) if core.is_staged else policy_rows(core)
        estimates, hopeless = [], set()
        for version in points:
            if version.of is not None and id(version.of) in hopeless:
                continue
            scored = outcomes(core, version.policy, split, rows)
            losses = (scored["quality_ref"] - scored["quality"]).astype(np.float32)
            if losses.mean() - losses.std() / len(losses) ** 0.5 > epsilon:
                hopeless.add(id(version.of))
            # What a policy costs itself it also costs where it leaves everything running.
            flops = "flops_ratio_with_policy" if isinstance(version.policy, SplitPolicy) else "flops_ratio"
            estimates.append(_Estimate(version, float(scored[flops].mean()), losses))
        return estimates

    def _order(self) -> NDArray:
        if not self._estimates:
            return np.zeros(0, dtype=np.int64)
        flops = np.array([one.flops for one in self._estimates])
        paths = [id(one.version if one.version.of is None else one.version.of) for one in self._estimates]
        return sequence(flops, np.stack([one.losses for one in self._estimates]), np.array(paths))

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
