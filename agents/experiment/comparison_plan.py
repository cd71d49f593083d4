"""The runs of a comparison: their settings, their folders, and whether they are finished."""

import json
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from sd_gym.agents.baselines.static import StaticAgent
from sd_gym.agents.experiment.run import OnProgress, check_same_run, is_setting, split_settings, train
from sd_gym.agents.imitation.agent import ImitationAgent
from sd_gym.agents.registry import agent_class, agent_names, is_control, make_settings
from sd_gym.agents.runs.folder import BLIND, STARTS, check_backbone, origins, read_description
from sd_gym.agents.runs.verdict import CONFIDENCE
from sd_gym.agents.serving import run as dials

from sd_gym.envs.config import load_config, parse_yaml
from sd_gym.envs.serving.config import serving_config
from sd_gym.envs.shared import shared_core
from sd_gym.registration import SERVING, config_of, plain_id
from sd_gym.tasks.splits import check_unchanged

CONTROLS = ("hull", "early-exit", "random", "hash", "dense")  # of every comparison, with a blind agent
FROM_INFIX = "-from-"


@dataclass(frozen=True)
class PlannedRun:
    """A run to be trained, with settings of the env and the agent.

    If ``start`` or ``path`` is the folder of another planned run, that run is trained first.
    """

    env: str
    algo: str
    folder: Path
    steps: int
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    confidence: float = CONFIDENCE

    @property
    def needs(self) -> list[Path]:
        """Folders of the runs that it starts from."""
        return [Path(self.settings[key]) for key in STARTS if self.settings.get(key) is not None]

    def command(self, imports: Sequence[str] = ()) -> str:
        """The command that trains this run alone."""
        parts = ["sd-gym", "train", self.env, "--algo", self.algo, "--output", str(self.folder), "--resume"]
        parts += ["--steps", str(self.steps), "--seed", str(self.seed)]
        for key, value in self.settings.items():
            parts += ["--set", f"{key}={_as_yaml(value)}"]
        parts += [] if self.confidence == CONFIDENCE else ["--confidence", str(self.confidence)]
        return shlex.join([*parts, *(part for name in imports for part in ("--import", name))])

    def train(self, imports: Sequence[str], on_progress: OnProgress) -> None:
        """Train the run, or resume it. Raises: see ``run.train``."""
        options: dict[str, Any] = {"imports": imports, "on_progress": on_progress, **self.settings}
        names: dict[str, Any] = {"steps": self.steps, "seed": self.seed, "confidence": self.confidence}
        train(self.env, self.algo, self.folder, resume=True, **names, **options)

    def is_finished(self) -> bool:
        """Whether the folder holds this run, finished; ``ValueError`` if it holds another one, or on other data."""
        if not (self.folder / "result.json").exists():
            return False
        was = read_description(self.folder)
        if self.env in SERVING:
            values = self.steps, self.seed, self.settings, self.confidence
            check_same_run(self.folder, was, dials.describe(self.env, self.algo, *values))
            return True
        of_env, of_agent = split_settings(self.algo, self.settings)
        config = load_config(config_of(self.env), of_env)
        now = {key: getattr(self, key) for key in ("env", "algo", "steps", "seed", "confidence")}
        now["env_config"] = config.model_dump()
        now["env_config"]["backbone"].pop("device")
        now["agent_settings"] = make_settings(self.algo, of_agent).model_dump()
        _name_starts(was, now)
        check_same_run(self.folder, was, now)
        core = shared_core(config.model_copy(update={"backbone": config.backbone.model_copy(update={"device": "cpu"})}))
        check_unchanged(self.folder, was["data"], core.data)
        check_backbone(self.folder, was["weights"], core.backbone)
        return True


