"""A run's policy as an artefact that decides without the env."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd_gym.config import dotted, nested
from sd_gym.envs.protocols import Core
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.card import OperatingPoint
from sd_gym.policy.table_export import TablePolicy

RESULT_KEYS = ("split", "instances", "quality", "quality_ref", "flops_ratio", "flops_ratio_with_policy")
RESULT_KEYS += ("quality_difference", "quality_difference_interval", "verdict", "guarantee")


def export(
    core: Core,
    policy: DecisionPolicy,
    operating_points: Sequence[OperatingPoint],
    result: dict[str, Any],
    description: dict[str, Any],
) -> SkipPolicy | None:
    """The artefact of a run; of one on a table, for the backbone that the table is of.

    ``None`` where a policy cannot leave its env: see ``sd_gym.envs.export``.
    """
    if (exported := core.export()) is None:
        return None
    network: DecisionPolicy | TablePolicy = policy
    if exported.masks is not None or exported.projection is not None:
        known = [*core.decision_nvec.tolist(), *[2] * core.has_answer_stage], core.backbone.board.names
        network = TablePolicy(policy, *known, exported.masks, exported.projection)
    env, selection = dotted(exported.env.model_dump()), result["selection"]
    card = {
        "env": nested({key: value for key, value in env.items() if key != "reward.objective"}),
        "backbone": exported.backbone,
        "result": {key: result[key] for key in RESULT_KEYS},
        "selection": selection and {key: selection[key] for key in ("rows", "epsilon", "confidence")},
        "run": {key: description[key] for key in ("env", "algo", "steps", "seed", "versions", "data")},
    }
    of_input = exported.mean, exported.deviation, exported.rarity, exported.protection
    looks = exported.of_tokens, exported.ranking_costs_flops, exported.context
    return SkipPolicy(network, *of_input, tuple(operating_points), card, *looks)
