"""Which tokens of a tokenised input may be dropped, by a rule on the tokens alone."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor


class TokenRule(NamedTuple):
    """A rule for the tokens that are never dropped: special tokens, some at either end, and the question of a pair.

    In an env the data set defines them for each text (``sd_gym.tasks.encoding.droppable_tokens``). An attached policy
    has tokens only; ``find`` gives it a rule with the same result.
    """

    special: tuple[int, ...]  # ids of the tokenizer's special tokens
    first: Annotated[int, Field(ge=0)]  # number of tokens at the beginning
    last: Annotated[int, Field(ge=0)]  # number of tokens at the end
    separator: int | None  # id of the token after the question; None if there is no question

    @classmethod
    def find(
        cls, input_ids: Tensor, length: NDArray, droppable: NDArray, special: list[int], separator: int | None
    ) -> TokenRule | None:
        """The rule that protects exactly the tokens that are not droppable; ``None`` if there is no such rule.

        Inputs ``[n, longest]`` of ``length [n]`` are padded at the right, and ``droppable`` is bool of their shape.
        ``special`` are the ids of the special tokens, ``separator`` that of the token between two texts, if any.
        """
        wanted, lengths = torch.from_numpy(droppable), torch.from_numpy(length)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        some = wanted.any(dim=1)  # an input without droppable tokens says nothing about the ends
        first = wanted.int().argmax(dim=1)[some]
        last = (lengths - wanted.shape[1] + wanted.flip(1).int().argmax(dim=1))[some]
        ends = (int(first.min()), int(last.min())) if some.any() else (0, 0)
        for first_last, question in (((0, 0), None), ((0, 0), separator), (ends, None)):
            rule = cls(tuple(special), *first_last, question)
            if torch.equal(rule.selects(input_ids, mask), wanted):
                return rule
        return None

    def selects(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Which tokens may be dropped, bool ``[n, longest]``; ids and attention mask are padded at the right."""
        present = mask.bool()
        place, length = torch.arange(input_ids.shape[1], device=input_ids.device), present.sum(dim=1, keepdim=True)
        special = torch.isin(input_ids, torch.tensor(self.special, device=input_ids.device))
        allowed = present & ~special & (place >= self.first) & (place < length - self.last)
        if self.separator is not None:
            allowed &= ((input_ids == self.separator) & (place > 0)).cumsum(dim=1) > 0
        return allowed

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TokenRule:
        """The rule with the values of ``_asdict``; ``KeyError`` or ``TypeError`` if they are malformed."""
        return cls(**{**values, "special": tuple(values["special"])})
