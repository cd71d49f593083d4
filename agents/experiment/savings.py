"""How much more of the FLOPs agents save than what needs no learning, at the same quality."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines.static import searched_masks
from sd_gym.agents.experiment.fronts import front_of
from sd_gym.agents.learning.decisions import check_fits, decide_and_score
from sd_gym.agents.runs.finished import Run, agent_label, finished_runs, group_by_settings, read_run
from sd_gym.agents.runs.folder import BLIND, check_backbone, has_policy
from sd_gym.agents.runs.fronts import LEAST, EnvFronts, Front, flops_samples

from sd_gym.backbones import load_backbone
from sd_gym.config import EnvConfig, RewardConfig
from sd_gym.envs.protocols import Core
from sd_gym.envs.shared import shared_core
from sd_gym.policy import DecisionPolicy
from sd_gym.tasks.splits import Splits, check_unchanged

COLUMNS = [
    "env",
    "agent",
    "seeds",
    "points lost",
    "FLOPs of static / blind",
    "FLOPs (worst)",
    "saved more than static masks, points (interval; worst)",
    "above zero",
    "than blind",
    "above zero",
]
BESIDE = ("static", "blind")  # what learned agents are compared with
STEP, FURTHEST = 0.5, 15.0  # margins of bolder and more cautious versions of a policy
READ = (0.25, 0.5)  # losses that fronts are read at, as shares of epsilon: about what selected policies lose


def env_fronts(folders: list[Path], test_size: int | None = None) -> list[EnvFronts]:
    """Score all masks that were searched, and bolder and more cautious versions of each policy, on the test split.

    Args:
        folders: Of the runs.
        test_size: Instances of the test split to score, if there are so many; ``None``: those that the runs had.

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If there is no env with a learned agent and with a control, or the data of a run have changed.

    Warns:
        UserWarning: If folders hold no finished run, or runs are left out, since there is nothing to compare them with
            on the same env.
    """
    envs: dict[EnvConfig, dict[str, list[Run]]] = {}
    for folder in finished_runs(folders):
        run = read_run(folder)
        config, algo = run.config, run.config["algo"]
        name = "blind" if algo.startswith(BLIND) else algo if algo == "static" else agent_label(config)
        if name in BESIDE or (not config["control"] and has_policy(folder)):
            envs.setdefault(_env_of(run), {}).setdefault(name, []).append(run)
    found, alone = [], []
    for env, agents in sorted(envs.items(), key=lambda pair: pair[0].model_dump_json()):
        runs = [run for of_agent in agents.values() for run in of_agent]
        if 0 < sum(name in BESIDE for name in agents) < len(agents):
            data, backbone = Splits(env.data, env.task), load_backbone(env.backbone.name, env.backbone.device)
            for run in runs:
                check_unchanged(run.folder, run.config["data"], data)
                check_backbone(run.folder, run.config["weights"], backbone)
            found.append(_fronts_of(_resized(env, test_size), agents))
        else:
            alone += [str(run.folder) for run in runs]
    if not found:
        raise ValueError("expected runs of a learned agent and, on the same env, of static or a blind agent")
    if alone:
        warnings.warn(
            f"left out, as their env's config (the rows that were trained on are part of it) has no run to compare "
            f"them with: {', '.join(alone)}",
            stacklevel=2,
        )
    return found


def savings(fronts: EnvFronts) -> list[list[str]]:
    """Rows of ``COLUMNS``: each learned agent beside the static masks and the blind agents of the same env, over seeds.

    What lies on their fronts at a loss of a quarter and of half of epsilon is compared. Intervals are paired bootstraps
    over instances (``flops_samples``): that of the mean over seeds, and how many seeds' own ones are above zero.
    """
    losses = [share * fronts.epsilon for share in READ]
    controls = {name: flops_samples(front, losses) for name, front in fronts.controls.items()}
    rows = []
    for name, runs in sorted(fronts.learned.items()):
        read = np.stack([flops_samples(front, losses) for front in runs])  # [runs, losses, 1 + samples]
        for number, loss in enumerate(losses):
            others = [controls[control][number] if control in controls else None for control in BESIDE]
            costs = " / ".join("-" if other is None else f"{other[0]:.1%}" for other in others)
            own = read[:, number]
            cells = [cell for other in others for cell in _compared(own, other)]
            flops = f"{own[:, 0].mean():.1%} ({own[:, 0].max():.1%})"
            rows.append([fronts.env, name, str(len(runs)), f"{100 * loss:.2f}", costs, flops, *cells])
    return rows


def _env_of(run: Run) -> EnvConfig:
    """Its env's config but for what changes no instance and no quality: of the reward, all but epsilon."""
    return run.env.model_copy(update={"reward": RewardConfig(epsilon=run.env.reward.epsilon)})


def _resized(env: EnvConfig, test_size: int | None) -> EnvConfig:
    """With so many instances of the test split; ``None``: as it is."""
    if test_size is None:
        return env
    return env.model_copy(update={"data": env.data.model_copy(update={"test_size": test_size})})


def _fronts_of(config: EnvConfig, agents: dict[str, list[Run]]) -> EnvFronts:
    core = shared_core(config)

    def front(policies: list[DecisionPolicy]) -> Front:
        return front_of(core, core.split("test"), policies)

    def versions_of(run: Run) -> list[DecisionPolicy]:
        policy = check_fits(DecisionPolicy.load(run.folder), core)
        return versions(core, policy, config.reward.epsilon, run.result.get("margin", 0.0))

    masks = [
        check_fits(DecisionPolicy.load(run.folder), core).with_decision(mask)
        for run in agents.get("static", [])
        for mask in searched_masks(run.folder, core.nvec)
    ]
    blind = [version for run in agents.get("blind", []) for version in versions_of(run)]
    controls = {name: front(policies) for name, policies in zip(BESIDE, (masks, blind), strict=True) if policies}
    learned = {
        name: [front(versions_of(run)) for run in runs]
        for agent, of_agent in agents.items()
        if agent not in BESIDE
        for name, runs in group_by_settings(agent, of_agent)
    }
    return EnvFronts(config.id, config.reward.epsilon, controls, learned)


def versions(core: Core, policy: DecisionPolicy, epsilon: float, margin: float = 0.0) -> list[DecisionPolicy]:
    """Versions of a policy, from bolder to more cautious: from a loss of epsilon on the test split to a tenth of it.

    Args:
        core: The env's core.
        policy: A selected one.
        epsilon: Quality that may be lost.
        margin: With which it was selected (``result.json``), so that one that was made dense has bolder versions too.
    """
    policy = policy.with_margin(-margin)

    def lost(margin: float) -> float:
        scored = decide_and_score(core, policy.with_margin(margin), core.split("test"))
        return float((scored["quality_ref"] - scored["quality"]).mean())

    return [policy.with_margin(margin) for margin in margins(lost, epsilon)]


def margins(lost: Callable[[float], float], epsilon: float) -> NDArray:
    """Margins from a loss of epsilon to a tenth of it, where ``lost`` says how much quality is lost at one."""
    boldest = cautious = 0.0
    while boldest > -FURTHEST and lost(boldest) < epsilon:
        boldest -= STEP
    while cautious < FURTHEST and lost(cautious) > LEAST * epsilon:
        cautious += STEP
    return np.arange(boldest, cautious + STEP / 2, STEP)


def _compared(own: NDArray, other: NDArray | None) -> tuple[str, str]:
    """What runs ``[runs, 1 + samples]`` save more than another front, and how many of the runs surely do."""
    if other is None:
        return "-", "-"
    more = 100 * (other - own)
    mean = more.mean(axis=0)
    low, high = np.percentile(mean[1:], [2.5, 97.5])
    above = np.percentile(more[:, 1:], 2.5, axis=1) > 0
    return f"{mean[0]:+.1f} ({low:+.1f} to {high:+.1f}; worst {more[:, 0].min():+.1f})", f"{above.sum()} of {len(own)}"
