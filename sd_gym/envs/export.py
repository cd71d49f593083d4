"""What a policy takes along when it leaves its env: all that deciding needs beside its network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_gym.backbones.load import BUNDLED
from sd_gym.envs.config import EnvConfig
from sd_gym.envs.spaces import Pooled, Tokens
from sd_gym.envs.table import EXPORT, TableCore, all_decisions
from sd_gym.files import map_arrays, write_arrays
from sd_gym.policy.artefact import tokenizer_hash
from sd_gym.policy.protected_tokens import ProtectedTokens
from sd_gym.projection import Projection
from sd_gym.tasks.ranking import RANKINGS

if TYPE_CHECKING:
    from sd_gym.envs.protocols import Core, Split

Array = NDArray


class Export(NamedTuple):
    """What a policy takes along.

    Attributes:
        env: The config of the env; of a table, of the env that the table is of.
        backbone: What is known of the backbone, as the artefact's card has it.
        mean: As of ``SkipPolicy``; likewise the next three.
        deviation: Of what is observed.
        rarity: Of tokens.
        protection: Of tokens.
        masks: Of a table, as of ``TablePolicy``; of an env that computes ``None``.
        projection: Likewise.
        of_tokens: As of ``SkipPolicy``.
        ranking_costs_flops: What its ranking of tokens says of itself.
    """

    env: EnvConfig
    backbone: dict[str, Any]
    mean: Array
    deviation: Array
    rarity: Array | None
    protection: ProtectedTokens | None
    masks: Array | None = None
    projection: Projection | None = None
    of_tokens: tuple[Array, Array] | None = None
    ranking_costs_flops: bool = False

    def write(self, folder: Path) -> None:
        """Write to a table what its description has no place for."""
        arrays = {"mean": self.mean, "deviation": self.deviation, "rarity": self.rarity}
        write_arrays(folder / EXPORT, {name: values for name, values in arrays.items() if values is not None})


def of_core(core: Core) -> Export | None:
    """Of an env that computes.

    Returns:
        ``None`` where a policy cannot leave it: its observation is one of the user's own, or its tokens are ranked at
        random, which is a control, or in a way of the user's own.
    """
    config, backbone, train = core.config, core.backbone, core.split("train")
    drops, ranking = len(config.tokens.shares) > 1, RANKINGS.find(config.tokens.ranking)
    known = not drops or ranking.is_exported
    if not (isinstance(core.observation, Pooled | Tokens) and known):
        return None
    said = {
        "name": config.backbone.name,
        "is_local": Path(config.backbone.name).exists() or config.backbone.name in BUNDLED,
        "model_type": backbone.model.config.model_type,
        "auto_class": backbone.head.auto_class,
        "weights": backbone.weights,
        "tokenizer": tokenizer_hash(backbone.tokenizer),
        "token_types": train.encoded.token_type_ids is not None,
    }
    seen = core.stage_observation if core.is_staged else core.observation
    rarity = train.rarity if drops and ranking.needs_rarity else None
    protection = _protection(train) if drops else None
    looks = core.observation
    of_tokens = (looks.mean, looks.deviation) if core.is_staged and isinstance(looks, Tokens) else None
    known = {"of_tokens": of_tokens, "ranking_costs_flops": ranking.costs_flops}
    return Export(config, said, seen.mean, seen.deviation, rarity, protection, **known)


def of_table(core: TableCore) -> Export | None:
    """Of a table.

    Returns:
        ``None`` where the env that it is of has nothing to take along, or where its
        stages are one, which sees what no env of one stage shows.

    Raises:
        ValueError: If the table is damaged.
    """
    said, file = core.description, core.folder / EXPORT
    if not file.is_file() or ("ways" in said and not core.is_staged):
        return None
    arrays = {name: np.array(values) for name, values in map_arrays(file).items()}
    try:
        protection = said["protection"]
        return Export(
            core.config.model_copy(
                update={"id": said["env"], "table": None, "action": "multi_discrete", "codebook": None}
            ),
            {key: value for key, value in said["backbone"].items() if key != "switches"},
            arrays["mean"],
            arrays["deviation"],
            arrays.get("rarity"),
            protection and ProtectedTokens.from_json(protection),
            None if core.exhaustive else core.to_masks(all_decisions(core.nvec)),
            core.observation.projection,
            ranking_costs_flops=RANKINGS.find(core.config.tokens.ranking).costs_flops,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{core.folder} is damaged: {error}; copy it again") from error


def _protection(train: Split) -> ProtectedTokens | None:
    tokenizer = train.backbone.tokenizer
    added = tokenizer("", "").input_ids  # what is put around texts and between them
    separator = added[-1] if added else None
    special, encoded = sorted({*tokenizer.all_special_ids, *added}), train.encoded
    return ProtectedTokens.find(encoded.input_ids, encoded.source_length, train.tokens.droppable, special, separator)
