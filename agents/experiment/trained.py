"""A run that was trained: its description, its core and its policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_gym.agents.learning.decisions import check_fits
from sd_gym.agents.runs.folder import check_backbone, read_description

from sd_gym.config import EnvConfig, dotted
from sd_gym.envs.config import TABLE_KEYS, make_config
from sd_gym.envs.protocols import Core
from sd_gym.envs.shared import shared_core
from sd_gym.policy import DecisionPolicy
from sd_gym.registration import serving_env_refused
from sd_gym.tasks.splits import check_unchanged


def load_run(folder: Path, places: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Core, DecisionPolicy]:
    """The config, core and policy of a run folder; ``places``: see ``moved``.

    Raises ``FileNotFoundError`` if it holds no run; ``ValueError`` if its network is not registered, its policy does
    not fit the env, or its data have changed.
    """
    description = moved(read_description(folder), places or {})
    core = core_of_run(folder, description)
    return description, core, check_fits(DecisionPolicy.load(folder), core)


def moved(description: dict[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """A run's description with new ``places`` of its ``dataset`` and ``backbone``, or of its ``table``.

    A table has the outcomes of its backbone, so another place of the backbone changes nothing there. Raises
    ``ValueError`` for other keys.
    """
    found = dotted(places, "places")
    has_table = description["env_config"].get("table") is not None
    known = {"table": "table"} if has_table else {"data.dataset": "dataset", "backbone.name": "backbone"}
    if has_table:
        found.pop("backbone.name", None)
    if others := [key for key in found if key not in known]:
        files = " and ".join(known.values())
        raise ValueError(f"{others[0]}: a run keeps its settings; only its {files} may be elsewhere now")
    return {**description, "env_config": run_config(description, found).model_dump()} if found else description


def core_of_run(folder: Path, description: dict[str, Any]) -> Core:
    """The core of a run; raises ``ValueError`` if its data or its backbone have changed."""
    core = shared_core(run_config(description))
    check_unchanged(folder, description["data"], core.data)
    check_backbone(folder, description["weights"], core.backbone)
    return core


def run_config(description: dict[str, Any], settings: dict[str, Any] | None = None) -> EnvConfig:
    """The env's config of a run, with some keys overridden, for evaluation.

    The run's own objective need not be registered here; then there are no rewards.
    """
    if "arrivals" in description["env_config"]:
        raise ValueError(serving_env_refused(description["env"]))
    values = dotted(description["env_config"])
    if values.get("table") is not None:  # the table has the other keys
        values = {key: value for key, value in values.items() if key in ("id", "table", *TABLE_KEYS)}
    overrides, objective = dotted(settings or {}, description["env"]), values.pop("reward.objective", None)
    config = make_config({**values, **overrides}, description["env"])
    if objective is None or "reward.objective" in overrides:
        return config
    return config.model_copy(update={"reward": config.reward.model_copy(update={"objective": objective})})
