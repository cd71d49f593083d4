"""How policies are learned and compared; installed as ``sd_gym.agents``. Agents are swapped by name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_gym.agents.learning.agent import Agent, AgentSettings, LearnerSettings, PrivilegedAgent, Rollout
    from sd_gym.agents.registry import agent_names, make_agent, register_agent

__all__ = [
    "Agent",
    "AgentSettings",
    "LearnerSettings",
    "PrivilegedAgent",
    "Rollout",
    "agent_names",
    "make_agent",
    "register_agent",
]


def __getattr__(name: str) -> Any:
    """Import names on demand: reports do not need torch, which these import."""
    if name not in __all__:
        raise AttributeError(f"module 'sd_gym.agents' has no attribute {name!r}")
    module = "learning.agent" if name[0].isupper() else "registry"
    return getattr(import_module(f"sd_gym.agents.{module}"), name)
