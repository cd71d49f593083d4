"""Replay of a finished run: its recorded decisions are scored again with the real backbone and data."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment.evaluation import decisions_hash, evaluate
from sd_gym.agents.experiment.trained import core_of_run, moved
from sd_gym.agents.learning.decisions import SplitDecisions, check_fits, decide_on, decision_flops, score_decisions
from sd_gym.agents.runs.folder import instance_rows, read_description, read_result

from sd_gym.envs.protocols import Split
from sd_gym.policy import DecisionPolicy
from sd_gym.registry import naming_imports

QUALITY_TOLERANCE = 1e-4  # likelihoods depend on their batch in the last bits
FLOPS_TOLERANCE = 1e-9  # counted, not measured
NOT_REPLAYED = ("policy_flops_counted", "decisions_hash")  # keys of a result that do not follow from decisions
TOLERANCES = {"quality": QUALITY_TOLERANCE, "quality_ref": QUALITY_TOLERANCE, "flops_ratio": FLOPS_TOLERANCE}


class ReplayError(ValueError):
    """The decisions of a run do not give what it has recorded; the message says where."""


class Replay(NamedTuple):
    """A confirmed run. ``has_policy``: whether its folder has the policy, which decided the same again."""

    split: str
    instances: int
    has_policy: bool

    def lines(self) -> list[str]:
        """The outcome as lines of the command's output."""
        policy = (
            "decides the same again" if self.has_policy else "is not in the folder, so only its decisions were replayed"
        )
        return [
            f"{self.instances} instances of the {self.split} split: quality and FLOPs of all decisions are as recorded",
            "result.json follows from them; data and backbone are those of the run",
            f"the policy {policy}",
        ]


class RecordedInstances(NamedTuple):
    """The content of ``instances.csv``."""

    ids: list[str]
    decisions: NDArray  # masks, int64 [n, switches + 1]
    goes_on: NDArray  # which rows went on after their answer, bool [n]
    scores: dict[str, NDArray]  # those of ``TOLERANCES``, and flops_ratio_with_policy; float64 [n] each


def replay(folder: Path, places: Mapping[str, Any] | None = None) -> Replay:
    """Replay a run: its data, its backbone, the outcome of each decision, its result, and its policy's decisions.

    The folder is that of a run or of ``sd_gym.evaluate``. ``places``: see ``sd_gym.agents.experiment.trained.moved``.

    Raises:
        FileNotFoundError: If it holds no finished run.
        ReplayError: If something is not as recorded.
        ValueError: If a file is damaged, or the data or the backbone have changed.
    """
    description, result = moved(read_description(folder), places or {}), read_result(folder)
    with naming_imports(folder):
        core = core_of_run(folder, description)
    split, file = core.split(result["split"]), folder / "instances.csv"
    rows = np.arange(len(split))
    recorded = read_instances(file, core.mask_nvec)
    _check_instances(file, recorded, split)
    try:
        decisions = core.from_masks(recorded.decisions)
    except ValueError as error:
        raise ReplayError(f"{file}: {error}") from error
    if core.has_answer_stage:
        decisions[:, -1] = recorded.goes_on
    now, was = decisions_hash(core.joined(recorded.decisions, recorded.goes_on)), result["decisions_hash"]
    if now != was:
        raise ReplayError(f"{file}: decisions were changed: their hash is {now}, and {was} in result.json")
    scored = score_decisions(core, split, rows, decisions)
    for name, tolerance in TOLERANCES.items():
        _check_scores(file, recorded, name, scored[name], tolerance)
    # A ``PrivilegedAgent`` and ``sd_gym.evaluate`` leave no policy.
    has_policy = (folder / "policy.safetensors").exists()
    policy = check_fits(DecisionPolicy.load(folder), core) if has_policy else None
    dense = split.costs.dense_flops(rows)
    if policy is None:
        own = dense * (recorded.scores["flops_ratio_with_policy"] - recorded.scores["flops_ratio"])
    else:
        decided = decide_on(core, policy, split, rows)
        again, were = (core.joined(core.to_masks(made), core.goes_on(made)) for made in (decided, decisions))
        if len(differ := np.flatnonzero((again != were).any(axis=1))):
            raise ReplayError(
                f"{file}: {len(differ)} of {len(decided)} decisions are not the saved policy's, first "
                f"that of {recorded.ids[differ[0]]!r}"
            )
        own = decision_flops(core, policy, split, rows)
        total = recorded.scores["flops_ratio"] + own / dense
        _check_scores(file, recorded, "flops_ratio_with_policy", total, FLOPS_TOLERANCE)
    for key, value in evaluate(core, SplitDecisions(decisions, own), split.name).items():
        unknown = value is None and key in ("return", "regret")  # the objective is the user's, and not imported
        if key in result and key not in NOT_REPLAYED and not unknown:
            _check_same(f"{folder / 'result.json'}: {key}", result[key], value)
    return Replay(result["split"], len(split), policy is not None)


