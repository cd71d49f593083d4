"""A run: its folder, training with model selection, and its result."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import evaluate, summary, time_ratio
from sd_gym.agents.experiment.export import export
from sd_gym.agents.experiment.logs import log_result, log_validation, open_logger
from sd_gym.agents.experiment.selection import Selection
from sd_gym.agents.learning.agent import INFO_TAGS, Agent, BaseAgent, PrivilegedAgent, Rollout, SplitDecisions
from sd_gym.agents.learning.decisions import PolicyLike, check_fits, observation_batches
from sd_gym.agents.registry import agent_class, is_control, make_agent, make_settings
from sd_gym.agents.report.plots import plot_run
from sd_gym.agents.runs.folder import check_backbone, read_description
from sd_gym.agents.runs.verdict import ONE_SIDED_95
from stable_baselines3.common.logger import Logger

from sd_gym.config import KEYS, EnvConfig, dotted, is_key
from sd_gym.envs.config import TABLE_KEYS, make_config
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import joined
from sd_gym.files import as_json, damaged_checkpoint, read_checkpoint, write_checkpoint, write_json
from sd_gym.folders import MARKER, contents, foreign, locked
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.card import FILE
from sd_gym.registration import registered_ids
from sd_gym.registry import UnknownNameError, naming_imports, unknown
from sd_gym.tasks.data import SPLITS
from sd_gym.tasks.ranking import STATISTICS_SIZE
from sd_gym.tasks.splits import Splits, check_unchanged
from sd_gym.version import __version__

VALIDATIONS = 8  # times that the policy is validated during training
TIMED_BATCH_SIZES = (1, 8, 32)
OnProgress = Callable[[int, dict[str, float]], None]  # called with (steps so far, figures to show)
LIBRARIES = ("gymnasium", "numpy", "sd-gym", "stable-baselines3", "torch", "transformers")


def split_settings(algo: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide ``key=value`` settings into those of the env's config and those of the agent.

    Raises:
        ValueError: If a key is neither.
    """
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
    """Whether a key is one of the env's config that can be set, in any spelling: its id is what it is asked for by."""
    return is_key(key) and key != "id"


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
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train an agent on an env, select its best policy on validation, and evaluate that on the test split.

    Args:
        env_id: A registered id.
        algo: An agent's name.
        folder: The run folder: ``config.json``, TensorBoard events, ``policy.safetensors``, ``policy.json``,
            ``skip_policy.json`` and ``skip_policy.safetensors`` (the policy as an artefact, with ``README.md``),
            ``result.json``, ``instances.csv``, ``result.png`` (and ``sb3.safetensors``) are written to it;
            ``checkpoint.pt`` while it learns.
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
        FileExistsError: If the folder holds a finished run, one that was cut off and shall not be resumed, or anything
            else; ``FolderInUseError`` if another process is writing to it.
        ValueError: If a name or setting is unknown, the data of any split are malformed, or the run to resume is
            another one, on other data, or damaged.
    """
    with locked(folder):
        there = _there(folder, resume)
        with naming_imports(folder):
            agent = _make(env_id, algo, seed, settings or {})
        names = {"env": env_id, "algo": algo, "control": is_control(algo), "steps": steps, "seed": seed}
        names |= {"strictness": strictness, "imports": list(imports)}
        return _train(agent, folder, names, there, on_progress)


def _there(folder: Path, resume: bool) -> dict[str, Any] | None:
    """What ``config.json`` says of the run in the folder that is to be resumed; ``None``: the folder is empty.

    Raises:
        FileExistsError: If the folder holds anything else.
    """
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
    agent: BaseAgent, folder: Path, names: dict[str, Any], there: dict[str, Any] | None, on_progress: OnProgress | None
) -> dict[str, Any]:
    """As ``train``, in a folder that is ours, after what is ``there`` of it."""
    core = agent.env.core
    for split in SPLITS:  # what is wrong with any of them is told before anything is learned
        core.split(split)
    agent.env.reset(seed=names["seed"])
    description = {MARKER: __version__, **names, **circumstances(core.config)}
    description["agent_settings"] = agent.settings.model_dump()
    description["weights"] = core.backbone.weights
    description["data"] = core.data.identity()  # all splits, so that what is wrong with one is told at once
    if there is not None:
        _check_same(folder, there, description, core.data)
    if isinstance(agent, PrivilegedAgent):
        return _train_decider(agent, folder, description, on_progress)
    return _train_agent(agent, folder, description, on_progress)


def _train_decider(
    agent: PrivilegedAgent, folder: Path, description: dict[str, Any], on_progress: OnProgress | None
) -> dict[str, Any]:
    """Have it learn, and evaluate its decisions."""
    write_json(folder / "config.json", description)
    logger = open_logger(folder, description)
    agent.learn(description["steps"], logger, partial(_tell, on_progress))
    decided = agent.decide_split(agent.env.core.split("test"))
    agent.save_extra(folder)
    result = _finished(folder, description, agent.env.core, decided)
    log_result(logger, description["steps"], result)
    logger.close()
    return result


def _train_agent(
    agent: Agent, folder: Path, description: dict[str, Any], on_progress: OnProgress | None
) -> dict[str, Any]:
    """Have it learn, from its checkpoint on if there is one; select its policy, and evaluate that."""
    core, steps, checkpoint = agent.env.core, description["steps"], folder / "checkpoint.pt"
    selection = Selection(core, description["strictness"], agent.searches)
    reached = _load_checkpoint(checkpoint, agent, selection)
    write_json(folder / "config.json", description)
    _score_dense(agent, steps, checkpoint, on_progress)
    logger = open_logger(folder, description, reached)
    following = _Following(agent, selection, logger, checkpoint, steps, on_progress, reached)
    agent.learn(steps, logger, following)
    reached = following.reached or steps  # where nothing is learned there are no rollouts
    policy, last = agent.policy(), None
    if agent.selects:
        last = summary(core, policy, "test")
        policy = selection.select(agent.selectable_policies())
    if not selection.history:
        entry = selection.validate(reached, policy, agent.env.objective)
        log_validation(logger, entry, selection.core.backbone.board.names)
    policy.save(folder)
    agent.save_extra(folder)
    result = _finished(folder, description, core, policy, selection, last)
    log_result(logger, reached, result)
    logger.close()
    checkpoint.unlink(missing_ok=True)
    return result


@dataclass
class _Following:
    """What happens after each rollout: where they are due a validation and a checkpoint, and word of the progress.

    Attributes:
        reached: Decisions made so far; ``None``: none.
    """

    agent: Agent
    selection: Selection
    logger: Logger
    checkpoint: Path
    steps: int
    on_progress: OnProgress | None
    reached: int | None

    def __call__(self, rollout: Rollout) -> None:
        self.reached = rollout.steps
        next_due = (len(self.selection.history) + 1) * max(1, self.steps // VALIDATIONS)
        if self.agent.validates and rollout.steps >= min(next_due, self.steps):
            entry = self.selection.consider(rollout.steps, self.agent.policy(), self.agent.env.objective)
            log_validation(self.logger, entry, self.selection.core.backbone.board.names)
            self._save_checkpoint()
        _tell(self.on_progress, rollout)

    def _save_checkpoint(self) -> None:
        if state := self.agent.state():
            scores = self.agent.env.core.scores()
            write_checkpoint(self.checkpoint, {"agent": state, "history": self.selection.history, "scores": scores})


def _score_dense(agent: Agent, steps: int, checkpoint: Path, on_progress: OnProgress | None) -> None:
    """Score the dense backbone on all that the run will need of it, if it was not; and do not lose that."""
    core = agent.env.core
    core.split("validation").scoring.score_dense()
    train = core.split(agent.env.config.split)
    if agent.validates and steps >= len(train):
        train.scoring.score_dense(lambda: on_progress and on_progress(0, {}))
        if not checkpoint.exists():
            write_checkpoint(checkpoint, {"scores": core.scores()})


def _load_checkpoint(checkpoint: Path, agent: Agent, selection: Selection) -> int | None:
    """Go on from a checkpoint; returns the decisions made before it, ``None`` where there is none.

    Raises:
        ValueError: If it does not fit.
    """
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


def _tell(on_progress: OnProgress | None, rollout: Rollout) -> None:
    if on_progress is not None:
        figures = {key: float(np.mean(values)) for key, values in rollout.infos.items() if key in INFO_TAGS}
        on_progress(rollout.steps, figures)


def reduce(run: str | Path, codebook: int, output: str | Path) -> dict[str, Any]:
    """Have a run's policy decide among few masks, select how boldly, and evaluate that on the test split.

    Inputs then agree more often, and those that agree run faster together: ``sd-gym reduce``.

    Args:
        run: The run.
        codebook: Different decisions at most, of several stages at each; see ``DecisionPolicy.reduced``.
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
        selection = Selection(core, description.get("strictness", ONE_SIDED_95))
        selected = selection.select([_reduced(policy, codebook, core)])
        description["command"] = shlex.join(sys.argv)
        description["agent_settings"] = {**description["agent_settings"], "codebook": codebook}
        write_json(folder / "config.json", description)
        selected.save(folder)
        return _finished(folder, description, core, selected, selection)


