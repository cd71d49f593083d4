"""A run's policy as an artefact that decides without the env."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd_gym.config import nested, spelled
from sd_gym.envs.core import Core
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.card import OperatingPoint
from sd_gym.policy.table_export import TablePolicy

OF_A_RESULT = (
    "split",
    "instances",
    "quality",
    "quality_ref",
    "flops_ratio",
    "flops_ratio_with_policy",
    "quality_difference",
    "quality_difference_interval",
    "verdict",
)


def export(
    core: Core,
    policy: DecisionPolicy,
    operating_points: Sequence[OperatingPoint],
    result: dict[str, Any],
    description: dict[str, Any],
) -> SkipPolicy | None:
    """The artefact of a run; of one on a table, for the backbone that the table is of.

    Args:
        core: The env's core.
        policy: What was selected.
        operating_points: Its validated versions.
        result: As in ``result.json``.
        description: As in ``config.json``.

    Returns:
        ``None`` where a policy cannot leave its env: see ``sd_gym.envs.leaving``.
    """
    leaving = core.leaving()
    if leaving is None:
        return None
    network: DecisionPolicy | TablePolicy = policy
    if leaving.masks is not None or leaving.projection is not None:
        known = core.decision_nvec.tolist(), core.backbone.board.names
        network = TablePolicy(policy, *known, leaving.masks, leaving.projection)
    env = spelled(leaving.env.model_dump())
    card = {
        "env": nested({key: value for key, value in env.items() if key != "reward.objective"}),
        "backbone": leaving.backbone,
        "result": {key: result[key] for key in OF_A_RESULT},
        "run": {key: description[key] for key in ("env", "algo", "steps", "seed", "versions", "data")},
    }
    of_input = leaving.mean, leaving.deviation, leaving.rarity, leaving.protection
    return SkipPolicy(network, *of_input, tuple(operating_points), card, leaving.of_tokens)
