"""Which policy of a run is kept: quality first, then the fewest FLOPs; never the mean reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import by_difficulty, decide_and_score
from sd_gym.agents.experiment.verdict import ONE_SIDED_95, Verdict, assured, fewest_instances

from sd_gym.envs.core import Core
from sd_gym.envs.split import Split
from sd_gym.objectives import Objective
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import Stop

# Of versions of a policy, from bolder to more cautious, in log-odds; the last one leaves everything running.
MARGINS = (*np.arange(-1.5, 6, 0.25).tolist(), *np.arange(6, 14.01, 0.5).tolist(), 1000.0)
AS_LEARNED = MARGINS.index(0.0)
FURTHER = 8  # steps behind the selected version, 2 in log-odds: who wants more caution finds one that is known, too
CURVE_INSTANCES = 1000  # of the first half, that each point of a curve is of
OFFERED = 2  # of the policies that were validated on the way, the last ones are selected from; they are alike


def halves(split: Split) -> tuple[NDArray, NDArray]:
    """The rows that curves are of, and that searches may use; and those that no search has seen."""
    rows = np.arange(len(split))
    return rows[: (len(split) + 1) // 2], rows[(len(split) + 1) // 2 :]


def keeps(core: Core, scored: dict[str, NDArray], strictness: float) -> bool:
    """Whether a policy that was scored on rows of the validation split will be seen to keep the quality in the test.

    Of the test split only the size is known here; where it is too small to tell anything, another sample like this one
    stands for it.
    """
    quality, quality_ref, epsilon = scored["quality"], scored["quality_ref"], core.config.reward.epsilon
    size = len(core.split("test"))
    fresh = size if size >= fewest_instances(epsilon, errors=strictness) else len(quality)
    return assured(quality, quality_ref, epsilon, fresh, strictness) == Verdict.KEPT


@dataclass
class Selection:
    """Gathers the policies of a run and selects one in the end.

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
        policies: The last policies that were validated.
        history: One entry a validation: step, quality, quality_ref, flops_ratio, quality_kept, reward and
            by_difficulty (one level, 0, where the data have none), on instances of the first half.
        stops: Of the policy that was selected, the versions that selection has looked at, the boldest first.
        margin: In log-odds, which was put on the policy that was selected; 1,000 makes it dense.
    """

    core: Core
    strictness: float = ONE_SIDED_95
    searched: bool = False
    policies: list[DecisionPolicy] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    margin: float = 0.0
    _screened: dict[tuple[int, int], tuple[bool, Stop]] = field(default_factory=dict)

    def consider(self, step: int, policy: DecisionPolicy, objective: Objective) -> dict[str, Any]:
        """Validate a policy, remember it, and return its entry of the history."""
        entry = self.validate(step, policy, objective)
        self.history.append(entry)
        self.policies = [*self.policies, policy][-OFFERED:]
        return entry

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
        """The policy to keep, of those that were validated and ``offers``; dense if no other keeps the quality.

        A version that is not confirmed is replaced by the next more cautious one of the same policy.
        """
        policies = [*offers, *reversed(self.policies)]  # of equals, such as all dense, what learning ended with
        self._screened.clear()
        boldest, guess = [], AS_LEARNED
        for policy in policies:  # they are much alike
            boldest.append(guess := self._boldest(policy, guess))
        candidates = [(self._flops(*pair), *pair) for pair in zip(policies, boldest, strict=True)]
        while True:
            candidates.sort(key=lambda candidate: candidate[0])
            _, policy, step = candidates.pop(0)
            chosen = policy.with_margin(MARGINS[step])
            if step == len(MARGINS) - 1 or self._confirmed(chosen):
                self.stops, self.margin = self._stops(policy, step), float(MARGINS[step])
                return chosen
            candidates.append((self._flops(policy, step + 1), policy, step + 1))

    def state(self) -> dict[str, Any]:
        """What was gathered, as tensors and plain values."""
        return {"history": self.history, "policies": [policy.state_dict() for policy in self.policies]}

    def load_state(self, state: dict[str, Any], like: DecisionPolicy) -> None:
        """Go on from what ``state`` gave; the policies are built ``like`` the agent's."""
        self.history = state["history"]
        self.policies = [like.with_weights(weights) for weights in state["policies"]]

    def _stops(self, policy: DecisionPolicy, selected: int) -> list[Stop]:
        """The versions of a policy that were screened, and a cautious one; margins count from the selected one on."""
        self._screen(policy, min(selected + FURTHER, len(MARGINS) - 1))
        seen = sorted((step, stop) for (number, step), (_, stop) in self._screened.items() if number == id(policy))
        return [stop._replace(margin=stop.margin - MARGINS[selected]) for _, stop in seen]

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

    def _screen(self, policy: DecisionPolicy, step: int) -> tuple[bool, Stop]:
        """Whether a version of a policy keeps the quality where it is screened, and what it does there."""
        key, split = (id(policy), step), self.core.split("validation")
        if key not in self._screened:
            rows = halves(split)[0] if self.searched else np.arange(len(split))
            scored = self._score(policy.with_margin(MARGINS[step]), rows)
            loss = scored["quality_ref"] - scored["quality"]
            # With one more instance that loses all, as ``assured`` has it: no sample is too good to vary.
            deviation = float((np.sum(loss**2) + 1) / (len(loss) + 1)) ** 0.5
            highest = float(loss.mean()) + ONE_SIDED_95 * deviation / len(loss) ** 0.5
            stop = Stop(float(MARGINS[step]), float(loss.mean()), highest, float(scored["flops_ratio"].mean()))
            self._screened[key] = self._kept(scored), stop
        return self._screened[key]

    def _confirmed(self, chosen: DecisionPolicy) -> bool:
        """Whether rows that no search has seen say so too; without a search, screening has seen them all."""
        rows = halves(self.core.split("validation"))[1]
        return not self.searched or self._kept(self._score(chosen, rows))

    def _score(self, policy: DecisionPolicy, rows: NDArray) -> dict[str, NDArray]:
        return decide_and_score(self.core, policy, self.core.split("validation"), rows)

    def _kept(self, scored: dict[str, NDArray]) -> bool:
        return keeps(self.core, scored, self.strictness)
