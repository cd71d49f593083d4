"""Results of a policy on a split compared with the dense backbone, with intervals."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.by_instance import by_facts, write_instances
from sd_gym.agents.learning.decisions import PolicyLike, SplitPolicy, outcomes
from sd_gym.agents.runs.verdict import (
    CONFIDENCE,
    Verdict,
    difference_interval,
    fewest_instances,
    losses_allowed,
    verdict,
)

from sd_gym.envs.exact import best_rewards, normalised_score
from sd_gym.envs.protocols import SCORES, Core, Split
from sd_gym.envs.table import TableCore, TableSplit
from sd_gym.objectives import Objective
from sd_gym.registry import UnknownNameError
from sd_gym.tasks.difficulty import means_by


def evaluate(
    core: Core, policy: PolicyLike | SplitPolicy, split_name: str, *, table: Path | None = None
) -> dict[str, Any]:
    """The result of a policy on a split; ``table`` is a CSV file for the results of each instance.

    Returns:
        ``flops_ratio`` is the mean over instances of the backbone's ratio; ``flops_ratio_with_policy`` adds the FLOPs
        of deciding, if ``policy_flops_counted``. ``goes_on`` is the share of rows that went on. ``return``
        is the mean reward, which FLOPs of deciding do not lower; ``regret`` is how much more the best masks of a table
        would earn. Both are ``None`` if unknown: without a table, or with an unregistered objective.
        ``normalised_score`` is 0 on the hull of a table's masks and 1 for full information (``sd_gym.envs.exact``).
        ``metrics`` has the data set's own metric if it is not the mean quality. ``by_difficulty`` has the data's
        levels, or else the quartiles of the dense loss; ``by_fact`` has the quartiles of each fact of the instances.
    """
    split = core.split(split_name)
    split.scoring.score_dense()
    rows, scored = np.arange(len(split)), outcomes(core, policy, split)
    masks = scored["decision"]
    decisions = core.joined(masks, scored["goes_on"])
    if table is not None:
        write_instances(split, scored, table)
    epsilon = core.config.reward.epsilon
    metrics = split.scoring.metrics
    highest = split.scoring.highest
    return {
        "metrics": {"policy": metrics(rows, decisions), "dense": metrics(rows, np.zeros_like(masks))},
        "split": split_name,
        "instances": len(split),
        **_means(core, split, scored, CONFIDENCE),
        "quality_difference_interval": difference_interval(scored["quality"], scored["quality_ref"], highest),
        "highest_quality": highest,
        "fewest_instances": fewest_instances(epsilon, highest) if epsilon else None,  # None: no number is enough
        "losses_allowed": losses_allowed(len(split), epsilon, highest=highest),
        "decisions_hash": decisions_hash(decisions),
        "epsilon": epsilon,
        "policy_flops_counted": isinstance(policy, SplitPolicy) or policy.flops is not None,
        "decisions_used": len(np.unique(masks, axis=0)),
        "goes_on": float(scored["goes_on"].mean()),
        "by_difficulty": by_difficulty(scored, split.levels),
        "by_fact": by_facts(split, scored),
        "skip_rate": dict(zip(core.backbone.board.names, masks[:, :-1].mean(axis=0).tolist(), strict=True)),
    }


def summary(
    core: Core, policy: PolicyLike | SplitPolicy, split_name: str, confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The first part of ``evaluate``: means of quality and FLOPs, and the verdict with this ``confidence``."""
    split = core.split(split_name)
    split.scoring.score_dense()
    return _means(core, split, outcomes(core, policy, split), confidence)


def _means(core: Core, split: Split, scored: dict[str, NDArray], confidence: float) -> dict[str, Any]:
    reward, difference = core.config.reward, scored["quality"] - scored["quality_ref"]
    judged = verdict(scored["quality"], scored["quality_ref"], reward.epsilon, confidence, split.scoring.highest)
    flops = float(scored["flops_ratio_with_policy"].mean())
    score = None
    mean = None
    regret = None
    if isinstance(core, TableCore) and split.name == "test":
        score = normalised_score(core.folder, float(-difference.mean()), flops)
    with suppress(UnknownNameError):  # a run's own objective is registered only where it was trained
        mean = float(Objective(reward).rewards(*(scored[name] for name in SCORES)).mean())
        regret = float(best_rewards(split).mean()) - mean if isinstance(split, TableSplit) else None
    return {
        "quality": float(scored["quality"].mean()),
        "quality_ref": float(scored["quality_ref"].mean()),
        "quality_difference": float(difference.mean()),
        "quality_kept": judged == Verdict.KEPT,
        "verdict": str(judged),
        "flops_ratio": float(scored["flops_ratio"].mean()),
        "flops_ratio_with_policy": flops,
        "normalised_score": score,
        "return": mean,
        "regret": regret,
    }


def decisions_hash(decisions: NDArray) -> str:
    """A hash of decisions ``[n, switches + 1]``, to detect later changes."""
    return hashlib.sha256(np.ascontiguousarray(decisions, dtype="<i8").tobytes()).hexdigest()[:16]


def by_difficulty(scored: dict[str, NDArray], levels: NDArray) -> list[dict[str, Any]]:
    """Means of scored decisions (see ``outcomes``) by the instances' ``levels [n]``."""
    columns = {
        **{name: scored[name] for name in (*SCORES, "flops_ratio_with_policy")},
        "skip_rate": scored["decision"][:, :-1],
    }
    return [{"difficulty": means.pop("group"), **means} for means in means_by(levels, columns)]
