"""The folder of a table: what decisions do to instances, computed once. Nothing here needs torch.

* ``table.json``: of which env it is (its config), the hashes of its data and backbone, the switches, the observation.
* ``codebook.json``, where only some decisions are in it: which, a mask a line, the dense one first. An env with
  ``action="discrete"`` takes the folder as its ``codebook``. Of several stages they are all ways to decide the first
  one with all ways to decide the second one, and so on, in this order.
* ``SPLIT.safetensors`` of each split, mapped into memory: ``quality [n, masks]``, as numbers of ``quality_values``
  where there are few different ones, and in bits, ``[n, masks / 8]``, where there are two; ``always [lengths, levels]``
  and ``switched [lengths, levels, switches]``, int64, of which FLOPs are the sum, and ``costs [n]``, which of them an
  instance has; ``observations``, float32, or float16 where they are reduced, and of a later stage K, under all ways
  to come to it, ``observations.K [n, ways before it, size]``; of the stage ``answer``, ``judged [n, masks, values]``,
  what the head says of its answers, and ``spent [lengths, masks]``, the FLOPs that are shown there; the difficulty and
  the facts of each instance, in the smallest type that holds them exactly.
* ``SPLIT.json``: the ids of the instances, and those of their facts that are words.
* ``projection.safetensors``, where observations are reduced: how (``sd_gym.projection``).
* ``export.safetensors``: what standardises observations and ranks tokens, so that a policy that learned here decides
  on the env itself, or on texts. A table of an env that no policy can leave has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd_gym.errors import short
from sd_gym.files import read_json
from sd_gym.registration import CONFIG_FOLDER

FORMAT = 3
CODEBOOK, PROJECTION, EXPORT = "codebook.json", "projection.safetensors", "export.safetensors"
MOST = 4096  # decisions; where there are no more, a table has all of them
CLASS_LOG_ODDS = "log_odds"  # the first judgement of a backbone that classifies
JUDGED, SPENT = "judged", "spent"  # in the file of a split
FACT = "fact."  # before the name of a fact, in the file of a split


def observations_at(stage: int) -> str:
    """Name of what is observed at a stage, in the file of a split."""
    return f"observations.{stage}" if stage else "observations"


def table_folder(name: str | Path) -> Path:
    """The folder of a table: of the package, such as ``tables/summarization-mini``, or a path."""
    bundled = CONFIG_FOLDER / name
    return bundled if bundled.is_dir() else Path(name)


def read_description(folder: Path) -> dict[str, Any]:
    """What ``table.json`` says of a complete table.

    Raises ``FileNotFoundError`` where there is none, ``ValueError`` if it is damaged, cut off, or of another version.
    """
    file = folder / "table.json"
    if not file.is_file():
        raise FileNotFoundError(f"no table.json in {folder}; expected a table, as sd-gym tabulate writes it")
    described = read_json(file)
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{file}: expected a table of format {FORMAT}, got {short(described.get('format'))} (written by sd_gym "
            f"{short(described.get('sd_gym'))}); make it again, or take the version that wrote it"
        )
    kinds = {"env": str, "env_config": dict, "backbone": dict, "nvec": list, "observation": dict, "splits": dict}
    for key, kind in kinds.items():
        if not isinstance(described.get(key), kind):
            raise ValueError(f"{file} is damaged: {key!r} is {short(described.get(key))}; copy it again")
    if not described.get("complete"):
        raise ValueError(f"{folder}: the table is not complete; go on with sd-gym tabulate --resume")
    return described
