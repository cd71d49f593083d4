"""The folder of a table: the outcomes of decisions on instances, computed once. Nothing here needs torch.

* ``table.json``: the original env's config, the hashes of its data and backbone, the switches, the observation.
* ``codebook.json``, if the table has only some decisions: one mask per line, the dense one first. An env with
  ``action="discrete"`` takes the folder as its ``codebook``. With several stages the masks are all combinations of the
  choices per stage; the choice of the last stage changes first.
* ``SPLIT.safetensors`` of each split, mapped into memory:

  * ``quality [n, masks]``: indices into ``quality_values``, packed into bits ``[n, masks / 8]`` if there are two
    values; with more than 65,536 values, the qualities themselves;
  * ``always [lengths, levels]`` and ``switched [lengths, levels, switches]``, int64: FLOPs, which are summed; ``costs
    [n]``: the row of each instance in both;
  * ``observations``, float32, or float16 if reduced; for a later stage K ``observations.K [n, choices before, size]``;
  * with the stage ``answer``, ``judged [n, masks, values]``, the head's judgement of its answers, and ``spent [lengths,
    masks]``, the FLOPs shown there; of a decoder-only backbone that generates, ``read [lengths, switches]``, those on
    prompts alone;
  * difficulty and facts of each instance, in the smallest type that holds them exactly.
* ``SPLIT.json``: the ids of the instances, and their facts that are texts.
* ``projection.safetensors``, if observations are reduced: how (``sd_gym.projection``).
* ``export.safetensors``: statistics of observations and tokens, with which a policy that learned here decides on the
  original env or on texts. It is missing if no policy can leave that env.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_gym.errors import one_line, short
from sd_gym.files import read_json
from sd_gym.registration import CONFIG_FOLDER

FORMAT = 3
CODEBOOK, PROJECTION, EXPORT = "codebook.json", "projection.safetensors", "export.safetensors"
MOST_MASKS = 4096  # a table of an env with no more decisions has all of them
JUDGED, SPENT, READ = "judged", "spent", "read"  # in the file of a split
FACT = "fact."  # before the name of a fact, in the file of a split


def observations_at(stage: int) -> str:
    """Name of the observations at a stage, in the file of a split."""
    return f"observations.{stage}" if stage else "observations"


def table_folder(name: str | Path) -> Path:
    """The folder of a table: of the package, such as ``tables/summarization-mini``, or a path."""
    bundled = CONFIG_FOLDER / name
    return bundled if bundled.is_dir() else Path(name)


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Turn errors caused by missing or wrong values in a table's files into a ``ValueError`` that names its folder."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {one_line(error)}); copy it again") from error


def read_table(folder: Path) -> dict[str, Any]:
    """The content of ``table.json`` of a complete table.

    Raises:
        FileNotFoundError: If there is no table.
        ValueError: If it is damaged, not complete, or of another format.
    """
    file = folder / "table.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no table.json in {folder}; expected a table, as sd-gym tabulate writes it; if it moved, set table to "
            "where it is now"
        )
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
        raise ValueError(f"{folder}: the table is not complete; continue with sd-gym tabulate --resume")
    return described
