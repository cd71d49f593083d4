"""Results of a policy on a split compared with the dense backbone, with intervals and measured time."""

import hashlib
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.experiment.by_instance import by_facts, write_instances
from sd_gym.agents.experiment.export import export
from sd_gym.agents.learning.decisions import PolicyLike, SplitPolicy, outcomes
from sd_gym.agents.runs.verdict import (
    CONFIDENCE,
    Verdict,
    difference_interval,
    fewest_instances,
    losses_allowed,
    verdict,
)

from sd_gym.backbones import Backbone
from sd_gym.envs.core import BackboneCore
from sd_gym.envs.exact import best_rewards, normalised_score
from sd_gym.envs.protocols import SCORES, Core, Split
from sd_gym.envs.table import TableCore, TableSplit
from sd_gym.execution.passes import Passes
from sd_gym.execution.split import BackboneSplit
from sd_gym.inference.staged_passes import StagedPasses
from sd_gym.objectives import Objective
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.registry import UnknownNameError
from sd_gym.switch import first_layer_input
from sd_gym.tasks.difficulty import means_by

WARM_UP, LEAST_TIMED = 2, 3  # queues before timing; fewest timed queues
TIMED_ROWS = 64  # rows from which batches of several rows are taken
TIMED_BULK_ROWS = 256  # rows that run in bulk, where no text is generated
TIMED_SECONDS = 30.0  # after which no further queue is timed: three queues of a large backbone take minutes


def evaluate(
    core: Core, policy: PolicyLike | SplitPolicy, split_name: str, *, table: Path | None = None
) -> dict[str, Any]:
    """The result of a policy on a split; ``table`` is a CSV file for the results of each instance.

    Returns:
        ``flops_ratio`` is the mean over instances of the backbone's ratio; ``flops_ratio_with_policy`` adds the FLOPs
        of deciding, if ``policy_flops_counted``. ``goes_on`` is the share of rows that went on. ``return``
        is the mean reward, which FLOPs of deciding do not lower; ``regret`` is how much more the best masks of a table
        would earn. Both are ``None`` if unknown: without a table, or with an unregistered objective.
        ``normalised_score`` is 0 on the hull of a table's masks and 1 for full information (``sd_gym.envs.exact``).
        ``metrics`` has the data set's own metric if it is not the mean quality. ``by_difficulty`` has the data's
        levels, or else the quartiles of the dense loss; ``by_fact`` has the quartiles of each fact of the instances.
    """
    split = core.split(split_name)
    split.scoring.score_dense()
    rows, scored = np.arange(len(split)), outcomes(core, policy, split)
    masks = scored["decision"]
    decisions = core.joined(masks, scored["goes_on"])
    if table is not None:
        write_instances(split, scored, table)
    epsilon = core.config.reward.epsilon
    metrics = split.scoring.metrics
    highest = split.scoring.highest
    return {
        "metrics": {"policy": metrics(rows, decisions), "dense": metrics(rows, np.zeros_like(masks))},
        "split": split_name,
        "instances": len(split),
        **_means(core, split, scored, CONFIDENCE),
        "quality_difference_interval": difference_interval(scored["quality"], scored["quality_ref"], highest),
        "highest_quality": highest,
        "fewest_instances": fewest_instances(epsilon, highest) if epsilon else None,  # None: no number is enough
        "losses_allowed": losses_allowed(len(split), epsilon, highest=highest),
        "decisions_hash": decisions_hash(decisions),
        "epsilon": epsilon,
        "policy_flops_counted": isinstance(policy, SplitPolicy) or policy.flops is not None,
        "decisions_used": len(np.unique(masks, axis=0)),
        "goes_on": float(scored["goes_on"].mean()),
        "by_difficulty": by_difficulty(scored, split.levels),
        "by_fact": by_facts(split, scored),
        "skip_rate": dict(zip(core.backbone.board.names, masks[:, :-1].mean(axis=0).tolist(), strict=True)),
    }


