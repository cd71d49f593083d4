"""The texts of an input with a mark per character: read, dropped by a decision, or cut off as too long."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_gym.config import BackboneConfig
from sd_gym.data.instance import Instance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ, DROPPED, CUT = 0, 1, 2


class MarkedText(NamedTuple):
    """A text and its marks."""

    text: str
    marks: NDArray  # ``READ``, ``DROPPED`` or ``CUT`` per character, int8 ``[len(text)]``

    def runs(self) -> list[tuple[str, int]]:
        """The text in pieces, each with its mark."""
        groups = groupby(zip(self.text, self.marks.tolist(), strict=True), key=lambda pair: pair[1])
        return [("".join(character for character, _ in group), mark) for mark, group in groups]


def marked_texts(
    instance: Instance, tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig, keep: NDArray | None = None
) -> list[MarkedText]:
    """The texts that a backbone reads (source and pair, or the filled prompt), with marks.

    With a slow tokenizer all is marked as read: it does not give the characters of its tokens. ``keep``: the tokens
    that are not dropped, bool ``[length]``; ``None``: all.
    """
    from sd_gym.tasks.encoding import texts_and_tokens  # imports torch

    texts, places = texts_and_tokens(instance, tokenizer, backbone)
    if places is None:
        return [MarkedText(text, np.full(len(text), READ, dtype=np.int8)) for text in texts]
    keep = np.ones(len(places), dtype=bool) if keep is None else keep
    marked = []
    for number, text in enumerate(texts):
        own = places[:, 0] == number
        marks = np.full(len(text), READ, dtype=np.int8)
        for (_, begin, end), kept in zip(places[own], keep[own], strict=True):
            marks[begin:end] = READ if kept else DROPPED
        if tokenizer.truncation_side == "left":
            marks[: places[own, 1].min(initial=len(text))] = CUT
        else:
            marks[places[own, 2].max(initial=0) :] = CUT
        marked.append(MarkedText(text, marks))
    return marked
