"""A run on a serving env learns or searches dials, selects one, and plays it on test rows and arrivals."""

import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.learning.agent import NotApplicableError
from sd_gym.agents.runs.folder import read_description
from sd_gym.agents.runs.guarantee import guarantee, on_other_rows
from sd_gym.agents.runs.statistics import bootstrap_interval
from sd_gym.agents.runs.verdict import Verdict, fewest_instances, losses_allowed, verdict
from sd_gym.agents.serving import controls
from sd_gym.agents.serving.learn import DialSettings, learned
from sd_gym.agents.serving.play import Played, play
from stable_baselines3.common.logger import configure

from sd_gym.envs.exact import lower_hull
from sd_gym.envs.serving.config import ServingConfig, serving_config
from sd_gym.envs.serving.dial import Dial, Network
from sd_gym.envs.serving.queues import core_of, expected_loss, outcomes
from sd_gym.envs.serving.shells import ServingVectorEnv
from sd_gym.files import write_json
from sd_gym.folders import MARKER, contents, foreign, locked
from sd_gym.registration import serving_file
from sd_gym.version import __version__

Array = NDArray
LEARNERS = ("ppo", "a2c")
SEARCHED = {"fixed": controls.fixed, "threshold": controls.threshold, "staircase": controls.staircase}
CONTROLS = (*SEARCHED, "foresight")
SEARCH_EPISODES, EPISODES = 6, 32
FRONT = 0.25, 0.5, 0.75, 1.0  # losses in epsilons, at which goodputs are compared
LIBRARIES = ("gymnasium", "numpy", "sd-gym", "stable-baselines3", "torch")
OnProgress = Callable[[int, dict[str, float]], None]


class Candidates(NamedTuple):
    """Dials on the hull of loss and goodput on policy rows and training arrivals, from dense to bold."""

    networks: list[Network]
    loss: Array
    goodput: Array


def check_serving_agent(algo: str) -> None:
    """Raise ``NotApplicableError`` if an agent does not apply to serving envs."""
    if algo not in (*LEARNERS, *CONTROLS):
        known = ", ".join((*LEARNERS, *CONTROLS))
        why = " (it compares several decisions for one input; an episode here is thousands of decisions)"
        why = why if algo == "reinforce" else ""
        raise NotApplicableError(f"the agent {algo!r} does not apply to a serving env{why}; expected one of {known}")


def split_settings(algo: str, settings: dict[str, Any]) -> tuple[dict[str, Any], DialSettings | None]:
    """Split settings into those of the env and those of the agent. Raises ``ValueError`` if a value is wrong."""
    check_serving_agent(algo)
    if algo not in LEARNERS:
        return settings, None
    own = {key: value for key, value in settings.items() if key in DialSettings.model_fields}
    return {key: value for key, value in settings.items() if key not in own}, DialSettings(**own)


def describe(
    env_id: str, algo: str, steps: int, seed: int, settings: dict[str, Any], confidence: float
) -> dict[str, Any]:
    """The first part of ``config.json``, which identifies a run. Raises ``ValueError`` if a name is wrong."""
    of_env, of_agent = split_settings(algo, settings)
    names = {"env": env_id, "algo": algo, "control": algo in CONTROLS, "steps": steps, "seed": seed}
    config = serving_config(env_id, of_env).model_dump(mode="json")
    own = {} if of_agent is None else of_agent.model_dump()
    return {**names, "confidence": confidence, "env_config": config, "agent_settings": own}


def train(
    env_id: str,
    algo: str,
    folder: Path,
    *,
    steps: int,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    confidence: float,
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train a dial as ``sd_gym.train`` does; an interrupted run restarts from the beginning.

    The folder gets ``config.json``, TensorBoard events, ``dial.json``, ``dial.safetensors`` and ``result.json``.
    """
    described = describe(env_id, algo, steps, seed, settings or {}, confidence)
    of_env, of_agent = split_settings(algo, settings or {})
    config = serving_config(env_id, of_env)
    with locked(folder):
        if (folder / "result.json").exists():
            raise FileExistsError(f"{folder} holds a finished run; choose another --output")
        if contents(folder) and not (folder / "config.json").exists():
            raise foreign(folder, "run folder")
        if contents(folder) and not resume:
            raise FileExistsError(f"{folder} holds an interrupted run; restart it with --resume")
        core = core_of(config)
        described |= {MARKER: __version__, "command": shlex.join(sys.argv)}
        described |= {"weights": core.backbone.weights, "data": core.data.identity()}
        described["versions"] = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
        write_json(folder / "config.json", described)
        if algo == "foresight":
            result = _bound(config)
        else:
            if of_agent is None:
                networks = SEARCHED[algo](config)
            else:
                env = ServingVectorEnv(str(serving_file(env_id)), of_agent.num_envs, **of_env)
                logger = configure(str(folder), ["tensorboard"])
                networks = learned(algo, env, of_agent, steps, seed, logger, on_progress or (lambda *_: None))
                logger.close()
            result = _selected(config, candidates(config, networks), confidence, folder)
        result["data"] = {name: core.split(name).provenance for name in ("train", "validation", "test")}
        write_json(folder / "result.json", result)
        return result


def candidates(config: ServingConfig, networks: Sequence[Network]) -> Candidates:
    """The hull of networks on training arrivals and policy rows."""
    played = play(config, networks, "train", SEARCH_EPISODES)
    loss, goodput = played.shares @ expected_loss(config), played.goodput.mean(axis=1)
    hull = lower_hull(loss, -goodput)
    return Candidates([networks[number] for number in hull.number], hull.loss, -hull.flops)


def _selected(config: ServingConfig, tried: Candidates, confidence: float, folder: Path) -> dict[str, Any]:
    """Select a dial by fixed-sequence testing on validation rows and arrivals, save it, and test all dials."""
    dense = controls.fixed(config)[0]
    quality = outcomes(config, "validation").quality
    passed = 0
    for shares in play(config, tried.networks, "validation", SEARCH_EPISODES).shares:
        if verdict(quality @ shares, quality[:, 0], config.epsilon, confidence) != Verdict.KEPT:
            break
        passed += 1
    chosen = tried.networks[passed - 1] if passed else dense
    Dial(config, expected_loss(config), chosen).save(folder)
    tested = play(config, tried.networks, "test", EPISODES)
    own = Played(*(values[[passed - 1]] for values in tested)) if passed else play(config, [dense], "test", EPISODES)
    result = _measured(config, own)
    text = guarantee(len(quality), config.epsilon, confidence, passed == 0)
    keys = ("instances", "split", "quality_difference", "quality_difference_interval")
    result["guarantee"] = f"{text}; {on_other_rows(*(result[key] for key in keys))}"
    cost = outcomes(config, "test").cost.mean(axis=0)
    return result | _front(config, tested.shares @ cost, tested.goodput.mean(axis=1))


def _measured(config: ServingConfig, played: Played) -> dict[str, Any]:
    """The result of one dial on the test rows.

    A dial does not observe the row, so all rows have the same shares of points. A row's quality is the mean over them.
    """
    known, shares = outcomes(config, "test"), played.shares[0]
    quality, quality_ref = known.quality @ shares, known.quality[:, 0]
    flops = float((known.flops_ratio @ shares).mean())
    difference, goodput = float((quality - quality_ref).mean()), played.goodput[0]
    judged = verdict(quality, quality_ref, config.epsilon)
    return {
        "split": "test",
        "instances": len(quality),
        "metrics": {},
        "goodput": float(goodput.mean()),
        "goodput_interval": bootstrap_interval(goodput),
        "episodes": len(goodput),
        "shares": shares,
        "quality": float(quality.mean()),
        "quality_ref": float(quality_ref.mean()),
        "quality_difference": difference,
        "quality_difference_interval": bootstrap_interval(quality - quality_ref),
        "quality_kept": judged == Verdict.KEPT,
        "verdict": str(judged),
        "epsilon": config.epsilon,
        "fewest_instances": fewest_instances(config.epsilon),
        "losses_allowed": losses_allowed(len(quality), config.epsilon),
        "flops_ratio": flops,
        "flops_ratio_with_policy": flops,
        "policy_flops_counted": True,  # a dial takes some thousand FLOPs per group
        "return": float(goodput.mean() - 1 + config.penalty * difference * goodput.mean()),  # per request
        "decisions_used": int((shares > 0).sum()),
        "decisions_hash": "",
        "by_difficulty": [{"difficulty": 0, "instances": len(quality), "flops_ratio": flops}],
        "time": {},
        "artefact": None,
        "last_policy": None,
        "skip_rate": {},
        "history": [],
    }


def _front(config: ServingConfig, loss: Array, goodput: Array) -> dict[str, Any]:
    """Goodput at the losses ``FRONT`` of coins between the dials and dense, which loses nothing."""
    dense = play(config, [controls.fixed(config)[0]], "test", EPISODES).goodput.mean()
    hull = lower_hull(np.append(loss, 0.0), -np.append(goodput, dense))
    return {
        "goodput_at": {str(part): float(-np.interp(part * config.epsilon, hull.loss, hull.flops)) for part in FRONT}
    }


def _bound(config: ServingConfig) -> dict[str, Any]:
    """The bound of all dials, as a result that loses epsilon."""
    bounds = controls.foresight(config, "test", EPISODES, np.array(FRONT) * config.epsilon)
    dense = _measured(config, play(config, [controls.fixed(config)[0]], "test", 1))
    at = dict(zip(map(str, FRONT), bounds.tolist(), strict=True))
    return (
        dense
        | {"goodput": at["1.0"], "goodput_interval": [at["1.0"]] * 2, "goodput_at": at, "guarantee": None}
        | {"verdict": "a bound", "quality_kept": False, "quality_difference": -config.epsilon}
    )


def is_finished(folder: Path, described: dict[str, Any]) -> bool:
    """Whether the folder holds this run, finished; raises ``ValueError`` if it holds another run."""
    if not (folder / "result.json").exists():
        return False
    present = read_description(folder)
    if differ := [key for key, value in described.items() if present.get(key) != value]:
        raise ValueError(f"{folder} holds another run, of another {differ[0]}; choose another --output")
    return True
