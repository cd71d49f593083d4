"""Checks of an env before anyone learns on it: rewards, optimum, seeds, and what deciding blindly gets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces.utils import flatten
from gymnasium.utils.env_checker import check_env as gymnasium_check
from numpy.typing import NDArray

EPISODES = 32  # that each of the panel decides on
SEEDS = 8  # that are compared with each other
EXHAUSTIVE, TRIED_ON = 4096, 2  # decisions that are all tried, and on how many instances
SLACK = 1e-6


class Check(NamedTuple):
    """What a check found.

    Attributes:
        name: Of the check.
        passed: Whether it is as it should be.
        found: What was found, in words.
    """

    name: str
    passed: bool
    found: str

    def words(self) -> str:
        """For the command line."""
        return f"{'ok    ' if self.passed else 'FAILED'}  {self.name}: {self.found}"


class Episode(NamedTuple):
    """What came of an episode: its observations as one vector, its return and its last info."""

    seen: NDArray
    total: float
    info: dict[str, Any]


def check_env(env_id: str, settings: dict[str, Any] | None = None) -> list[Check]:
    """Check an env as a user of it would want it checked.

    Args:
        env_id: A registered id.
        settings: Overrides of its config, by key.

    Returns:
        Of each check what it found: Gymnasium's own, seeds, a panel of constant and random decisions, the rewards'
        range, and the best of all decisions where they are few enough to be tried.

    Raises:
        ValueError: If a setting is unknown, or the env gives a ``reward.vector``: the objective's is checked.
        gymnasium.error.UnregisteredEnv: If there is no such env.
    """
    env = gym.make(env_id, disable_env_checker=True, **(settings or {}))
    if env.unwrapped.config.reward.vector:
        raise ValueError("expected rewards of the objective, got reward.vector=True; leave it out")
    panel = _panel(env)
    checks = [_gymnasium(env), *_seeds(env), *_panel_checks(env, panel), _rewards(env, panel), _optimum(env, panel)]
    env.close()
    return checks


def _gymnasium(env: gym.Env) -> Check:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            gymnasium_check(env.unwrapped, skip_render_check=True)
        except Exception as error:  # whatever it raises is what it found
            return Check("Gymnasium's checker", False, " ".join(str(error).split()) or type(error).__name__)
    return Check("Gymnasium's checker", not noted, "; ".join(str(one.message) for one in noted) or "says nothing")


def _seeds(env: gym.Env) -> list[Check]:
    once, again = ([_drawn(env, seed) for seed in range(SEEDS)] for _ in range(2))
    same = all(
        one.total == other.total and one.info["instance"] == other.info["instance"] and (one.seen == other.seen).all()
        for one, other in zip(once, again, strict=True)
    )
    instances = {episode.info["instance"] for episode in once}
    found = f"{len(instances)} different instances from {SEEDS} seeds"
    return [
        Check("same seed, same episode", same, "observations, instance and reward" if same else "they differ"),
        Check("other seed, other episode", len(instances) > 1, found),
    ]


def _drawn(env: gym.Env, seed: int) -> Episode:
    """An episode of random actions, all drawn from one seed."""
    env.action_space.seed(seed)
    return _episode(env, env.action_space.sample, seed=seed)


def _panel(env: gym.Env) -> dict[str, list[Episode]]:
    """Episodes of all that runs everything, skips everything, or decides at random, on the same instances."""
    space = env.action_space
    env.action_space.seed(0)
    choose: dict[str, Callable[[], Any]] = {"random": space.sample}
    if not isinstance(space, gym.spaces.Discrete):  # a codebook has no decision that skips everything
        choose["all skipped"] = lambda: _everything(space)
        choose["nothing skipped"] = lambda: np.zeros(space.shape, dtype=space.dtype)
    return {name: [_episode(env, act, seed=seed) for seed in range(EPISODES)] for name, act in choose.items()}


def _everything(space: gym.Space) -> NDArray:
    return np.ones(space.shape, space.dtype) if isinstance(space, gym.spaces.MultiBinary) else space.nvec - 1


def _panel_checks(env: gym.Env, panel: dict[str, list[Episode]]) -> list[Check]:
    checks = []
    for name, episodes in panel.items():
        infos = [episode.info for episode in episodes]
        reward = np.mean([episode.total for episode in episodes])
        quality, flops = (np.mean([info[key] for info in infos]) for key in ("quality", "flops_ratio"))
        found = f"reward {reward:+.3f}, quality {quality:.1%}, FLOPs {flops:.1%}"
        passed = True
        if name == "nothing skipped":  # is the dense backbone
            same = all(info["quality"] == info["quality_ref"] for info in infos)
            passed = same and abs(flops - 1) < SLACK
        elif name == "all skipped":
            passed = flops < 1
        checks.append(Check(name, bool(passed), found))
    return checks


def _rewards(env: gym.Env, panel: dict[str, list[Episode]]) -> Check:
    """Of the lexicographic objective: in [-penalty, 1], at least 0 just where the quality is kept."""
    config = env.unwrapped.config
    episodes = [episode for of_one in panel.values() for episode in of_one]
    totals = np.array([episode.total for episode in episodes])
    kept = np.array([episode.info["is_success"] for episode in episodes])
    found = f"{totals.min():+.3f} to {totals.max():+.3f}"
    if config.reward.objective != "lexicographic":
        return Check(
            "rewards", bool(np.isfinite(totals).all()), f"{found}; {config.reward.objective} declares no range"
        )
    inside = (totals >= -config.reward.penalty - SLACK) & (totals <= 1 + SLACK)
    sides = (totals[kept] >= -SLACK).all() and (totals[~kept] < 0).all()
    declared = f"declared {-config.reward.penalty:+g} to +1, below 0 only where quality is lost"
    return Check("rewards", bool(inside.all() and sides), f"{found}; {declared}")


def _optimum(env: gym.Env, panel: dict[str, list[Episode]]) -> Check:
    """The best of all decisions on a few instances: nothing beats it, and it is no worse than the dense one."""
    actions = _all_actions(env.action_space)
    if actions is None or len(env.unwrapped.core.stages) > 1:
        return Check("best of all decisions", True, "not tried: there are too many, or several stages")
    names = list(dict.fromkeys(episode.info["instance"] for episode in panel["random"]))[:TRIED_ON]
    best = {name: max(_of_instance(env, name, action).total for action in actions) for name in names}
    beaten = [
        f"{who} has {episode.total:+.4f} on {name}, the best {best[name]:+.4f}"
        for who, episodes in panel.items()
        for episode in episodes
        if (name := episode.info["instance"]) in best and episode.total > best[name] + SLACK
    ]
    found = ", ".join(f"{name}: {reward:+.3f}" for name, reward in best.items())
    return Check("best of all decisions", not beaten, "; ".join(beaten) or f"{len(actions)} tried; {found}")


def _of_instance(env: gym.Env, name: str, action: Any) -> Episode:
    return _episode(env, lambda: action, options={"instance": name})


def _all_actions(space: gym.Space) -> list[Any] | None:
    """All actions, where there are few."""
    if isinstance(space, gym.spaces.Discrete):
        return list(range(int(space.n))) if space.n <= EXHAUSTIVE else None
    nvec = [2] * space.n if isinstance(space, gym.spaces.MultiBinary) else space.nvec.tolist()
    if np.prod(np.array(nvec, dtype=float)) > EXHAUSTIVE:
        return None
    return [np.array(action, dtype=space.dtype) for action in product(*map(range, nvec))]


def _episode(
    env: gym.Env, act: Callable[[], Any], *, seed: int | None = None, options: dict[str, Any] | None = None
) -> Episode:
    observation, info = env.reset(seed=seed, options=options)
    seen, total, over = [flatten(env.observation_space, observation)], 0.0, False
    while not over:
        observation, reward, over, _, info = env.step(act())
        seen.append(flatten(env.observation_space, observation))
        total += float(reward)
    return Episode(np.concatenate(seen), total, info)
