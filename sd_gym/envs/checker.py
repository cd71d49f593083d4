"""Checks of an env before anyone learns on it: rewards, optimum, seeds, and the results of constant decisions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env as gymnasium_check
from gymnasium.utils.env_checker import data_equivalence

from sd_gym.envs.actions import all_decisions, number_of_decisions
from sd_gym.envs.protocols import SCORES
from sd_gym.envs.serving.shells import ServingEnv
from sd_gym.envs.single import SwitchableEnv

EPISODES = 32  # episodes of each constant or random decision
SEEDS = 8  # whose episodes are compared
EXHAUSTIVE, TRIED_ON = 4096, 2  # most decisions that are all tried, and on how many instances
SLACK = 1e-6


class Check(NamedTuple):
    """The result of a check: its name, whether it passed, and the finding in words."""

    name: str
    passed: bool
    finding: str

    def line(self) -> str:
        """The check as a line of the command's output."""
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.name}: {self.finding}"


class Episode(NamedTuple):
    """An episode: its observations, its return and its last info."""

    observations: list[Any]
    total: float
    info: dict[str, Any]


class Queue(NamedTuple):
    """An episode of a queue at one operating point: sums, the answers' mean FLOPs ratio, and the return."""

    answers: int
    refused: int
    cost: float
    flops_ratio: float
    seconds: float
    total: float

    def finding(self) -> str:
        """In words."""
        goodput, loss = self.answers / (self.answers + self.refused), self.cost / max(self.answers, 1)
        return f"{goodput:.1%} answered in time, {100 * loss:+.2f} points lost, FLOPs {self.flops_ratio:.1%}"


def check_env(env_id: str, settings: dict[str, Any] | None = None) -> list[Check]:
    """Check an env: Gymnasium's checker, seeds, rewards, and the results of constant and random decisions.

    If the decisions are few, the best one is searched too. Of a queue (``ServingEnv``) each operating point serves one
    episode. ``settings`` are overrides of the env's config, by key.

    Raises:
        gymnasium.error.UnregisteredEnv: If there is no such env.
        ValueError: If a setting is unknown, or the env gives a ``reward.vector``: the objective's reward is checked.
    """
    env = gym.make(env_id, disable_env_checker=True, **(settings or {})).unwrapped
    if isinstance(env, ServingEnv):
        return _queue_checks(env)
    if not isinstance(env, SwitchableEnv):
        raise ValueError(f"{env_id} is not an env of sd_gym")
    if env.config.reward.vector:
        raise ValueError("expected rewards of the objective, got reward.vector=True; leave it out")
    panel = _panel(env)
    checks = [_gymnasium(env), *_seeds(env), *(_panel_check(*item) for item in panel.items())]
    checks += [_rewards(env, panel), _optimum(env, panel)]
    env.close()
    return checks


def _queue_checks(env: ServingEnv) -> list[Check]:
    """Checks of a queue, and what each operating point does there."""
    requests, penalty = env.config.requests, env.config.penalty
    dense, again, other = (_queue(env, 0, seed=seed) for seed in (0, 0, 1))
    bolder = [_queue(env, point, seed=0) for point in range(1, len(env.config.points))]
    queues = [dense, other, *bolder]
    missing = max(abs(requests - queue.answers - queue.refused) for queue in queues)
    totals = np.array([queue.total for queue in queues])
    expected = np.array([-queue.refused - penalty * queue.cost for queue in queues])
    finding = f"{totals.min():.1f} to {totals.max():.1f}; -refused - penalty * cost has {expected.min():.1f} to "
    same, differs, is_dense = dense == again, dense != other, dense.cost == 0 and abs(dense.flops_ratio - 1) < SLACK
    return [
        _gymnasium(env),
        Check("same seed, same episode", same, "answers, losses and times" if same else "they differ"),
        Check("other seed, other episode", differs, "they differ" if differs else "they are the same"),
        Check("requests", missing == 0, f"{requests - missing} of {requests} answered or refused"),
        Check("rewards", bool(np.allclose(totals, expected, atol=SLACK)), f"{finding}{expected.max():.1f}"),
        Check("dense", is_dense, dense.finding()),
        *(Check(f"point {number}", True, queue.finding()) for number, queue in enumerate(bolder, start=1)),
    ]


def _queue(env: ServingEnv, point: int, *, seed: int) -> Queue:
    """An episode at one operating point."""
    env.reset(seed=seed)
    total, over, infos = 0.0, False, []
    while not over:
        _, reward, over, _, info = env.step(point)
        total += reward
        infos.append(info)
    answers, refused, cost, seconds = (
        sum(info[key] for info in infos) for key in ("answers", "refused", "cost", "seconds")
    )
    flops = sum(info["answers"] * info["flops_ratio"] for info in infos) / max(answers, 1)
    return Queue(answers, refused, cost, flops, seconds, total)


