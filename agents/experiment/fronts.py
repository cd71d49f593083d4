"""Policies on a whole split, as a front of quality and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.learning.decisions import decide_rows, decision_flops, score_decisions
from sd_gym.agents.runs.fronts import Front

from sd_gym.envs.protocols import Core, Split
from sd_gym.policy import DecisionPolicy


def front_of(core: Core, split: Split, policies: Sequence[DecisionPolicy]) -> Front:
    """Score policies on a whole split; the dense decision, at its full FLOPs, always belongs to a front."""
    rows, policies = np.arange(len(split)), list(policies)
    every = [decide_rows(core, policy, split, rows) for policy in policies]
    # A policy that does not look at its input need not run at all.
    own = [
        decision_flops(core, policy, split, rows) if policy.head.weight.any() and not policy.blind else 0 * rows
        for policy in policies
    ]
    return front_of_decisions(core, split, every, own)


def front_of_decisions(core: Core, split: Split, every: Sequence[NDArray], own: Sequence[NDArray]) -> Front:
    """As ``front_of``, of the decisions of each policy, ``[n, components]``, and the FLOPs of deciding, ``[n]``."""
    rows = np.arange(len(split))
    decided = np.stack([*every, np.zeros((len(rows), len(core.nvec)))])
    # Versions of a policy agree on most instances: each decision on an instance is scored once.
    pairs = np.column_stack([np.tile(rows, len(decided)), decided.reshape(-1, len(core.nvec)).astype(np.int64)])
    different, back = np.unique(pairs, axis=0, return_inverse=True)
    scored = score_decisions(core, split, different[:, 0], different[:, 1:])
    quality, flops = (scored[name][back].reshape(decided.shape[:2]) for name in ("quality", "flops_ratio"))
    return Front(quality, flops + np.array([*own, 0 * rows]) / split.costs.dense_flops(rows))
