"""sd_gym: reinforcement learning environments in which an agent learns what a transformer need not compute.

Importing it registers all envs with Gymnasium; torch and transformers are imported when an env is made.

    >>> import gymnasium as gym, sd_gym
    >>> env = gym.make("SD/Classification-Mini-v0")
"""

from sd_gym.registration import register_envs, registered_ids
from sd_gym.version import __version__

__all__ = ["__version__", "registered_ids"]

register_envs()