def summary(
    core: Core, policy: PolicyLike | SplitPolicy, split_name: str, confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """The first part of ``evaluate``: means of quality and FLOPs, and the verdict with this ``confidence``."""
    split = core.split(split_name)
    split.scoring.score_dense()
    return _means(core, split, outcomes(core, policy, split), confidence)


def _means(core: Core, split: Split, scored: dict[str, NDArray], confidence: float) -> dict[str, Any]:
    reward, difference = core.config.reward, scored["quality"] - scored["quality_ref"]
    judged = verdict(scored["quality"], scored["quality_ref"], reward.epsilon, confidence, split.scoring.highest)
    flops = float(scored["flops_ratio_with_policy"].mean())
    score = None
    mean = None
    regret = None
    if isinstance(core, TableCore) and split.name == "test":
        score = normalised_score(core.folder, float(-difference.mean()), flops)
    with suppress(UnknownNameError):  # a run's own objective is registered only where it was trained
        mean = float(Objective(reward).rewards(*(scored[name] for name in SCORES)).mean())
        regret = float(best_rewards(split).mean()) - mean if isinstance(split, TableSplit) else None
    return {
        "quality": float(scored["quality"].mean()),
        "quality_ref": float(scored["quality_ref"].mean()),
        "quality_difference": float(difference.mean()),
        "quality_kept": judged == Verdict.KEPT,
        "verdict": str(judged),
        "flops_ratio": float(scored["flops_ratio"].mean()),
        "flops_ratio_with_policy": flops,
        "normalised_score": score,
        "return": mean,
        "regret": regret,
    }


def decisions_hash(decisions: NDArray) -> str:
    """A hash of decisions ``[n, switches + 1]``, to detect later changes."""
    return hashlib.sha256(np.ascontiguousarray(decisions, dtype="<i8").tobytes()).hexdigest()[:16]


def by_difficulty(scored: dict[str, NDArray], levels: NDArray) -> list[dict[str, Any]]:
    """Means of scored decisions (see ``outcomes``) by the instances' ``levels [n]``."""
    columns = {
        **{name: scored[name] for name in (*SCORES, "flops_ratio_with_policy")},
        "skip_rate": scored["decision"][:, :-1],
    }
    return [{"difficulty": means.pop("group"), **means} for means in means_by(levels, columns)]


@torch.inference_mode()
def time_ratio(
    core: BackboneCore, policy: PolicyLike, split_name: str, batch_size: int | None, batches: int = 12
) -> dict[str, float | None]:
    """Time of deciding and of the switched backbone, over the time of the dense one, end to end.

    Rows run from tokenised texts to logits: single rows (``batch_size=1``), queues of ``TIMED_ROWS`` random rows in
    passes of at most ``batch_size``, or ``TIMED_BULK_ROWS`` rows in passes of any size (``None``: in bulk; of generated
    texts ``TIMED_ROWS``).

    The dense backbone takes rows as they come, each pass padded to its longest row; in bulk, by length. With the
    policy, a queue is observed and decided on. It then runs in the passes of the env: by decision, and by length where
    that pays. Tokens are ranked if some are dropped.

    Passes by length and shorter inputs save time without any decision, so both are timed as controls, except in bulk.
    Each queue times everything, after a warm-up. There are as many queues as give ``batches`` passes, in bulk three,
    and fewer on large backbones.

    Returns:
        Medians over queues of times over the dense one: ``time_ratio``; ``dense_by_length``, the dense backbone in
        passes by length alone; ``dense_shortened``, the dense backbone on inputs that are all cut to the share of
        tokens that the policy keeps (``None`` if the env drops none).
    """
    split = core.split(split_name)
    # A policy with several stages runs like an artefact: in passes by length, then the rest for rows that go on. Others
    # run as in the env.
    artefact = None
    if core.is_staged and isinstance(policy, DecisionPolicy):
        artefact = export(core, policy, (), {})
    random, ratios = np.random.default_rng(0), list[dict[str, float]]()
    warm_up, least = (WARM_UP, LEAST_TIMED) if batch_size else (1, 1)
    rows_of = 1 if batch_size == 1 else TIMED_BULK_ROWS if batch_size is None and not _generates(core) else TIMED_ROWS
    count = min(rows_of, len(split))
    started, queues = time.perf_counter(), max(LEAST_TIMED, batches * (batch_size or 0) // count)
    for number in range(queues + warm_up):
        if len(ratios) >= least and time.perf_counter() - started > TIMED_SECONDS:
            break
        rows = random.integers(len(split), size=count)
        dense, runs = _timed_runs(core, policy, artefact, split, rows, batch_size)
        dense_seconds = _seconds(dense, core.backbone)
        seconds = {name: _seconds(run, core.backbone) for name, run in runs.items()}
        if number >= warm_up:
            ratios.append({name: value / dense_seconds for name, value in seconds.items()})
    medians = {name: statistics.median(ratio[name] for ratio in ratios) for name in ratios[0]}
    return dict.fromkeys(("time_ratio", "dense_by_length", "dense_shortened")) | medians


def _timed_runs(
    core: BackboneCore,
    policy: PolicyLike,
    artefact: SkipPolicy | None,
    split: BackboneSplit,
    rows: NDArray,
    size: int | None,
) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """The dense reference to time, and the functions that are compared with it, by their key in ``time_ratio``.

    In bulk the reference runs by length, so only the policy is compared. If the policy judges generated texts, all
    functions but ``dense_shortened`` generate them.
    """
    backbone, everything = core.backbone, np.arange(len(rows))
    unseen, again = split.uncached(rows), split.uncached(rows)
    unseen.passes.most = again.passes.most = size
    parts = np.split(rows, range(size or len(rows), len(rows), size or len(rows)))
    skip_none = np.zeros((len(rows), len(core.mask_nvec)), dtype=np.int64)
    generates = _generates(core)

    def dense() -> None:
        for part in parts:
            inputs, none = split.passes.inputs(part), skip_none[: len(part)]
            split.passes.generated_batch(part, none, inputs, judges=False) if generates else backbone.logits(inputs)

    def grouped(passes: Passes, decisions: NDArray = skip_none) -> None:
        passes.answers(everything, decisions) if generates else list(passes.logits(everything, decisions))

    def decided() -> None:
        if artefact is None:
            list(core.decided_logits(unseen, everything, policy.decide))
            return
        known = artefact.decides_first and len(rows) > 1  # a single text is decided on in its pass
        passes, decisions = StagedPasses(unseen, artefact, known=known), skip_none
        if known:
            inputs = unseen.encoded.inputs(everything, backbone.model.device)
            first = first_layer_input(backbone.board, inputs), inputs["attention_mask"]
            decisions = artefact.network.decide(passes.observe_first(everything, *first))[:, : skip_none.shape[1]]
        grouped(passes, decisions)

    def shortened() -> None:
        for inputs in map(split.passes.inputs, parts):
            length = max(1, round(share * inputs["input_ids"].shape[1]))
            columns = slice(-length, None) if backbone.head.padding_side == "left" else slice(length)
            backbone.logits({name: value if name == "labels" else value[:, columns] for name, value in inputs.items()})

    dense_by_length = partial(grouped, again.passes)
    if size is None:
        return dense_by_length, {"time_ratio": decided}
    runs: dict[str, Callable[[], object]] = {"time_ratio": decided, "dense_by_length": dense_by_length}
    if len(core.config.tokens.shares) == 1:
        return dense, runs
    level = core.to_masks(core.rollout(split, rows, policy.decide)[0])[:, -1]
    share = split.tokens.kept_length(rows, level).sum() / split.encoded.source_length[rows].sum()
    return dense, {**runs, "dense_shortened": shortened}


def _generates(core: BackboneCore) -> bool:
    """Whether texts are generated to be timed: the policy judges them."""
    return core.has_answer_stage and not core.backbone.head.judges_passes


def _seconds(run: Callable[[], object], backbone: Backbone) -> float:
    """Seconds of a run, which is dense unless it makes decisions of its own."""
    board = backbone.board
    wait = torch.zeros((), device=backbone.model.device).item  # a device runs all that came before, then gives a value
    with board.decide(np.zeros((1, len(board)), dtype=bool)):  # ignore a policy attached to the model
        wait()
        started = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - started
