"""A run: its folder, training with model selection, and its result."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from sd_gym.agents.common.agent import Rollout
from sd_gym.agents.common.evaluation import ONE_SIDED_99_5, decide_and_score, evaluate, quality_kept, time_ratio
from sd_gym.agents.common.plots import plot_run
from sd_gym.agents.registry import agent_class, make_agent
from stable_baselines3.common.logger import configure

from sd_gym.envs.config import EnvConfig
from sd_gym.envs.core import Core, shared_core
from sd_gym.envs.shells import SwitchableVectorEnv
from sd_gym.policy import DecisionPolicy, write_json

MARGINS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)  # of more cautious versions of a policy, in log-odds
VALIDATIONS = 8  # times that the policy is validated during training
TIMED_BATCH_SIZES = (1, 8, 32)
LIBRARIES = ("gymnasium", "numpy", "sd-gym", "stable-baselines3", "torch", "transformers")


@dataclass
class Selection:
    """Keeps the best policy seen, by (quality kept on validation, then fewer FLOPs), never by mean reward.

    Attributes:
        core: Scores the policies.
        best: The best policy so far.
        history: One entry a validation: step, quality, quality_ref, flops_ratio, quality_kept.
    """

    core: Core
    best: DecisionPolicy | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    _rank: tuple[bool, float] | None = None

    def consider(self, step: int, policy: DecisionPolicy) -> dict[str, Any]:
        """Validate a policy, keep it if it is the best, and return its entry of the history.

        Where a policy does not keep the quality, more cautious versions of it are tried: what it is least sure of
        is run again, step by step, until the quality is kept.
        """
        entry = self._validate(step, policy)
        self.history.append(entry)
        kept = entry["quality_kept"]
        for margin in MARGINS:
            if kept:
                break
            kept = self._validate(step, policy.more_cautious(margin))["quality_kept"]
        return entry

    def _validate(self, step: int, policy: DecisionPolicy) -> dict[str, Any]:
        scored = decide_and_score(self.core, policy, self.core.split("validation"))
        difference = scored["quality"] - scored["quality_ref"]
        # Stricter than the verdict on the test split: the best of many candidates has been lucky in part.
        kept = quality_kept(difference, self.core.config.epsilon, ONE_SIDED_99_5)
        entry = {
            "step": step,
            "quality": float(scored["quality"].mean()),
            "quality_ref": float(scored["quality_ref"].mean()),
            "flops_ratio": float(scored["flops_ratio"].mean()),
            "quality_kept": kept,
        }
        # Where no policy keeps the quality, the one that loses least is the best.
        rank = (kept, -entry["flops_ratio"] if kept else float(difference.mean()))
        if self._rank is None or rank > self._rank:
            self._rank, self.best = rank, policy
        return entry


def split_settings(algo: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide ``key=value`` settings into those of the env's config and those of the agent.

    Raises:
        ValueError: If a key is neither.
    """
    env_keys, agent_keys = EnvConfig.model_fields, agent_class(algo).Settings.model_fields
    for key in settings:
        if key not in env_keys and key not in agent_keys:
            raise ValueError(
                f"unknown setting {key!r}. Of the env: {', '.join(env_keys)}. Of {algo}: {', '.join(agent_keys)}."
            )
    env = {key: value for key, value in settings.items() if key in env_keys}
    return env, {key: value for key, value in settings.items() if key not in env_keys}


def train(
    env_id: str,
    algo: str,
    folder: Path,
    *,
    steps: int,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    on_progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train an agent on an env, select its best policy on validation, and evaluate that on the test split.

    Args:
        env_id: A registered id.
        algo: An agent's name.
        folder: The run folder: ``config.json``, TensorBoard events, ``policy.safetensors``, ``policy.json``,
            ``result.json``, ``instances.csv``, ``result.png`` (and ``sb3.zip``) are written to it.
        steps: Decisions to learn from.
        seed: Of the agent and of the env's draws.
        settings: Overrides of the env's config and of the agent's settings, by key.
        on_progress: Called after each rollout with (steps so far, figures to show).

    Returns:
        The result, as in ``result.json``.

    Raises:
        FileExistsError: If the folder holds a finished run.
        ValueError: If a name or setting is unknown.
    """
    if (folder / "result.json").exists():
        raise FileExistsError(f"{folder} holds a finished run; choose another --output")
    env_settings, agent_settings = split_settings(algo, settings or {})
    folder.mkdir(parents=True, exist_ok=True)
    num_envs = agent_class(algo).Settings(**agent_settings).num_envs
    env = gym.make_vec(env_id, num_envs=num_envs, **env_settings).unwrapped
    agent = make_agent(algo, env, seed=seed, **agent_settings)
    env.reset(seed=seed)
    write_json(folder / "config.json", _describe(env, env_id, algo, agent.settings, steps, seed))
    logger = configure(str(folder), ["tensorboard"])
    selection = Selection(env.core)
    interval = max(1, steps // VALIDATIONS)

    def on_rollout(rollout: Rollout) -> None:
        due = len(selection.history) + 1
        if rollout.steps >= due * interval or rollout.steps >= steps:
            entry = selection.consider(rollout.steps, agent.policy())
            for key in ("quality", "flops_ratio"):
                logger.record(f"validation/{key}", entry[key])
        if on_progress is not None:
            shown = {key: float(np.mean(rollout.infos[key])) for key in ("quality", "quality_ref", "flops_ratio")}
            on_progress(rollout.steps, shown)

    agent.learn(steps, logger, on_rollout)
    if selection.best is None:
        selection.consider(0, agent.policy())
    logger.close()
    selection.best.save(folder)
    agent.save_extra(folder)
    return finish(env.core, selection.best, folder, selection.history)


def finish(core: Core, policy: DecisionPolicy, folder: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Evaluate a policy on the test split and write ``result.json``, ``instances.csv`` and ``result.png``."""
    result = evaluate(core, policy, "test", folder / "instances.csv")
    result["time"] = {str(size): time_ratio(core, policy, "test", size) for size in TIMED_BATCH_SIZES}
    result["history"] = history
    result["data"] = {name: core.split(name).counts for name in ("train", "validation", "test")}
    plot_run(result, core.backbone.board.names, folder / "result.png")
    write_json(folder / "result.json", result)
    return result


def load_run(folder: Path) -> tuple[dict[str, Any], Core, DecisionPolicy]:
    """The config, core and policy of a run folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"no config.json in {folder}; expected a folder that 'sd-gym train' wrote")
    description = json.loads(file.read_text(encoding="utf-8"))
    core = shared_core(EnvConfig(**description["env_config"]))
    return description, core, DecisionPolicy.load(folder)


def _describe(env: SwitchableVectorEnv, env_id: str, algo: str, settings: Any, steps: int, seed: int) -> dict[str, Any]:
    return {
        "env": env_id,
        "algo": algo,
        "steps": steps,
        "seed": seed,
        "command": shlex.join(sys.argv),
        "env_config": env.config.model_dump(),
        "agent_settings": settings.model_dump(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }
