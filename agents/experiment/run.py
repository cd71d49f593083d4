"""Training of a run: its folder, model selection, and its result."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from sd_gym.agents.drawing.run_picture import plot_run
from sd_gym.agents.experiment.evaluation import evaluate, summary
from sd_gym.agents.experiment.export import export, run_card
from sd_gym.agents.experiment.selection import Selection
from sd_gym.agents.experiment.tensorboard_logs import log_result, log_validation, open_logger
from sd_gym.agents.experiment.timing import time_ratio
from sd_gym.agents.learning.agent import Agent, BaseAgent, Rollout
from sd_gym.agents.learning.decisions import DENSE_MARGIN, Dense, PolicyLike, SplitPolicy, Version
from sd_gym.agents.registry import agent_class, is_control, make_agent, make_settings
from sd_gym.agents.runs.folder import origins, read_description, run_description
from sd_gym.agents.runs.guarantee import measured_loss
from sd_gym.agents.runs.lineage import check_starts
from sd_gym.agents.runs.verdict import CONFIDENCE
from sd_gym.agents.serving import run as dials
from sd_gym.agents.serving.learn import OnProgress

from sd_gym.config import KEYS, SPLITS, dotted, is_key
from sd_gym.envs.core import BackboneCore
from sd_gym.envs.protocols import SCORES, Core
from sd_gym.envs.vector import SwitchableVectorEnv
from sd_gym.errors import short
from sd_gym.files import as_json, damaged_checkpoint, read_checkpoint, write_checkpoint, write_json
from sd_gym.folders import contents, locked, other_content_error
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.card import FILE
from sd_gym.registration import SERVING, all_ids, plain_id
from sd_gym.registry import UnknownNameError, naming_imports, nearest, unknown
from sd_gym.tasks.splits import check_unchanged

VALIDATIONS = 8  # during training
MOST = 2**32 - 1  # largest seed of all libraries
TIMED_BATCH_SIZES = {"1": 1, "8": 8, "32": 32, "in bulk": None}


def split_settings(algo: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide settings into those of the env's config and those of the agent; ``ValueError`` if a key is neither."""
    agent_keys = agent_class(algo).Settings.model_fields
    env = {key: value for key, value in settings.items() if is_setting(key)}
    agent = {key: value for key, value in settings.items() if key not in env}
    if unknown_key := next((key for key in agent if key not in agent_keys), None):
        known = ", ".join(filter(is_setting, KEYS))
        hint = nearest(unknown_key, [*filter(is_setting, KEYS), *agent_keys])
        raise ValueError(
            f"unknown setting {unknown_key!r}{hint} The env has {known}; {algo} has {', '.join(agent_keys)}."
        )
    return env, agent


def is_setting(key: str) -> bool:
    """Whether a key, in any spelling, is one of the env's config that can be set; the id cannot."""
    return is_key(key) and key != "id"


def train(
    env_id: str,
    algo: str = "ppo",
    output: str | Path | None = None,
    *,
    steps: int = 50_000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resume: bool = False,
    imports: Sequence[str] = (),
    on_progress: OnProgress = lambda steps, figures: None,
    **settings: Any,
) -> dict[str, Any]:
    """Train an agent, select its best policy on validation, and evaluate that on the test split: ``sd-gym train``.

    The folder gets ``config.json``, TensorBoard events, ``policy.safetensors``, ``policy.json``, ``skip_policy.json``
    and ``skip_policy.safetensors`` (the policy as an artefact, with ``README.md``), ``result.json``,
    ``instances.csv``, ``result.png`` (and ``sb3.safetensors``); ``checkpoint.pt`` while it learns.

    Args:
        env_id: A registered id.
        algo: An agent's name.
        output: Run folder; ``None``: ``default_folder``.
        steps: Decisions to learn from.
        seed: Seed of the agent and of the drawn instances.
        confidence: One-sided confidence of the guarantee that the selected policy loses less than ``epsilon``.
        resume: Whether to continue an interrupted run.
        imports: Modules and files that register what the run needs; errors name them if they are missing later.
        on_progress: Called after each rollout with (steps so far, figures to show).
        settings: Keys of the env's config and settings of the agent.

    Returns:
        The result, as in the folder's ``result.json``: ``quality``, ``quality_ref`` (dense), ``flops_ratio``,
        ``flops_ratio_with_policy``, the verdict ``quality_kept`` at ``epsilon``, ``quality_difference_interval``,
        ``by_difficulty``, ``time`` by batch size, and more. ``guarantee`` is the selection in words, and
        ``last_policy`` has the results of the policy as learned.

    Raises:
        FileExistsError: If the folder holds a finished run, an interrupted one without ``resume``, or anything else;
            ``FolderInUseError`` if another process uses it.
        ValueError: If a name or setting is unknown, ``steps`` is below 1, ``seed`` is negative or above 2^32 - 1, the
            data of a split are malformed, the run to start from learned on validation or test rows, or the run to
            resume is another one, on other data, or damaged.
    """
    steps, seed = whole_number("steps", steps, 1), whole_number("seed", seed, 0)
    env_id = plain_id(env_id)
    folder = default_folder(env_id, algo, seed) if output is None else Path(output)
    with locked(folder):
        unfinished = unfinished_run(folder, resume)
        if env_id in SERVING:
            described = dials.describe(env_id, algo, steps, seed, settings, confidence)
            if unfinished is not None:
                check_same_run(folder, unfinished, described)
            return dials.train(described, folder, settings, on_progress)
        with naming_imports(folder):
            agent = _make_agent(env_id, algo, seed, settings)
        names = {"env": env_id, "algo": algo, "control": is_control(algo), "steps": steps, "seed": seed}
        names |= {"confidence": confidence, "imports": list(imports)}
        return _train(agent, folder, names, unfinished, on_progress)


def whole_number(name: str, value: Any, least: int) -> int:
    """An argument as an integer, which NumPy's are, too; ``ValueError`` if it is none, or out of range."""
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or not least <= value <= MOST:
        raise ValueError(f"{name}: expected a whole number from {least} to {MOST:,}, got {short(value)}")
    return int(value)


def default_folder(env_id: str, algo: str, seed: int) -> Path:
    """``runs/TASK-ALGO-SEED``, such as ``runs/Classification-Mini-ppo-0``."""
    name = env_id.removeprefix("SD/").removesuffix("-v0").replace("/", "-")
    return Path("runs") / f"{name}-{algo}-{seed}"


def unfinished_run(folder: Path, resume: bool) -> dict[str, Any] | None:
    """``config.json`` of the run to resume, ``None`` for an empty folder; raises if it holds anything else."""
    if not contents(folder):
        return None
    try:
        description = read_description(folder)
    except (FileNotFoundError, ValueError) as error:
        raise other_content_error(folder, "run folder") from error
    if (folder / "result.json").exists():
        raise FileExistsError(f"{folder} holds a finished run; choose another --output")
    if not resume:
        raise FileExistsError(f"{folder} holds an interrupted run; continue with --resume, or choose another --output")
    return description


def _train(
    agent: BaseAgent, folder: Path, names: dict[str, Any], unfinished: dict[str, Any] | None, on_progress: OnProgress
) -> dict[str, Any]:
    core = agent.env.core
    for split in SPLITS:  # so errors in a split are raised before learning
        core.split(split)
    agent.env.reset(seed=names["seed"])
    description = _described(agent, names)
    if unfinished is not None:
        check_same_run(folder, unfinished, description)
        check_unchanged(folder, unfinished["data"], core.data)
    learner = agent if isinstance(agent, Agent) else None
    steps = names["steps"]
    checkpoint = folder / "checkpoint.pt"
    selection = Selection(core, names["confidence"])
    reached = None if learner is None else _load_checkpoint(checkpoint, learner, selection)
    write_json(folder / "config.json", description)
    if learner is not None:
        _score_dense(learner, steps, checkpoint, on_progress)
    logger = open_logger(folder, description, reached)

    def after_rollout(rollout: Rollout) -> None:
        """Validate and write a checkpoint if they are due, and show the progress."""
        nonlocal reached
        reached = rollout.steps
        due = rollout.steps * VALIDATIONS >= (len(selection.history) + 1) * steps
        if learner is not None and learner.validates and due:
            selection.history.append(selection.validate(rollout.steps, learner.policy(), agent.env.objective))
            log_validation(logger, selection.history[-1])
            if state := learner.state():
                saved = {"agent": state, "history": selection.history, "scores": core.scores()}
                write_checkpoint(checkpoint, saved)
        figures = {key: float(np.mean(values)) for key, values in rollout.infos.items() if key in SCORES}
        on_progress(rollout.steps, figures)

    agent.learn(steps, logger, after_rollout)
    reached = reached or steps  # an agent that learns nothing has no rollouts
    policy, last = _selected(agent, selection)
    if learner is not None and isinstance(policy, DecisionPolicy):
        if not selection.history:
            log_validation(logger, selection.validate(reached, policy, agent.env.objective))
        policy.save(folder)
    agent.save_extra(folder)

    def log(result: dict[str, Any]) -> None:
        log_result(logger, reached or steps, result, core.backbone.board.names)
        logger.close()

    result = finish(folder, description, policy, selection, last, log)
    checkpoint.unlink(missing_ok=True)
    return result


def _described(agent: BaseAgent, names: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a run; raises ``ValueError`` if the run to start from or the objective cannot be used."""
    core, settings = agent.env.core, agent.settings.model_dump()
    description = run_description(names, core.config, core.backbone, core.data) | {"agent_settings": settings}
    description["origins"], description["origin_seeds"] = origins(settings)
    check_starts(settings, core.data)
    _check_objective(description["env_config"]["reward"]["objective"])
    return description


def _check_objective(name: str) -> None:
    """Raise ``ValueError`` for a function that its name does not tell from others: a run keeps the name alone."""
    if "<" in name:
        raise ValueError(
            f"the objective {name} has no name of its own, by which runs are told apart; register it "
            "(sd_gym.register_objective) and pass its name"
        )


def _selected(agent: BaseAgent, selection: Selection) -> tuple[PolicyLike | SplitPolicy, dict[str, Any] | None]:
    """The policy to evaluate and, if it was selected, the results of the policy as learned."""
    core = agent.env.core
    dense: PolicyLike | SplitPolicy = Dense(core)
    learned = agent.policy() if isinstance(agent, Agent) else dense
    if not agent.selects:
        return (learned if isinstance(agent, Agent) else agent.operating_points()[0].policy), None
    chosen = selection.select(agent.operating_points())
    if isinstance(learned, DecisionPolicy):
        dense = (selection.origin or learned).with_margin(DENSE_MARGIN)
    if agent.searches:
        learned = (selection.as_searched() or Version(dense)).policy
    return (chosen or Version(dense)).policy, summary(core, learned, "test")


def _score_dense(agent: Agent, steps: int, checkpoint: Path, on_progress: OnProgress) -> None:
    """Score the dense backbone on all rows that the run needs, and keep the scores in the checkpoint."""
    core = agent.env.core
    core.split("validation").scoring.score_dense()
    train = core.split(agent.env.config.split)
    if agent.validates and steps >= len(train):
        train.scoring.score_dense(lambda: on_progress(0, {}))
        if not checkpoint.exists():
            write_checkpoint(checkpoint, {"scores": core.scores()})


def _load_checkpoint(checkpoint: Path, agent: Agent, selection: Selection) -> int | None:
    """Continue from a checkpoint, if there is one; returns the decisions made before it. Raises if it does not fit."""
    if not checkpoint.exists():
        agent.env.core.load_scores({})
        return None
    saved = read_checkpoint(checkpoint)
    try:
        agent.env.core.load_scores(saved["scores"])
        if "agent" not in saved:
            return None
        agent.load_state(saved["agent"])
        selection.history = saved["history"]
        return selection.history[-1]["step"]
    except Exception as error:
        raise ValueError(damaged_checkpoint(checkpoint, error)) from error


def finish(
    folder: Path,
    description: dict[str, Any],
    policy: PolicyLike | SplitPolicy,
    selection: Selection,
    last: dict[str, Any] | None = None,
    log: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Write the result of a run and, if the policy can decide without its env, the artefact; return the result.

    It is logged before it is written, since a run with a result is finished.
    """
    core = selection.core
    result = measure(selection, policy, "test", SPLITS, folder, last)
    result["artefact"] = None
    points, card = selection.operating_points(), run_card(result, description)
    if isinstance(policy, DecisionPolicy) and (artefact := export(core, policy, points, card)):
        artefact.save_pretrained(folder)
        result["artefact"] = FILE
    log(result)
    write_result(result, core, folder)
    return result


def _make_agent(env_id: str, algo: str, seed: int, settings: dict[str, Any]) -> BaseAgent:
    env_settings, agent_settings = split_settings(algo, settings)
    num_envs = make_settings(algo, agent_settings).num_envs
    try:
        if ":" in env_id:  # Gymnasium would import a module of that name
            raise gym.error.UnregisteredEnv(env_id)
        env = gym.make_vec(env_id, num_envs=num_envs, **env_settings).unwrapped
    except gym.error.UnregisteredEnv as error:
        raise UnknownNameError(unknown("env", env_id, all_ids())) from error
    assert isinstance(env, SwitchableVectorEnv)  # all registered ids make one
    if env.config.split != "train":
        raise ValueError(f"agents learn on the training split; leave out split={env.config.split}")
    return make_agent(algo, env, seed=seed, **agent_settings)


def measure(
    selection: Selection,
    policy: PolicyLike | SplitPolicy,
    split: str,
    splits: Sequence[str],
    folder: Path | None,
    last: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of a policy on a split, with times if a backbone runs, and the provenance of ``splits``.

    ``selection`` may have selected the policy; ``last`` are the results of the policy as learned. ``instances.csv`` is
    written if there is a folder.
    """
    core = selection.core
    result = evaluate(core, policy, split, table=folder and folder / "instances.csv")
    if result["quality_ref"] <= result["epsilon"]:
        warnings.warn(
            f"dense quality is {result['quality_ref']:.1%}, no more than epsilon, so nothing can be lost, whatever is "
            "skipped; choose another quality=, a smaller epsilon= (0.01 is one point), or a backbone that has learned "
            "the task",
            stacklevel=2,
        )
    result |= {"time": {}, "history": selection.history, "last_policy": last, **selection.report()}
    if isinstance(core, BackboneCore) and not isinstance(policy, SplitPolicy):
        result["time"] = {name: time_ratio(core, policy, split, size) for name, size in TIMED_BATCH_SIZES.items()}
    if selection.selected is not None:
        result["guarantee"] += f"; {measured_loss(result)}"
    return result | {"data": {name: core.split(name).provenance for name in splits}}


def write_result(result: dict[str, Any], core: Core, folder: Path) -> None:
    """Write ``result.png`` and ``result.json``."""
    plot_run(result, core.backbone.board.names, folder / "result.png")
    write_json(folder / "result.json", result)


def check_same_run(folder: Path, present: dict[str, Any], described: dict[str, Any]) -> None:
    """Raise ``ValueError`` if a folder holds another run, that is, if a key of both descriptions differs."""
    was, now = _identity(present), _identity(json.loads(as_json(described)))
    if differ := [key for key in now if key in was and was[key] != now[key]]:
        shown = ", ".join(f"its {key} is {was[key]}, now it is {now[key]}" for key in differ)
        raise ValueError(f"{folder} holds another run; choose another --output: {shown}")


def _identity(description: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run, by key: env, agent, seed, steps, the env's config and the agent's settings."""
    keys = ("env", "algo", "steps", "seed", "confidence", "weights")
    named = {key: description[key] for key in keys if key in description}
    env = description["env_config"]
    return {**named, **(env if description["env"] in SERVING else dotted(env)), **description["agent_settings"]}
