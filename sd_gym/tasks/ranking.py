"""Rankings of the tokens of encoded inputs: the lowest ones are dropped first."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sd_gym.data.encoded import Encoded
from sd_gym.data.instance import Instance
from sd_gym.registry import Registry, check_function
from sd_gym.switch import (
    FlopsModel,
    Switchboard,
    attention_received,
    inverse_document_frequency,
    position_scores,
    rarity_scores,
)

STATISTICS_SIZE = 2000  # training instances that statistics are taken from
BATCH = 512

ScoreTokens = Callable[[Encoded, Switchboard, Callable[[], NDArray]], NDArray]  # see ``TokenRanking.scores``


class TokenRanking(ABC):
    """A way to rank tokens."""

    is_exported: bool = False  # whether a saved policy can rank by it, without its env
    needs_rarity: bool = False  # whether a saved policy needs ``training_rarity`` for it
    costs_flops: bool = False  # whether ranking runs a part of the backbone

    @abstractmethod
    def scores(self, encoded: Encoded, board: Switchboard, rarity: Callable[[], NDArray]) -> NDArray:
        """How much each token matters, float ``[n, longest]``; ``rarity`` returns ``training_rarity``."""

    def flops(self, flops: FlopsModel, length: NDArray) -> NDArray:
        """FLOPs of ranking the tokens of inputs of ``length [n]`` tokens, int64 ``[n]``."""
        return np.zeros_like(length)


class ByAttention(TokenRanking):
    """Ranks by the attention that each token receives in the first layer, which is run densely first."""

    is_exported = True
    costs_flops = True

    def scores(self, encoded: Encoded, board: Switchboard, rarity: Callable[[], NDArray]) -> NDArray:
        """See ``attention_received``."""
        parts, longest = in_batches(attention_received, encoded, board), encoded.input_ids.shape[1]
        return np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts])

    def flops(self, flops: FlopsModel, length: NDArray) -> NDArray:
        """FLOPs of the first attention."""
        return flops.first_attention(length)


class ByRarity(TokenRanking):
    """Ranks by inverse document frequency in the training split."""

    is_exported = True
    needs_rarity = True

    def scores(self, encoded: Encoded, board: Switchboard, rarity: Callable[[], NDArray]) -> NDArray:
        """See ``rarity_scores``."""
        ids = encoded.input_ids.numpy()
        return rarity_scores(ids, np.arange(ids.shape[1]) < encoded.source_length[:, None], rarity())


class FunctionRanking(TokenRanking):
    """Ranks by a function that costs no FLOPs; see ``register_ranking``."""

    def __init__(self, function: ScoreTokens, *, is_exported: bool = False) -> None:
        self._function = function
        self.is_exported = is_exported

    def scores(self, encoded: Encoded, board: Switchboard, rarity: Callable[[], NDArray]) -> NDArray:
        """The values of the function."""
        return self._function(encoded, board, rarity)


RANKINGS: Registry[TokenRanking] = Registry(
    "token ranking",
    {
        "attention": ByAttention(),
        "idf": ByRarity(),
        "position": FunctionRanking(lambda encoded, *_: position_scores(encoded.input_ids.shape), is_exported=True),
        "random": FunctionRanking(lambda encoded, *_: np.random.default_rng(0).random(encoded.input_ids.shape)),
    },
)


def register_ranking(name: str, ranking: TokenRanking | ScoreTokens) -> None:
    """Register a token ranking of your own: ``token_ranking=name`` then works in ``gym.make``, YAML and ``--set``.

    A policy that uses it cannot be saved for use outside its env.

    Args:
        name: Its name. A second one of the same name replaces the first.
        ranking: A ``TokenRanking``, or a function that costs no FLOPs. It takes ``(encoded, board, rarity)`` to a
            number per token, float ``[n, longest]``; the lowest are dropped first.

    Raises:
        ValueError: If the name is one of the project's.
        TypeError: If it is neither.
    """
    if not isinstance(ranking, TokenRanking):
        check_function(f"the token ranking {name!r}", ranking)
    RANKINGS.register(name, ranking if isinstance(ranking, TokenRanking) else FunctionRanking(ranking))


def training_rarity(tokenizer: PreTrainedTokenizerBase, train: Sequence[Instance]) -> NDArray:
    """``inverse_document_frequency`` of each token in the first training instances."""
    texts = [f"{instance.source} {instance.source_pair or ''}" for instance in train[:STATISTICS_SIZE]]
    return inverse_document_frequency(map(np.array, tokenizer(texts).input_ids))


def in_batches(
    function: Callable[[Switchboard, dict[str, Tensor]], Tensor], encoded: Encoded, board: Switchboard
) -> Iterator[NDArray]:
    """A function of the model's inputs, batch by batch, in order."""
    for start in range(0, len(encoded), BATCH):
        rows = np.arange(start, min(start + BATCH, len(encoded)))
        yield function(board, encoded.inputs(rows, board.model.device)).float().cpu().numpy()
