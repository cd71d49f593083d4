"""Which policy of a run is kept: quality first, then the fewest FLOPs; never the mean reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import by_difficulty
from sd_gym.agents.learning.decisions import decide_and_score, decide_rows, halves, keeps_quality
from sd_gym.agents.runs.verdict import ONE_SIDED_95

from sd_gym.envs.protocols import Core
from sd_gym.objectives import Objective
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.card import OperatingPoint

# Of versions of a policy, from bolder to more cautious, in log-odds; the last one leaves everything running.
MARGINS = (*np.arange(-1.5, 6, 0.25).tolist(), *np.arange(6, 14.01, 0.5).tolist(), 1000.0)
AS_LEARNED, UNKNOWN = MARGINS.index(0.0), -1
FURTHER = 8  # steps after the selected version, 2 in log-odds: a more cautious operating point is known, too
CURVE_INSTANCES = 1000  # of the first half, that each point of a curve is of


@dataclass
class Selection:
    """Validates the policies of a run during training, and selects one in the end.

    Each policy has versions from bold to cautious. Selection finds its boldest version that is assured to keep the
    quality, and keeps the cheapest of these. The safety margin covers both samples, validation and test.

    The best of many candidates that were searched on a sample is a lucky one there. So where a search has used one half
    of the validation split, policies are screened on that half, and then, from the cheapest on, the first whose quality
    is confirmed on the other half is kept.
    """

    core: Core  # scores the policies
    strictness: float = ONE_SIDED_95  # safety margin, in standard errors (``assured``)
    searched: bool = False  # whether the policies come from a search on the first half
    history: list[dict[str, Any]] = field(default_factory=list)  # an entry per validation; see ``validate``
    operating_points: list[OperatingPoint] = field(default_factory=list)  # of the selected policy, the boldest first
    margin: float = 0.0  # in log-odds, added to the selected policy; 1,000 makes it dense
    _screened: dict[tuple[int, int], tuple[bool, OperatingPoint]] = field(default_factory=dict)

    def consider(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """Validate a policy, and return its entry, which the history now has."""
        self.history.append(self.validate(step, policy, objective))
        return self.history[-1]

    def validate(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """The entry of a policy, on instances of the first half."""
        split = self.core.split("validation")
        rows = halves(split)[0][:CURVE_INSTANCES]
        scored = self._score(policy, rows)
        names = ("quality", "quality_ref", "flops_ratio")
        return {
            "step": step,
            **{name: float(scored[name].mean()) for name in names},
            "quality_kept": self._kept(scored),
            "reward": float(objective.rewards(*(scored[name] for name in names)).mean()),
            "by_difficulty": by_difficulty(scored, split.difficulty[rows]),
        }

    def select(self, policies: list[DecisionPolicy]) -> DecisionPolicy:
        """The policy to keep; of equals, such as all dense, the first. Dense if no other keeps the quality."""
        self._screened.clear()
        # The cheapest first: what runs more at its boldest than another that is confirmed is never screened.
        guess = AS_LEARNED
        waiting = [(self._least(policy), number, UNKNOWN) for number, policy in enumerate(policies)]
        heapify(waiting)
        while True:
            _, number, step = heappop(waiting)
            policy = policies[number]
            if step == UNKNOWN:
                step = guess = self._boldest(policy, guess)  # policies are much alike
            elif step == len(MARGINS) - 1 or self._confirmed(policy.with_margin(MARGINS[step])):
                self.operating_points, self.margin = self._operating_points(policy, step), float(MARGINS[step])
                return policy.with_margin(MARGINS[step])
            else:
                step += 1
            heappush(waiting, (self._screen(policy, step)[1].flops_ratio, number, step))

    def _least(self, policy: DecisionPolicy) -> float:
        """FLOPs of its boldest version; 0 of several stages, where they are not known without a pass."""
        split = self.core.split("validation")
        if self.core.is_staged:
            return 0.0
        decisions = decide_rows(self.core, policy.with_margin(MARGINS[0]), split, self._rows)
        return float(split.costs.flops_ratio(self._rows, decisions).mean())

    @property
    def _rows(self) -> NDArray:
        """The rows of the validation split that policies are screened on."""
        split = self.core.split("validation")
        return halves(split)[0] if self.searched else np.arange(len(split))

    def _operating_points(self, policy: DecisionPolicy, selected: int) -> list[OperatingPoint]:
        """The versions of a policy that were screened, and a cautious one; margins count from the selected one on."""
        self._screen(policy, min(selected + FURTHER, len(MARGINS) - 1))
        points = sorted((step, point) for (number, step), (_, point) in self._screened.items() if number == id(policy))
        return [point._replace(margin=point.margin - MARGINS[selected]) for _, point in points]

    def _boldest(self, policy: DecisionPolicy, guess: int) -> int:
        """The first of ``MARGINS`` at which a policy keeps the quality where it is screened.

        More caution means fewer skips and a higher quality. So the search goes on from a guess in steps that double,
        and then by bisection (Bentley and Yao 1976).
        """
        low, high, width, answers = 0, len(MARGINS) - 1, 1, set()
        while low < high:
            step = min(max(low, guess), high - 1)
            answers.add(kept := self._screen(policy, step)[0])
            low, high = (low, step) if kept else (step + 1, high)
            guess = (low + high) // 2 if len(answers) > 1 else step + (-width if kept else width)
            width *= 2
        return low

    def _screen(self, policy: DecisionPolicy, step: int) -> tuple[bool, OperatingPoint]:
        """Whether a version of a policy keeps the quality where it is screened, and its results there."""
        key = id(policy), step
        if key not in self._screened:
            scored = self._score(policy.with_margin(MARGINS[step]), self._rows)
            loss = scored["quality_ref"] - scored["quality"]
            # With one more instance that loses all, as ``assured`` has it: no sample is too good to vary.
            deviation = float((np.sum(loss**2) + 1) / (len(loss) + 1)) ** 0.5
            highest = float(loss.mean()) + ONE_SIDED_95 * deviation / len(loss) ** 0.5
            point = OperatingPoint(
                float(MARGINS[step]), float(loss.mean()), highest, float(scored["flops_ratio"].mean())
            )
            self._screened[key] = self._kept(scored), point
        return self._screened[key]

    def _confirmed(self, chosen: DecisionPolicy) -> bool:
        """Whether it keeps the quality on rows that no search has used; without a search, screening used all."""
        rows = halves(self.core.split("validation"))[1]
        return not self.searched or self._kept(self._score(chosen, rows))

    def _score(self, policy: DecisionPolicy, rows: NDArray) -> dict[str, NDArray]:
        return decide_and_score(self.core, policy, self.core.split("validation"), rows)

    def _kept(self, scored: dict[str, NDArray]) -> bool:
        return keeps_quality(self.core, scored, self.strictness)
