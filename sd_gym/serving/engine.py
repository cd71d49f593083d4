"""What answers the rows of a batcher: a model with its policy, in one thread of its own."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sd_gym.execution.bank import MODELS
from sd_gym.execution.split import BackboneSplit
from sd_gym.inference.answer import Answer
from sd_gym.inference.texts import SkippingModel
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.card import OperatingPoint
from sd_gym.serving.batcher import PassCost, Row

WARM_UP_TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
WARM_UP_ROWS, WARM_UP_ROUNDS = (8, 24), 3


class Asked(NamedTuple):
    """One input of a request."""

    texts: list[str]  # checked
    point: int | None = None  # index of the operating point; None: the dial chooses
    longest: int | None = None  # tokens of a generated text at most; None: as in the env


class Served(NamedTuple):
    """The answer to one input, and what it took."""

    answer: Answer
    scores: dict[str, float] | None  # probability of each class, the highest first; None: there are no classes
    length: int  # tokens of the input
    promised: float  # FLOPs of this row alone, the policy's own included
    executed: float  # its share of those of its group, padding included
    dense: float  # FLOPs of the dense backbone on this row alone


class BlockingEngine(Protocol):
    """A ``sd_gym.serving.batcher.Engine`` whose calls block."""

    groups_masks: bool  # whether only rows of one mask run together

    def prepare(self, inputs: list[Asked]) -> list[Row]: ...  # noqa: D102

    def run(self, rows: list[Row], point: int) -> list[Served]: ...  # noqa: D102

    def warm_up(self) -> PassCost: ...  # noqa: D102


class InThread:
    """An engine whose calls run one after the other in a thread, so that the event loop never waits."""

    def __init__(self, engine: BlockingEngine) -> None:
        self._engine, self._thread = engine, ThreadPoolExecutor(1, thread_name_prefix="model")

    async def prepare(self, inputs: list[Asked]) -> list[Row]:
        """See ``Engine``."""
        return await self.call(self._engine.prepare, inputs)

    async def run(self, rows: list[Row], point: int) -> list[Served]:
        """See ``Engine``."""
        return await self.call(self._engine.run, rows, point)

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function gives in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class OperatingPoints:
    """The operating points of a policy that requests, or a dial, may choose among; the one that skips most first.

    Args:
        policy: The policy, at the operating point of requests that ask for none.
        allow_loss: Highest loss that a point may have, by its upper bound; ``None``: points that passed their test.
        allow_flops: Largest share of the FLOPs that a point may run.

    Attributes:
        points: The points. The policy's own is always among them.
        default: The index of that one.
    """

    def __init__(self, policy: SkipPolicy, allow_loss: float | None = None, allow_flops: float = 1.0) -> None:
        def allowed(point: OperatingPoint) -> bool:
            keeps = point.passed if allow_loss is None else point.highest_loss <= allow_loss
            return point.margin == 0 or (keeps and point.flops_ratio <= allow_flops)

        self.points = [point for point in policy.operating_points if allowed(point)]
        self._policy = replace(policy, operating_points=tuple(self.points))
        if all(point.margin != 0 for point in self.points):  # it was never tested
            self.points.append(OperatingPoint(0.0, float("nan"), float("nan"), float("nan"), passed=False))
        self.default = next(number for number, point in enumerate(self.points) if point.margin == 0)
        self.policies = [policy.with_margin(point.margin) for point in self.points]

    def index(self, max_loss: float | None, max_flops: float | None) -> int | None:
        """The point within a request's limits; ``None`` without a limit; ValueError as of ``SkipPolicy.at``."""
        if max_loss is None and max_flops is None:
            return None
        chosen = self._policy.at(max_loss=max_loss, max_flops=max_flops).operating_points
        return next(number for number, point in enumerate(chosen) if point.margin == 0)