def _name_starts(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Replace the folders of the runs that a run starts from, which may have moved, by what these runs are.

    If a folder is gone, its name is all that is known.
    """
    before, present = was["agent_settings"], now["agent_settings"]
    found, seeds = origins(present)
    for key in STARTS:
        if present.get(key) is None or before.get(key) is None:
            continue
        if key in was.get("origins", {}) and Path(present[key], "config.json").is_file():
            before[key] = f"{was['origins'][key]}, {was['origin_seeds'][key]}"
            present[key] = f"{found[key]}, {seeds[key]}"
        else:
            before[key], present[key] = Path(before[key]).name, Path(present[key]).name


def _as_yaml(value: Any) -> str:
    """A setting as text for ``--set``; a word is quoted only if YAML would read it as something else."""
    if not isinstance(value, str | Path):
        return json.dumps(value)
    word = str(value)
    with suppress(ValueError):
        if parse_yaml(word, "") == word:
            return word
    return yaml.safe_dump(word, default_style='"', width=math.inf, allow_unicode=True).rstrip("\n")


def plan_comparison(
    envs: Sequence[str],
    algos: Sequence[str],
    *,
    controls: bool = True,
    seeds: int = 10,
    steps: int = 50_000,
    output: Path = Path("runs/compare"),
    settings: dict[str, Any] | None = None,
    confidence: float = CONFIDENCE,
) -> list[PlannedRun]:
    """The runs of a comparison in the order of training: each agent and control on each env, with the same seeds.

    See ``sd_gym.train_all`` for the arguments. An agent without random draws (``Agent.draws``) is trained once. Raises
    ``ValueError`` if a name or a setting is unknown, or an agent cannot start from another.
    """
    envs = [*map(plain_id, envs)]
    settings = settings or {}
    names = {}
    shared: dict[str, Any] = {"steps": steps, "settings": settings, "confidence": confidence}
    folders, runs = {env: output / env.removeprefix("SD/").removesuffix("-v0") for env in envs}, list[PlannedRun]()
    for env in filter(SERVING.__contains__, envs):
        runs += _serving_runs(env, algos, controls, seeds, folders[env], shared)
    envs = [env for env in envs if env not in SERVING]
    if not envs:
        return runs
    for name in [*algos, *((*CONTROLS, *_blind(algos)) if controls else ())]:
        algo, start = _parts(name)
        for part in filter(None, (algo, start)):
            agent_class(part)  # raises if the name is unknown
        if start:
            _start_key(algo, start)
            names[start] = None
        names[name] = None
    of_agents = {key for name in names for key in agent_class(_parts(name)[0]).Settings.model_fields}
    split_settings("dense", {key: value for key, value in settings.items() if key not in of_agents})  # raises
    for env in envs:
        config_of(env)  # raises if the name is unknown
        for seed in range(seeds):
            for name in names:
                algo, start = _parts(name)
                if seed and not agent_class(algo).draws:
                    continue
                known = agent_class(algo).Settings.model_fields
                own = {key: value for key, value in settings.items() if is_setting(key) or key in known}
                if start:
                    own[_start_key(algo, start)] = folders[env] / f"{start}-{seed if agent_class(start).draws else 0}"
                runs.append(PlannedRun(env, algo, folders[env] / f"{name}-{seed}", steps, seed, own, confidence))
    return runs


def _serving_runs(
    env: str, algos: Sequence[str], controls: bool, seeds: int, folder: Path, shared: dict[str, Any]
) -> list[PlannedRun]:
    """The runs on a serving env, which has its own agents and controls; controls have one seed."""
    of_env, _ = dials.split_settings("ppo", shared["settings"])
    serving_config(env, of_env)  # raises if a setting is unknown
    runs = []
    for name in dict.fromkeys([*algos, *(dials.CONTROLS if controls else ())]):
        own = shared if name in dials.LEARNERS else {**shared, "settings": of_env}
        for seed in range(seeds if name in dials.LEARNERS else 1):
            runs.append(PlannedRun(env, name, folder / f"{name}-{seed}", seed=seed, **own))
    return runs


def _parts(name: str) -> tuple[str, str]:
    """The agent, and the agent whose run it starts from, if any."""
    if name in agent_names():
        return name, ""
    algo, _, start = name.partition(FROM_INFIX)
    return algo, start


def _start_key(algo: str, start: str) -> str:
    """The setting that names the run that an agent starts from: ``path`` if that run has masks, else ``start``.

    Raises ``ValueError`` if it has no such setting.
    """
    has_masks = issubclass(agent_class(start), StaticAgent | ImitationAgent)
    for key in reversed(STARTS) if has_masks else ["start"]:
        if key in agent_class(algo).Settings.model_fields:
            return key
    raise ValueError(f"{algo} cannot start from a run of {start}")


def _blind(algos: Sequence[str]) -> list[str]:
    """The first learning agent, blind; if it starts from a run, that is a run of static masks."""
    for algo, start in map(_parts, algos):
        if not is_control(algo):
            return [f"{BLIND}{algo}{FROM_INFIX}static" if start else f"{BLIND}{algo}"]
    return []
