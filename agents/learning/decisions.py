"""Decisions of a policy on a split, and their outcomes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.protocols import SCORES, Core, Observations, Split
from sd_gym.envs.spaces import flat_size, token_width
from sd_gym.execution.passes import PASS_TOKENS
from sd_gym.execution.scoring import DENSE_BATCH
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.table_export import TablePolicy
from sd_gym.switch import PassState

PolicyT = TypeVar("PolicyT", bound=DecisionPolicy | TablePolicy)
BATCH = 256
MAX_VERSIONS = 40  # versions of a policy, at most
TIE = 1e-4  # log-odds between a margin and the preference that it is a quantile of, which many inputs may share
# Margins in log-odds, for policies whose preferences take a pass to compute.
MARGINS = (
    *(-20.0, -12.0, -8.0, -6.0, -4.5, -3.0),
    *np.arange(-1.5, 6, 0.75).tolist(),
    *np.arange(6, 15, 1.5).tolist(),
    *(17.0, 20.0, 25.0, 32.0, 40.0),
)
TABLE_MARGINS = (
    *MARGINS[:6],
    *np.arange(-1.5, 15, 0.25).tolist(),
    *MARGINS[-5:],
)  # for tables, where a pass costs nothing
DENSE_MARGIN = 1000.0  # skips nothing
POLICY_ROWS = 2000  # rows for searches and for the order of operating points, at most
FEW_ROWS = 500  # most rows if each point takes a pass of its own, and to find the end of a path


class SplitDecisions(NamedTuple):
    """Decisions on rows of a split, ``[n, components]``, and the FLOPs of deciding, ``[n]``: a ``SplitPolicy``."""

    decisions: NDArray
    flops: NDArray

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """These decisions; ``rows`` must be those that they were made on."""
        return self


class PolicyLike(Protocol):
    """A policy that can be evaluated, such as a ``DecisionPolicy``."""

    @property
    def flops(self) -> int | None:
        """FLOPs of one decision; ``None``: not counted."""

    def decide(self, observations: Observations) -> NDArray:
        """Decisions, int64 ``[n, switches + 1]``, for ``n`` observations."""
        ...


@runtime_checkable
class SplitPolicy(Protocol):
    """A policy that decides on rows of a split, and may use more than their observations, as an early exit does."""

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """Its decisions on ``rows [n]`` of a split, the same at every call, and their FLOPs."""
        ...


class Dense(NamedTuple):
    """A policy that skips nothing; deciding costs nothing."""

    core: Core

    def decide_split(self, split: Split, rows: NDArray) -> SplitDecisions:
        """Zeros."""
        return SplitDecisions(np.zeros((len(rows), len(self.core.nvec)), dtype=np.int64), np.zeros(len(rows)))


def row_batches(core: Core, rows: NDArray) -> list[NDArray]:
    """Rows ``[n]`` in parts that are observed at once."""
    size = _batch_size(core)
    return np.split(rows, range(size, len(rows), size))


def _batch_size(core: Core) -> int:
    """Rows per batch of observations: tokens take memory, and with stages the pass as well."""
    if core.is_staged:
        return max(1, min(BATCH, PASS_TOKENS // core.config.backbone.max_source_length))
    return sys.maxsize if isinstance(core.observation_space, gym.spaces.Box) else BATCH


def decide_on(core: Core, policy: PolicyLike, split: Split, rows: NDArray) -> NDArray:
    """A policy's decisions ``[n, components]`` on ``rows [n]``."""
    return np.concatenate([core.rollout(split, part, policy.decide)[0] for part in row_batches(core, rows)])


class Version(NamedTuple):
    """A candidate for selection: a policy, and the policy that it is a version of, if any."""

    policy: PolicyLike | SplitPolicy
    margin: float = 0.0  # in log-odds, from the policy that it is a version of; higher skips less
    origin: Any = None  # that policy; its versions are neighbours in a list, the most cautious one first
    # The policy that several learned ones are variants of, such as imitation's, one per price of a lost instance:
    # selection does not let them exclude each other. None: there are no variants.
    variant_of: Any = None


def versions(core: Core, policy: DecisionPolicy | TablePolicy) -> list[Version]:
    """Operating points of a policy, from cautious to bold, including the policy itself.

    Their margins are quantiles of the policy's preferences on policy rows: those for accepting an answer, if it has
    that stage, else those for skipping. Where only a part of a pass shows these, margins are fixed.
    """
    margins = list(MARGINS if core.config.table is None else TABLE_MARGINS)
    if isinstance(policy, DecisionPolicy):
        sees_answer = core.has_answer_stage and not policy.blind
        if sees_answer or not core.is_staged:
            preferences = _preferences(core, policy)
            finite = preferences[np.isfinite(preferences)]  # none if its codebook has one mask
            quantiles = np.quantile(finite, np.linspace(0, 1, MAX_VERSIONS - 1)) if len(finite) else finite
            quantiles = quantiles - TIE if sees_answer else quantiles + TIE
            margins = np.unique([0.0, *quantiles]).tolist()
    return [Version(policy.with_margin(margin), margin, policy) for margin in margins[::-1]]