def _gymnasium(env: gym.Env) -> Check:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            gymnasium_check(env, skip_render_check=True)
        except Exception as error:  # any error is the finding
            return Check("Gymnasium's checker", False, " ".join(str(error).split()) or type(error).__name__)
    finding = "; ".join(str(warning.message) for warning in noted) or "no objection"
    return Check("Gymnasium's checker", not noted, finding)


def _seeds(env: SwitchableEnv) -> list[Check]:
    def random_episode(seed: int) -> Episode:
        env.action_space.seed(seed)
        return _episode(env, env.action_space.sample, seed=seed)

    first, second = ([random_episode(seed) for seed in range(SEEDS)] for _ in range(2))
    same = all(
        once.total == again.total
        and once.info["instance"] == again.info["instance"]
        and data_equivalence(once.observations, again.observations, exact=True)
        for once, again in zip(first, second, strict=True)
    )
    instances = {episode.info["instance"] for episode in first}
    finding = f"{len(instances)} different instances from {SEEDS} seeds"
    return [
        Check("same seed, same episode", same, "observations, instance and reward" if same else "they differ"),
        Check("other seed, other episode", len(instances) > 1, finding),
    ]


def _panel(env: SwitchableEnv) -> dict[str, list[Episode]]:
    """Episodes that run everything, skip everything, or decide at random, on the same instances."""
    space = env.action_space
    space.seed(0)
    choose: dict[str, Callable[[], Any]] = {"random": space.sample}
    if not isinstance(space, gym.spaces.Discrete):  # no mask of a codebook skips everything
        choose["all skipped"] = lambda: (env.core.actions.nvec - 1).astype(space.dtype)
        choose["nothing skipped"] = lambda: np.zeros_like(choose["all skipped"]())
    return {name: [_episode(env, act, seed=seed) for seed in range(EPISODES)] for name, act in choose.items()}


def _panel_check(name: str, episodes: list[Episode]) -> Check:
    infos = [episode.info for episode in episodes]
    reward = np.mean([episode.total for episode in episodes])
    quality, flops = (np.mean([info[key] for info in infos]) for key in ("quality", "flops_ratio"))
    is_dense = all(info["quality"] == info["quality_ref"] for info in infos) and abs(flops - 1) < SLACK
    passed = {"nothing skipped": is_dense, "all skipped": flops < 1}.get(name, True)
    return Check(name, bool(passed), f"reward {reward:+.3f}, quality {quality:.1%}, FLOPs {flops:.1%}")


def _rewards(env: SwitchableEnv, panel: dict[str, list[Episode]]) -> Check:
    """Whether rewards are those of the objective, computed from the infos."""
    episodes = [episode for of_decision in panel.values() for episode in of_decision]
    totals = np.array([episode.total for episode in episodes])
    expected = env.objective.rewards(*(np.array([episode.info[key] for episode in episodes]) for key in SCORES))
    finding = f"{totals.min():+.3f} to {totals.max():+.3f}; {env.objective.name} has {expected.min():+.3f} to "
    return Check("rewards", bool(np.allclose(totals, expected, atol=SLACK)), f"{finding}{expected.max():+.3f}")


def _optimum(env: SwitchableEnv, panel: dict[str, list[Episode]]) -> Check:
    """Whether the best of all decisions on a few instances is at least as good as those of the panel."""
    sizes = env.core.actions.nvec
    if number_of_decisions(sizes) > EXHAUSTIVE or len(env.core.stages) > 1:
        return Check("best of all decisions", True, "not tried: there are too many, or several stages")
    actions = list(all_decisions(sizes).astype(env.action_space.dtype).reshape(-1, *env.action_space.shape or ()))
    names = list(dict.fromkeys(episode.info["instance"] for episode in panel["random"]))[:TRIED_ON]
    best = {
        name: max(_episode(env, lambda: action, options={"instance": name}).total for action in actions)  # noqa: B023  (called at once)
        for name in names
    }
    beaten = [
        f"{decision} has {episode.total:+.4f} on {name}, the best {best[name]:+.4f}"
        for decision, episodes in panel.items()
        for episode in episodes
        if (name := episode.info["instance"]) in best and episode.total > best[name] + SLACK
    ]
    finding = ", ".join(f"{name}: {reward:+.3f}" for name, reward in best.items())
    return Check("best of all decisions", not beaten, "; ".join(beaten) or f"{len(actions)} tried; {finding}")


def _episode(
    env: SwitchableEnv, act: Callable[[], Any], *, seed: int | None = None, options: dict[str, Any] | None = None
) -> Episode:
    observation, info = env.reset(seed=seed, options=options)
    observations = [observation]
    total = 0.0
    over = False
    while not over:
        observation, reward, over, _, info = env.step(act())
        observations.append(observation)
        total += float(reward)
    return Episode(observations, total, info)
