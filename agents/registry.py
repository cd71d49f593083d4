"""Agents by name."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from sd_gym.agents.common.agent import Agent

from sd_gym.envs.shells import SwitchableVectorEnv

AGENTS = {
    "ppo": "sd_gym.agents.ppo.agent:PPOAgent",
    "ppo_lex": "sd_gym.agents.ppo.agent:PPOLexAgent",
    "a2c": "sd_gym.agents.a2c.agent:A2CAgent",
    "a2c_lex": "sd_gym.agents.a2c.agent:A2CLexAgent",
    "reinforce": "sd_gym.agents.reinforce.agent:ReinforceAgent",
    "imitation": "sd_gym.agents.imitation.agent:ImitationAgent",
    "static": "sd_gym.agents.baselines.static:StaticAgent",
    "dense": "sd_gym.agents.baselines.constant:DenseAgent",
    "every-other": "sd_gym.agents.baselines.constant:EveryOtherAgent",
    "early-exit": "sd_gym.agents.baselines.early_exit:EarlyExitAgent",
    "oracle": "sd_gym.agents.baselines.oracle:OracleAgent",
    "random": "sd_gym.agents.baselines.constant:RandomAgent",
    "hash": "sd_gym.agents.baselines.constant:HashAgent",
}
LEARNING = ("ppo", "ppo_lex", "a2c", "a2c_lex", "reinforce", "imitation")


def agent_names() -> list[str]:
    """All names that ``make_agent`` takes."""
    return [*AGENTS, *(f"blind-{name}" for name in LEARNING)]


def agent_class(name: str) -> type[Agent]:
    """The class behind a name, imported now.

    Raises:
        ValueError: If there is no agent of that name.
    """
    if name not in agent_names():
        near = difflib.get_close_matches(name, agent_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown agent {name!r}{hint} Known agents: {', '.join(agent_names())}.")
    module, _, attribute = AGENTS[name.removeprefix("blind-")].partition(":")
    return getattr(import_module(module), attribute)


def make_agent(name: str, env: SwitchableVectorEnv, *, seed: int = 0, **settings: Any) -> Agent:
    """An agent by name.

    Args:
        name: One of ``agent_names()``.
        env: What it learns on.
        seed: Of its weights and exploration.
        settings: Fields of the agent's ``Settings``.

    Raises:
        ValueError: If the name or a setting is unknown.
    """
    return agent_class(name)(env, seed=seed, blind=name.startswith("blind-"), **settings)
