"""How policies are learned and compared; installed as ``sd_gym.agents``. Agents are swapped by name."""

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
