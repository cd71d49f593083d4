"""Which tokens of a split's inputs each token level drops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads import Head
from sd_gym.config import BackboneConfig, TokensConfig
from sd_gym.data.encoded import Encoded, left_padded
from sd_gym.data.instance import Instance
from sd_gym.switch import Switchboard, dropped_tokens, keep_tokens
from sd_gym.tasks.encoding import droppable_tokens
from sd_gym.tasks.ranking import RANKINGS


@dataclass(eq=False)
class TokenDropping:
    """The tokens of a split that may be dropped, how much they matter, and those that are kept.

    ``rarity`` returns ``training_rarity``; it is called only if the ranking needs it.
    """

    instances: Sequence[Instance]
    encoded: Encoded
    board: Switchboard
    tokenizer: Tokenizer
    head: Head
    backbone: BackboneConfig
    tokens: TokensConfig
    rarity: Callable[[], NDArray]

    def __post_init__(self) -> None:
        self.shares, self.ranking = np.array(self.tokens.shares), RANKINGS.find(self.tokens.ranking)

    @cached_property
    def droppable(self) -> NDArray:
        """Which tokens may be dropped, bool ``[n, longest]``; not the last one if the model answers from it."""
        droppable = droppable_tokens(self.instances, self.tokenizer, self.backbone)
        if self.board.architecture.causal:
            present = self.encoded.input_ids.numpy() != self.tokenizer.pad_token_id
            droppable[np.arange(len(present)), present.shape[1] - 1 - present[:, ::-1].argmax(axis=1)] = False
        return droppable

    @cached_property
    def scores(self) -> NDArray:
        """How much each token matters, float ``[n, longest]``; ValueError if a user's ranking gives other values."""
        scores = np.asarray(self.ranking.scores(self.encoded, self.board, self.rarity))
        if scores.shape != tuple(self.encoded.input_ids.shape) or np.isnan(scores).any():
            raise ValueError(
                f"the ranking {self.tokens.ranking!r} has to give a number for each token, "
                f"{list(self.encoded.input_ids.shape)}, got {list(scores.shape)}"
                f"{', some of them NaN' if np.isnan(scores).any() else ''}"
            )
        return scores

    def kept_length(self, rows: NDArray, level: NDArray) -> NDArray:
        """Tokens of the inputs that are kept at the token levels, int64 ``[n]``."""
        length = self.encoded.source_length[rows]
        return length - dropped_tokens(self.droppable[rows], self.shares[level]) if level.any() else length

    def kept(self, rows: NDArray, level: NDArray) -> NDArray | None:
        """The tokens that a batch of rows keeps, bool ``[n, longest of these rows]``; ``None``: all."""
        if not level.any():
            return None
        length = self.encoded.source_length[rows, None]
        present = np.arange(length.max()) < length
        keep = keep_tokens(self.scores[rows], self.droppable[rows], self.shares[level])[:, : present.shape[1]] & present
        if self.head.padding_side == "left":
            return left_padded(torch.from_numpy(keep), torch.from_numpy(length)).numpy()
        return keep
