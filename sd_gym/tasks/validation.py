"""What a backbone is worth on a split under random decisions, while it is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.forward import forward, kept_of_pass
from sd_gym.backbones.load import output_of
from sd_gym.backbones.prepare import decisions_around, random_decisions
from sd_gym.backbones.spans import best_spans
from sd_gym.switch import Switchboard
from sd_gym.tasks.data import Instances
from sd_gym.tasks.encoding import Encoded
from sd_gym.tasks.metrics import likelihood, quality
from sd_gym.tasks.ranking import kept_tokens
from sd_gym.tasks.text import text_quality

REPORTED_RATES = (0.0, 0.2, 0.4, 0.6)
BATCH = 64


@dataclass(frozen=True)
class Part:
    """A split as the model reads it, with what dropping its tokens needs.

    Attributes:
        instances: The instances.
        encoded: Their tensors.
        padding_side: Where batches are padded.
        shares: The shares of tokens that a row may drop, float ``[levels]``.
        scores: How much each token matters, ``[n, longest]``; ``None`` where none is dropped.
        droppable: Whether it may be dropped, likewise.
        skip_logits: Log-odds by which the policy that the backbone is tuned under skips each switch, float32
            ``[n, switches]``; ``None``: there is none.
    """

    instances: Instances
    encoded: Encoded
    padding_side: str
    shares: NDArray
    scores: NDArray | None
    droppable: NDArray | None
    skip_logits: NDArray | None = None

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are (``Instances.provenance``), and how many had their input or target cut."""
        return {**self.instances.provenance, **self.encoded.counts}

    def batch(self, rows: NDArray, level: NDArray) -> dict[str, Tensor]:
        """The inputs of some rows, on the CPU; ``keep`` among them where tokens are dropped at their levels."""
        inputs = self.encoded.batch(rows, torch.device("cpu"), padding_side=self.padding_side)
        if self.skip_logits is not None:
            inputs["skip_logits"] = torch.from_numpy(self.skip_logits[rows])
        if level.any():
            length, share = self.encoded.source_length[rows], self.shares[level]
            keep = kept_tokens(self.scores[rows], self.droppable[rows], length, share, self.padding_side)
            inputs["keep"] = torch.from_numpy(keep)
        return inputs


@dataclass(frozen=True)
class Score:
    """Mean quality on a split, of which each process runs its share."""

    board: Switchboard
    part: Part
    label_range: float
    max_target_length: int
    accelerator: Accelerator

    @property
    def name(self) -> str:
        """What the quality is."""
        labels = self.part.encoded.labels
        names = {"text": "likelihood", "span": "f1", "label": "score" if labels.is_floating_point() else "accuracy"}
        return names[output_of(self.board.model)]

    def by_rate(self) -> dict[str, float]:
        """Quality with every row skipping each switch at random, by the rate (0: dense)."""
        n, switches, generator = len(self.part.encoded), len(self.board), torch.Generator()
        drawn = {rate: torch.rand(n, switches, generator=generator.manual_seed(0)) < rate for rate in REPORTED_RATES}
        return {str(rate): self.mean(skip.long(), np.zeros(n, dtype=np.int64)) for rate, skip in drawn.items()}

    def by_share(self) -> dict[str, float]:
        """Quality with every sublayer running, by the share of tokens that every row drops; nothing where none may."""
        n, shares = len(self.part.encoded), self.part.shares.tolist()[1:]
        nothing = torch.zeros(n, len(self.board), dtype=torch.int64)
        return {str(share): self.mean(nothing, np.full(n, level)) for level, share in enumerate(shares, start=1)}

    def under_decisions(self, max_rate: float) -> float:
        """Quality with every row drawing its decision as in training, the same ones at each call."""
        n, levels = len(self.part.encoded), len(self.part.shares)
        generator = torch.Generator().manual_seed(0)
        skip = random_decisions(n, len(self.board), max_rate, generator)
        if self.part.skip_logits is not None:
            skip = decisions_around(torch.from_numpy(self.part.skip_logits), skip, generator)
        return self.mean(skip, np.random.default_rng(0).integers(levels, size=n))

    @torch.inference_mode()
    def mean(self, skip: Tensor, level: NDArray) -> float:
        """Mean quality under decisions ``[n, switches]`` and token levels ``[n]``."""
        part, device = self.part, self.board.model.device
        order = np.argsort(part.encoded.source_length, kind="stable")
        batches = np.split(order, range(BATCH, len(order), BATCH))
        total = 0.0
        for rows in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            inputs = {name: value.to(device) for name, value in part.batch(rows, level[rows]).items()}
            inputs.pop("skip_logits", None)
            keep = inputs.pop("keep", None)
            if keep is not None and "context_mask" in inputs:
                inputs["context_mask"] = inputs["context_mask"] & keep
            with self.board.decide(skip[rows], kept_of_pass(self.board, keep, inputs["labels"])):
                logits = forward(self.board, inputs)
            total += self._sum(logits, inputs["labels"], rows)
        return float(self.accelerator.reduce(torch.tensor(total, device=device), reduction="sum")) / len(order)

    def _sum(self, logits: Tensor, labels: Tensor, rows: NDArray) -> float:
        if output_of(self.board.model) == "span":
            chosen = [self.part.instances[row] for row in rows]
            spans = best_spans(logits, self.max_target_length).cpu().numpy()
            texts = self.part.encoded.span_texts(rows, spans, [one.source_pair for one in chosen])
            return sum(text_quality("squad", text, one.references) for text, one in zip(texts, chosen, strict=True))
        score = likelihood if self.board.model.can_generate() else quality
        return float(score(logits, labels, self.label_range).sum())
