"""Which tokens of encoded inputs go first when tokens are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sd_gym.registry import Registry
from sd_gym.switch import (
    Switchboard,
    attention_received,
    inverse_document_frequency,
    keep_tokens,
    position_scores,
    random_scores,
    rarity_scores,
)
from sd_gym.tasks.encoding import Encoded, left_padded
from sd_gym.tasks.instance import Instance

RankingFunction = Callable[[Encoded, Switchboard, Callable[[], NDArray]], NDArray]
STATISTICS_SIZE = 2000  # training instances that statistics are taken from
BATCH = 512


def token_scores(ranking: str, encoded: Encoded, board: Switchboard, rarity: Callable[[], NDArray]) -> NDArray:
    """How much each token matters, float ``[n, longest]``.

    Args:
        ranking: ``attention`` (received in the backbone's first layer), ``idf`` (inverse document frequency),
            ``position``, ``random``, or one of the user's.
        encoded: The inputs.
        board: The backbone's switchboard.
        rarity: Gives ``training_rarity``, which ``idf`` ranks by.

    Raises:
        ValueError: If a ranking of one's own gives something else.
    """
    scores = np.asarray(RANKINGS.find(ranking)(encoded, board, rarity))
    if scores.shape != tuple(encoded.input_ids.shape) or np.isnan(scores).any():
        raise ValueError(
            f"the ranking {ranking!r} has to give a number for each token, {list(encoded.input_ids.shape)}, got "
            f"{list(scores.shape)}"
        )
    return scores


def _by_attention(encoded: Encoded, board: Switchboard, rarity: Callable[[], NDArray]) -> NDArray:
    parts, longest = in_batches(attention_received, encoded, board), encoded.input_ids.shape[1]
    return np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts])


def _by_rarity(encoded: Encoded, board: Switchboard, rarity: Callable[[], NDArray]) -> NDArray:
    ids = encoded.input_ids.numpy()
    return rarity_scores(ids, np.arange(ids.shape[1]) < encoded.source_length[:, None], rarity())


RANKINGS: Registry[RankingFunction] = Registry(
    "token ranking",
    {
        "attention": _by_attention,
        "idf": _by_rarity,
        "position": lambda encoded, board, rarity: position_scores(tuple(encoded.input_ids.shape)),
        "random": lambda encoded, board, rarity: random_scores(tuple(encoded.input_ids.shape)),
    },
)


def register_ranking(name: str, function: RankingFunction) -> None:
    """Make a token ranking of your own known: then ``token_ranking=name`` works in ``gym.make``, YAML and ``--set``.

    A policy that drops tokens by it decides in the env alone: an artefact knows the project's rankings only.

    Args:
        name: What it is called; a later one of the same name replaces it.
        function: Takes ``(encoded, board, rarity)``, as of ``token_scores``, to a number for each token, float
            ``[n, longest]``; the lowest go first.

    Raises:
        ValueError: If the name is one of the project's.
    """
    RANKINGS.register(name, function)


def training_rarity(tokenizer: PreTrainedTokenizerBase, train: Sequence[Instance]) -> NDArray:
    """How rare each token is in the first training instances, as ``inverse_document_frequency`` says it."""
    texts = [f"{one.source} {one.source_pair or ''}" for one in train[:STATISTICS_SIZE]]
    return inverse_document_frequency(map(np.array, tokenizer(texts).input_ids))


def kept_tokens(scores: NDArray, droppable: NDArray, length: NDArray, share: NDArray, padding_side: str) -> NDArray:
    """The tokens that a batch of inputs keeps, bool ``[n, longest of them]``, as the switchboard's ``decide`` takes it.

    Args:
        scores: How much each token matters, ``[n, longest of the split]``.
        droppable: Whether it may be dropped, likewise.
        length: Tokens of each input, ``[n]``.
        share: Share of the droppable tokens that each row drops, ``[n]``.
        padding_side: Where the batch is padded, ``left`` or ``right``.
    """
    longest = int(length.max())
    keep = keep_tokens(scores, droppable, share)[:, :longest] & (np.arange(longest) < length[:, None])
    if padding_side == "left":
        return left_padded(torch.from_numpy(keep), torch.from_numpy(length)[:, None]).numpy()
    return keep


def in_batches(
    function: Callable[[Switchboard, dict[str, Tensor]], Tensor], encoded: Encoded, board: Switchboard
) -> Iterator[NDArray]:
    """What a function of the model's inputs gives, batch by batch, in order."""
    for start in range(0, len(encoded), BATCH):
        rows = np.arange(start, min(start + BATCH, len(encoded)))
        yield function(board, encoded.inputs(rows, board.model.device)).float().cpu().numpy()