def _reduced(policy: DecisionPolicy, codebook: int, core: Core) -> DecisionPolicy:
    """The policy with a codebook for the first training inputs: for what each stage sees behind its own decisions."""
    train = core.split("train")
    parts = observation_batches(core, np.arange(min(len(train), STATISTICS_SIZE)))
    if not core.is_staged:
        return policy.reduced(codebook, core.observe(train, parts[0]))
    seen: list[Observations] = []

    def decide(observations: Observations) -> NDArray:
        seen.append(observations)
        return policy.decide(observations)

    for rows in parts if policy.channels is None else parts[:1]:  # tokens take memory
        core.rollout(train, rows, decide)
    return policy.reduced(codebook, joined(seen), core.steps.components)


def _finished(
    folder: Path,
    description: dict[str, Any],
    core: Core,
    policy: DecisionPolicy | SplitDecisions,
    selection: Selection | None = None,
    last: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the result of a run and, of a policy that was selected, the artefact; return the result."""
    result = measured(core, policy, "test", folder)
    result["last_policy"] = last  # what learning ended with, where another one may have been selected
    result["margin"] = selection.margin if selection else 0.0  # in log-odds, which selection put on what was learned
    result["history"] = selection.history if selection else []
    result["data"] = {name: core.split(name).provenance for name in SPLITS}
    artefact = export(core, policy, selection.operating_points, result, description) if selection else None
    result["artefact"] = None if artefact is None else FILE  # None: what decides does so in its env alone
    if artefact is not None:
        artefact.save_pretrained(folder)
    write_result(result, core, folder)
    return result


def _make(env_id: str, algo: str, seed: int, settings: dict[str, Any]) -> BaseAgent:
    """The agent, untrained, on a vector env of its own."""
    env_settings, agent_settings = split_settings(algo, settings)
    num_envs = make_settings(algo, agent_settings).num_envs
    if ":" in env_id.removeprefix("sd_gym:"):  # Gymnasium would import a module of that name
        raise UnknownNameError(unknown("env", env_id, registered_ids()))
    try:
        env = gym.make_vec(env_id, num_envs=num_envs, **env_settings).unwrapped
    except gym.error.UnregisteredEnv as error:
        raise UnknownNameError(unknown("env", env_id, registered_ids())) from error
    return make_agent(algo, env, seed=seed, **agent_settings)


def measured(core: Core, policy: PolicyLike | SplitDecisions, split: str, folder: Path | None) -> dict[str, Any]:
    """The result on a split, timed if a policy decides; ``instances.csv`` is written to the folder, if there is one."""
    result = evaluate(core, policy, split, table=folder / "instances.csv" if folder else None)
    untimed = isinstance(policy, SplitDecisions) or core.config.table is not None  # a table runs nothing
    sizes = () if untimed else TIMED_BATCH_SIZES
    result["time"] = {str(size): time_ratio(core, policy, split, size) for size in sizes}
    return result


def write_result(result: dict[str, Any], core: Core, folder: Path) -> None:
    """Write ``result.png`` and ``result.json``."""
    plot_run(result, core.backbone.board.names, folder / "result.png")
    write_json(folder / "result.json", result)


def _check_same(folder: Path, there: dict[str, Any], description: dict[str, Any], data: Splits) -> None:
    """Raise ``ValueError`` if the run in the folder, of which ``there`` tells, is not the described one."""
    here = json.loads(as_json(description))
    was, now = _settings(there), _settings(here)
    differ = [key for key in now if key in was and was[key] != now[key]]
    if differ:
        shown = ", ".join(f"its {key} is {was[key]}, now it is {now[key]}" for key in differ)
        raise ValueError(f"{folder} holds another run: {shown}")
    check_unchanged(folder, there["data"], data)


def _settings(description: dict[str, Any]) -> dict[str, Any]:
    """All that says which run it is, by key: env, agent, seed, steps, the env's config and the agent's settings."""
    keys = ("env", "algo", "steps", "seed", "strictness", "weights")
    named = {key: description[key] for key in keys if key in description}
    return {**named, **dotted(description["env_config"]), **description["agent_settings"]}


def load_run(folder: Path) -> tuple[dict[str, Any], Core, DecisionPolicy]:
    """The config, core and policy of a run folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If its network is not registered, its policy is none for this env, or its data have changed.
    """
    description = read_description(folder)
    core = shared_core(run_config(description))
    check_unchanged(folder, description["data"], core.data)
    check_backbone(folder, description["weights"], core.backbone)
    return description, core, check_fits(DecisionPolicy.load(folder), core)


def run_config(description: dict[str, Any], settings: dict[str, Any] | None = None) -> EnvConfig:
    """The env's config of a run, some keys overridden, to evaluate on.

    The run's objective is left out: no reward is given, and a user's own may not be registered here.
    """
    values = {key: value for key, value in dotted(description["env_config"]).items() if key != "reward.objective"}
    if values.get("table") is not None:  # which says the rest
        values = {key: value for key, value in values.items() if key in ("id", "table", *TABLE_KEYS)}
    return make_config({**values, **dotted(settings or {}, description["env"])}, description["env"])


def circumstances(config: EnvConfig) -> dict[str, Any]:
    """What ``config.json`` says of the env, and of how the program was called."""
    return {
        "command": shlex.join(sys.argv),
        "env_config": config.model_dump(),
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }
