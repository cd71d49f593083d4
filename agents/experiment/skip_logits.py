"""A run's log-odds of skipping, for preparing a backbone under its decisions."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.learning.decisions import observed, row_batches

from sd_gym.config import EnvConfig, dotted
from sd_gym.envs.config import make_config
from sd_gym.envs.core import BackboneCore
from sd_gym.envs.shared import shared_core
from sd_gym.execution.split import BackboneSplit
from sd_gym.policy import DecisionPolicy
from sd_gym.tasks.splits import Splits


def skip_logits_of_run(folder: Path, overrides: dict[str, Any]) -> tuple[EnvConfig, dict[str, NDArray]]:
    """The env's config of a run with ``overrides``, and its policy's log-odds of skipping on that env's data.

    A policy of several stages decides each stage after its own earlier decisions. ``overrides`` are values by dotted
    key, such as another ``data.dataset``, but not the backbone, which the policy observes. The log-odds of ``train``
    (all its rows) and ``validation`` are float32 ``[n, switches]``, for ``prepare_backbone``. Raises like ``load_run``,
    and ``ValueError`` if the policy does not decide switch by switch.
    """
    _, core, policy = load_run(folder)
    config = make_config({**dotted(core.config.model_dump()), "data.policy_rows": "all", **overrides}, core.config.id)
    data, logits = shared_core(config), {}
    if not (isinstance(core, BackboneCore) and isinstance(data, BackboneCore)):
        raise ValueError(f"{folder} is a run on a table; expected one on an env with a backbone")
    plain = Splits(config.data, config.task)  # which the backbone is prepared on
    for name in ("train", "validation"):
        split = data.split(name)
        if split.instances.hash != plain[name].hash:
            raise ValueError(
                f"the rows of {name} are others without those that the backbone knows, so the policy's decisions would "
                "go to other rows; pass data whose splits share no texts"
            )
        batches = row_batches(core, np.arange(len(split)))
        logits[name] = np.concatenate([_skip_logits(core, policy, split, rows) for rows in batches])
    return config, logits


def _skip_logits(core: BackboneCore, policy: DecisionPolicy, split: BackboneSplit, rows: NDArray) -> NDArray:
    """Log-odds of skipping on rows ``[n]``, float32 ``[n, switches]``; minus infinity for switches of no stage."""
    logits = np.full((len(rows), core.n_switches), -np.inf, dtype=np.float32)
    for columns, observations in zip(core.columns, observed(core, policy, split, rows), strict=True):
        logits[:, columns] = policy.skip_logits(observations)[:, columns]
    return logits
