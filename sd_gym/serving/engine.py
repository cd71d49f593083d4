"""Engines of a batcher: a model and its policy, which run in one thread."""

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sd_gym.execution.bank import MODELS
from sd_gym.inference.answer import Answer
from sd_gym.inference.choices import decided_masks
from sd_gym.inference.onnx import OnnxModel
from sd_gym.inference.texts import SkippingModel
from sd_gym.operating_points import OperatingPoint, margin_for
from sd_gym.serving.grouping import PassCost, Row

WARM_UP_TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
WARM_UP_ROWS, WARM_UP_ROUNDS = (8, 24), 5
WARM_UP_TOKENS = 4  # most tokens of a generated text: whole texts would take minutes
LEAST_PADDING = 8.0  # tokens of padding that a row may always add to a group


class Asked(NamedTuple):
    """One input of a request."""

    texts: list[str]  # checked
    point: int | None = None  # index of the operating point; None: the dial chooses
    longest: int | None = None  # most tokens of a generated text; None: as in the env


class Served(NamedTuple):
    """The answer to one input, and its cost."""

    answer: Answer
    scores: dict[str, float] | None  # probability of each class in descending order; None: not a classification
    length: int  # tokens of the input
    promised: float  # FLOPs of this row alone, the policy's own included
    executed: float  # its share of its group's FLOPs, padding included
    dense: float  # FLOPs of the dense backbone on this row alone
    generated: int = 0  # tokens of the text, with its end
    finished: bool = True  # whether the text ended by itself, not at the limit


class Described(NamedTuple):
    """A description of the model."""

    name: str  # the backbone's name
    fields: tuple[str, ...]  # names of an input's texts
    gives: str  # label, score, span or text
    switches: list[str]
    longest: int  # most tokens of a generated text
    completes: bool  # whether the model continues one text: it is decoder-only


class OperatingPoints:
    """The operating points of a policy that requests and dials may choose (``points``); the first skips most.

    ``default`` is the index of the point whose margin is ``usual``, which is always allowed. Others are allowed if the
    upper bound of their loss is at most ``allow_loss`` (``None``: if they passed their test), and their FLOPs ratio at
    most ``allow_flops``.
    """

    def __init__(
        self,
        points: Sequence[OperatingPoint],
        usual: float = 0.0,
        allow_loss: float | None = None,
        allow_flops: float = 1.0,
    ) -> None:
        if allow_loss is None:
            kept = [point for point in points if point.passed]
        else:  # as ``margin_for``: up to the first one, from dense to bold, that may lose more
            kept = [*takewhile(lambda point: point.highest_loss <= allow_loss, points[::-1])][::-1]
        self._tested = points[points.index(kept[0]) :] if kept else []
        self.points = [
            point for point in points if point.margin == usual or (point in kept and point.flops_ratio <= allow_flops)
        ]
        if all(point.margin != usual for point in self.points):  # it was never tested
            self.points.append(OperatingPoint(usual, math.nan, math.nan, math.nan, passed=False))
        self.default = self._at(usual)

    def index(self, max_loss: float | None, max_flops: float | None) -> int | None:
        """The point within a request's limits, as ``margin_for`` chooses it; ``None`` without limits.

        Raises:
            ValueError: As ``margin_for``, or if the point is not allowed.
        """
        if max_loss is None and max_flops is None:
            return None
        margin = margin_for(self._tested, max_loss=max_loss, max_flops=max_flops)
        if all(point.margin != margin for point in self.points):
            shares = ", ".join(f"{point.flops_ratio:.0%}" for point in self.points)
            raise ValueError(f"this server does not allow the operating point of these limits; it allows {shares}")
        return self._at(margin)

    def _at(self, margin: float) -> int:
        return next(number for number, point in enumerate(self.points) if point.margin == margin)


class BlockingEngine(ABC):
    """Decides and answers, in calls that block; ``dialled``: the points that the dial may choose."""

    served: Described
    groups_masks = True  # whether rows are grouped by mask

    def __init__(self, model: Any, points: OperatingPoints, dialled: Sequence[int]) -> None:
        self.model = model
        self._points = points.points
        self._dialled = dialled

    def checked(self, given: Any) -> list[str]:
        """See ``TextModel``."""
        return self.model.checked(given)

    @abstractmethod
    def prepare(self, inputs: list[Asked]) -> list[Row]:
        """Tokenise, and decide at the requested operating point, or else at all that the dial may choose."""

    @abstractmethod
    def run(self, rows: list[Row], point: int) -> list[Served]:
        """Answer rows of one kind at an operating point."""

    @abstractmethod
    def warm_up(self) -> PassCost:
        """Warm the model up, and measure the overhead of its passes."""

    def _needed(self, inputs: list[Asked]) -> list[int]:
        """The operating points at which decisions are needed, in ascending order."""
        dialled = self._dialled if any(asked.point is None for asked in inputs) else ()
        return sorted({*dialled, *(asked.point for asked in inputs if asked.point is not None)})


