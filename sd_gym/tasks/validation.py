"""The quality of a backbone on a split under random decisions, measured while it is prepared."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.draws import Drawing, decisions_around, layers_of, least_important
from sd_gym.backbones.heads import Head
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded
from sd_gym.switch import Switchboard
from sd_gym.tasks.data import Instances
from sd_gym.tasks.metrics import text_quality
from sd_gym.tasks.token_dropping import TokenDropping

REPORTED_RATES = (0.0, 0.2, 0.4, 0.6)
BATCH = 64


@dataclass(frozen=True)
class EncodedSplit:
    """A split as the model reads it."""

    instances: Instances
    encoded: Encoded  # the instances as tensors
    head: Head
    tokens: TokenDropping  # which of their tokens a level drops
    skip_logits: NDArray | None = None  # a policy's log-odds of skipping each switch, float32 ``[n, switches]``

    @property
    def provenance(self) -> dict[str, Any]:
        """``Instances.provenance``, and how many inputs and targets were cut."""
        return {**self.instances.provenance, **self.encoded.counts}

    def batch(self, rows: NDArray, level: NDArray) -> dict[str, Tensor]:
        """The inputs of some rows, on the CPU; with ``skip_logits`` under a policy, and ``keep`` where tokens drop."""
        inputs = self.head.batch(self.encoded, rows, torch.device("cpu"))
        if self.skip_logits is not None:
            inputs["skip_logits"] = torch.from_numpy(self.skip_logits[rows])
        keep = self.tokens.kept(rows, level)
        if keep is not None:
            inputs["keep"] = torch.from_numpy(keep)
        return inputs


@dataclass(frozen=True)
class MeanQuality:
    """Mean quality on a split; each process runs its share."""

    board: Switchboard
    split: EncodedSplit
    label_range: float
    reading: BackboneConfig
    accelerator: Accelerator

    def by_rate(self, importance: Tensor | None = None) -> dict[str, float]:
        """Quality by skip rate (0: dense), with each switch of each row skipped at random.

        If the ``importance`` of each layer is known, the rate is the share of layers skipped, the least important ones.
        """
        n = len(self.split.encoded)
        generator = torch.Generator()
        layers = layers_of(self.board)

        def skip(rate: float) -> Tensor:
            if importance is not None:
                return least_important(importance, rate, layers).expand(n, -1)
            return (torch.rand(n, len(layers), generator=generator.manual_seed(0)) < rate).long()

        return {str(rate): self._mean(skip(rate), np.zeros(n, dtype=np.int64)) for rate in REPORTED_RATES}

    def by_share(self) -> dict[str, float]:
        """Quality by the share of tokens dropped, with every sublayer running; empty if no share is above 0."""
        n, shares = len(self.split.encoded), self.split.tokens.shares.tolist()[1:]
        dense = torch.zeros(n, len(self.board), dtype=torch.int64)
        return {str(share): self._mean(dense, np.full(n, level)) for level, share in enumerate(shares, start=1)}

    def under_decisions(self, drawing: Drawing) -> float:
        """Quality under decisions drawn as in training, with the same seed at each call."""
        n, levels = len(self.split.encoded), len(self.split.tokens.shares)
        generator = torch.Generator().manual_seed(0)
        skip = drawing(n, generator)
        if self.split.skip_logits is not None:
            skip = decisions_around(torch.from_numpy(self.split.skip_logits), skip, generator)
        return self._mean(skip, np.random.default_rng(0).integers(levels, size=n))

    @torch.inference_mode()
    def _mean(self, skip: Tensor, level: NDArray) -> float:
        """Mean quality under decisions ``[n, switches]`` and token levels ``[n]``."""
        split, device = self.split, self.board.model.device
        order = np.argsort(split.encoded.source_length, kind="stable")
        batches = np.split(order, range(BATCH, len(order), BATCH))
        total = 0.0
        for rows in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            inputs = {name: value.to(device) for name, value in split.batch(rows, level[rows]).items()}
            inputs.pop("skip_logits", None)
            keep = inputs.pop("keep", None)
            kept = None if keep is None else split.head.kept(inputs, keep)
            with self.board.decide(skip[rows], kept), self.accelerator.autocast():
                logits = split.head.forward(self.board, inputs).float()
            total += self._sum(logits, inputs["labels"], rows)
        reduced: Any = self.accelerator.reduce(torch.tensor(total, device=device), reduction="sum")
        return float(reduced) / len(order)

    def _sum(self, logits: Tensor, labels: Tensor, rows: NDArray) -> float:
        split, head = self.split, self.split.head
        measure = head.measured_by(head.validated_by[0])
        if measure.score is not None:
            return float(measure.score(logits, labels, self.label_range).sum())
        spans = head.best(logits, self.reading.max_target_length).cpu().numpy()
        answers = head.to_texts(split.instances, split.encoded, rows, spans)
        references = [split.instances[row].references for row in rows]
        return sum(text_quality("squad", text, right) for text, right in zip(answers, references, strict=True))
