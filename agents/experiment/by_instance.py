"""Outcomes of decisions by facts of the instances, for reports."""

import csv
import io
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sd_gym.envs.protocols import SCORES, Split
from sd_gym.files import write_text
from sd_gym.tasks.difficulty import means_by, quartiles


def by_facts(split: Split, scored: dict[str, NDArray]) -> dict[str, list[dict[str, Any]]]:
    """Means of quality, dense quality and FLOPs ratio by each of the split's facts; numbers by their quartiles."""
    means = {}
    for name, values in split.facts().items():
        is_number = values.dtype.kind in "if"
        columns = ({name: values} if is_number else {}) | {score: scored[score] for score in SCORES}
        means[name] = means_by(quartiles(values) if is_number else values, columns)
    return means


def write_instances(split: Split, scored: dict[str, NDArray], file: Path) -> None:
    """Write a CSV with one line per instance: facts, decision (as digits, the token level last) and outcome.

    ``scored`` has ``decision [n, switches + 1]`` and, ``[n]`` each, ``goes_on``, ``quality``, ``quality_ref``,
    ``flops_ratio`` and ``flops_ratio_with_policy``, which includes the policy's own FLOPs.
    """
    decisions = ["".join(map(str, decision)) for decision in scored["decision"].tolist()]
    columns = {
        "id": split.ids.tolist(),
        "level": split.levels.tolist(),
        **{name: values.tolist() for name, values in split.facts().items()},
        "source_cut": split.encoded.source_cut.tolist(),
        "target_cut": split.encoded.target_cut.tolist(),
        "decision": decisions,
        "goes_on": scored["goes_on"].tolist(),
        **{name: scored[name].tolist() for name in (*SCORES, "flops_ratio_with_policy")},
    }
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_text(file, lines.getvalue())
