"""Agents by name."""

from typing import Any

from sd_gym.agents.learning.agent import AgentSettings, BaseAgent
from sd_gym.agents.runs.folder import BLIND

from sd_gym.config import is_key
from sd_gym.envs.vector import SwitchableVectorEnv
from sd_gym.registry import Registry, UnknownNameError, unknown

AGENTS: Registry[type[BaseAgent]] = Registry(
    "agent",
    {
        "ppo": "sd_gym.agents.ppo.agent:PPOAgent",
        "ppo_lagrangian": "sd_gym.agents.ppo.lagrangian:PPOLagrangianAgent",
        "ppo_lex": "sd_gym.agents.ppo.crpo:PPOLexAgent",
        "a2c": "sd_gym.agents.a2c.agent:A2CAgent",
        "reinforce": "sd_gym.agents.reinforce.agent:ReinforceAgent",
        "imitation": "sd_gym.agents.imitation.agent:ImitationAgent",
        "static": "sd_gym.agents.baselines.static:StaticAgent",
        "hull": "sd_gym.agents.baselines.hull:HullAgent",
        "full-information": "sd_gym.agents.baselines.full_information:FullInformation",
        "dense": "sd_gym.agents.baselines.constant:DenseAgent",
        "every-other": "sd_gym.agents.baselines.constant:EveryOtherAgent",
        "early-exit": "sd_gym.agents.baselines.early_exit:EarlyExit",
        "confidence": "sd_gym.agents.baselines.early_exit:Confidence",
        "cascade": "sd_gym.agents.baselines.cascade:Cascade",
        "oracle": "sd_gym.agents.baselines.oracle:Oracle",
        "random": "sd_gym.agents.baselines.constant:RandomAgent",
        "hash": "sd_gym.agents.baselines.constant:HashAgent",
    },
)


def register_agent(name: str, cls: type[BaseAgent]) -> None:
    """Register an agent of your own for ``sd_gym.train(env, name)`` and, with ``--import``, ``--algo NAME``.

    Unless the class has ``is_control = True``, there is a ``blind-NAME`` as well, which does not see the input.

    Raises:
        TypeError: If ``cls`` is no subclass of ``sd_gym.agents.Agent`` or ``sd_gym.agents.PrivilegedAgent``.
        ValueError: If the name is one of the project's or begins with ``blind-``, or a setting has the name of a key
            of the env's config.
    """
    if not (isinstance(cls, type) and issubclass(cls, BaseAgent)):
        raise TypeError(
            f"the agent {name!r} has to be a subclass of sd_gym.agents.Agent or PrivilegedAgent, got {cls!r}"
        )
    if name.startswith(BLIND):
        raise ValueError(
            f"the agent {name!r} needs another name: {BLIND}NAME is the agent NAME with zeroed observations"
        )
    if keys := [key for key in cls.Settings.model_fields if is_key(key)]:
        raise ValueError(f"the agent {name!r}: its setting {keys[0]!r} is a key of the env; choose another name for it")
    AGENTS.register(name, cls)


def learning_agents() -> list[str]:
    """Names of all agents but controls."""
    return [name for name in AGENTS.names() if not AGENTS.find(name).is_control]


def is_control(name: str) -> bool:
    """Whether an agent is a control baseline: its class says so, or it is blind."""
    return name.startswith(BLIND) or agent_class(name).is_control


def agent_names() -> list[str]:
    """All names for ``make_agent``."""
    return [*AGENTS.names(), *(BLIND + name for name in learning_agents())]


def agent_class(name: str) -> type[BaseAgent]:
    """The class of a name, imported now; raises ``ValueError`` if there is no agent of that name."""
    if name not in agent_names():
        raise UnknownNameError(unknown("agent", name, agent_names()))
    return AGENTS.find(name.removeprefix(BLIND))


def make_settings(name: str, settings: dict[str, Any]) -> AgentSettings:
    """Checked settings of an agent by name, defaults included. Raises: see ``make_agent``."""
    return agent_class(name).make_settings(settings, name.startswith(BLIND))


def make_agent(name: str, env: SwitchableVectorEnv, *, seed: int = 0, **settings: Any) -> BaseAgent:
    """An agent by name (``agent_names``) that learns on an env; ``seed`` seeds all its draws.

    Raises:
        ValueError: If the name or a setting is unknown.
    """
    blind = {"blind": True} if name.startswith(BLIND) else {}
    return agent_class(name)(env, seed=seed, **blind, **settings)
