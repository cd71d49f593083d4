"""A finished run played again: what its decisions give with the real backbone and data is what it says they gave."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import decisions_hash, evaluate
from sd_gym.agents.experiment.run import run_config
from sd_gym.agents.learning.decisions import SplitDecisions, check_fits, decide_rows, decision_flops, score_decisions
from sd_gym.agents.runs.folder import check_backbone, read_description, read_result

from sd_gym.envs.protocols import Core, Split
from sd_gym.envs.shared import shared_core
from sd_gym.policy import DecisionPolicy
from sd_gym.registry import naming_imports
from sd_gym.tasks.splits import check_unchanged

# Likelihoods differ in their last bits with the batch that they are computed in; a right answer is right.
QUALITY_TOLERANCE = 1e-4
FLOPS_TOLERANCE = 1e-9  # counted, not measured
NOT_REPLAYED = ("policy_flops_counted", "decisions_hash")  # of a result: no outcomes of decisions
SCORES = {"quality": QUALITY_TOLERANCE, "quality_ref": QUALITY_TOLERANCE, "flops_ratio": FLOPS_TOLERANCE}
WITH_POLICY = "flops_ratio_with_policy"


class ReplayError(ValueError):
    """A run says something else than what its decisions give; the message says what."""


class Replay(NamedTuple):
    """What was found to be as the run says.

    Attributes:
        split: Which split.
        instances: How many.
        decided: Whether the folder has the policy, and it decided the same again.
    """

    split: str
    instances: int
    decided: bool

    def words(self) -> list[str]:
        """For the command line."""
        policy = "decides the same again" if self.decided else "is not in the folder, so nobody decided again"
        return [
            f"{self.instances} instances of the {self.split} split: quality and FLOPs of all decisions are as recorded",
            "result.json is what they give; data and backbone are those of the run",
            f"the policy {policy}",
        ]


class Recorded(NamedTuple):
    """What ``instances.csv`` holds, one value an instance.

    Attributes:
        ids: Of the instances.
        decisions: As masks, int64 ``[n, switches + 1]``.
        scores: ``quality``, ``quality_ref``, ``flops_ratio`` and ``flops_ratio_with_policy``; float64 ``[n]`` each.
    """

    ids: list[str]
    decisions: NDArray
    scores: dict[str, NDArray]


def replay(folder: Path) -> Replay:
    """Play a run again: its data, its backbone, the outcome of each decision, its result, and its policy's decisions.

    Args:
        folder: Of a run, or of what ``sd_gym.evaluate`` wrote.

    Raises:
        FileNotFoundError: If it holds no finished run.
        ReplayError: If something is not as the run says.
        ValueError: If what it holds is damaged, or the data or the backbone are others.
    """
    description, result = read_description(folder), read_result(folder)
    with naming_imports(folder):
        core = shared_core(run_config(description))
    check_unchanged(folder, description["data"], core.data)
    check_backbone(folder, description["weights"], core.backbone)
    split = core.split(result["split"])
    file = folder / "instances.csv"
    recorded = read_instances(file, core.decision_nvec)
    _check_instances(file, recorded, split)
    _check_decisions(file, recorded, result)
    decisions = _numbered(file, core, recorded)
    scored = score_decisions(core, split, np.arange(len(split)), decisions)
    for name, tolerance in SCORES.items():
        _check_scores(file, recorded, name, scored[name], tolerance)
    policy = DecisionPolicy.load(folder) if (folder / "policy.safetensors").exists() else None
    if policy is not None:
        _check_policy(file, recorded, core, split, check_fits(policy, core))
    _check_result(folder, result, core, split, recorded, decisions, policy)
    return Replay(result["split"], len(split), policy is not None)


def read_instances(file: Path, nvec: NDArray) -> Recorded:
    """What a run has recorded of each instance.

    Args:
        file: Its ``instances.csv``.
        nvec: Sizes of a mask's components: the core's ``decision_nvec``.

    Raises:
        FileNotFoundError: If there is none.
        ReplayError: If it is damaged.
    """
    if not file.exists():
        raise FileNotFoundError(f"no {file.name} in {file.parent}; expected a finished run, whose decisions are there")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        decisions = [_decision(row["decision"], nvec) for row in rows]
        scores = {name: np.array([float(row[name]) for row in rows]) for name in (*SCORES, "flops_ratio_with_policy")}
        return Recorded([row["id"] for row in rows], np.array(decisions, dtype=np.int64), scores)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(f"{file}: expected a line an instance with its id, decision and scores: {error}") from error


def _decision(digits: str, nvec: NDArray) -> list[int]:
    """A digit a switch, and the token level."""
    switches = len(nvec) - 1
    decision = [*map(int, digits[:switches]), int(digits[switches:])]
    if any(choice >= size for choice, size in zip(decision, nvec, strict=True)):
        raise ValueError(f"{digits!r} is no decision on {switches} switches and {nvec[-1]} token levels")
    return decision


def _check_instances(file: Path, recorded: Recorded, split: Split) -> None:
    ids = [instance.id for instance in split.instances]
    if recorded.ids != ids:
        pairs = zip(recorded.ids, ids, strict=False)
        first = next((f"{was!r} where {now!r} is expected" for was, now in pairs if was != now), "the rest is missing")
        raise ReplayError(f"{file} has {len(recorded.ids)} instances, the {split.name} split {len(ids)}: {first}")


def _check_decisions(file: Path, recorded: Recorded, result: dict[str, Any]) -> None:
    now, was = decisions_hash(recorded.decisions), result.get("decisions_hash")
    if was != now:
        raise ReplayError(f"{file}: decisions were changed: their hash is {now}, and {was} in result.json")


def _numbered(file: Path, core: Core, recorded: Recorded) -> NDArray:
    """The recorded masks as the env's decisions."""
    try:
        return core.from_masks(recorded.decisions)
    except ValueError as error:
        raise ReplayError(f"{file}: {error}") from error


