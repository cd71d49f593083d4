"""A run: its folder, training with model selection, and its result."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.drawing.run_picture import plot_run
from sd_gym.agents.experiment.evaluation import evaluate, summary, time_ratio
from sd_gym.agents.experiment.export import export
from sd_gym.agents.experiment.selection import Selection
from sd_gym.agents.experiment.tensorboard_logs import log_result, log_validation, open_logger
from sd_gym.agents.learning.agent import INFO_TAGS, Agent, BaseAgent, PrivilegedAgent, Rollout
from sd_gym.agents.learning.decisions import (
    DENSE_MARGIN,
    Dense,
    PolicyLike,
    SplitPolicy,
    Version,
    check_fits,
    evaluator,
    versions,
)
from sd_gym.agents.registry import agent_class, is_control, make_agent, make_settings
from sd_gym.agents.runs.folder import check_backbone, read_description
from sd_gym.agents.runs.guarantee import on_other_rows
from sd_gym.agents.runs.verdict import CONFIDENCE
from sd_gym.agents.serving import run as dials

from sd_gym.config import KEYS, EnvConfig, dotted, is_key
from sd_gym.envs.config import TABLE_KEYS, make_config
from sd_gym.envs.core import BackboneCore
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import joined
from sd_gym.envs.vector import SwitchableVectorEnv
from sd_gym.files import as_json, damaged_checkpoint, read_checkpoint, write_checkpoint, write_json
from sd_gym.folders import MARKER, contents, foreign, locked
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.card import FILE
from sd_gym.registration import SERVING, registered_ids
from sd_gym.registry import UnknownNameError, naming_imports, unknown
from sd_gym.tasks.data import SPLITS
from sd_gym.tasks.ranking import STATISTICS_SIZE
from sd_gym.tasks.splits import check_unchanged
from sd_gym.version import __version__

VALIDATIONS = 8  # during training
TIMED_BATCH_SIZES = (1, 8, 32)
OnProgress = Callable[[int, dict[str, float]], None]  # called with (steps so far, figures to show)
DIFFERENCE = ("quality_difference", "quality_difference_interval")
LIBRARIES = ("gymnasium", "numpy", "sd-gym", "stable-baselines3", "torch", "transformers")


def split_settings(algo: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide settings into those of the env's config and those of the agent; ``ValueError`` if a key is neither."""
    agent_keys = agent_class(algo).Settings.model_fields
    for key in settings:
        if not is_setting(key) and key not in agent_keys:
            known = [key for key in KEYS if is_setting(key)]
            raise ValueError(
                f"unknown setting {key!r}. Of the env: {', '.join(known)}. Of {algo}: {', '.join(agent_keys)}."
            )
    env = {key: value for key, value in settings.items() if is_setting(key)}
    return env, {key: value for key, value in settings.items() if key not in env}


def is_setting(key: str) -> bool:
    """Whether a key of the env's config, in any spelling, can be set; the id cannot."""
    return is_key(key) and key != "id"


