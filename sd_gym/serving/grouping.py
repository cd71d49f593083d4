"""Which queued rows run together, and how long that takes."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sd_gym.serving.limits import Limits


class Row(NamedTuple):
    """One input with its decisions."""

    length: int  # in tokens
    masks: Sequence[Hashable]  # one for each operating point
    kind: Hashable  # only rows of the same kind can run together
    content: Any  # what the engine needs to answer the input
    is_dialled: bool = True  # whether the dial chooses its operating point, not its request


class PassCost(NamedTuple):
    """The overhead of a pass, in the number of tokens that take as long to compute."""

    one_mask: float  # if its rows share a mask, finite; a row joins a group if it adds less padding than this
    mixed: float = math.inf  # if they do not; infinite if they cannot run together
    mixed_row: float = 0.0  # overhead of each row of a mixed pass


def best_group(rows: Sequence[Row], point: int, first: int | None, limits: Limits, cost: PassCost) -> list[int]:
    """The indices of the rows that run next at an operating point.

    They share a mask unless a mixed pass costs less per row.

    Args:
        rows: The queue, earliest deadline first; at least one row.
        point: Index of the operating point.
        first: A row that has to be in the group; ``None``: one of the most frequent mask.
        limits: Of the group.
        cost: Of a pass.
    """
    masks = [row.masks[point] for row in rows]
    if first is None:
        count = Counter(masks)
        first = max(range(len(rows)), key=lambda index: count[masks[index]])  # earliest deadline if equal
    of_kind = [index for index, row in enumerate(rows) if row.kind == rows[first].kind]
    of_mask = [index for index in of_kind if masks[index] == masks[first]]
    group, mixed = (_filled(rows, first, some, limits, cost.one_mask) for some in (of_mask, of_kind))
    is_mixed_cheaper = cost.mixed / len(mixed) + cost.mixed_row < cost.one_mask / len(group)
    return mixed if is_mixed_cheaper else group


def _filled(
    rows: Sequence[Row], first: int, candidates: Sequence[int], limits: Limits, most_padding: float
) -> list[int]:
    """``first`` and as many candidates of similar length as fit."""
    group, longest = [first], rows[first].length
    for index in candidates:
        if len(group) == limits.rows:
            break
        length = max(longest, rows[index].length)
        padded = (len(group) + 1) * length
        added_padding = padded - len(group) * longest - rows[index].length
        if index != first and padded <= limits.tokens and added_padding <= most_padding:
            group.append(index)
            longest = length
    return group


@dataclass
class _Pace:
    """Seconds per token of recent groups: moving averages of their mean and deviation, as of RFC 6298."""

    mean: float
    deviation: float = 0.0

    def add(self, pace: float) -> None:
        self.deviation += (abs(pace - self.mean) - self.deviation) / 4
        self.mean += (pace - self.mean) / 8


class Paces:
    """How long groups take, learned from those that ran: one pace for each operating point, kind and mask."""

    def __init__(self, cost: PassCost) -> None:
        self._cost = cost
        self._paces: dict[Hashable, _Pace] = {}

    def expected_seconds(self, group: Sequence[Row], point: int) -> float:
        """The time that few groups of this size exceed; 0 if none like it has run."""
        key, tokens = self._key_and_tokens(group, point)
        if key not in self._paces:
            return 0.0
        return (self._paces[key].mean + 2 * self._paces[key].deviation) * tokens

    def ran(self, group: Sequence[Row], point: int, seconds: float) -> None:
        """Learn from a group."""
        key, tokens = self._key_and_tokens(group, point)
        self._paces.setdefault(key, _Pace(seconds / tokens)).add(seconds / tokens)

    def refused(self, group: Sequence[Row], point: int) -> None:
        """Expect a percent less: refused groups are not measured, so one long pause could refuse all later ones."""
        if pace := self._paces.get(self._key_and_tokens(group, point)[0]):
            pace.mean *= 0.99
            pace.deviation *= 0.99

    def _key_and_tokens(self, group: Sequence[Row], point: int) -> tuple[Hashable, float]:
        """The key of a group's pace, and its tokens, overhead included."""
        masks = {row.masks[point] for row in group}
        tokens = len(group) * max(row.length for row in group)
        if len(masks) == 1:
            return (point, group[0].kind, *masks), tokens + self._cost.one_mask
        return (point, group[0].kind), tokens + self._cost.mixed + self._cost.mixed_row * len(group)
