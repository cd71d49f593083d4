"""A run's policy as an artefact that decides without the env."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_gym.backbones.load import BUNDLED
from sd_gym.config import nested, spelled
from sd_gym.envs.core import Core
from sd_gym.envs.spaces import Pooled, Tokens
from sd_gym.envs.split import Split
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy, Stop, tokenizer_hash, weights_hash
from sd_gym.policy.protection import Protection

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
    core: Core, policy: DecisionPolicy, stops: Sequence[Stop], result: dict[str, Any], description: dict[str, Any]
) -> SkipPolicy | None:
    """The artefact of a run.

    Args:
        core: The env's core.
        policy: What was selected.
        stops: Its validated versions.
        result: As in ``result.json``.
        description: As in ``config.json``.

    Returns:
        ``None`` where a policy cannot leave its env: its observation is one of the user's own, or its tokens are ranked
        at random, which is a control, or in a way of the user's own.
    """
    config, backbone, train = core.config, core.backbone, core.split("train")
    drops = len(config.tokens.shares) > 1
    known = not drops or config.tokens.ranking in ("attention", "idf", "position")
    if not (isinstance(core.observation, Pooled | Tokens) and known):
        return None
    env = spelled(description["env_config"])
    card = {
        "env": nested({key: value for key, value in env.items() if key != "reward.objective"}),
        "backbone": {
            "name": config.backbone.name,
            "is_local": Path(config.backbone.name).exists() or config.backbone.name in BUNDLED,
            "model_type": backbone.model.config.model_type,
            "auto_class": backbone.head.auto_class,
            "weights": weights_hash(backbone.model),
            "tokenizer": tokenizer_hash(backbone.tokenizer),
            "token_types": train.encoded.token_type_ids is not None,
        },
        "result": {key: result[key] for key in OF_A_RESULT},
        "run": {key: description[key] for key in ("env", "algo", "steps", "seed", "versions", "data")},
    }
    seen = core.stage_observation if core.is_staged else core.observation
    return SkipPolicy(
        policy,
        seen.mean,
        seen.deviation,
        train.rarity if drops and config.tokens.ranking == "idf" else None,
        _protection(train) if drops else None,
        tuple(stops),
        card,
    )


def _protection(train: Split) -> Protection | None:
    tokenizer = train.backbone.tokenizer
    added = tokenizer("", "").input_ids  # what is put around texts and between them
    separator = added[-1] if added else None
    special, encoded = sorted({*tokenizer.all_special_ids, *added}), train.encoded
    return Protection.of(encoded.input_ids, encoded.source_length, train.tokens.droppable, special, separator)
