"""A run: its folder, training with model selection, and its result."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sd_gym.agents.common.agent import INFO_TAGS, Agent, Rollout
from sd_gym.agents.common.evaluation import Decided, Decides, evaluate, summary, time_ratio
from sd_gym.agents.common.logs import log_result, log_validation, open_logger
from sd_gym.agents.common.plots import plot_run
from sd_gym.agents.common.selection import Selection
from sd_gym.agents.common.verdict import ONE_SIDED_95
from sd_gym.agents.registry import agent_class, make_agent

from sd_gym.envs.config import EnvConfig, make_config
from sd_gym.envs.core import Core, shared_core
from sd_gym.policy import DecisionPolicy, as_json, write_json
from sd_gym.registration import registered_ids
from sd_gym.registry import UnknownNameError, naming_imports, unknown
from sd_gym.tasks.data import SPLITS
from sd_gym.tasks.splits import changed

VALIDATIONS = 8  # times that the policy is validated during training
TIMED_BATCH_SIZES = (1, 8, 32)
LIBRARIES = ("gymnasium", "numpy", "sd-gym", "stable-baselines3", "torch", "transformers")


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
    strictness: float = ONE_SIDED_95,
    resume: bool = False,
    imports: Sequence[str] = (),
    on_progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train an agent on an env, select its best policy on validation, and evaluate that on the test split.

    Args:
        env_id: A registered id.
        algo: An agent's name.
        folder: The run folder: ``config.json``, TensorBoard events, ``policy.safetensors``, ``policy.json``,
            ``result.json``, ``instances.csv``, ``result.png`` (and ``sb3.zip``) are written to it; ``checkpoint.pt``
            while it learns.
        steps: Decisions to learn from.
        seed: Of the agent and of the env's draws.
        settings: Overrides of the env's config and of the agent's settings, by key.
        strictness: Standard errors of luck that validation has to leave room for, for a policy to be selected.
        resume: Whether to go on from the folder's checkpoint, if there is one, as if nothing had happened.
        imports: Modules and files that register what the run needs, as ``--import`` takes them; kept in
            ``config.json``, so that whoever lacks them is told. Import them first.
        on_progress: Called after each rollout with (steps so far, figures to show).

    Returns:
        The result, as in ``result.json``.

    Raises:
        FileExistsError: If the folder holds a finished run, or one that was cut off and shall not be resumed.
        ValueError: If a name or setting is unknown, or the run to resume is another one.
    """
    if (folder / "result.json").exists():
        raise FileExistsError(f"{folder} holds a finished run; choose another --output")
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{folder} holds a run that was cut off; go on with --resume, or choose another --output")
    with naming_imports(folder):
        agent = _make(env_id, algo, seed, settings or {})
    env = agent.env
    env.reset(seed=seed)
    description = {"env": env_id, "algo": algo, "steps": steps, "seed": seed, "imports": list(imports)}
    description |= circumstances(env.config) | {"agent_settings": agent.settings.model_dump()}
    description["data"] = env.core.data.identity()  # all splits, so that what is wrong with one is told at once
    selection = Selection(env.core, strictness)
    reached, scores = None, {}
    if checkpoint.exists():
        _check_same(folder, description)
        saved = torch.load(checkpoint, weights_only=True)  # tensors and plain values only
        agent.load_state(saved["agent"])
        selection.load_state(saved["selection"], agent.policy())
        reached, scores = selection.history[-1]["step"], saved["scores"]
    env.core.load_scores(scores)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", description)
    logger = open_logger(folder, description, reached)
    interval = max(1, steps // VALIDATIONS)

    def on_rollout(rollout: Rollout) -> None:
        nonlocal reached
        reached = rollout.steps
        due = len(selection.history) + 1
        if agent.validates and (rollout.steps >= due * interval or rollout.steps >= steps):
            log_validation(logger, selection.consider(rollout.steps, agent.policy(), env.objective))
            if state := agent.state():
                _save(checkpoint, {"agent": state, "selection": selection.state(), "scores": env.core.scores()})
        if on_progress is not None:
            figures = {key: float(np.mean(values)) for key, values in rollout.infos.items() if key in INFO_TAGS}
            on_progress(rollout.steps, figures)

    agent.learn(steps, logger, on_rollout)
    reached = reached or steps  # where nothing is learned there are no rollouts
    decided = agent.decided(env.core.split("test"))
    policy = last = None
    if decided is None:
        policy = agent.policy()
        if agent.selects:
            last = summary(env.core, policy, "test")
            policy = selection.select(agent.offers())
        if not selection.history:
            log_validation(logger, selection.validate(reached, policy, env.objective))
        policy.save(folder)
    agent.save_extra(folder)
    result = measured(env.core, policy, "test", folder, decided)
    result["last_policy"] = last  # what learning ended with, where another one may have been selected
    result["history"] = selection.history
    result["data"] = {name: env.core.split(name).provenance for name in SPLITS}
    write_result(result, env.core, folder)
    log_result(logger, reached, result)
    logger.close()
    checkpoint.unlink(missing_ok=True)
    return result


def _make(env_id: str, algo: str, seed: int, settings: dict[str, Any]) -> Agent:
    """The agent, untrained, on a vector env of its own."""
    env_settings, agent_settings = split_settings(algo, settings)
    num_envs = agent_class(algo).Settings(**agent_settings).num_envs
    try:
        env = gym.make_vec(env_id, num_envs=num_envs, **env_settings).unwrapped
    except gym.error.UnregisteredEnv as error:
        raise UnknownNameError(unknown("env", env_id, registered_ids())) from error
    return make_agent(algo, env, seed=seed, **agent_settings)


def measured(
    core: Core, policy: Decides | None, split: str, folder: Path | None, decided: Decided | None = None
) -> dict[str, Any]:
    """The result on a split, timed if a policy decides; ``instances.csv`` is written to the folder, if there is one."""
    result = evaluate(core, policy, split, decided=decided, table=folder / "instances.csv" if folder else None)
    sizes = TIMED_BATCH_SIZES if policy is not None else ()
    result["time"] = {str(size): time_ratio(core, policy, split, size) for size in sizes}
    return result


def write_result(result: dict[str, Any], core: Core, folder: Path) -> None:
    """Write ``result.png`` and ``result.json``."""
    plot_run(result, core.backbone.board.names, folder / "result.png")
    write_json(folder / "result.json", result)


def _save(file: Path, value: dict[str, Any]) -> None:
    """The file appears complete or not at all."""
    torch.save(value, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)


def _check_same(folder: Path, description: dict[str, Any]) -> None:
    """Raise ``ValueError`` if the run in the folder is not the described one."""
    there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    here = json.loads(as_json(description))
    differ = differences(flat_settings(there), flat_settings(here))
    if differ:
        shown = ", ".join(f"its {key} is {was}, now it is {now}" for key, (was, now) in differ.items())
        raise ValueError(f"{folder} holds another run: {shown}")
    if words := changed(there.get("data", {}), here["data"]):
        raise ValueError(f"{folder} holds a run on other data: {words}")


def flat_settings(description: dict[str, Any]) -> dict[str, Any]:
    """All that says which run it is, by key: env, agent, seed, steps, the env's config and the agent's settings."""
    named = {key: description.get(key) for key in ("env", "algo", "steps", "seed")}
    return {**named, **description["env_config"], **description["agent_settings"]}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each key whose values differ."""
    return {key: (one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)}


def load_run(folder: Path) -> tuple[dict[str, Any], Core, DecisionPolicy]:
    """The config, core and policy of a run folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If its network is not registered, or its data have changed.
    """
    description = read_description(folder)
    core = shared_core(run_config(description))
    check_data(folder, description, core)
    return description, core, DecisionPolicy.load(folder)


def check_data(folder: Path, description: dict[str, Any], core: Core) -> None:
    """Raise ``ValueError``, naming the splits, if the data are not those of the run (where it says which those are)."""
    if "data" in description and (words := changed(description["data"], core.data.identity())):
        raise ValueError(f"{folder}: {words}. Its results are of the former; train again, or bring the data back")


def read_description(folder: Path) -> dict[str, Any]:
    """A run's ``config.json``.

    Raises:
        FileNotFoundError: If there is none.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"no config.json in {folder}; expected a folder that 'sd-gym train' wrote")
    return json.loads(file.read_text(encoding="utf-8"))


def run_config(description: dict[str, Any], settings: dict[str, Any] | None = None) -> EnvConfig:
    """The env's config of a run, some keys overridden, to evaluate on.

    The run's objective is left out: no reward is given, and a user's own may not be registered here.
    """
    values = {key: value for key, value in description["env_config"].items() if key != "objective"}
    return make_config({**values, **(settings or {})}, description["env"])


def circumstances(config: EnvConfig) -> dict[str, Any]:
    """What ``config.json`` says of the env, and of how the program was called."""
    return {
        "command": shlex.join(sys.argv),
        "env_config": config.model_dump(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }
