"""What a backbone is tuned under: the decisions of a run's policy on the data of the preparation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.run import load_run
from sd_gym.agents.learning.decisions import observation_batches

from sd_gym.config import EnvConfig, dotted
from sd_gym.envs.config import make_config
from sd_gym.envs.protocols import Core, Observations, Split
from sd_gym.envs.shared import shared_core
from sd_gym.policy import DecisionPolicy


def decided_by_run(folder: Path, overrides: dict[str, Any]) -> tuple[EnvConfig, dict[str, NDArray]]:
    """The env's config of a run, some keys overridden, and the log-odds of skipping that its policy has there.

    Of a policy of several stages, those that each stage has of its switches, behind what the policy decides before it.

    Args:
        folder: Of the run.
        overrides: Values by dotted key, such as another ``data.dataset``; not the backbone, which the policy observes.

    Returns:
        The config, and of ``train`` and ``validation`` float32 ``[n, switches]``, as ``prepare_backbone`` takes them.

    Raises:
        FileNotFoundError, ValueError: As ``load_run`` raises; or if the policy has no odds of a switch by itself.
    """
    _, core, policy = load_run(folder)
    config = make_config(dotted(core.config.model_dump()) | overrides, core.config.id)
    splits = {name: shared_core(config).split(name) for name in ("train", "validation")}
    return config, {
        name: np.concatenate(
            [_odds(core, policy, split, rows) for rows in observation_batches(core, np.arange(len(split)))]
        )
        for name, split in splits.items()
    }


def _odds(core: Core, policy: DecisionPolicy, split: Split, rows: NDArray) -> NDArray:
    """Log-odds of skipping on rows ``[n]``, float32 ``[n, switches]``; minus infinity where no stage decides."""
    odds = np.full((len(rows), core.n_switches), -np.inf, dtype=np.float32)
    stages = iter(core.columns)

    def decide(observations: Observations) -> NDArray:
        columns = next(stages)
        odds[:, columns] = policy.skip_logits(observations)[:, columns]
        return policy.decide(observations)

    core.rollout(split, rows, decide)
    return odds
