"""How policies are learned and compared; installed as ``sd_gym.agents``.

Agents are swapped by name: ``ppo``, ``a2c``, ``reinforce``, and the controls ``dense`` and ``random``. ``blind-NAME``
is the agent NAME with its observation zeroed: what pruning alone gets.
"""

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