def _check_scores(file: Path, recorded: Recorded, name: str, scored: NDArray, tolerance: float) -> None:
    was = recorded.scores[name]
    differ = np.flatnonzero(~(np.abs(was - scored) <= tolerance))
    if len(differ):
        row = differ[0]
        raise ReplayError(
            f"{file}: {name} of {len(differ)} of {len(was)} instances is not what their decisions give; of "
            f"{recorded.ids[row]!r} it is {was[row]:.6g} there, and {scored[row]:.6g} played again"
        )


def _check_policy(file: Path, recorded: Recorded, core: Core, split: Split, policy: DecisionPolicy) -> None:
    decided = core.to_masks(decide_rows(core, policy, split, np.arange(len(split))))
    differ = np.flatnonzero((decided != recorded.decisions).any(axis=1))
    if len(differ):
        raise ReplayError(
            f"{file}: {len(differ)} of {len(decided)} decisions are not the saved policy's, that of "
            f"{recorded.ids[differ[0]]!r} the first"
        )


def _check_result(
    folder: Path,
    result: dict[str, Any],
    core: Core,
    split: Split,
    recorded: Recorded,
    decisions: NDArray,
    policy: DecisionPolicy | None,
) -> None:
    """Whether ``result.json`` is what ``evaluate`` makes of the decisions."""
    dense = split.costs.dense_flops(np.arange(len(split)))
    if policy is None:
        own = dense * (recorded.scores["flops_ratio_with_policy"] - recorded.scores["flops_ratio"])
    else:
        own = decision_flops(core, policy, split, np.arange(len(split)))
        total = recorded.scores["flops_ratio"] + own / dense
        _check_scores(folder / "instances.csv", recorded, "flops_ratio_with_policy", total, FLOPS_TOLERANCE)
    again = evaluate(core, SplitDecisions(decisions, own), split.name)
    for key, value in again.items():
        if key in result and key not in NOT_REPLAYED:
            _check_same(f"{folder / 'result.json'}: {key}", result[key], value)


def _check_same(where: str, was: Any, now: Any) -> None:
    """Raise ``ReplayError`` at the first value that differs."""
    if isinstance(now, dict) and isinstance(was, dict) and was.keys() == now.keys():
        for key, value in now.items():
            _check_same(f"{where}.{key}", was[key], value)
    elif isinstance(now, list | tuple) and isinstance(was, list | tuple) and len(was) == len(now):
        for number, value in enumerate(now):
            _check_same(f"{where}.{number}", was[number], value)
    elif isinstance(now, float) and isinstance(was, int | float):
        if not math.isclose(was, now, rel_tol=QUALITY_TOLERANCE, abs_tol=QUALITY_TOLERANCE / 10):
            raise ReplayError(f"{where} is {was:.6g} there, and {now:.6g} played again")
    elif was != now:
        raise ReplayError(f"{where} is {was!r} there, and {now!r} played again")
