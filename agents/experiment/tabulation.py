"""Tables from Python (``sd_gym.tabulate``): which env, which decisions, and the references of a table."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.baselines.full_information import full_information
from sd_gym.agents.baselines.search import all_masks, greedy_path, skip_units
from sd_gym.agents.experiment.trained import run_config
from sd_gym.agents.imitation.staged import ways_of_stages
from sd_gym.agents.learning.decisions import policy_rows
from sd_gym.agents.runs.folder import read_description

from sd_gym.config import SPLITS, ConfigError, EnvConfig
from sd_gym.envs.actions import codebook_file, number_of_decisions, read_masks
from sd_gym.envs.config import load_config
from sd_gym.envs.core import BackboneCore
from sd_gym.envs.exact import REFERENCES, hull, oracle
from sd_gym.envs.protocols import Core
from sd_gym.envs.shared import shared_core
from sd_gym.envs.table import table_core
from sd_gym.envs.table_files import MOST_MASKS, read_table
from sd_gym.envs.tabulate import TableMaker, Units, by_falling_flops
from sd_gym.files import write_json
from sd_gym.going_on import stages_of_pass
from sd_gym.registration import config_of

TABLE = "SD/Table-v0"  # the env that takes any table
PATH_INSTANCES = 400  # training instances for the search of a path
CHOICES = "all, layers, random:N, path, codebook or codebook:FILE"
LEAST_ADVANTAGE = (
    0.05  # full information saves this share of the FLOPs more than the hull if there is anything to learn
)


def tabulate(
    env_or_run: str | Path,
    output: str | Path,
    *,
    decisions: str | Sequence[str] | None = None,
    instances: int | None = None,
    seed: int = 0,
    pca: int | None = None,
    share: bool = False,
    bf16: bool = False,
    references: bool = False,
    resume: bool = False,
    jobs: int = 1,
    ray: str | None = None,
    imports: Sequence[str] = (),
    on_progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compute the outcomes of decisions on all instances of an env, for ``SD/Table-v0``: ``sd-gym tabulate``.

    Args:
        env_or_run: A registered id, or the folder of a run on the env.
        output: Folder to write the table to (its files: ``sd_gym.envs.table_files``).
        decisions: ``all``, or one or several of

            * ``random:N``: N masks, each with its own skip rate;
            * ``path``: a greedy search on the training split, from dense to all skipped;
            * ``layers``: all masks that skip whole layers; alone, the table's env then decides layer by layer;
            * ``codebook``: the env's; ``codebook:FILE``: a list of masks, or the folder of a run of ``static`` or of a
              table.

            The dense mask is always added. ``None``: all if there are at most 4,096, else ``random:64``. With several
            stages, the parts of the masks at each stage are combined with those at the others (``None``: ``path``).
        instances: Largest number per split; ``None``: all.
        seed: Seed of ``random:N``.
        pca: Number of principal components that observations are reduced to (float16), for a small table;
            ``None``: they are not reduced.
        share: Whether to leave out the data's own ids (instances are numbered), facts in words, and paths. No table has
            texts.
        bf16: Whether the backbone computes in bfloat16 (``torch.autocast``), which is nearly twice as fast.
        references: Whether to write the references of the table (``references.json``); see ``write_references``.
        resume: Whether to continue an interrupted table.
        jobs: Processes, of one thread each; 1: this process. With more, guard your script by
            ``if __name__ == "__main__":``.
        ray: Address of a Ray cluster that runs them instead; see ``sd_gym.train_all``.
        imports: Modules and files that register what the env needs; the other processes import them first.
        on_progress: Called with the number of finished decisions, and of all.
        settings: Overrides of the env's config.

    Returns:
        The content of ``table.json``.

    Raises:
        FileExistsError: If the folder holds a table that is not resumed, or anything else.
        ValueError: If a name or setting is unknown, a choice is malformed, ``pca`` is too large, or the table to resume
            is another one.
        ConfigError: If the env is a table itself, or observes more than one array.

    Example:
        >>> import sd_gym
        >>> table = sd_gym.tabulate("SD/Classification-Mini-v0", "table", decisions="random:64")  # doctest: +SKIP
    """
    config = _config(str(env_or_run), settings, instances)
    # A core keeps what it has computed. What it computes in bfloat16 must not get into the envs of this process.
    core = BackboneCore(config) if bf16 else shared_core(config)
    with torch.autocast(torch.device(config.backbone.device).type, torch.bfloat16, enabled=bf16):
        few = number_of_decisions(core.mask_nvec) <= MOST_MASKS
        asked = [decisions] if isinstance(decisions, str) else list(decisions or ())
        asked = asked or ["path" if core.is_staged else "all" if few else "random:64"]
        masks = ways = units = None
        if core.is_staged:
            masks, ways = combine_stages(core, _chosen(core, asked, seed))
        elif asked != ["all"] or not few:
            masks = _chosen(core, asked, seed)
            units = _units(core, _choice(core, "layers", seed), masks) if asked == ["layers"] else None
        chosen = "" if masks is None else _label(asked, seed, share)
        folder = Path(output)
        maker = TableMaker(core, masks, folder, ways, units, chosen=chosen, pca=pca, share=share, bf16=bf16)
        on_chunk = on_progress or (lambda done, total: None)
        maker.make(resume=resume, jobs=jobs, ray=ray, imports=imports, on_chunk=on_chunk)
    if references:
        write_references(TABLE, table=str(output))
    return read_table(Path(output))


def _label(asked: Sequence[str], seed: int, share: bool) -> str:
    """How masks were chosen; without folders if the table is shared."""
    names = [
        f"codebook:{Path(name.removeprefix('codebook:')).name}" if share and name.startswith("codebook:") else name
        for name in asked
    ]
    return " and ".join(names) + (f", seed {seed}" if any(name.startswith("random:") for name in asked) else "")


def _config(env_or_run: str, settings: dict[str, Any], instances: int | None) -> EnvConfig:
    """The config of an env or of a run, with a limit on the instances of each split."""
    if (Path(env_or_run) / "config.json").is_file():
        config = run_config(read_description(Path(env_or_run)), settings)
    else:
        config = load_config(config_of(env_or_run), settings)
    if config.table is not None:
        raise ConfigError(f"{env_or_run} is a table itself; tabulate the env that it was made from")
    if instances is not None:
        if instances < 1:
            raise ValueError(f"expected at least one instance of each split, got {instances}")
        sizes = {f"{split}_size": min(instances, config.data.size(split) or instances) for split in SPLITS}
        config = config.model_copy(update={"data": config.data.model_copy(update=sizes)})
    return config.model_copy(update={"action": "multi_discrete"})  # the masks of a codebook, not their numbers


def _chosen(core: Core, asked: Sequence[str], seed: int) -> NDArray:
    """Different masks, ``[masks, switches + 1]``, by falling FLOPs, the dense one first; raises like ``_choice``."""
    dense = np.zeros((1, len(core.mask_nvec)), dtype=np.int64)
    chosen = (core.to_masks(_choice(core, choice, seed)) for choice in asked)
    masks = np.unique(np.concatenate([dense, *chosen]), axis=0)
    return masks[by_falling_flops(core, masks)]


def _units(core: Core, layers: NDArray, masks: NDArray) -> Units:
    """The decisions on whole layers ``layers [decisions, components]`` as indices of masks."""
    number_of = {tuple(mask): number for number, mask in enumerate(masks.tolist())}
    units = skip_units(core, "layer")
    names = [core.switch_names[unit[0]].rpartition(".")[0] + ".layer" for unit in units[:-1]]
    sizes = [int(core.nvec[unit[0]]) for unit in units]
    return Units(names, sizes, [number_of[tuple(mask)] for mask in layers.tolist()])


def combine_stages(core: Core, masks: NDArray) -> tuple[NDArray, list[int]]:
    """All combinations of the parts ("ways") that masks ``[masks, switches + 1]`` have at each stage of an env.

    Returns the combinations, int64 ``[combinations, switches + 1]``, with the last stage's ways changing first; and the
    number of ways of each stage, which are sorted by falling FLOPs. Raises ``ValueError`` for more than 4,096.
    """
    of_stages = [np.unique(ways, axis=0) for ways in ways_of_stages(core, masks)]
    of_stages = [ways[by_falling_flops(core, ways)] for ways in of_stages]
    counts = [len(ways) for ways in of_stages]
    if math.prod(counts) > MOST_MASKS:
        raise ValueError(
            f"{len(masks)} masks make {' x '.join(map(str, counts))} combinations at the stages {core.stages}; a table "
            f"has at most {MOST_MASKS:,}: choose fewer decisions, or fewer stages"
        )
    combined = np.zeros((1, masks.shape[1]), dtype=np.int64)
    for ways in of_stages:
        combined = (combined[:, None] + ways).reshape(-1, masks.shape[1])
    return combined, counts


def _choice(core: Core, asked: str, seed: int) -> NDArray:
    """The masks of a value of ``decisions``; raises ``ValueError`` if it is malformed."""
    kind, _, value = asked.partition(":")
    if kind == "random" and value.isdecimal() and int(value) > 0:
        return random_masks(core.mask_nvec, int(value), seed)
    if asked == "path":
        return greedy_path(core, core.split("train"), policy_rows(core, PATH_INSTANCES))
    if asked == "layers":
        units = skip_units(core, "layer")
        if number_of_decisions(core.nvec[[unit[0] for unit in units]]) > MOST_MASKS:
            raise ValueError(
                f"{core.config.id} has too many layers: a table has at most {MOST_MASKS:,} masks; choose path"
            )
        return all_masks(core.nvec, units)
    if kind == "codebook":
        name = value or core.config.codebook
        if name is None:
            raise ValueError(f"{core.config.id} has no codebook; name one: codebook:FILE")
        masks = read_masks(codebook_file(name), core.mask_nvec)
        decided = np.concatenate(core.stage_actions.components[: len(stages_of_pass(core.stages))]).astype(int)
        if core.is_staged and np.delete(masks, decided, axis=1).any():
            raise ValueError(f"{asked} has masks that skip before the first of the stages {core.stages}; add 'first'")
        return masks
    if asked == "all":
        raise ValueError(
            f"{core.config.id} has {number_of_decisions(core.mask_nvec):,} decisions; a table has all where "
            f"there are at most {MOST_MASKS:,}, and 'all' stands alone: choose some with random:N, path or codebook"
        )
    raise ValueError(f"--decisions: expected {CHOICES}, got {asked!r}")


def random_masks(nvec: NDArray, count: int, seed: int) -> NDArray:
    """Different masks, each with a skip rate drawn uniformly from 0 to 1, so that some are near dense.

    int64 ``[count, components]``, or fewer if there are no more; the dense one is first.
    """
    random, masks = np.random.default_rng(seed), {(0,) * len(nvec): None}
    while len(masks) < min(count, number_of_decisions(nvec)):
        masks[tuple(random.binomial(nvec - 1, random.random()).tolist())] = None
    return np.array(list(masks), dtype=np.int64)


def write_references(env_id: str, **settings: Any) -> dict[str, Any]:
    """Compute what a learner on a table has to beat and can reach, and write ``references.json`` into its folder.

    Args:
        env_id: Id of an env on the table; its epsilon gives the losses.
        settings: Overrides of its config, such as ``table``.

    Returns:
        ``losses`` (0, epsilon / 2, epsilon) and the test FLOPs ratio of ``hull``, ``full_information`` and ``oracle``
        at each; ``negative_control``: whether full information beats the hull by less than 5 points; and ``curves``,
        the corners of each (``sd_gym.envs.exact.Curve``).
    """
    core = table_core(load_config(config_of(env_id), settings))
    split, epsilon = core.split("test"), core.config.reward.epsilon
    losses = [0.0, epsilon / 2, epsilon]
    curves = {"hull": hull(split), "full_information": full_information(split), "oracle": oracle(split)}
    at = {name: [curve.at(loss) for loss in losses] for name, curve in curves.items()}
    ahead = max(masks - full for masks, full in zip(at["hull"][1:], at["full_information"][1:], strict=True))
    corners = {name: {"loss": curve.loss, "flops": curve.flops} for name, curve in curves.items()}
    references = {"losses": losses, **at, "negative_control": ahead < LEAST_ADVANTAGE, "curves": corners}
    write_json(core.folder / REFERENCES, references)
    return references
