"""A split under decisions: what a policy decides there, and the outcomes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.protocols import Core, Observations, Split
from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.execution.passes import PASS_TOKENS
from sd_gym.execution.scoring import AT_ONCE
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.table_export import TablePolicy
from sd_gym.switch import PassState

PolicyT = TypeVar("PolicyT", DecisionPolicy, TablePolicy)
BATCH = 256
POINTS = 40  # versions of a policy, at most
# Of versions of a policy whose preferences are not known without a pass, in log-odds.
MARGINS = (*np.arange(-1.5, 6, 0.75).tolist(), *np.arange(6, 15, 1.5).tolist(), 17.0, 20.0, 25.0, 32.0, 40.0)
DENSE_MARGIN = 1000.0  # leaves everything running
POLICY_ROWS = 2000  # that searches use, and operating points are ordered on, at most
FEW_ROWS = 500  # the same, where each point takes a pass of its own, and to end a path


class SplitDecisions(NamedTuple):
    """Decisions on rows of a split, ``[n, components]``, and the FLOPs of deciding, ``[n]``."""

    decisions: NDArray
    flops: NDArray


class PolicyLike(Protocol):
    """What can be evaluated: a ``DecisionPolicy``, or anything else that decides."""

    @property
    def flops(self) -> int | None:
        """FLOPs of one decision; ``None`` where nobody has counted them."""
        ...

    def decide(self, observations: Observations) -> NDArray:
        """Decisions, int64 ``[n, switches + 1]``, for ``n`` observations."""
        ...


@runtime_checkable
class SplitPolicy(Protocol):
    """What decides by more than the observation, such as a cascade or a coin that each row has a side of."""

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """Its decisions on ``rows [n]`` of a split, the same at every call, and what it costs to make them."""
        ...


class Dense(NamedTuple):
    """Nothing is skipped, and nobody decides."""

    core: Core

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """Zeros."""
        return SplitDecisions(np.zeros((len(rows), len(self.core.nvec)), dtype=np.int64), np.zeros(len(rows)))


class Evaluator:
    """How policies are evaluated on a core that decides before the first layer: they decide before anything runs."""

    rows_of_orders = POLICY_ROWS  # that operating points are ordered on, at most

    def __init__(self, core: Core) -> None:
        self._core = core

    def margins(self, policy: DecisionPolicy | TablePolicy) -> list[float]:
        """Ascending, in log-odds, 0 among them: quantiles of what makes a component run, on policy rows."""
        core = self._core
        if isinstance(policy, TablePolicy) or policy.codebook is not None:
            return list(MARGINS)
        parts = self.batches(policy_rows(core))
        gaps = np.concatenate([policy.preference(core.observe(core.split("train"), part)).ravel() for part in parts])
        return np.unique([0.0, *np.quantile(gaps[np.isfinite(gaps)], np.linspace(0, 1, POINTS - 1))]).tolist()

    def decide_and_score(self, policy: PolicyLike, split: Split, rows: NDArray) -> dict[str, NDArray]:
        """What a policy decides on ``rows [n]`` of a split, and what comes of it; see ``decide_and_score``."""
        return score_decisions(self._core, split, rows, self.decide(policy, split, rows))

    def flops_ratio(self, policy: PolicyLike, split: Split, rows: NDArray) -> NDArray | None:
        """FLOPs ratios ``[n]`` of a policy; ``None`` where no less than ``decide_and_score`` tells them."""
        return split.costs.flops_ratio(rows, self.decide(policy, split, rows))

    def decide(self, policy: PolicyLike, split: Split, rows: NDArray) -> NDArray:
        """A policy's decisions ``[n, components]`` on ``rows [n]``."""
        return np.concatenate([self._core.rollout(split, part, policy.decide)[0] for part in self.batches(rows)])

    def batches(self, rows: NDArray) -> list[NDArray]:
        """Rows ``[n]`` in parts that are observed at once: all, where observations are flat, else batches."""
        return np.split(rows, range(self._at_once, len(rows), self._at_once))

    @property
    def _at_once(self) -> int:
        return sys.maxsize if isinstance(self._core.observation_space, gym.spaces.Box) else BATCH


class StagedEvaluator(Evaluator):
    """How they are evaluated where they decide at stages: a decision takes a pass, which goes on to the outcome."""

    rows_of_orders = FEW_ROWS

    def margins(self, policy: DecisionPolicy | TablePolicy) -> list[float]:
        """The same for all policies: their preferences are not known without a pass."""
        return list(MARGINS)

    def decide_and_score(self, policy: PolicyLike, split: Split, rows: NDArray) -> dict[str, NDArray]:
        """In one pass: what was run to look is not run again to score."""
        core = self._core
        return _score(core, split, rows, lambda part: core.rollout(split, rows[part], policy.decide), self._at_once)

    def flops_ratio(self, policy: PolicyLike, split: Split, rows: NDArray) -> NDArray | None:
        """``None``."""
        return None

    @property
    def _at_once(self) -> int:
        """Rows go through one pass, whose memory is bounded."""
        return max(1, min(BATCH, PASS_TOKENS // self._core.config.backbone.max_source_length))


def evaluator(core: Core) -> Evaluator:
    """How policies are evaluated on a core."""
    return StagedEvaluator(core) if core.is_staged else Evaluator(core)


class Version(NamedTuple):
    """An operating point that selection may choose: a policy and, if it is one of several versions, of which."""

    policy: PolicyLike | SplitPolicy
    margin: float = 0.0  # in log-odds, from the policy that it is a version of; higher skips less
    of: Any = (
        None  # the policy, or whatever else makes a path: its versions stand together, the most cautious one first
    )
    learned: Any = None  # what several paths are variants of, if not each a policy of its own


def versions(core: Core, policy: DecisionPolicy | TablePolicy) -> list[Version]:
    """Operating points of a policy, from cautious to bold, the policy itself among them."""
    return [Version(policy.with_margin(margin), margin, policy) for margin in evaluator(core).margins(policy)[::-1]]


def check_fits(policy: PolicyT, core: Core) -> PolicyT:
    """The policy, if it observes and decides on what a core has; else raises ``ValueError``."""
    space, size, width = core.observation_space, policy.observation_size, policy.token_width
    if policy.channels is not None and width is None:  # of tokens alone
        size, width = 0, size
    for what, has, needs in (
        ("decides on components", policy.nvec, core.nvec.tolist()),
        ("decides on the switches", policy.switches, core.switch_names),
        ("decides at the stages", policy.stages, core.stages),
        ("reads", _describe(size, width), _describe(flat_size(space), token_width(space))),
    ):
        if has != needs:
            raise ValueError(f"the policy {what} {has}, but {core.config.id} has {needs}")
    return policy


def _describe(flat: int, width: int | None) -> str:
    """What is observed, for messages: so many numbers, and tokens of so many."""
    observations, tokens = f"observations of shape {(flat,)}", f"tokens of {width} numbers"
    return observations if width is None else f"{observations} and {tokens}" if flat else tokens


def decide_and_score(core: Core, policy: PolicyLike, split: Split, rows: NDArray | None = None) -> dict[str, NDArray]:
    """Decide on rows of a split (``None``: all), once, in order, and score the decisions.

    To ``decision`` ``[n, switches + 1]``, ``goes_on``, ``quality``, ``quality_ref`` and ``flops_ratio`` ``[n]``.
    """
    return evaluator(core).decide_and_score(policy, split, np.arange(len(split)) if rows is None else rows)


def outcomes(
    core: Core, policy: PolicyLike | SplitPolicy, split: Split, rows: NDArray | None = None
) -> dict[str, NDArray]:
    """As ``decide_and_score``, of whatever decides; and ``flops_ratio_with_policy [n]``, with the FLOPs of deciding."""
    rows = np.arange(len(split)) if rows is None else rows
    if isinstance(policy, SplitPolicy):
        decisions, flops = policy.decide_split(split, rows)
        scored = score_decisions(core, split, rows, decisions)
    else:
        scored, flops = decide_and_score(core, policy, split, rows), decision_flops(core, policy, split, rows)
    return scored | {"flops_ratio_with_policy": scored["flops_ratio"] + flops / split.costs.dense_flops(rows)}


def decision_flops(core: Core, policy: PolicyLike, split: Split, rows: NDArray) -> NDArray:
    """FLOPs of deciding on rows, ``[n]``: the policy's, as far as they are known, and those of all that it observes."""
    observing = core.observing_flops(split, rows, blind=getattr(policy, "blind", False))
    if isinstance(policy, DecisionPolicy):
        tokens = np.minimum(split.encoded.source_length[rows], core.config.backbone.max_source_length)
        observing = observing + policy.flops_per_token * tokens
    return np.full(len(rows), policy.flops or 0) + observing


def score_decisions(core: Core, split: Split, rows: NDArray, decisions: NDArray) -> dict[str, NDArray]:
    """Outcomes of given decisions ``[n, switches + 1]`` on ``rows [n]``, as ``decide_and_score`` returns them."""
    return _score(core, split, rows, lambda part: (decisions[part], None))


def _score(
    core: Core,
    split: Split,
    rows: NDArray,
    decide: Callable[[NDArray], tuple[NDArray, PassState | None]],
    size: int = AT_ONCE,
) -> dict[str, NDArray]:
    """Outcomes, ``size`` rows at a time; ``decide`` gives decisions at positions in ``rows``, and the state there."""
    # Batches of similar length waste little on padding; results are put back in order.
    order = np.argsort(split.encoded.source_length[rows], kind="stable")
    results = []
    for part in np.split(order, range(size, len(order), size)):
        decisions, state = decide(part)
        outcome = core.score(split, rows[part], decisions, state)
        made = core.to_masks(decisions), core.goes_on(decisions)
        results.append((*made, outcome.quality, outcome.quality_ref, outcome.flops_ratio))
    back = np.argsort(order)
    names = ("decision", "goes_on", "quality", "quality_ref", "flops_ratio")
    return {
        name: np.concatenate(of_each)[back] for name, of_each in zip(names, zip(*results, strict=True), strict=True)
    }


def policy_rows(core: Core, most: int = POLICY_ROWS) -> NDArray:
    """Rows of the training split, at most so many, drawn evenly: searches use them, and selection orders by them.

    No row of the validation split is used for this, so all of them are left for the tests of selection.
    """
    n = len(core.split("train"))
    return np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)