def _preferences(core: Core, policy: DecisionPolicy) -> NDArray:
    """Those of ``DecisionPolicy.preference`` on policy rows, at the last stage; float32, flat."""
    split, few = core.split("train"), core.is_staged and core.config.table is None
    parts = row_batches(core, policy_rows(core, FEW_ROWS if few else POLICY_ROWS))
    last = (observed(core, policy, split, part)[-1] for part in parts)
    return np.concatenate([policy.preference(observations).ravel() for observations in last])


def observed(core: Core, policy: PolicyLike, split: Split, rows: NDArray) -> list[Observations]:
    """What a policy observes at each stage on ``rows [n]``, after its own earlier decisions."""
    seen = list[Observations]()

    def decide(observations: Observations) -> NDArray:
        seen.append(observations)
        return policy.decide(observations)

    core.rollout(split, rows, decide)
    return seen


def check_fits(policy: PolicyT, core: Core) -> PolicyT:
    """Return the policy; raises ``ValueError`` if its observations, stages or decisions are not those of the core."""
    space = core.observation_space
    size = policy.observation_size
    width = policy.token_width
    if policy.channels is not None and width is None:  # it observes tokens alone
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
    observations, tokens = f"observations of shape {(flat,)}", f"tokens of {width} numbers"
    return observations if width is None else f"{observations} and {tokens}" if flat else tokens


def outcomes(
    core: Core, policy: PolicyLike | SplitPolicy, split: Split, rows: NDArray | None = None
) -> dict[str, NDArray]:
    """Decide on rows of a split (``None``: all), once, in order, and score the decisions.

    Returns ``decision [n, switches + 1]``, ``goes_on``, ``quality``, ``quality_ref``, ``flops_ratio`` and
    ``flops_ratio_with_policy``, which adds the FLOPs of deciding, each ``[n]``.
    """
    rows = np.arange(len(split)) if rows is None else rows
    if isinstance(policy, SplitPolicy):
        decisions, flops = policy.decide_split(split, rows)
        scored = score_decisions(core, split, rows, decisions)
    else:
        flops = decision_flops(core, policy, split, rows)
        if core.is_staged:  # in one pass: sublayers that ran for an observation do not run again
            size, decide = _batch_size(core), policy.decide
            scored = _score(core, split, rows, lambda part: core.rollout(split, rows[part], decide), size)
        else:
            scored = score_decisions(core, split, rows, decide_on(core, policy, split, rows))
    return scored | {"flops_ratio_with_policy": scored["flops_ratio"] + flops / split.costs.dense_flops(rows)}


def decision_flops(core: Core, policy: PolicyLike, split: Split, rows: NDArray) -> NDArray:
    """FLOPs of deciding on rows, ``[n]``: the policy's own, if they are known, and those of its observations."""
    flops = core.observing_flops(split, rows, blind=getattr(policy, "blind", False)) + (policy.flops or 0)
    if isinstance(policy, DecisionPolicy):
        tokens = np.minimum(split.encoded.source_length[rows], core.config.backbone.max_source_length)
        flops = flops + policy.flops_per_token * tokens
    return flops


def score_decisions(core: Core, split: Split, rows: NDArray, decisions: NDArray) -> dict[str, NDArray]:
    """Outcomes of given decisions ``[n, switches + 1]`` on ``rows [n]``: see ``outcomes``."""
    return _score(core, split, rows, lambda part: (decisions[part], None))


def score_masks(core: Core, split: Split, rows: NDArray, masks: NDArray) -> dict[str, NDArray]:
    """Outcomes of ``rows [n]`` under masks ``[masks, components]``: arrays ``[masks, n, ...]``; see ``outcomes``."""
    scored = [score_decisions(core, split, rows, np.tile(mask, (len(rows), 1))) for mask in masks]
    return {name: np.stack([of_mask[name] for of_mask in scored]) for name in scored[0]}


def _score(
    core: Core,
    split: Split,
    rows: NDArray,
    decide: Callable[[NDArray], tuple[NDArray, PassState | None]],
    size: int = DENSE_BATCH,
) -> dict[str, NDArray]:
    """Outcomes, ``size`` rows at a time; ``decide`` maps positions in ``rows`` to decisions and a pass's state."""
    # Batches of similar length need little padding; the last line restores the order.
    order = np.argsort(split.encoded.source_length[rows], kind="stable")
    results = []
    for part in np.split(order, range(size, len(order), size)):
        decisions, state = decide(part)
        outcome = core.score(split, rows[part], decisions, state)
        scores = {name: getattr(outcome, name) for name in SCORES}
        results.append({"decision": core.to_masks(decisions), "goes_on": core.goes_on(decisions), **scores})
    return {name: np.concatenate([part[name] for part in results])[np.argsort(order)] for name in results[0]}


def policy_rows(core: Core, most: int = POLICY_ROWS) -> NDArray:
    """Rows of the training split, at most ``most``, evenly spaced: for searches, and for the order of selection.

    So all rows of the validation split are left for the tests of selection.
    """
    n = len(core.split("train"))
    return np.linspace(0, n - 1, min(n, most)).round().astype(np.int64)