class TextEngine(BlockingEngine):
    """Answers with a model in torch.

    If a policy has few masks before the first layer, the rows of a mask run together, otherwise all rows.
    """

    model: SkippingModel

    def __init__(self, model: SkippingModel, points: OperatingPoints, dialled: Sequence[int]) -> None:
        super().__init__(model, points, dialled)
        policy = model.policy
        self._staged = policy.is_staged
        self._policies = [policy.with_margin(point.margin) for point in points.points]
        masks = decided_masks(policy) if policy.decides_first else None
        self._masks = masks if masks is not None and len(masks) <= MODELS else None
        self.groups_masks, config = self._masks is not None, model.model.config
        completes = model.gives == "text" and len(model.fields) == 1 and not config.is_encoder_decoder
        name = Path(policy.card["backbone"]["name"]).name
        self.served = Described(name, model.fields, model.gives, model.board.names, model.max_target_length, completes)

    @torch.inference_mode()
    def prepare(self, inputs: list[Asked]) -> list[Row]:
        """See ``BlockingEngine``."""
        split = self.model.split([asked.texts for asked in inputs])
        decisions = np.zeros((len(inputs), len(self._policies), len(self.model.board) + 1), dtype=np.int64)
        needed = self._needed(inputs)
        decided = self.model.decided_at([self._policies[point] for point in needed], split)
        decisions[:, needed] = decided.swapaxes(0, 1)
        return list(map(self._row, inputs, split.encoded.source_length.tolist(), decisions))

    def _row(self, asked: Asked, length: int, decisions: NDArray) -> Row:
        if asked.point is not None:
            decisions = np.repeat(decisions[[asked.point]], len(decisions), axis=0)
        masks = [decision.tobytes() if self.groups_masks else b"" for decision in decisions]
        kind = asked.longest, asked.point if self._staged else None
        return Row(length, masks, kind, (asked, decisions), asked.point is None)

    @torch.inference_mode()
    def run(self, rows: list[Row], point: int) -> list[Served]:
        """Answer rows of one kind at an operating point."""
        asked: list[Asked] = [row.content[0] for row in rows]
        self.model.policy = self._policies[point if asked[0].point is None else asked[0].point]
        return self._answered(
            [given.texts for given in asked], np.stack([row.content[1][point] for row in rows]), asked[0]
        )

    def _answered(self, texts: list[list[str]], decided: NDArray, asked: Asked) -> list[Served]:
        split = self.model.split(texts)
        if asked.longest is not None:
            split.passes.max_target_length = asked.longest
        if self.groups_masks and (decided != decided[0]).any():
            split.passes.bank = None  # one pass for all masks
        scores: list[dict[str, float] | None] = [None] * len(texts)
        parts = list[NDArray]()

        def keep(rows: NDArray, logits: torch.Tensor | None) -> None:
            parts.append(rows)
            if logits is None or split.head.confidence is None:
                return
            for row, shares in zip(rows.tolist(), logits.float().softmax(dim=-1).tolist(), strict=True):
                scores[row] = _sorted_scores(shares, self.model.names)

        split.passes.watch = keep
        answers = self.model.answered(split, decided)
        costs, passes = self.model.costs(split), split.passes
        rows = np.arange(len(texts))
        masks = np.array([[*answer.skip, answer.token_level, answer.went_on] for answer in answers], dtype=np.int64)
        passed = [rows] if self._staged else parts  # with stages, parts are not passes: rows go on after them
        executed = costs.executed_flops(rows, masks, passed)
        if (passes.first_generated != passes.generated).any():  # texts that were written again have other lengths
            first, accepted = self.model.costs(split, passes.first_generated), masks.copy()
            accepted[:, -1] = 0
            executed -= costs.executed_flops(rows, accepted, passed) - first.executed_flops(rows, accepted, passed)
        executed = executed / len(rows) + self.model.own_flops(split)
        dense = costs.dense_flops(rows)
        promised = dense * [answer.flops_ratio for answer in answers]
        lengths = split.encoded.source_length.tolist()
        columns = answers, scores, lengths, promised.tolist(), executed.tolist(), dense.tolist()
        columns += passes.generated.tolist(), passes.finished.tolist()
        return [Served(*values) for values in zip(*columns, strict=True)]

    def warm_up(self) -> PassCost:
        """Measure the overhead of passes of one mask and of several."""
        texts = _warm_up_texts(self.model.fields)
        length = self.prepare([Asked(texts)])[0].length
        dense = np.zeros((1, len(self.model.board) + 1), dtype=np.int64)
        masks = dense if self._masks is None else self._masks
        asked = Asked(texts, longest=min(WARM_UP_TOKENS, self.served.longest))

        def run(decisions: NDArray) -> None:
            self._answered([texts] * len(decisions), decisions, asked)

        token = _fit_seconds(run, [dense])[0] / length
        of_row, of_pass = _fit_seconds(run, masks[:, None])
        if len(masks) == 1:
            return PassCost(max(LEAST_PADDING, of_pass / token))
        mixed_row, mixed = _fit_seconds(run, [masks])
        return PassCost(max(LEAST_PADDING, of_pass / token), mixed / token, max(0.0, mixed_row - of_row) / token)