def train(
    env_id: str,
    algo: str,
    folder: Path,
    *,
    steps: int,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    confidence: float = CONFIDENCE,
    resume: bool = False,
    imports: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train an agent as ``sd_gym.train`` does, into a run folder; raises ``FolderInUseError`` if another process does.

    The folder gets ``config.json``, TensorBoard events, ``policy.safetensors``, ``policy.json``, ``skip_policy.json``
    and ``skip_policy.safetensors`` (the policy as an artefact, with ``README.md``), ``result.json``,
    ``instances.csv``, ``result.png`` (and ``sb3.safetensors``); ``checkpoint.pt`` while it learns.
    """
    if env_id in SERVING:
        options: dict[str, Any] = {"steps": steps, "seed": seed, "settings": settings, "confidence": confidence}
        return dials.train(env_id, algo, folder, resume=resume, on_progress=on_progress, **options)
    with locked(folder):
        unfinished = _unfinished_run(folder, resume)
        with naming_imports(folder):
            agent = _make(env_id, algo, seed, settings or {})
        names = {"env": env_id, "algo": algo, "control": is_control(algo), "steps": steps, "seed": seed}
        names |= {"confidence": confidence, "imports": list(imports)}
        return _train(agent, folder, names, unfinished, on_progress)


def _unfinished_run(folder: Path, resume: bool) -> dict[str, Any] | None:
    """``config.json`` of the run to resume; ``None``: the folder is empty; raises if it holds anything else."""
    if not contents(folder):
        return None
    try:
        description = read_description(folder)
    except (FileNotFoundError, ValueError) as error:
        raise foreign(folder, "run folder") from error
    if (folder / "result.json").exists():
        raise FileExistsError(f"{folder} holds a finished run; choose another --output")
    if not resume:
        raise FileExistsError(f"{folder} holds a run that was cut off; go on with --resume, or choose another --output")
    return description


def _train(
    agent: BaseAgent,
    folder: Path,
    names: dict[str, Any],
    unfinished: dict[str, Any] | None,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    core = agent.env.core
    for split in SPLITS:  # errors in any split are raised before anything is learned
        core.split(split)
    agent.env.reset(seed=names["seed"])
    description = {MARKER: __version__, **names, **run_metadata(core.config)}
    description["agent_settings"] = agent.settings.model_dump()
    description["weights"] = core.backbone.weights
    description["data"] = core.data.identity()
    if unfinished is not None:
        check_same_run(folder, _identity(unfinished), _identity(json.loads(as_json(description))))
        check_unchanged(folder, unfinished["data"], core.data)
    if isinstance(agent, PrivilegedAgent):
        return _train_privileged(agent, folder, description, on_progress)
    assert isinstance(agent, Agent)  # the only other kind
    return _train_agent(agent, folder, description, on_progress)


def _train_privileged(
    agent: PrivilegedAgent, folder: Path, description: dict[str, Any], on_progress: OnProgress | None
) -> dict[str, Any]:
    """Learn, select an operating point, and evaluate its decisions."""
    core, selection = agent.env.core, None
    if agent.selects:
        selection = Selection(core, description["confidence"])
    write_json(folder / "config.json", description)
    logger = open_logger(folder, description)
    agent.learn(description["steps"], logger, partial(_show_progress, on_progress))
    points = agent.operating_points()
    chosen, last = points[0] if points else None, None
    if selection is not None:
        chosen = selection.select(points)
        last = summary(core, (selection.as_searched() or Version(Dense(core))).policy, "test")
    agent.save_extra(folder)
    policy = Dense(core) if chosen is None else chosen.policy
    result = _finish(folder, description, core, policy, selection, last)
    log_result(logger, description["steps"], result)
    logger.close()
    return result


def _train_agent(
    agent: Agent, folder: Path, description: dict[str, Any], on_progress: OnProgress | None
) -> dict[str, Any]:
    """Learn, from the checkpoint on if there is one; select an operating point, and evaluate that."""
    core, steps, checkpoint = agent.env.core, description["steps"], folder / "checkpoint.pt"
    selection = Selection(core, description["confidence"])
    reached = _load_checkpoint(checkpoint, agent, selection)
    write_json(folder / "config.json", description)
    _score_dense(agent, steps, checkpoint, on_progress)
    logger = open_logger(folder, description, reached)
    switches = core.backbone.board.names

    def after_rollout(rollout: Rollout) -> None:
        """A validation and a checkpoint where they are due, and progress."""
        nonlocal reached
        reached = rollout.steps
        next_due = (len(selection.history) + 1) * max(1, steps // VALIDATIONS)
        if agent.validates and rollout.steps >= min(next_due, steps):
            entry = selection.consider(rollout.steps, agent.policy(), agent.env.objective)
            log_validation(logger, entry, switches)
            if state := agent.state():
                saved = {"agent": state, "history": selection.history, "scores": core.scores()}
                write_checkpoint(checkpoint, saved)
        _show_progress(on_progress, rollout)

    agent.learn(steps, logger, after_rollout)
    reached = reached or steps  # where nothing is learned there are no rollouts
    policy, last = agent.policy(), None
    if agent.selects:
        last, policy = _selected(agent, selection)
    if not selection.history:
        log_validation(logger, selection.validate(reached, policy, agent.env.objective), switches)
    policy.save(folder)
    agent.save_extra(folder)
    selected = selection if agent.selects else None
    result = _finish(folder, description, core, policy, selected, last, selection.history)
    log_result(logger, reached, result)
    logger.close()
    checkpoint.unlink(missing_ok=True)
    return result


def _selected(agent: Agent, selection: Selection) -> tuple[dict[str, Any], DecisionPolicy]:
    """The results of the policy as learned, and the policy as selected."""
    learned = agent.policy()
    chosen = selection.select(agent.operating_points())
    dense = (selection.origin or learned).with_margin(DENSE_MARGIN)
    if agent.searches:
        learned = (selection.as_searched() or Version(dense)).policy
    policy = dense if chosen is None else chosen.policy
    assert isinstance(policy, DecisionPolicy)  # as every operating point of an agent that has a policy
    return summary(agent.env.core, learned, "test"), policy


def _score_dense(agent: Agent, steps: int, checkpoint: Path, on_progress: OnProgress | None) -> None:
    """Score the dense backbone on all rows that the run needs, and keep the scores in the checkpoint."""
    core = agent.env.core
    core.split("validation").scoring.score_dense()
    train = core.split(agent.env.config.split)
    if agent.validates and steps >= len(train):
        train.scoring.score_dense(lambda: on_progress and on_progress(0, {}))
        if not checkpoint.exists():
            write_checkpoint(checkpoint, {"scores": core.scores()})


def _load_checkpoint(checkpoint: Path, agent: Agent, selection: Selection) -> int | None:
    """Go on from a checkpoint, if there is one; returns the decisions made before it. Raises if it does not fit."""
    reached, scores = None, {}
    if checkpoint.exists():
        saved = read_checkpoint(checkpoint)
        try:
            scores = saved.get("scores", {})
            if "agent" in saved:
                agent.load_state(saved["agent"])
                selection.history = saved["history"]
                reached = selection.history[-1]["step"]
        except Exception as error:  # whatever does not fit
            raise ValueError(damaged_checkpoint(checkpoint, error)) from error
    agent.env.core.load_scores(scores)
    return reached


def _show_progress(on_progress: OnProgress | None, rollout: Rollout) -> None:
    if on_progress is not None:
        figures = {key: float(np.mean(values)) for key, values in rollout.infos.items() if key in INFO_TAGS}
        on_progress(rollout.steps, figures)


def reduce(run: str | Path, codebook: int, output: str | Path) -> dict[str, Any]:
    """Make a run's policy decide among few masks, select its operating point, and evaluate that: ``sd-gym reduce``.

    Inputs then agree more often, and those that agree run faster together.

    Args:
        run: The run.
        codebook: The most different decisions, at each stage; see ``DecisionPolicy.reduced``.
        output: A run folder, written as by ``train``; ``agent_settings`` in its ``config.json`` have ``codebook``.

    Returns:
        The result, as in ``result.json``.

    Raises:
        FileNotFoundError: If there is no such run.
        FileExistsError: If the output holds anything.
        ValueError: If the codebook is empty, the run's policy decides at random, or its data have changed.
    """
    folder = Path(output)
    with locked(folder):
        if contents(folder):
            raise FileExistsError(f"{folder} is not empty; choose another --output")
        description, core, policy = load_run(Path(run))
        if policy.noise != "none":
            raise ValueError(f"{run}: its policy decides at random; expected one that has learned")
        selection = Selection(core, description.get("confidence", CONFIDENCE))
        reduced = _reduced(policy, codebook, core)
        selection.select(versions(core, reduced))
        selected = reduced.with_margin(selection.margin)
        description["command"] = shlex.join(sys.argv)
        description["agent_settings"] = {**description["agent_settings"], "codebook": codebook}
        write_json(folder / "config.json", description)
        selected.save(folder)
        return _finish(folder, description, core, selected, selection)


def _reduced(policy: DecisionPolicy, codebook: int, core: Core) -> DecisionPolicy:
    """The policy with a codebook for the first training inputs: at each stage, after its own earlier decisions."""
    train = core.split("train")
    batches = evaluator(core).batches(np.arange(min(len(train), STATISTICS_SIZE)))
    observed: list[Observations] = []

    def decide(observations: Observations) -> NDArray:
        observed.append(observations)
        return policy.decide(observations)

    for rows in batches if policy.channels is None else batches[:1]:  # tokens take memory
        core.rollout(train, rows, decide)
    return policy.reduced(codebook, joined(observed), core.steps.components)


def _finish(
    folder: Path,
    description: dict[str, Any],
    core: Core,
    policy: PolicyLike | SplitPolicy,
    selection: Selection | None = None,
    last: dict[str, Any] | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write the result of a run and, of a policy that can leave its env, the artefact; return the result."""
    result = measure(core, policy, "test", folder)
    result["history"] = list(history)
    result |= selected_result(selection, last, result)
    result["data"] = {name: core.split(name).provenance for name in SPLITS}
    artefact = None  # a policy may be unable to leave its env
    if isinstance(policy, DecisionPolicy):
        points = [] if selection is None else selection.operating_points()
        artefact = export(core, policy, points, result, description)
    if artefact is not None:
        artefact.save_pretrained(folder)
    result["artefact"] = None if artefact is None else FILE
    write_result(result, core, folder)
    return result


def selected_result(selection: Selection | None, last: dict[str, Any] | None, result: dict[str, Any]) -> dict[str, Any]:
    """What a result says of the selection: the tests, the guarantee in words, and the policy as learned."""
    if selection is None:
        return {"last_policy": last, "margin": 0.0, "selection": None, "guarantee": None}
    tested = on_other_rows(*(result[key] for key in ("instances", "split", *DIFFERENCE)))
    return {
        "last_policy": last,  # at the end of learning, before selection
        "margin": selection.margin,  # in log-odds, added by selection
        "selection": selection.report(),
        "guarantee": selection.guarantee if selection.selected is None else f"{selection.guarantee}; {tested}",
    }


def _make(env_id: str, algo: str, seed: int, settings: dict[str, Any]) -> BaseAgent:
    """The agent, untrained, on a vector env of its own."""
    env_settings, agent_settings = split_settings(algo, settings)
    num_envs = make_settings(algo, agent_settings).num_envs
    try:
        if ":" in env_id.removeprefix("sd_gym:"):  # Gymnasium would import a module of that name
            raise gym.error.UnregisteredEnv(env_id)
        env = gym.make_vec(env_id, num_envs=num_envs, **env_settings).unwrapped
    except gym.error.UnregisteredEnv as error:
        raise UnknownNameError(unknown("env", env_id, registered_ids())) from error
    assert isinstance(env, SwitchableVectorEnv)  # as every registered id has it
    return make_agent(algo, env, seed=seed, **agent_settings)


def measure(core: Core, policy: PolicyLike | SplitPolicy, split: str, folder: Path | None) -> dict[str, Any]:
    """The result on a split, timed if a policy decides; ``instances.csv`` is written to the folder, if there is one."""
    table = folder / "instances.csv" if folder else None
    if isinstance(policy, SplitPolicy):
        decided = policy.decide_split(core.split(split), np.arange(len(core.split(split))))
        return evaluate(core, decided, split, table=table) | {"time": {}}
    result = evaluate(core, policy, split, table=table)
    result["time"] = {}
    if isinstance(core, BackboneCore):  # a table runs nothing
        result["time"] = {str(size): time_ratio(core, policy, split, size) for size in TIMED_BATCH_SIZES}
    return result


def write_result(result: dict[str, Any], core: Core, folder: Path) -> None:
    """Write ``result.png`` and ``result.json``."""
    plot_run(result, core.backbone.board.names, folder / "result.png")
    write_json(folder / "result.json", result)


def check_same_run(folder: Path, was: dict[str, Any], now: dict[str, Any], hint: str = "") -> None:
    """Raise ``ValueError`` if the run in a folder is another one, by the keys that both descriptions have."""
    if differ := [key for key in now if key in was and was[key] != now[key]]:
        shown = ", ".join(f"its {key} is {was[key]}, now it is {now[key]}" for key in differ)
        raise ValueError(f"{folder} holds another run: {shown}{hint}")


def _identity(description: dict[str, Any]) -> dict[str, Any]:
    """Which run it is, by key: env, agent, seed, steps, the env's config and the agent's settings."""
    keys = ("env", "algo", "steps", "seed", "confidence", "weights")
    named = {key: description[key] for key in keys if key in description}
    return {**named, **dotted(description["env_config"]), **description["agent_settings"]}


def load_run(folder: Path) -> tuple[dict[str, Any], Core, DecisionPolicy]:
    """The config, core and policy of a run folder; raises ``FileNotFoundError`` if it holds no run.

    ``ValueError`` if its network is not registered, its policy does not fit the env, or its data have changed.
    """
    description = read_description(folder)
    core = core_of_run(folder, description)
    return description, core, check_fits(DecisionPolicy.load(folder), core)


def core_of_run(folder: Path, description: dict[str, Any]) -> Core:
    """The core of a run; raises ``ValueError`` if its data or its backbone have changed."""
    core = shared_core(run_config(description))
    check_unchanged(folder, description["data"], core.data)
    check_backbone(folder, description["weights"], core.backbone)
    return core


def run_config(description: dict[str, Any], settings: dict[str, Any] | None = None) -> EnvConfig:
    """The env's config of a run, some keys overridden, to evaluate on.

    The run's objective may be a user's own that is not registered here: then no reward can be given.
    """
    values = dotted(description["env_config"])
    if values.get("table") is not None:  # the rest is in the table
        values = {key: value for key, value in values.items() if key in ("id", "table", *TABLE_KEYS)}
    given, objective = dotted(settings or {}, description["env"]), values.pop("reward.objective", None)
    config = make_config({**values, **given}, description["env"])
    if objective is None or "reward.objective" in given:
        return config
    return config.model_copy(update={"reward": config.reward.model_copy(update={"objective": objective})})


def run_metadata(config: EnvConfig) -> dict[str, Any]:
    """What ``config.json`` records of the env, the command and the libraries."""
    return {
        "command": shlex.join(sys.argv),
        "env_config": config.model_dump(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }
