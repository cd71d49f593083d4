"""Heads that extract a span of the context: the first and the last token of the answer."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING, BatchEncoding, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads.answers import CHOICE, MOST_UNSURE, QualityMeasure, judged_choice
from sd_gym.backbones.heads.base import Head
from sd_gym.backbones.heads.encoding import model_inputs, nothing_generated
from sd_gym.backbones.heads.losses import IGNORED, divergence
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded, Targets
from sd_gym.data.instance import Instance
from sd_gym.errors import BackboneError, DataError, short
from sd_gym.switch import Switchboard

NOWHERE = -1e9  # logit of a position where no answer may begin or end; finite, so that differences stay numbers


class SpanHead(Head):
    """Logits of starts and ends, float32 ``[batch, 2, length]``, ``NOWHERE`` outside the context.

    Labels are the first and last tokens of the right answers, int64 ``[batch, most answers, 2]``, -100 where padded.
    A batch also has ``context_mask``, bool ``[batch, length]``: where an answer may begin and end.
    """

    name = "span"
    gives = "span"
    validated_by = ("metric", "f1")
    answering = "extracted"
    _auto_class = "AutoModelForQuestionAnswering"
    _stored_as = ("ForQuestionAnswering",)
    source_options: ClassVar = {"return_offsets_mapping": True}

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self | None:
        """A model whose class extracts answers."""
        return cls() if cls.is_stored(model.config, [type(model).__name__]) else None

    @classmethod
    def loading(cls, config: PretrainedConfig) -> tuple[str, dict[str, Any]]:
        """A class with two outputs, for starts and ends, whatever the stored head has."""
        if type(config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
            raise BackboneError(f"the architecture {config.model_type!r} has no head that extracts answers")
        return cls._auto_class, {"num_labels": 2}

    def targets(
        self, instances: Sequence[Instance], source: BatchEncoding, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> Targets:
        """The right spans; DataError if a right answer is not in its context."""
        # The None of special tokens and padding becomes NaN.
        parts = np.stack([np.array(source.sequence_ids(row), dtype=np.float32) for row in range(len(instances))])
        offsets, context_mask = source.offset_mapping.int(), torch.from_numpy(parts == 1)
        labels, cut = _spans(instances, parts == 1, offsets.numpy())
        return replace(nothing_generated(labels, context_mask=context_mask, offsets=offsets), target_cut=cut)

    def _further_inputs(self, encoded: Encoded, indices: NDArray) -> dict[str, Tensor]:
        mask, longest = encoded.context_mask, int(encoded.source_length[indices].max())
        assert mask is not None  # from ``targets``
        return {"context_mask": mask[np.asarray(indices), :longest], **super()._further_inputs(encoded, indices)}

    def forward(self, board: Switchboard, batch: dict[str, Tensor], call: Callable[..., Any] | None = None) -> Tensor:
        """See ``Head.forward``."""
        output = (call or board.model)(**model_inputs(batch))
        logits = torch.stack([output.start_logits, output.end_logits], dim=1).float()
        return logits.masked_fill(~batch["context_mask"][:, None], NOWHERE)

    def kept(self, batch: dict[str, Tensor], keep: NDArray | Tensor) -> NDArray | Tensor:
        """The tokens that the input keeps; no answer begins or ends at a dropped token."""
        batch["context_mask"] = batch["context_mask"] & torch.as_tensor(keep).to(batch["context_mask"].device)
        return keep

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-probability of the right spans, over the rows with one."""
        known = labels[:, 0, 0] >= 0
        return -span_log_likelihood(logits[known], labels[known]).sum() / known.sum().clamp(min=1)

    def distillation(self, logits: Tensor, dense_logits: Tensor, labels: Tensor) -> Tensor:
        """KL divergence of starts plus that of ends, with the dense output renormalised over the tokens that are kept.

        The dense output gets no gradient.
        """
        dense_logits = dense_logits.detach().masked_fill(logits <= NOWHERE, NOWHERE)
        return 2 * divergence(logits.flatten(0, 1), dense_logits.flatten(0, 1))

    def counted(self, labels: Tensor) -> Tensor:
        """The rows with a right span, and all rows."""
        known = labels[:, 0, 0] >= 0
        return torch.stack([known.sum(), known.new_tensor(len(known), dtype=torch.long)])

    def measured_by(self, quality: str) -> QualityMeasure:
        """Exact match compares texts, as the same text may be in several places."""
        return super().measured_by("metric" if quality in ("exact_match", "agreement") else quality)

    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """1.0 where the most probable span is a right one."""
        return (best_spans(logits, logits.shape[-1])[:, None] == labels).all(dim=-1).any(dim=-1).float()

    def likelihood(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """The sum of the probabilities of the right spans; 0 where no span is right."""
        return span_log_likelihood(logits, labels).exp()

    judgement = (*(f"{place}_{name}" for place in ("start", "end") for name in CHOICE), "answered_log_odds")

    def judge(self, logits: Tensor) -> Tensor:
        """``judged_choice`` of the start and of the end, and the log-odds of the best span against "no answer"."""
        start, end = logits.log_softmax(dim=-1).unbind(dim=1)
        place = torch.arange(logits.shape[-1], device=logits.device)
        first, last = place[:, None], place
        is_span = (first <= last) & ((first > 0) | (last == 0))
        best = (start[:, :, None] + end[:, None]).masked_fill(~is_span, 2 * NOWHERE).amax(dim=(1, 2))
        answered = (best - start[:, 0] - end[:, 0]).clamp(0.0, -MOST_UNSURE)  # 0 where there is no answer
        return torch.cat([judged_choice(logits[:, 0]), judged_choice(logits[:, 1]), answered[:, None]], dim=1)

    def best(self, logits: Tensor, longest: int) -> Tensor:
        """The most probable spans, int64 ``[batch, 2]``."""
        return best_spans(logits, longest)

    def to_texts(self, instances: Sequence[Instance], encoded: Encoded, rows: NDArray, values: NDArray) -> list[str]:
        """The texts of the spans in their contexts; empty: no answer."""
        assert encoded.offsets is not None  # from ``targets``
        offsets, (first, last) = encoded.offsets.numpy(), values.astype(np.int64).T
        places = zip(rows, offsets[rows, first, 0].tolist(), offsets[rows, last, 1].tolist(), first > 0, strict=True)
        return [_context(instances[row])[begin:end].strip() if some else "" for row, begin, end, some in places]


def span_log_likelihood(logits: Tensor, spans: Tensor) -> Tensor:
    """Log-probability that the answer is one of the right spans, float32 ``[batch]``; ``-inf`` if no span is right.

    Logits are ``[batch, 2, length]``, spans (first and last token) int64 ``[batch, spans, 2]``, -100 where padded.
    Start and end are independent, and the probabilities of different spans add up (Clark and Gardner 2018).
    """
    log_prob = logits.log_softmax(dim=-1)
    joint = log_prob.gather(-1, spans.clamp(min=0).transpose(1, 2)).sum(dim=1)
    return joint.masked_fill(spans[..., 0] < 0, -torch.inf).logsumexp(dim=1)


def best_spans(logits: Tensor, max_length: int) -> Tensor:
    """First and last token of the most probable span of at most ``max_length`` tokens, int64 ``[batch, 2]``.

    Logits are ``[batch, 2, length]``, ``NOWHERE`` where no answer may begin or end. The first token of the input stands
    for "no answer" (Devlin et al. 2019, section 4.3) and is a span only by itself.
    """
    start, end = logits.unbind(dim=1)
    longest = min(max_length, end.shape[1])
    ends = torch.nn.functional.pad(end, (0, longest - 1), value=NOWHERE).unfold(1, longest, 1)
    scores = start[:, :, None] + ends  # [batch, first token, further tokens]
    scores[:, 0, 1:] = 2 * NOWHERE
    best = scores.flatten(1).argmax(dim=1)
    first = best // longest
    return torch.stack([first, first + best % longest], dim=1)


def _spans(instances: Sequence[Instance], context_mask: NDArray, offsets: NDArray) -> tuple[Tensor, NDArray]:
    """First and last tokens of the right answers, and whether all of them were cut off: see ``Encoded``."""
    spans, cut = [], np.zeros(len(instances), dtype=bool)
    for row, instance in enumerate(instances):
        if not instance.references:
            spans.append([(0, 0)])
            continue
        tokens = np.nonzero(context_mask[row])[0]
        begin, end = offsets[row, tokens, 0], offsets[row, tokens, 1]
        right = []
        for first, last in _places(instance):
            # Both ascend: the first token that ends after the answer's start, the last that begins before its end.
            start, stop = np.searchsorted(end, first, side="right"), np.searchsorted(begin, last) - 1
            # What is left of the answer, such as a space, may have no token.
            if start <= stop and (
                stop + 1 < len(tokens) or end[stop] >= last or _context(instance)[end[stop] : last].isspace()
            ):
                right.append((int(tokens[start]), int(tokens[stop])))
        cut[row] = not right
        spans.append([*dict.fromkeys(right)] or [(IGNORED, IGNORED)])  # two answers may have the same tokens
    rows = [torch.tensor(right) for right in spans]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED), cut


def _context(instance: Instance) -> str:
    assert instance.source_pair is not None  # the context of a question
    return instance.source_pair


def _places(instance: Instance) -> list[tuple[int, int]]:
    """Characters of the right answers: from the data, else all occurrences of their texts."""
    context, references = _context(instance), instance.references
    places = [(start, end) for start, end in instance.answer_spans if context[start:end] in references]
    if not places:
        places = [match.span() for text in references for match in re.finditer(re.escape(text), context)]
    if not places:
        raise DataError(
            f"{instance.place}: the answer {short(references[0])} is not in its context, so it cannot be extracted; "
            "use a backbone that generates"
        )
    return places