class TextEngine:
    """Decides on texts, and answers those that share a mask.

    If a policy has few masks, the rows of a mask run together as a smaller model. If it has many, rows of all masks run
    together on the switchboard. So do the rows of an operating point if it decides in the pass.

    Args:
        model: The model.
        points: Its operating points.
        dialled: Indices of those that a dial chooses among.
    """

    def __init__(self, model: SkippingModel, points: OperatingPoints, dialled: Sequence[int]) -> None:
        self.model, self._policies, self._dialled = model, points.policies, dialled
        few, self._staged = model.policy.network.few_decisions, model.policy.is_staged
        self._masks = None if few is None or self._staged or len(few) > MODELS else few
        self.groups_masks = self._masks is not None

    @torch.inference_mode()
    def prepare(self, inputs: list[Asked]) -> list[Row]:
        """Tokenise, and decide at the operating point that was asked for, or else at all that may be chosen."""
        rows: dict[int, Row] = {}
        for count in {len(asked.texts) for asked in inputs}:  # a single text among pairs gets further tokens
            numbers = [number for number, asked in enumerate(inputs) if len(asked.texts) == count]
            of_count = [inputs[number] for number in numbers]
            split = self.model.split([asked.texts for asked in of_count])
            lengths = split.encoded.source_length.tolist()
            rows |= zip(numbers, map(self._row, of_count, lengths, self._decided(split, of_count)), strict=True)
        return [rows[number] for number in range(len(inputs))]

    def _decided(self, split: BackboneSplit, inputs: list[Asked]) -> NDArray:
        """Decisions at each operating point, int64 ``[n, points, switches + 1]``; zeros where nobody asks for it."""
        decisions = np.zeros((len(inputs), len(self._policies), len(self.model.board) + 1), dtype=np.int64)
        for number, policy in enumerate(self._policies):
            if any(number in self._dialled if asked.point is None else number == asked.point for asked in inputs):
                self.model.policy = policy
                decisions[:, number] = self.model.decided(split)
        return decisions

    def _row(self, asked: Asked, length: int, decisions: NDArray) -> Row:
        if asked.point is not None:
            decisions = np.repeat(decisions[[asked.point]], len(decisions), axis=0)
        masks = [decision.tobytes() if self.groups_masks else b"" for decision in decisions]
        kind = len(asked.texts), asked.longest, asked.point if self._staged else None
        return Row(length, masks, kind, (asked, decisions))

    @torch.inference_mode()
    def run(self, rows: list[Row], point: int) -> list[Served]:
        """The answers of rows of one kind at an operating point."""
        asked: list[Asked] = [row.content[0] for row in rows]
        self.model.policy = self._policies[point if asked[0].point is None else asked[0].point]
        return self._answered([one.texts for one in asked], np.stack([row.content[1][point] for row in rows]), asked[0])

    def _answered(self, texts: list[list[str]], decided: NDArray, asked: Asked) -> list[Served]:
        split, names = self.model.split(texts), self.model.model.config.id2label or {}
        if asked.longest is not None:
            split.passes.longest = asked.longest
        if self.groups_masks and (decided != decided[0]).any():
            split.passes.bank = None  # it is one pass, not one for each mask
        scores: list[dict[str, float] | None] = [None] * len(texts)

        def keep(rows: NDArray, logits: torch.Tensor) -> None:
            for row, shares in zip(rows.tolist(), logits.float().softmax(dim=-1).tolist(), strict=True):
                ranked = sorted(enumerate(shares), key=lambda pair: -pair[1])
                scores[row] = {str(names[number]): share for number, share in ranked}

        if split.head.confidence is not None:
            split.passes.watch = keep
        answers = self.model.answered(split, decided)
        said, rows = self.model.saying(split, [answer.answer for answer in answers]), np.arange(len(texts))
        masks = np.array([[*one.skip, one.token_level, one.went_on] for one in answers], dtype=np.int64)
        executed = said.costs.executed_flops(rows, masks, [rows]) / len(rows) + self.model.own_flops(split)
        dense, length = said.costs.dense_flops(rows).tolist(), split.encoded.source_length.tolist()
        return [
            Served(
                answers[row], scores[row], length[row], answers[row].flops_ratio * dense[row], executed[row], dense[row]
            )
            for row in rows
        ]

    def warm_up(self) -> PassCost:
        """Run what is slow the first time, and measure what passes of one mask and of several take.

        The time of a pass is fitted by a * rows + b. In a pass of several masks each row runs just what its own runs.
        """
        texts = [WARM_UP_TEXT] * len(self.model.fields)
        length = self.prepare([Asked(texts)])[0].length
        dense = np.zeros((1, len(self.model.board) + 1), dtype=np.int64)
        masks = dense if self._masks is None else self._masks

        def seconds(decisions: NDArray) -> float:
            started = time.perf_counter()
            self._answered([texts] * len(decisions), decisions, Asked(texts))
            return time.perf_counter() - started

        def fitted(of_rows: Callable[[int], list[NDArray]]) -> tuple[float, float]:
            few, many = WARM_UP_ROWS
            for decisions in of_rows(few):
                seconds(decisions)
            times = [
                statistics.fmean(
                    statistics.median(seconds(decisions) for _ in range(WARM_UP_ROUNDS)) for decisions in of_rows(rows)
                )
                for rows in WARM_UP_ROWS
            ]
            of_row = max((times[1] - times[0]) / (many - few), 1e-9)
            return of_row, max(0.0, times[0] - few * of_row)

        token = fitted(lambda rows: [np.repeat(dense, rows, axis=0)])[0] / length
        of_row, of_pass = fitted(lambda rows: [np.repeat(mask[None], rows, axis=0) for mask in masks])
        if len(masks) == 1:
            return PassCost(of_pass / token)
        mixed_row, mixed = fitted(lambda rows: [np.resize(masks, (rows, masks.shape[1]))])
        return PassCost(of_pass / token, mixed / token, max(0.0, mixed_row - of_row) / token)