class GraphEngine(BlockingEngine):
    """Answers with ONNX graphs of ``sd-gym export``. Each run has one mask, so rows of two masks never run together."""

    model: OnnxModel

    def __init__(self, model: OnnxModel, points: OperatingPoints, dialled: Sequence[int]) -> None:
        super().__init__(model, points, dialled)
        manifest = model.manifest
        name = Path(manifest["backbone"]["name"]).name
        self.served = Described(name, model.fields, manifest["head"], manifest["switches"], 0, completes=False)

    def prepare(self, inputs: list[Asked]) -> list[Row]:
        """See ``BlockingEngine``."""
        encoded = self.model.encoded([asked.texts for asked in inputs])
        batch, masks = self.model.batch(encoded), np.zeros((len(inputs), len(self._points)), dtype=np.int64)
        needed = self._needed(inputs)
        margins = np.array([self._points[point].margin for point in needed], dtype=np.float32)
        masks[:, needed], observed = self.model.decide_at(margins, batch)
        rows = []
        for asked, encoding, of_points, own in zip(inputs, encoded, masks, observed, strict=True):
            chosen = of_points if asked.point is None else np.repeat(of_points[asked.point], len(of_points))
            kind = asked.point if self.model.has_answer_stage else None
            rows.append(Row(len(encoding), chosen.tolist(), kind, (asked, encoding, own), asked.point is None))
        return rows

    def run(self, rows: list[Row], point: int) -> list[Served]:
        """Answer rows that share a mask at an operating point."""
        model = self.model
        asked = [row.content[0] for row in rows]
        encoded = [row.content[1] for row in rows]
        number, observed = np.full(len(rows), rows[0].masks[point]), np.stack([row.content[2] for row in rows])
        model.margin = np.float32(self._points[point if asked[0].point is None else asked[0].point].margin)
        values, went_on = model.run_policy(number[0], model.batch(encoded), observed)
        lengths = np.array([row.length for row in rows])
        padded = np.full_like(lengths, lengths.max())
        dense, own = model.dense_flops(lengths), model.own_flops(lengths)
        words = model.in_words(encoded, [given.texts for given in asked], values)
        answers = model.answers_of(encoded, words, number, went_on, own)
        scores: list[dict[str, float] | None] = [None] * len(rows)
        if self.served.gives == "label":
            shares = np.exp(values - values.max(axis=-1, keepdims=True))
            scores = [_sorted_scores((of_row / of_row.sum()).tolist(), model.names) for of_row in shares]
        promised = dense * [answer.flops_ratio for answer in answers]
        executed = model.flops_ratio(number, padded, went_on) * model.dense_flops(padded) + own
        columns = answers, scores, lengths.tolist(), promised.tolist(), executed.tolist(), dense.tolist()
        return [Served(*values) for values in zip(*columns, strict=True)]

    def warm_up(self) -> PassCost:
        """Open all graphs, and measure the overhead of their passes."""
        asked = Asked(_warm_up_texts(self.model.fields))
        row = self.prepare([asked])[0]

        def run(numbers: NDArray) -> None:
            masks = [numbers[0]] * len(self._points)
            self.run([row._replace(masks=masks)] * len(numbers), 0)

        numbers = np.arange(len(self.model.masks))[:, None]
        token = _fit_seconds(run, numbers[:1])[0] / row.length
        return PassCost(max(LEAST_PADDING, _fit_seconds(run, numbers)[1] / token))


def _warm_up_texts(names: Sequence[str]) -> list[str]:
    """Only the last text is long: a question before it is never cut, so a long one may not fit."""
    return [*["one"] * (len(names) - 1), WARM_UP_TEXT]


def _sorted_scores(shares: list[float], names: dict[int, str]) -> dict[str, float]:
    return {names[number]: share for number, share in sorted(enumerate(shares), key=lambda pair: -pair[1])}


def _fit_seconds(run: Callable[[NDArray], None], batches: Iterable[NDArray]) -> tuple[float, float]:
    """Seconds per row and per pass, of a linear fit to the mean time of batches, whose rows are repeated as needed.

    Each counts with its fastest run, as other processes slow runs down.
    """

    def seconds(batch: NDArray, rows: int) -> float:
        given = np.resize(batch, (rows, *batch.shape[1:]))
        started = time.perf_counter()
        run(given)
        return time.perf_counter() - started

    few, many = WARM_UP_ROWS
    for batch in batches:
        seconds(batch, few)
    times = [
        statistics.fmean(min(seconds(batch, rows) for _ in range(WARM_UP_ROUNDS)) for batch in batches)
        for rows in WARM_UP_ROWS
    ]
    of_row = max((times[1] - times[0]) / (many - few), 1e-9)
    return of_row, max(0.0, times[0] - few * of_row)
