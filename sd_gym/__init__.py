"""sd_gym: reinforcement learning environments in which an agent learns what a transformer need not compute.

Importing it registers all envs with Gymnasium; torch and transformers are imported when an env is made.

    >>> import gymnasium as gym, sd_gym
    >>> env = gym.make("SD/Classification-Mini-v0")

What the command line does, ``sd_gym.train``, ``train_all``, ``evaluate``, ``reduce``, ``compare`` and ``instances`` do
from Python; things of your own are made known with ``register_agent``, ``register_objective``, ``register_network``,
``register_observation``, ``register_metric``, ``register_ranking``, ``register_task`` and ``register_env``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sd_gym.registration import register_env, register_envs, register_observation, registered_ids
from sd_gym.version import __version__

if TYPE_CHECKING:
    from sd_gym.agents.experiment.api import evaluate, train, train_all
    from sd_gym.agents.experiment.run import reduce
    from sd_gym.agents.experiment.tabulation import tabulate
    from sd_gym.agents.registry import register_agent
    from sd_gym.agents.report.compare import compare
    from sd_gym.envs.listing import instances
    from sd_gym.inference.attach import attach, detach
    from sd_gym.inference.bake import bake
    from sd_gym.inference.texts import load
    from sd_gym.objectives import register_objective
    from sd_gym.policy import register_network
    from sd_gym.policy.artefact import SkipPolicy
    from sd_gym.tasks.family import register_task
    from sd_gym.tasks.metrics import register_metric
    from sd_gym.tasks.ranking import register_ranking

_WHERE = {
    "SkipPolicy": "sd_gym.policy.artefact",
    "attach": "sd_gym.inference.attach",
    "bake": "sd_gym.inference.bake",
    "compare": "sd_gym.agents.report.compare",
    "detach": "sd_gym.inference.attach",
    "evaluate": "sd_gym.agents.experiment.api",
    "instances": "sd_gym.envs.listing",
    "load": "sd_gym.inference.texts",
    "reduce": "sd_gym.agents.experiment.run",
    "register_agent": "sd_gym.agents.registry",
    "register_metric": "sd_gym.tasks.metrics",
    "register_network": "sd_gym.policy",
    "register_objective": "sd_gym.objectives",
    "register_ranking": "sd_gym.tasks.ranking",
    "register_task": "sd_gym.tasks.family",
    "tabulate": "sd_gym.agents.experiment.tabulation",
    "train": "sd_gym.agents.experiment.api",
    "train_all": "sd_gym.agents.experiment.api",
}

__all__ = [
    "SkipPolicy",
    "__version__",
    "attach",
    "bake",
    "compare",
    "detach",
    "evaluate",
    "instances",
    "load",
    "reduce",
    "register_agent",
    "register_env",
    "register_metric",
    "register_network",
    "register_objective",
    "register_observation",
    "register_ranking",
    "register_task",
    "registered_ids",
    "tabulate",
    "train",
    "train_all",
]

register_envs()


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 'sd_gym' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