def read_instances(file: Path, nvec: NDArray) -> RecordedInstances:
    """The recorded instances of a run, from its ``instances.csv``; ``nvec`` is the core's ``mask_nvec``.

    Raises ``FileNotFoundError`` if there is no file, ``ValueError`` if it is damaged.
    """
    if not file.exists():
        raise FileNotFoundError(f"no {file.name} in {file.parent}; expected a finished run, whose decisions are there")
    with instance_rows(file) as rows:
        decisions = [_decision(row["decision"], nvec) for row in rows]
        scores = {
            name: np.array([float(row[name]) for row in rows]) for name in (*TOLERANCES, "flops_ratio_with_policy")
        }
        goes_on = np.array([row["goes_on"] == "True" for row in rows])
        return RecordedInstances([row["id"] for row in rows], np.array(decisions, dtype=np.int64), goes_on, scores)


def _decision(digits: str, nvec: NDArray) -> list[int]:
    """From a digit per switch, and the token level."""
    switches = len(nvec) - 1
    decision = [*map(int, digits[:switches]), int(digits[switches:])]
    if any(choice >= size for choice, size in zip(decision, nvec, strict=True)):
        raise ValueError(f"{digits!r} is no decision on {switches} switches and {nvec[-1]} token levels")
    return decision


def _check_instances(file: Path, recorded: RecordedInstances, split: Split) -> None:
    if recorded.ids != (ids := split.ids.tolist()):
        pairs = zip(recorded.ids, ids, strict=False)
        first = next((f"{was!r} where {now!r} is expected" for was, now in pairs if was != now), "the rest is missing")
        raise ReplayError(f"{file} has {len(recorded.ids)} instances, the {split.name} split {len(ids)}: {first}")


def _check_scores(file: Path, recorded: RecordedInstances, name: str, scored: NDArray, tolerance: float) -> None:
    was = recorded.scores[name]
    if len(differ := np.flatnonzero(~(np.abs(was - scored) <= tolerance))):
        row = differ[0]
        raise ReplayError(
            f"{file}: {name} of {len(differ)} of {len(was)} instances is not what their decisions give; for "
            f"{recorded.ids[row]!r} it is {was[row]:.6g}, and {scored[row]:.6g} when replayed"
        )


def _check_same(where: str, was: Any, now: Any) -> None:
    """Raise ``ReplayError`` at the first value that differs."""
    if isinstance(now, list | tuple):
        now = dict(enumerate(now))
        was = dict(enumerate(was)) if isinstance(was, list | tuple) else was
    if isinstance(now, dict) and isinstance(was, dict) and was.keys() == now.keys():
        for key, value in was.items():
            _check_same(f"{where}.{key}", value, now[key])
    elif isinstance(now, float) and isinstance(was, int | float):
        if not math.isclose(was, now, rel_tol=QUALITY_TOLERANCE, abs_tol=QUALITY_TOLERANCE / 10):
            raise ReplayError(f"{where} is {was:.6g}, and {now:.6g} when replayed")
    elif was != now:
        raise ReplayError(f"{where} is {was!r}, and {now!r} when replayed")
