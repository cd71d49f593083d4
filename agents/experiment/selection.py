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
AS_LEARNED = MARGINS.index(0.0)
FURTHER = 8  # steps behind the selected version, 2 in log-odds: who wants more caution finds one that is known, too
CURVE_INSTANCES = 1000  # of the first half, that each point of a curve is of


@dataclass
class Selection:
    """Validates the policies of a run on the way, and selects one in the end.

    Of each policy there are versions from bold to cautious; the boldest that is assured to keep the quality is looked
    for, and the cheapest of these is kept. The validation split has to leave room for the luck of both samples, its own
    and that of the test split.

    The best of many candidates that were searched on a sample is a lucky one there. So where a search has used one half
    of the validation split, policies are screened on that half, and then, from the cheapest on, the first whose quality
    is confirmed on the other half is kept.

    Attributes:
        core: Scores the policies.
        strictness: Standard errors of luck that validation has to leave room for (``assured``).
        searched: Whether the policies come from a search on the first half.
        history: One entry a validation: step, quality, quality_ref, flops_ratio, quality_kept, reward and
            by_difficulty (one level, 0, where the data have none), on instances of the first half.
        operating_points: Of the policy that was selected, the versions that selection has looked at, the boldest first.
        margin: In log-odds, which was put on the policy that was selected; 1,000 makes it dense.
    """

    core: Core
    strictness: float = ONE_SIDED_95
    searched: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    operating_points: list[OperatingPoint] = field(default_factory=list)
    margin: float = 0.0
    _screened: dict[tuple[int, int], tuple[bool, OperatingPoint]] = field(default_factory=dict)

    def consider(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """Validate a policy, and return its entry, which the history now has."""
        self.history.append(self.validate(step, policy, objective))
        return self.history[-1]

    def validate(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """The entry of a policy."""
        split = self.core.split("validation")
        rows = halves(split)[0][:CURVE_INSTANCES]
        scored = self._score(policy, rows)
        entry = {"step": step} | {
            name: float(scored[name].mean()) for name in ("quality", "quality_ref", "flops_ratio")
        }
        rewards = objective.rewards(*(scored[name] for name in ("quality", "quality_ref", "flops_ratio")))
        known = {"quality_kept": self._kept(scored), "reward": float(rewards.mean())}
        return entry | known | {"by_difficulty": by_difficulty(scored, split.difficulty[rows])}

    def select(self, offers: list[DecisionPolicy]) -> DecisionPolicy:
        """The policy to keep, of these; of equals, such as all dense, the first. Dense if no other keeps the quality.

        A version that is not confirmed is replaced by the next more cautious one of the same policy.
        """
        self._screened.clear()
        # The cheapest first: what runs more at its boldest than another that is confirmed is never screened.
        waiting, guess = [(self._least(policy), number, None) for number, policy in enumerate(offers)], AS_LEARNED
        heapify(waiting)
        while True:
            _, number, step = heappop(waiting)
            policy = offers[number]
            if step is None:
                step = guess = self._boldest(policy, guess)  # policies are much alike
            elif step == len(MARGINS) - 1 or self._confirmed(policy.with_margin(MARGINS[step])):
                self.operating_points, self.margin = self._operating_points(policy, step), float(MARGINS[step])
                return policy.with_margin(MARGINS[step])
            else:
                step += 1
            heappush(waiting, (self._flops(policy, step), number, step))

    def _least(self, policy: DecisionPolicy) -> float:
        """FLOPs of its boldest version; of several stages they are not known without running anything: 0."""
        split = self.core.split("validation")
        if self.core.is_staged:
            return 0.0
        decisions = decide_rows(self.core, policy.with_margin(MARGINS[0]), split, self._rows)
        return float(split.costs.flops_ratio(self._rows, decisions).mean())

    @property
    def _rows(self) -> NDArray:
        """Of the validation split, those that policies are screened on."""
        split = self.core.split("validation")
        return halves(split)[0] if self.searched else np.arange(len(split))

    def _operating_points(self, policy: DecisionPolicy, selected: int) -> list[OperatingPoint]:
        """The versions of a policy that were screened, and a cautious one; margins count from the selected one on."""
        self._screen(policy, min(selected + FURTHER, len(MARGINS) - 1))
        seen = sorted((step, point) for (number, step), (_, point) in self._screened.items() if number == id(policy))
        return [point._replace(margin=point.margin - MARGINS[selected]) for _, point in seen]

    def _boldest(self, policy: DecisionPolicy, guess: int) -> int:
        """The first of ``MARGINS`` at which a policy keeps the quality where it is screened.

        More caution means fewer skips and a higher quality, so it is looked for from a guess on in steps that double,
        and between the last two by bisection (Bentley and Yao 1976).
        """
        low, high, width, answers = 0, len(MARGINS) - 1, 1, set()
        while low < high:
            step = min(max(low, guess), high - 1)
            answers.add(kept := self._screen(policy, step)[0])
            low, high = (low, step) if kept else (step + 1, high)
            guess = (low + high) // 2 if len(answers) > 1 else step + (-width if kept else width)
            width *= 2
        return low

    def _flops(self, policy: DecisionPolicy, step: int) -> float:
        return self._screen(policy, step)[1].flops_ratio

    def _screen(self, policy: DecisionPolicy, step: int) -> tuple[bool, OperatingPoint]:
        """Whether a version of a policy keeps the quality where it is screened, and what it does there."""
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
        """Whether rows that no search has seen say so too; without a search, screening has seen them all."""
        rows = halves(self.core.split("validation"))[1]
        return not self.searched or self._kept(self._score(chosen, rows))

    def _score(self, policy: DecisionPolicy, rows: NDArray) -> dict[str, NDArray]:
        return decide_and_score(self.core, policy, self.core.split("validation"), rows)

    def _kept(self, scored: dict[str, NDArray]) -> bool:
        return keeps_quality(self.core, scored, self.strictness)
