"""Tables from Python, as ``sd_gym.tabulate``: which env, and which decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.baselines.search import greedy_path
from sd_gym.agents.experiment.run import run_config
from sd_gym.agents.learning.decisions import halves
from sd_gym.agents.runs.folder import read_description

from sd_gym.config import ConfigError, EnvConfig
from sd_gym.envs.actions import codebook_file, number_of_decisions, read_masks
from sd_gym.envs.config import load_config
from sd_gym.envs.protocols import Core
from sd_gym.envs.shared import shared_core
from sd_gym.envs.table_files import MOST
from sd_gym.envs.table_files import read_description as read_table
from sd_gym.envs.tabulate import down_in_flops, write_table
from sd_gym.registration import config_of
from sd_gym.tasks.data import SPLITS

PATH_INSTANCES = 400  # of the validation split, that a path is searched on
CHOICES = "all, random:N, path, codebook or codebook:FILE"


def tabulate(
    env_or_run: str | Path,
    output: str | Path,
    *,
    decisions: str | Sequence[str] | None = None,
    instances: int | None = None,
    seed: int = 0,
    pca: int | None = None,
    share: bool = False,
    resume: bool = False,
    jobs: int = 1,
    imports: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compute what decisions do to all instances of an env, for ``SD/Table-v0``: ``sd-gym tabulate``.

    Args:
        env_or_run: A registered id; or the folder of a run, whose env it is then.
        output: Folder to write the table to (``sd_gym.envs.table_files`` says what is in it).
        decisions: ``all``; or one or several of ``random:N`` (N masks, each of a skip rate of its own), ``path``
            (greedily searched on the validation split, from dense to nothing), ``codebook`` (the env's) and
            ``codebook:FILE`` (a list of masks, or the folder of a run of ``static`` or of a table). The dense mask is
            always among them. ``None``: all where there are at most 4,096, else ``random:64``. Of an env that decides
            at several stages, what these masks say at each stage is combined with all that they say at the others
            (``None``: ``path``).
        instances: So many of each split at most; ``None``: all.
        seed: Of ``random:N``.
        pca: Principal components of the training split that the observations are reduced to (float16), which makes a
            table small; ``None``: they are kept as they are.
        share: Whether what is not to be passed on is left out: the data's own ids (instances are numbered), facts in
            words, and paths. Texts are in no table.
        resume: Whether to go on with a table that was cut off.
        jobs: Processes, of one thread each; 1: this process. With more, guard your script by
            ``if __name__ == "__main__":``.
        imports: Modules and files that register what the env needs; the other processes import them first.
        on_progress: Called with the decisions that are done, and all there are.
        settings: Overrides of the env's config.

    Returns:
        What ``table.json`` says of it.

    Raises:
        FileExistsError: If the folder holds a table, or anything else.
        ValueError: If a name or setting is unknown, a choice is none, there are not so many components, or what was
            cut off is another table.
        ConfigError: If the env is a table itself, or sees more than one array.

    Example:
        >>> import sd_gym
        >>> said = sd_gym.tabulate("SD/Classification-Mini-v0", "table", decisions="random:64")  # doctest: +SKIP
    """
    core = shared_core(_config(str(env_or_run), settings, instances))
    asked = [decisions] if isinstance(decisions, str) else list(decisions or ())
    few = number_of_decisions(core.nvec) <= MOST
    if not asked:
        asked = ["path"] if core.is_staged else ["all"] if few else ["random:64"]
    masks = None if asked == ["all"] and few and not core.is_staged else _chosen(core, asked, seed)
    ways = None
    if core.is_staged:
        masks, ways = in_stages(core, masks)
    folder, on_chunk = Path(output), on_progress or (lambda done, total: None)
    chosen = "" if masks is None else _in_words(asked, seed, share)
    how = {"pca": pca, "share": share, "resume": resume, "jobs": jobs, "imports": imports}
    write_table(core, masks, folder, ways=ways, chosen=chosen, **how, on_chunk=on_chunk)
    return read_table(folder)


def _in_words(asked: Sequence[str], seed: int, share: bool) -> str:
    """How masks were chosen; of files only the names, if it is shared."""
    names = [f"codebook:{Path(one).name}" if share and one.startswith("codebook:") else one for one in asked]
    return " and ".join(names) + (f", seed {seed}" if any(one.startswith("random:") for one in asked) else "")


def _config(env_or_run: str, settings: dict[str, Any], instances: int | None) -> EnvConfig:
    """The config of an env or of a run, with so many instances of each split."""
    if (Path(env_or_run) / "config.json").is_file():
        config = run_config(read_description(Path(env_or_run)), settings)
    else:
        config = load_config(config_of(env_or_run), settings)
    if config.table is not None:
        raise ConfigError(f"{env_or_run} is a table itself; tabulate the env that it is of")
    if instances is not None:
        if instances < 1:
            raise ValueError(f"expected at least one instance of each split, got {instances}")
        sizes = {f"{split}_size": min(instances, config.data.size(split) or instances) for split in SPLITS}
        config = config.model_copy(update={"data": config.data.model_copy(update=sizes)})
    # Of a codebook the masks are taken, and not the numbers.
    return config.model_copy(update={"action": "multi_discrete"})


def _chosen(core: Core, asked: Sequence[str], seed: int) -> NDArray:
    """Different masks, ``[masks, switches + 1]``, the dense one first, then down in FLOPs.

    Raises:
        ValueError: If a choice is none.
    """
    dense = np.zeros((1, len(core.nvec)), dtype=np.int64)
    masks = np.unique(np.concatenate([dense, *(_choice(core, one, seed) for one in asked)]), axis=0)
    return masks[down_in_flops(core, masks)]


def in_stages(core: Core, masks: NDArray) -> tuple[NDArray, list[int]]:
    """All combinations of what masks ``[masks, switches + 1]`` say at each stage of an env, its ways.

    Returns:
        The combinations, int64 ``[combinations, switches + 1]``, the last stage's ways changing first; and how many
        ways each stage has, the first of them nothing skipped, the others down in FLOPs.

    Raises:
        ValueError: If there are more than 4,096.
    """
    of_stages = []
    for components in core.steps.components:
        ways = np.zeros_like(masks)
        ways[:, components] = masks[:, components]
        ways = np.unique(ways, axis=0)
        of_stages.append(ways[down_in_flops(core, ways)])
    counts = [len(ways) for ways in of_stages]
    if math.prod(counts) > MOST:
        raise ValueError(
            f"{len(masks)} masks make {' x '.join(map(str, counts))} combinations at the stages {core.stages}; a table "
            f"has at most {MOST:,}: choose fewer decisions, or fewer stages"
        )
    combined = np.zeros((1, masks.shape[1]), dtype=np.int64)
    for ways in of_stages:
        combined = (combined[:, None] + ways).reshape(-1, masks.shape[1])
    return combined, counts


def _choice(core: Core, asked: str, seed: int) -> NDArray:
    """The masks that a word stands for."""
    kind, _, value = asked.partition(":")
    if kind == "random" and value.isdecimal() and int(value) > 0:
        return random_masks(core.nvec, int(value), seed)
    if asked == "path":
        split = core.split("validation")
        rows = halves(split)[0][:PATH_INSTANCES]
        return np.stack(greedy_path(core, split, rows, lambda scored: None))
    if kind == "codebook":
        name = value or core.config.codebook
        if name is None:
            raise ValueError(f"{core.config.id} has no codebook; name one: codebook:FILE")
        return read_masks(codebook_file(name), core.nvec)
    if asked == "all":
        raise ValueError(
            f"{core.config.id} has {number_of_decisions(core.nvec):,} decisions; a table has all of them where there "
            f"are at most {MOST:,}, and 'all' stands alone: choose some with random:N, path or codebook"
        )
    raise ValueError(f"--decisions: expected {CHOICES}, got {asked!r}")


def random_masks(nvec: NDArray, count: int, seed: int) -> NDArray:
    """Masks of a skip rate each, uniform from 0 to 1, so that some are near dense and some near nothing.

    Args:
        nvec: Sizes of the components.
        count: How many, the dense one included; no two are alike, so never more than there are.
        seed: Of what is drawn.

    Returns:
        int64 ``[count, components]``, the dense one first.
    """
    random, found = np.random.default_rng(seed), {(0,) * len(nvec): None}
    while len(found) < min(count, number_of_decisions(nvec)):
        found[tuple(random.binomial(nvec - 1, random.random()).tolist())] = None
    return np.array(list(found), dtype=np.int64)
