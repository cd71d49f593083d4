"""Results of a policy on a whole split against the dense backbone, with intervals and measured time."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.experiment.export import leaving
from sd_gym.agents.learning.decisions import (
    PolicyLike,
    SplitDecisions,
    SplitPolicy,
    decide_and_score,
    decision_flops,
    outcomes,
    score_decisions,
)
from sd_gym.agents.runs.statistics import bootstrap_interval
from sd_gym.agents.runs.verdict import Verdict, fewest_instances, losses_allowed, verdict

from sd_gym.backbones import Backbone
from sd_gym.config import RewardConfig
from sd_gym.envs.core import BackboneCore
from sd_gym.envs.exact import normalised_score
from sd_gym.envs.protocols import Core, Split
from sd_gym.envs.regret import best_rewards
from sd_gym.envs.report import by_facts, write_instances
from sd_gym.envs.table import TableCore, TableSplit
from sd_gym.execution.passes import Passes
from sd_gym.execution.split import BackboneSplit
from sd_gym.inference.texts import StagedPasses
from sd_gym.objectives import Objective
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.registry import UnknownNameError

WARM_UP, LEAST_TIMED = 2, 3  # batches
TIMED_SECONDS = 30.0  # after which no further batch is timed: of a large backbone, three batches take minutes


def evaluate(
    core: Core, policy: PolicyLike | SplitDecisions, split_name: str, *, table: Path | None = None
) -> dict[str, Any]:
    """The result on a split, of a policy or of decisions that a ``PrivilegedAgent`` made: in all and by difficulty.

    ``flops_ratio`` is the mean over instances of the backbone's ratio; ``flops_ratio_with_policy`` adds what it costs
    to decide, if ``policy_flops_counted``; ``goes_on`` is the share of answers that were not accepted. ``return`` is
    the mean reward, which no FLOPs of deciding lower; ``regret`` is how much more the best masks of a table would
    earn. Each is ``None`` where it is not known: without a table, or by an objective of a user's own that is not
    registered here. ``normalised_score`` is 0 on the hull of a table's masks and 1 at what full information reaches
    (``sd_gym.envs.exact``). ``metrics`` holds the data set's own metric where it is not the mean quality.
    ``by_difficulty`` has the data's levels, or without levels the quartiles of the dense loss; ``by_fact`` the
    quartiles of all facts of an instance, and ``table`` (a CSV file to write) each of them.
    """
    split = core.split(split_name)
    split.scoring.score_dense()
    rows = np.arange(len(split))
    if isinstance(policy, SplitDecisions):
        scored, flops = score_decisions(core, split, rows, policy.decisions), policy.flops
    else:
        scored, flops = decide_and_score(core, policy, split), decision_flops(core, policy, split, rows)
    own, masks = flops / split.costs.dense_flops(rows), scored["decision"]
    decisions = core.joined(masks, scored["goes_on"])
    if table is not None:
        write_instances(split, scored | {"flops_ratio_with_policy": scored["flops_ratio"] + own}, table)
    epsilon = core.config.reward.epsilon
    return {
        "metrics": {
            "policy": split.scoring.metrics(rows, decisions),
            "dense": split.scoring.metrics(rows, np.zeros_like(masks)),
        },
        "split": split_name,
        "instances": len(split),
        **_means(core, split, scored, own),
        "quality_difference_interval": bootstrap_interval(scored["quality"] - scored["quality_ref"]),
        "fewest_instances": fewest_instances(epsilon),
        "losses_allowed": losses_allowed(len(split), epsilon),
        "decisions_hash": decisions_hash(decisions),
        "epsilon": epsilon,
        "policy_flops_counted": isinstance(policy, SplitDecisions) or policy.flops is not None,
        "decisions_used": len(np.unique(masks, axis=0)),
        "goes_on": float(scored["goes_on"].mean()),
        "by_difficulty": by_difficulty(scored, split.levels),
        "by_fact": by_facts(split, scored),
        "skip_rate": dict(zip(core.backbone.board.names, masks[:, :-1].mean(axis=0).tolist(), strict=True)),
    }


def summary(core: Core, policy: PolicyLike | SplitPolicy, split_name: str) -> dict[str, Any]:
    """The first part of ``evaluate``: means of quality and FLOPs, and the verdict."""
    split = core.split(split_name)
    split.scoring.score_dense()
    scored = outcomes(core, policy, split)
    return _means(core, split, scored, scored["flops_ratio_with_policy"] - scored["flops_ratio"])


def _means(core: Core, split: Split, scored: dict[str, NDArray], own: NDArray) -> dict[str, Any]:
    """Means and the verdict, of scored decisions on a split and the FLOPs ratio ``own [n]`` of deciding."""
    judged = verdict(scored["quality"], scored["quality_ref"], core.config.reward.epsilon)
    return {
        "quality": float(scored["quality"].mean()),
        "quality_ref": float(scored["quality_ref"].mean()),
        "quality_difference": float((scored["quality"] - scored["quality_ref"]).mean()),
        "quality_kept": judged == Verdict.KEPT,
        "verdict": str(judged),
        "flops_ratio": float(scored["flops_ratio"].mean()),
        "flops_ratio_with_policy": float((scored["flops_ratio"] + own).mean()),
        "normalised_score": _normalised_score(core, split, scored, own),
        **_rewards(core.config.reward, split, scored),
    }


def _normalised_score(core: Core, split: Split, scored: dict[str, NDArray], own: NDArray) -> float | None:
    """How far scored decisions are from the hull to full information; ``None`` but on test rows of a table."""
    if not isinstance(core, TableCore) or split.name != "test":
        return None
    loss, flops = scored["quality_ref"] - scored["quality"], scored["flops_ratio"] + own
    return normalised_score(core.folder, float(loss.mean()), float(flops.mean()))


def _rewards(reward: RewardConfig, split: Split, scored: dict[str, NDArray]) -> dict[str, float | None]:
    """The return of scored decisions, and their regret."""
    try:
        objective = Objective(reward)
    except UnknownNameError:  # it belongs to a run, and was registered there
        return {"return": None, "regret": None}
    mean = float(objective.rewards(*(scored[name] for name in ("quality", "quality_ref", "flops_ratio"))).mean())
    best = float(best_rewards(split).mean()) if isinstance(split, TableSplit) else None
    return {"return": mean, "regret": None if best is None else best - mean}


def decisions_hash(decisions: NDArray) -> str:
    """A hash of decisions ``[n, switches + 1]``, which shows whether one was changed later."""
    return hashlib.sha256(np.ascontiguousarray(decisions, dtype="<i8").tobytes()).hexdigest()[:16]


def by_difficulty(scored: dict[str, NDArray], levels: NDArray) -> list[dict[str, Any]]:
    """Means of scored decisions (see ``decide_and_score``) over the instances of each level, of ``levels [n]``."""
    entries = []
    for level in np.unique(levels):
        chosen = levels == level
        means = {name: float(scored[name][chosen].mean()) for name in ("quality", "quality_ref", "flops_ratio")}
        skip_rate = scored["decision"][chosen, :-1].mean(axis=0).tolist()
        entries.append({"difficulty": int(level), "instances": int(chosen.sum()), **means, "skip_rate": skip_rate})
    return entries


@torch.inference_mode()
def time_ratio(
    core: BackboneCore, policy: PolicyLike, split_name: str, batch_size: int, batches: int = 12
) -> dict[str, float | None]:
    """Time of deciding and the switched backbone over that of the dense one, end to end.

    From tokenised texts to logits, of random batches. The dense backbone runs a batch in one pass, padded to its
    longest row. The policy's side observes, decides, ranks tokens where some are dropped (with statistics of the
    training split at hand), and runs the passes that the env runs: by decision, and by length where that pays. Passes
    by length, and cut inputs, save time without any decision; so they are timed as controls. All take turns, after a
    warm-up; ``batches`` of them, or fewer where they take long.

    Returns:
        Medians over batches of times over the dense one: ``time_ratio``; ``dense_by_length``, the dense backbone in
        passes cut by length alone; ``dense_shortened``, the dense backbone on inputs that are all cut to the share of
        tokens that the policy keeps (``None`` where an env drops none). And of the same batches, summed:
        ``flops_ratio`` of the rows alone, and ``executed_ratio``, executed FLOPs, padding included, over those of the
        dense pass.
    """
    split = core.split(split_name)
    # A policy that looks at answers runs as it does elsewhere, in one pass and what goes on; else as in the env.
    artefact = None
    if core.has_answer_stage and isinstance(policy, DecisionPolicy):
        artefact = leaving(core, policy, (), {})
    random = np.random.default_rng(0)
    times: list[list[float]] = []
    flops = np.zeros(4)
    started = time.perf_counter()
    for number in range(batches + WARM_UP):
        if len(times) >= LEAST_TIMED and time.perf_counter() - started > TIMED_SECONDS:
            break
        rows = random.integers(len(split), size=min(batch_size, len(split)))
        decisions, _ = core.rollout(split, rows, policy.decide)
        level = core.to_masks(decisions)[:, -1]
        runs = _contestants(core, policy, artefact, split, rows, level)
        dense, *others = [_seconds(run, core.backbone) for run in runs]
        if number < WARM_UP:
            continue
        times.append([seconds / dense for seconds in others])
        nothing, everything = np.zeros_like(decisions), [np.arange(len(rows))]
        parts = core.stage_observation.parts(split, rows, decisions)
        if artefact is not None:
            parts = [picked for picked, _ in split.passes.planned(rows, core.to_masks(nothing))]
        flops += (
            split.costs.flops(rows, decisions).sum(),
            split.costs.dense_flops(rows).sum(),
            split.costs.executed_flops(rows, decisions, parts),
            split.costs.executed_flops(rows, nothing, everything),
        )
    switched, by_length, *shortened = (statistics.median(ratios) for ratios in zip(*times, strict=True))
    return {
        "time_ratio": switched,
        "dense_by_length": by_length,
        "dense_shortened": shortened[0] if shortened else None,
        "flops_ratio": float(flops[0] / flops[1]),
        "executed_ratio": float(flops[2] / flops[3]),
    }


def _contestants(
    core: BackboneCore,
    policy: PolicyLike,
    artefact: SkipPolicy | None,
    split: BackboneSplit,
    rows: NDArray,
    level: NDArray,
) -> list[Callable[[], object]]:
    """Dense; with the policy; dense in passes by length; where tokens are dropped, dense on shorter inputs.

    Where the policy judges texts, all but the last one write them.
    """
    backbone, everything = core.backbone, np.arange(len(rows))
    unseen, again = split.unseen(rows), split.unseen(rows)
    nothing = np.zeros((len(rows), len(core.decision_nvec)), dtype=np.int64)
    writes = core.has_answer_stage and not backbone.head.judges_passes

    def dense() -> None:
        inputs = split.passes.inputs(rows)
        split.passes.generated_batch(rows, nothing, inputs, judges=False) if writes else backbone.logits(inputs)

    def by_length(passes: Passes) -> None:
        passes.generated(everything, nothing) if writes else list(passes.logits(everything, nothing))

    def decided() -> None:
        if artefact is None:
            list(core.decided_logits(unseen, everything, policy.decide))
        else:
            by_length(StagedPasses(unseen, artefact))

    def shortened() -> None:
        inputs = split.passes.inputs(rows)
        longest = inputs["input_ids"].shape[1]
        share = split.tokens.kept_length(rows, level).sum() / split.encoded.source_length[rows].sum()
        length = max(1, round(share * longest))
        columns = slice(-length, None) if backbone.head.padding_side == "left" else slice(length)
        backbone.logits({name: value if name == "labels" else value[:, columns] for name, value in inputs.items()})

    shortening = [shortened] if len(core.config.tokens.shares) > 1 else []
    return [dense, decided, lambda: by_length(again.passes), *shortening]


def _seconds(run: Callable[[], object], backbone: Backbone) -> float:
    """How long a run takes, dense unless it decides otherwise itself."""
    device, board = backbone.model.device, backbone.board
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    with board.decide(np.zeros((1, len(board)), dtype=bool)):  # a policy attached to the model does not count
        wait()
        started = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - started
