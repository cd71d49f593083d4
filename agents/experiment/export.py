"""A policy as an artefact that decides without its env."""

from collections.abc import Sequence
from typing import Any

from sd_gym.envs.protocols import Core
from sd_gym.operating_points import OperatingPoint
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.table_export import TablePolicy

RESULT_KEYS = ("split", "instances", "quality", "quality_ref", "flops_ratio", "flops_ratio_with_policy")
RESULT_KEYS += ("quality_difference", "quality_difference_interval", "verdict", "guarantee", "goes_on")
NOT_OF_POLICY = ("env", "backbone", "masks", "projection")  # fields of an ``Export`` that no ``SkipPolicy`` has


def run_card(result: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """The parts of an artefact's card about its run: result, selection, and how it was trained."""
    selection = result["selection"]
    return {
        "result": {key: result[key] for key in RESULT_KEYS},
        "selection": selection and {key: selection[key] for key in ("rows", "epsilon", "confidence")},
        "run": {key: description[key] for key in ("env", "algo", "steps", "seed", "versions", "data")},
    }


def export(
    core: Core, policy: DecisionPolicy, operating_points: Sequence[OperatingPoint], card: dict[str, Any]
) -> SkipPolicy | None:
    """The artefact of a policy; on a table, for the backbone of the table. ``card`` extends its card.

    ``None`` if a policy cannot decide without the env: see ``sd_gym.envs.export``.
    """
    if (exported := core.export()) is None:
        return None
    network: DecisionPolicy | TablePolicy = policy
    if exported.masks is not None or exported.projection is not None:
        nvec = [*core.mask_nvec.tolist(), *[2] * core.has_answer_stage]
        network = TablePolicy(policy, nvec, core.backbone.board.names, exported.masks, exported.projection)
    env = exported.env.model_dump()
    env["reward"].pop("objective")
    card = {"env": env, "backbone": exported.backbone, **card}
    same = {key: value for key, value in exported._asdict().items() if key not in NOT_OF_POLICY}
    return SkipPolicy(network, operating_points=tuple(operating_points), card=card, **same)
