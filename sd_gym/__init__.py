"""sd_gym: reinforcement learning environments in which an agent learns what a transformer need not compute.

Importing it registers all envs with Gymnasium. Torch and transformers are imported only when an env is made.

    >>> import gymnasium as gym, sd_gym
    >>> env = gym.make("SD/Classification-Mini-v0")

``sd_gym.train``, ``train_all``, ``evaluate``, ``reduce`` and ``compare`` do what the command line does.
Register your own parts with ``register_agent``, ``register_objective``, ``register_network``, ``register_observation``,
``register_metric``, ``register_ranking``, ``register_task`` and ``register_env``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sd_gym.version import __version__

if TYPE_CHECKING:
    from sd_gym import onnx
    from sd_gym.agents.experiment.api import evaluate, train_all
    from sd_gym.agents.experiment.reduction import reduce
    from sd_gym.agents.experiment.run import train
    from sd_gym.agents.experiment.tabulation import tabulate
    from sd_gym.agents.registry import register_agent
    from sd_gym.agents.report.compare import compare
    from sd_gym.envs.listing import instances
    from sd_gym.execution.bank import bank
    from sd_gym.inference.attach import attach, detach
    from sd_gym.inference.bake import bake
    from sd_gym.inference.export import export
    from sd_gym.inference.texts import load
    from sd_gym.objectives import register_objective
    from sd_gym.policy import register_network
    from sd_gym.policy.artefact import SkipPolicy
    from sd_gym.tasks.family import register_task
    from sd_gym.tasks.metrics import register_metric
    from sd_gym.tasks.ranking import register_ranking

_MODULES = {  # modules of names that need torch, or are slow to import
    "agents.experiment.api": ["evaluate", "train_all"],
    "agents.experiment.reduction": ["reduce"],
    "agents.experiment.run": ["train"],
    "agents.experiment.tabulation": ["tabulate"],
    "agents.registry": ["register_agent"],
    "agents.report.compare": ["compare"],
    "envs.listing": ["instances"],
    "execution.bank": ["bank"],
    "inference.attach": ["attach", "detach"],
    "inference.bake": ["bake"],
    "inference.export": ["export"],
    "inference.texts": ["load"],
    "objectives": ["register_objective"],
    "policy": ["register_network"],
    "policy.artefact": ["SkipPolicy"],
    "tasks.family": ["register_task"],
    "tasks.metrics": ["register_metric"],
    "tasks.ranking": ["register_ranking"],
}
_MODULE_OF = {name: f"sd_gym.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "SkipPolicy",
    "__version__",
    "attach",
    "bake",
    "bank",
    "compare",
    "detach",
    "evaluate",
    "export",
    "instances",
    "load",
    "onnx",
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

try:
    from sd_gym.registration import register_env, register_envs, register_observation, registered_ids
except ModuleNotFoundError as error:
    if error.name != "gymnasium":  # without Gymnasium only sd_gym.onnx works
        raise
else:
    register_envs()


def __getattr__(name: str) -> Any:
    """Import names that need torch on demand."""
    if name == "onnx":
        return import_module("sd_gym.onnx")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sd_gym' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, "onnx"})
