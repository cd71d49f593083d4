"""Which tokens of a tokenised input may be dropped, told from the tokens alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor


class ProtectedTokens(NamedTuple):
    """A rule for the tokens that are never dropped: special ones, some at either end, and the question of a pair.

    A data set says for each text what of it is protected (``sd_gym.tasks.encoding.droppable_tokens``). A policy that is
    attached to a model sees tokens only, so it needs a rule; ``find`` gives the one that says just the same.
    """

    special: tuple[int, ...]  # ids of the tokenizer's special tokens
    first: int  # tokens at the beginning
    last: int  # tokens at the end
    separator: int | None  # id of the token after the question; None: there is no question

    @classmethod
    def find(
        cls, input_ids: Tensor, length: NDArray, droppable: NDArray, special: list[int], separator: int | None
    ) -> ProtectedTokens | None:
        """The rule by which inputs protect exactly what is not ``droppable``; ``None``: there is none.

        Of ``input_ids [n, longest]``, padded at the right, and tokens of each input, ``length [n]``; ``separator`` is
        the id of the token between two texts, if the tokenizer has one.
        """
        wanted, lengths = torch.from_numpy(droppable), torch.from_numpy(length)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        some = wanted.any(dim=1)  # where nothing may be dropped, an input does not tell how far the ends reach
        first = wanted.int().argmax(dim=1)[some]
        last = (lengths - wanted.shape[1] + wanted.flip(1).int().argmax(dim=1))[some]
        ends = (int(first.min()), int(last.min())) if some.any() else (0, 0)
        for first_last, question in (((0, 0), None), ((0, 0), separator), (ends, None)):
            rule = cls(tuple(special), *first_last, question)
            if torch.equal(rule.droppable(input_ids, mask), wanted):
                return rule
        return None

    def droppable(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Which tokens may be dropped, bool ``[n, longest]``, of ids padded at the right, and their attention mask."""
        present = mask.bool()
        place, length = torch.arange(input_ids.shape[1], device=input_ids.device), present.sum(dim=1, keepdim=True)
        special = torch.isin(input_ids, torch.tensor(self.special, device=input_ids.device))
        allowed = present & ~special & (place >= self.first) & (place < length - self.last)
        if self.separator is not None:
            allowed &= ((input_ids == self.separator) & (place > 0)).cumsum(dim=1) > 0
        return allowed

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ProtectedTokens:
        """Of the values of ``_asdict`` (``KeyError`` or ``TypeError`` if they are others)."""
        return cls(**{**values, "special": tuple(values["special"])})
