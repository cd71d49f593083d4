"""What a decision costs and loses, against what is known of an instance."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sd_gym.envs.protocols import Split
from sd_gym.tasks.difficulty import means_by, quartiles

SCORES = ("quality", "quality_ref", "flops_ratio")


def by_facts(split: Split, scored: dict[str, NDArray]) -> dict[str, list[dict[str, Any]]]:
    """Means of quality, dense quality and FLOPs ratio by each of the split's facts: numbers by their quartiles."""
    found = {}
    for name, values in split.facts().items():
        number = values.dtype.kind in "if"
        columns = {name: values} if number else {}
        columns |= {score: scored[score] for score in SCORES}
        found[name] = means_by(quartiles(values) if number else values, columns)
    return found


def write_instances(split: Split, scored: dict[str, NDArray], file: Path) -> None:
    """One line an instance, as CSV: its facts, the decision (as digits, the token level last) and the outcome.

    ``scored`` has ``decision`` ``[n, switches + 1]``, and ``[n]`` each: ``goes_on``, ``quality``, ``quality_ref``,
    ``flops_ratio`` and, what it costs to decide included, ``flops_ratio_with_policy``.
    """
    decisions = ["".join(map(str, decision)) for decision in scored["decision"].tolist()]
    columns = {
        "id": [instance.id for instance in split.instances],
        "level": split.levels.tolist(),
        **{name: values.tolist() for name, values in split.facts().items()},
        "source_cut": split.encoded.source_cut.tolist(),
        "target_cut": split.encoded.target_cut.tolist(),
        "decision": decisions,
        "goes_on": scored["goes_on"].tolist(),
        **{name: scored[name].tolist() for name in (*SCORES, "flops_ratio_with_policy")},
    }
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    os.replace(temporary, file)
