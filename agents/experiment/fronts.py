"""Fronts of quality and FLOPs on a test split, and how many more FLOPs agents save than control baselines."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines.static import searched_masks
from sd_gym.agents.learning.decisions import check_fits, decide_on, decision_flops, outcomes, score_decisions
from sd_gym.agents.runs.finished_runs import Run, agent_label, finished_runs, group_by_settings
from sd_gym.agents.runs.folder import BLIND, check_backbone, has_policy
from sd_gym.agents.runs.fronts import LEAST, EnvFronts, Front, flops_samples

from sd_gym.backbones import load_backbone
from sd_gym.config import EnvConfig, RewardConfig
from sd_gym.envs.protocols import Core, Split
from sd_gym.envs.shared import shared_core
from sd_gym.policy import DecisionPolicy
from sd_gym.tasks.splits import Splits, check_unchanged

COLUMNS = ["env", "agent", "seeds", "points lost", "FLOPs of hull / blind", "FLOPs (worst)"]
COLUMNS += ["saved more than the hull, points (interval; worst)", "above zero", "than blind", "above zero"]
CONTROLS = ("hull", "blind")
MARGIN_STEP, LARGEST_MARGIN = 0.5, 15.0  # of versions of a policy
COMPARED_LOSSES = (0.25, 0.5)  # as shares of epsilon: about the losses of selected policies


def front_of(core: Core, split: Split, policies: Sequence[DecisionPolicy]) -> Front:
    """Score policies on a whole split; the last point of a front is dense."""
    rows = np.arange(len(split))
    decided = [decide_on(core, policy, split, rows) for policy in policies]
    own = [  # a policy that ignores its input need not run
        decision_flops(core, policy, split, rows) if policy.head.weight.any() and not policy.blind else 0 * rows
        for policy in policies
    ]
    decisions = np.stack([*decided, np.zeros((len(rows), len(core.nvec)))])
    # Versions of a policy agree on most instances: each decision on an instance is scored once.
    pairs = np.column_stack([np.tile(rows, len(decisions)), decisions.reshape(-1, len(core.nvec)).astype(np.int64)])
    different, back = np.unique(pairs, axis=0, return_inverse=True)
    scored = score_decisions(core, split, different[:, 0], different[:, 1:])
    quality, flops = (scored[name][back].reshape(decisions.shape[:2]) for name in ("quality", "flops_ratio"))
    return Front(quality, flops + np.array([*own, 0 * rows]) / split.costs.dense_flops(rows))


def score_fronts(folders: list[Path], test_size: int | None = None) -> list[EnvFronts]:
    """Score all masks of the hull, and operating points of each policy, on the test split.

    Args:
        folders: Of finished runs.
        test_size: Instances, at most; ``None``: those of the runs.

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If no env has runs of a learned agent and of a control, or the data of a run have changed.

    Warns:
        UserWarning: If a folder holds no finished run, or there is no other run to compare it with.
    """
    envs: dict[EnvConfig, dict[str, list[Run]]] = {}
    for run in finished_runs(folders):
        config, algo = run.config, run.config["algo"]
        name = "blind" if algo.startswith(BLIND) else algo if algo == "hull" else agent_label(config)
        if name in CONTROLS or (not config["control"] and has_policy(run.folder)):
            # Rewards may differ, as they change no instance and no quality; only epsilon counts.
            env = run.env.model_copy(update={"reward": RewardConfig(epsilon=run.env.reward.epsilon)})
            envs.setdefault(env, {}).setdefault(name, []).append(run)
    fronts, alone = [], []
    for env, agents in sorted(envs.items(), key=lambda pair: pair[0].model_dump_json()):
        runs = [run for of_agent in agents.values() for run in of_agent]
        if not 0 < sum(name in CONTROLS for name in agents) < len(agents):
            alone += [str(run.folder) for run in runs]
            continue
        data = Splits.of_env(env)
        backbone = load_backbone(env.backbone.name, env.backbone.device)
        for run in runs:
            check_unchanged(run.folder, run.config["data"], data)
            check_backbone(run.folder, run.config["weights"], backbone)
        if test_size is not None:
            env = env.model_copy(update={"data": env.data.model_copy(update={"test_size": test_size})})
        fronts.append(_fronts_of(env, agents))
    if not fronts:
        raise ValueError("expected runs of a learned agent and, on the same env, of hull or a blind agent")
    if alone:
        warnings.warn(
            "left out, as their env's config (training rows included) has no run to compare them with: "
            f"{', '.join(alone)}",
            stacklevel=2,
        )
    return fronts


def _fronts_of(config: EnvConfig, agents: dict[str, list[Run]]) -> EnvFronts:
    core = shared_core(config)
    split = core.split("test")

    def versions_of(run: Run) -> list[DecisionPolicy]:
        policy = check_fits(DecisionPolicy.load(run.folder), core)
        if run.config["algo"] == "hull":
            return [policy.with_decision(mask) for mask in searched_masks(run.folder, core.nvec)]
        return policy_versions(core, policy, config.reward.epsilon, run.result["margin"])

    controls = {
        name: front_of(core, split, [version for run in agents[name] for version in versions_of(run)])
        for name in CONTROLS
        if name in agents
    }
    learned = {
        name: [front_of(core, split, versions_of(run)) for run in runs]
        for agent, of_agent in agents.items()
        if agent not in CONTROLS
        for name, runs in group_by_settings(agent, of_agent)
    }
    return EnvFronts(config.id, config.reward.epsilon, controls, learned)


def policy_versions(core: Core, policy: DecisionPolicy, epsilon: float, margin: float = 0.0) -> list[DecisionPolicy]:
    """Versions of a policy, from bold to cautious: from a loss of epsilon on the test split to a tenth of it.

    ``margin`` is that of ``result.json``; it is taken off, so a policy that was made dense has versions that skip, too.
    """
    policy = policy.with_margin(-margin)

    def loss(margin: float) -> float:
        scored = outcomes(core, policy.with_margin(margin), core.split("test"))
        return float((scored["quality_ref"] - scored["quality"]).mean())

    boldest = cautious = 0.0
    while boldest > -LARGEST_MARGIN and loss(boldest) < epsilon:
        boldest -= MARGIN_STEP
    while cautious < LARGEST_MARGIN and loss(cautious) > LEAST * epsilon:
        cautious += MARGIN_STEP
    return [policy.with_margin(margin) for margin in np.arange(boldest, cautious + MARGIN_STEP / 2, MARGIN_STEP)]


def savings_rows(fronts: EnvFronts) -> list[list[str]]:
    """Rows of ``COLUMNS``: each learned agent compared with the hull and blind agents of the same env, over seeds.

    Fronts are compared at a loss of a quarter and of half of epsilon. Intervals are paired bootstraps over instances
    (``flops_samples``): the interval of the mean over seeds, and how many intervals of single seeds are above zero.
    """
    losses = [share * fronts.epsilon for share in COMPARED_LOSSES]
    controls = {name: flops_samples(front, losses) for name, front in fronts.controls.items()}
    rows = []
    for name, runs in sorted(fronts.learned.items()):
        samples = np.stack([flops_samples(front, losses) for front in runs])  # [runs, losses, 1 + samples]
        for number, loss in enumerate(losses):
            others = [controls[control][number] if control in controls else None for control in CONTROLS]
            costs = " / ".join("-" if other is None else f"{other[0]:.1%}" for other in others)
            own = samples[:, number]
            cells = [cell for other in others for cell in _compared(own, other)]
            flops = f"{own[:, 0].mean():.1%} ({own[:, 0].max():.1%})"
            rows.append([fronts.env, name, str(len(runs)), f"{100 * loss:.2f}", costs, flops, *cells])
    return rows


def _compared(own: NDArray, other: NDArray | None) -> tuple[str, str]:
    """How much more runs ``[runs, 1 + samples]`` save than another front, and how many do so significantly."""
    if other is None:
        return "-", "-"
    more = 100 * (other - own)
    mean = more.mean(axis=0)
    low, high = np.percentile(mean[1:], [2.5, 97.5])
    above = np.percentile(more[:, 1:], 2.5, axis=1) > 0
    return f"{mean[0]:+.1f} ({low:+.1f} to {high:+.1f}; worst {more[:, 0].min():+.1f})", f"{above.sum()} of {len(own)}"
