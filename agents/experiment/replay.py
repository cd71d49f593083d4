"""A finished run played again: its recorded decisions are scored with the real backbone and data, and compared."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import decisions_hash, evaluate
from sd_gym.agents.experiment.run import core_of_run
from sd_gym.agents.learning.decisions import SplitDecisions, check_fits, decision_flops, evaluator, score_decisions
from sd_gym.agents.runs.folder import has_policy, read_description, read_result

from sd_gym.envs.protocols import Split
from sd_gym.policy import DecisionPolicy
from sd_gym.registry import naming_imports

# Likelihoods differ in their last bits with the batch that they are computed in; a right answer is right.
QUALITY_TOLERANCE = 1e-4
FLOPS_TOLERANCE = 1e-9  # counted, not measured
NOT_REPLAYED = ("policy_flops_counted", "decisions_hash")  # of a result: no outcomes of decisions
SCORES = {"quality": QUALITY_TOLERANCE, "quality_ref": QUALITY_TOLERANCE, "flops_ratio": FLOPS_TOLERANCE}


class ReplayError(ValueError):
    """A run records something else than its decisions give; the message says what."""


class Replay(NamedTuple):
    """A run that was confirmed; ``decided`` says whether the folder has the policy, and it decided the same again."""

    split: str
    instances: int
    decided: bool

    def lines(self) -> list[str]:
        """For the command line."""
        policy = "decides the same again" if self.decided else "is not in the folder, so nobody decided again"
        return [
            f"{self.instances} instances of the {self.split} split: quality and FLOPs of all decisions are as recorded",
            "result.json is what they give; data and backbone are those of the run",
            f"the policy {policy}",
        ]


class RecordedInstances(NamedTuple):
    """The content of ``instances.csv``, one value per instance."""

    ids: list[str]
    decisions: NDArray  # as masks, int64 [n, switches + 1]
    goes_on: NDArray  # which rows went on after their answer, bool [n]
    scores: dict[str, NDArray]  # quality, quality_ref, flops_ratio and flops_ratio_with_policy; float64 [n] each


def replay(folder: Path) -> Replay:
    """Play a run again: its data, its backbone, the outcome of each decision, its result, and its policy's decisions.

    The folder is of a run, or of what ``sd_gym.evaluate`` wrote; raises ``FileNotFoundError`` if it holds no finished
    run, ``ReplayError`` if something is not as recorded, ``ValueError`` if a file is damaged, or the data or the
    backbone have changed.
    """
    description, result = read_description(folder), read_result(folder)
    with naming_imports(folder):
        core = core_of_run(folder, description)
    split, file = core.split(result["split"]), folder / "instances.csv"
    rows = np.arange(len(split))
    recorded = read_instances(file, core.decision_nvec)
    _check_instances(file, recorded, split)
    try:
        decisions = core.from_masks(recorded.decisions)
    except ValueError as error:
        raise ReplayError(f"{file}: {error}") from error
    if core.has_answer_stage:
        decisions[:, -1] = recorded.goes_on
    if (now := decisions_hash(core.joined(recorded.decisions, recorded.goes_on))) != (
        was := result.get("decisions_hash")
    ):
        raise ReplayError(f"{file}: decisions were changed: their hash is {now}, and {was} in result.json")
    scored = score_decisions(core, split, rows, decisions)
    for name, tolerance in SCORES.items():
        _check_scores(file, recorded, name, scored[name], tolerance)
    policy = check_fits(DecisionPolicy.load(folder), core) if has_policy(folder) else None
    dense = split.costs.dense_flops(rows)
    if policy is None:
        own = dense * (recorded.scores["flops_ratio_with_policy"] - recorded.scores["flops_ratio"])
    else:
        decided = evaluator(core).decide(policy, split, rows)
        if len(differ := np.flatnonzero((decided != decisions).any(axis=1))):
            raise ReplayError(
                f"{file}: {len(differ)} of {len(decided)} decisions are not the saved policy's, that of "
                f"{recorded.ids[differ[0]]!r} the first"
            )
        own = decision_flops(core, policy, split, rows)
        total = recorded.scores["flops_ratio"] + own / dense
        _check_scores(file, recorded, "flops_ratio_with_policy", total, FLOPS_TOLERANCE)
    for key, value in evaluate(core, SplitDecisions(decisions, own), split.name).items():
        if key in result and key not in NOT_REPLAYED:
            _check_same(f"{folder / 'result.json'}: {key}", result[key], value)
    return Replay(result["split"], len(split), policy is not None)


def read_instances(file: Path, nvec: NDArray) -> RecordedInstances:
    """The recorded instances of a run, from its ``instances.csv``.

    ``nvec`` is the core's ``decision_nvec``; raises ``FileNotFoundError`` if there is none, ``ReplayError`` if damaged.
    """
    if not file.exists():
        raise FileNotFoundError(f"no {file.name} in {file.parent}; expected a finished run, whose decisions are there")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        decisions = [_decision(row["decision"], nvec) for row in rows]
        scores = {name: np.array([float(row[name]) for row in rows]) for name in (*SCORES, "flops_ratio_with_policy")}
        goes_on = np.array([row["goes_on"] == "True" for row in rows])
        return RecordedInstances([row["id"] for row in rows], np.array(decisions, dtype=np.int64), goes_on, scores)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplayError(f"{file}: expected a line an instance with its id, decision and scores: {error}") from error


def _decision(digits: str, nvec: NDArray) -> list[int]:
    """A digit per switch, and the token level."""
    switches = len(nvec) - 1
    decision = [*map(int, digits[:switches]), int(digits[switches:])]
    if any(choice >= size for choice, size in zip(decision, nvec, strict=True)):
        raise ValueError(f"{digits!r} is no decision on {switches} switches and {nvec[-1]} token levels")
    return decision


def _check_instances(file: Path, recorded: RecordedInstances, split: Split) -> None:
    ids = [instance.id for instance in split.instances]
    if recorded.ids != ids:
        pairs = zip(recorded.ids, ids, strict=False)
        first = next((f"{was!r} where {now!r} is expected" for was, now in pairs if was != now), "the rest is missing")
        raise ReplayError(f"{file} has {len(recorded.ids)} instances, the {split.name} split {len(ids)}: {first}")


def _check_scores(file: Path, recorded: RecordedInstances, name: str, scored: NDArray, tolerance: float) -> None:
    was = recorded.scores[name]
    if len(differ := np.flatnonzero(~(np.abs(was - scored) <= tolerance))):
        row = differ[0]
        raise ReplayError(
            f"{file}: {name} of {len(differ)} of {len(was)} instances is not what their decisions give; of "
            f"{recorded.ids[row]!r} it is {was[row]:.6g} there, and {scored[row]:.6g} played again"
        )


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
