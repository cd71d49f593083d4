"""Which tokens of a split's inputs each token level drops."""

from collections.abc import Callable, Sequence
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


class TokenDropping:
    """The tokens of a split that may be dropped, how much they matter, and those that are kept.

    ``rarity`` returns ``training_rarity``; it is called only if the ranking needs it.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        encoded: Encoded,
        board: Switchboard,
        tokenizer: Tokenizer,
        head: Head,
        backbone: BackboneConfig,
        tokens: TokensConfig,
        rarity: Callable[[], NDArray],
    ) -> None:
        self.shares = np.array(tokens.shares)
        self.ranking = RANKINGS.find(tokens.ranking)
        self._instances = instances
        self._encoded = encoded
        self._board = board
        self._tokenizer = tokenizer
        self._head = head
        self._backbone = backbone
        self._ranked_by = tokens.ranking
        self._rarity = rarity

    @cached_property
    def droppable(self) -> NDArray:
        """Which tokens may be dropped, bool ``[n, longest]``; not the last one if the model answers from it."""
        droppable = droppable_tokens(self._instances, self._tokenizer, self._backbone)
        if self._board.architecture.causal:
            present = self._encoded.input_ids.numpy() != self._tokenizer.pad_token_id
            droppable[np.arange(len(present)), present.shape[1] - 1 - present[:, ::-1].argmax(axis=1)] = False
        return droppable

    @cached_property
    def scores(self) -> NDArray:
        """How much each token matters, float ``[n, longest]``; ValueError if a user's ranking gives other values."""
        scores = np.asarray(self.ranking.scores(self._encoded, self._board, self._rarity))
        if scores.shape != tuple(self._encoded.input_ids.shape) or np.isnan(scores).any():
            raise ValueError(
                f"the ranking {self._ranked_by!r} has to give a number for each token, "
                f"{list(self._encoded.input_ids.shape)}, got {list(scores.shape)}"
                f"{', some of them NaN' if np.isnan(scores).any() else ''}"
            )
        return scores

    def kept_length(self, rows: NDArray, level: NDArray) -> NDArray:
        """Tokens of the inputs that are kept at the token levels, int64 ``[n]``."""
        length = self._encoded.source_length[rows]
        return length - dropped_tokens(self.droppable[rows], self.shares[level]) if level.any() else length

    def kept(self, rows: NDArray, level: NDArray) -> NDArray | None:
        """The tokens that a batch of rows keeps, bool ``[n, longest of these rows]``; ``None``: all."""
        if not level.any():
            return None
        length = self._encoded.source_length[rows, None]
        present = np.arange(length.max()) < length
        keep = keep_tokens(self.scores[rows], self.droppable[rows], self.shares[level])[:, : present.shape[1]] & present
        if self._head.padding_side == "left":
            return left_padded(torch.from_numpy(keep), torch.from_numpy(length)).numpy()
        return keep
