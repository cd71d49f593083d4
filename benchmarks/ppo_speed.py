"""How long PPO takes on a Mini env, and where the time goes: the backbone, the policy, or the bookkeeping around them.

    python benchmarks/ppo_speed.py --steps 200000

Learning alone, without model selection. "backbone" is the frozen model's forward pass (a decision that was scored for
the same instance before is not run again); "policy" is deciding, and learning from the rollouts; what is left is
bookkeeping: drawing instances, batches, infos, TensorBoard.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
from rich.console import Console
from rich.table import Table
from sd_gym.agents.registry import agent_class, make_agent
from stable_baselines3.common.logger import configure

import sd_gym  # noqa: F401  (registers the ids)


class Stopwatch:
    """Adds up the seconds inside of methods."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, part: str, owner: Any, method: str) -> None:
        """Count the time inside of ``owner.method`` for ``part``."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        setattr(owner, method, timed)


def main() -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="SD/Classification-Mini-v0")
    parser.add_argument("--algo", default="ppo", help="ppo, a2c, or either with _lex or _lagrangian")
    parser.add_argument("--steps", type=int, default=200_000)
    arguments = parser.parse_args()
    env = gym.make_vec(arguments.env, num_envs=agent_class(arguments.algo).Settings().num_envs).unwrapped
    agent = make_agent(arguments.algo, env, seed=0)
    env.reset(seed=0)
    watch = Stopwatch()
    watch.watch("backbone", type(env.core.backbone), "logits")
    watch.watch("policy", agent.algorithm.policy, "forward")
    watch.watch("policy", agent.algorithm, "train")
    ratios: list[float] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        logger = configure(folder, ["tensorboard"])
        agent.learn(arguments.steps, logger, lambda rollout: ratios.append(rollout.infos["flops_ratio"].mean()))
        logger.close()
    seconds = time.perf_counter() - started
    watch.seconds["bookkeeping"] = seconds - sum(watch.seconds.values())
    title = f"{arguments.env}, {arguments.algo}, {arguments.steps:,} decisions in {seconds:.0f} s"
    caption = f"FLOPs ratio of the first rollout {ratios[0]:.2f}, of the last {ratios[-1]:.2f}"
    table = Table(title=title, caption=caption)
    for column in ("", "seconds", "share"):
        table.add_column(column, justify="right")
    for part, value in watch.seconds.items():
        table.add_row(part, f"{value:.1f}", f"{value / seconds:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
