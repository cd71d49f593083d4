"""Runs on serving envs: learn or search dials, select one, and play it on test rows and arrivals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray as Array
from scipy.stats import norm
from sd_gym.agents.learning.agent import NotApplicableError, checked_settings
from sd_gym.agents.runs.folder import run_description
from sd_gym.agents.runs.guarantee import guarantee, measured_loss
from sd_gym.agents.runs.statistics import bootstrap_interval, pareto_front
from sd_gym.agents.runs.verdict import Verdict, difference_interval, fewest_instances, losses_allowed, verdict
from sd_gym.agents.serving import controls
from sd_gym.agents.serving.controls import Played, play
from sd_gym.agents.serving.learn import DialSettings, OnProgress, learn_dials
from stable_baselines3.common.logger import configure

from sd_gym.config import SPLITS
from sd_gym.envs.exact import lower_hull
from sd_gym.envs.serving.config import ServingConfig, serving_config
from sd_gym.envs.serving.dial import Dial, Network
from sd_gym.envs.serving.queues import core_of, expected_loss, outcomes
from sd_gym.envs.serving.shells import ServingVectorEnv
from sd_gym.files import write_json
from sd_gym.registration import SERVING

LEARNERS = ("ppo", "a2c")
SEARCHED = {"fixed": controls.fixed, "threshold": controls.threshold, "staircase": controls.staircase}
CONTROLS = (*SEARCHED, "foresight")
SEARCH_EPISODES, EPISODES = 6, 32
FRONT = 0.25, 0.5, 0.75, 1.0  # losses in epsilons, at which goodputs are compared


def split_settings(algo: str, settings: dict[str, Any]) -> tuple[dict[str, Any], DialSettings | None]:
    """Split settings into those of the env and those of the agent; controls have none.

    Raises ``NotApplicableError`` if the agent does not apply to serving envs, ``ValueError`` if a value is wrong.
    """
    if algo not in (*LEARNERS, *CONTROLS):
        known = ", ".join((*LEARNERS, *CONTROLS))
        why = " (it compares several decisions for one input; an episode here is thousands of decisions)"
        why = why if algo == "reinforce" else ""
        raise NotApplicableError(f"the agent {algo!r} does not apply to a serving env{why}; expected one of {known}")
    if algo not in LEARNERS:
        return settings, None
    own = {key: value for key, value in settings.items() if key in DialSettings.model_fields}
    return {key: value for key, value in settings.items() if key not in own}, checked_settings(DialSettings, own, algo)


def describe(
    env_id: str, algo: str, steps: int, seed: int, settings: dict[str, Any], confidence: float
) -> dict[str, Any]:
    """The first part of ``config.json``, which identifies a run. Raises ``ValueError`` if a name is wrong."""
    of_env, of_agent = split_settings(algo, settings)
    names = {"env": env_id, "algo": algo, "control": algo in CONTROLS, "steps": steps, "seed": seed}
    config = serving_config(env_id, of_env).model_dump(mode="json")
    own = {} if of_agent is None else of_agent.model_dump()
    return {**names, "confidence": confidence, "env_config": config, "agent_settings": own}


def train(described: dict[str, Any], folder: Path, settings: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Train the dial of a run ``described`` by ``describe``, from the beginning, as ``sd_gym.train`` does.

    The folder gets ``config.json``, TensorBoard events, ``dial.json``, ``dial.safetensors`` and ``result.json``.
    """
    env_id, algo, seed = (described[key] for key in ("env", "algo", "seed"))
    of_env, of_agent = split_settings(algo, settings)
    config = serving_config(env_id, of_env)
    core = core_of(config)
    for events in folder.glob("events.out.tfevents.*"):  # an interrupted run starts again
        events.unlink()
    write_json(folder / "config.json", run_description(described, config, core.backbone, core.data))
    if algo == "foresight":
        result = _bound(config)
    else:
        if of_agent is None:
            networks = SEARCHED[algo](config)
        else:
            env = ServingVectorEnv(str(SERVING.find(env_id)), of_agent.num_envs, **of_env)
            logger = configure(str(folder), ["tensorboard"])
            networks = learn_dials(algo, env, of_agent, described["steps"], seed, logger, on_progress)
            logger.close()
        tried = _undominated(config, networks, on_progress if of_agent is None else None)
        result = _selected(config, *tried, described["confidence"], folder)
    result["data"] = {name: core.split(name).provenance for name in SPLITS}
    write_json(folder / "result.json", result)
    return result


def _undominated(
    config: ServingConfig, networks: Sequence[Network], on_progress: OnProgress | None
) -> tuple[list[Network], Array]:
    """The networks that no other beats in loss and goodput on policy rows and training arrivals, from dense to bold.

    Also which of them are on the hull. Selection tests all in order; ``goodput_at`` mixes those on the hull.
    """
    played = play(config, networks, "train", SEARCH_EPISODES, on_progress)
    loss, goodput = played.shares @ expected_loss(config), played.goodput.mean(axis=1)
    front = pareto_front(goodput, loss)
    return [networks[number] for number in front], np.isin(front, lower_hull(loss * goodput, -goodput).number)


def _selected(
    config: ServingConfig, tried: Sequence[Network], on_hull: Array, confidence: float, folder: Path
) -> dict[str, Any]:
    """Select a dial by fixed-sequence testing on validation rows and arrivals, save it, and test all dials."""
    quality = outcomes(config, "validation").quality
    passed = 0
    played = play(config, tried, "validation", EPISODES)
    for shares, error in zip(played.shares, _arrival_errors(config, played), strict=True):
        epsilon = config.epsilon - norm.ppf(confidence) * error  # other arrivals give the points other shares
        if verdict(quality @ shares, quality[:, 0], epsilon, confidence) != Verdict.KEPT:
            break
        passed += 1
    chosen = tried[passed - 1] if passed else controls.fixed(config)[0]
    Dial(config, expected_loss(config), chosen).save(folder)
    tested, dense = play(config, tried, "test", EPISODES), play(config, controls.fixed(config)[:1], "test", EPISODES)
    result = _measured(config, Played(*(values[[passed - 1]] for values in tested)) if passed else dense)
    result["guarantee"] = f"{guarantee(len(quality), config.epsilon, confidence, passed == 0)}; {measured_loss(result)}"
    loss = np.append(tested.shares[on_hull] @ outcomes(config, "test").cost.mean(axis=0), 0.0)  # dense loses nothing
    goodput = np.append(tested.goodput[on_hull].mean(axis=1), dense.goodput.mean())
    return result | {"goodput_at": _at_front(goodput_at(loss, goodput, np.array(FRONT) * config.epsilon))}


def _arrival_errors(config: ServingConfig, played: Played) -> Array:
    """How much each dial's mean loss per answer varies with the arrivals: its standard error, ``[dials]``.

    The mean is a ratio of two sums over episodes: losses, as expected on policy rows, and answers.
    """
    answers = played.answers.sum(axis=2)  # [dials, episodes]
    lost, total = played.answers @ expected_loss(config), np.maximum(answers.sum(axis=1), 1)
    residual = lost - (lost.sum(axis=1) / total)[:, None] * answers
    return residual.std(axis=1, ddof=1) * answers.shape[1] ** 0.5 / total


def goodput_at(loss: Array, goodput: Array, limits: Array) -> Array:
    """The highest goodput of random mixtures of dials that lose at most ``limits`` per answer.

    One of the dials, dense, loses nothing, so each limit can be met.
    A mixture's loss per answer counts bold dials more, which answer more. So goodput and loss per request are mixed,
    and the best mixture is where their hull meets the limit.
    """
    lost, negative, _ = lower_hull(loss * goodput, -goodput)
    best = []
    for limit in limits:
        over = lost + limit * negative  # what a request loses above the limit
        last = int(np.flatnonzero(over <= 0)[-1])
        ends = slice(last, last + 2)
        best.append(-np.interp(0.0, over[ends], negative[ends]))
    return np.array(best)


def _at_front(goodput: Array) -> dict[str, float]:
    return dict(zip(map(str, FRONT), goodput.tolist(), strict=True))


def _measured(config: ServingConfig, played: Played) -> dict[str, Any]:
    """The result of one dial on the test rows.

    A dial does not observe the row, so a row's quality is its mean over points, weighted by how often each was chosen.
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
        "quality_difference_interval": difference_interval(quality, quality_ref),
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
        "by_difficulty": [
            {"difficulty": 0, "instances": len(quality), "flops_ratio": flops, "flops_ratio_with_policy": flops}
        ],
        "time": {},
        "artefact": None,
        "last_policy": None,
        "skip_rate": {},
        "history": [],
    }


def _bound(config: ServingConfig) -> dict[str, Any]:
    """The bound of all dials, as a result that loses epsilon on policy rows; its return bounds nothing."""
    bounds = controls.foresight(config, "test", EPISODES, np.array(FRONT) * config.epsilon)
    at_epsilon = Played(*(counts[[FRONT.index(1.0)]] for counts in bounds))
    return _measured(config, at_epsilon) | {
        "episodes": EPISODES,
        "goodput_at": _at_front(bounds.goodput[:, 0]),
        "guarantee": None,
        "verdict": "a bound",
        "quality_kept": False,
        "return": None,
    }
