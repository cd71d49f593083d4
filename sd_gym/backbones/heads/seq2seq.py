"""Heads that generate a text, by the decoder of an encoder-decoder."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sd_gym.backbones.heads.answers import MOST_UNSURE, log_likelihoods, log_odds_of
from sd_gym.backbones.heads.base import Head
from sd_gym.backbones.heads.encoding import model_inputs
from sd_gym.backbones.heads.losses import IGNORED
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded, Targets
from sd_gym.data.instance import Instance
from sd_gym.switch import Switchboard
from sd_gym.switch.stages import BETWEEN


class Seq2SeqHead(Head):
    """Logits ``[batch, target length, vocabulary]`` of teacher-forced passes.

    Labels are tokens, int64 ``[batch, target length]``, -100 where padded.
    """

    name = "seq2seq"
    gives = "text"
    validated_by = ("likelihood", "likelihood")  # few texts match exactly
    answering = "generated"
    _auto_class = "AutoModelForSeq2SeqLM"
    _stored_as = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "MTModel")  # the last one is Marian's

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Self | None:
        """Any model that generates."""
        return cls() if model.can_generate() else None

    def targets(
        self, instances: Sequence[Instance], source: BatchEncoding, tokenizer: Tokenizer, backbone: BackboneConfig
    ) -> Targets:
        """The texts' tokens, cut to ``max_target_length``; without an end where it is not known."""
        longest, texts = backbone.max_target_length, [str(instance.target) for instance in instances]
        targets = tokenizer(text_target=texts, truncation=True, max_length=longest)
        tokens, cut = targets.input_ids, was_cut(targets, longest)
        for row in [number for number, instance in enumerate(instances) if instance.is_cut]:
            limit = longest + tokenizer.num_special_tokens_to_add()
            whole = tokenizer(text_target=texts[row], truncation=True, max_length=limit).input_ids
            while len(whole) > 1 and whole[-1] in tokenizer.all_special_ids:  # mBART ends a text with two
                whole.pop()
            tokens[row], cut[row] = whole[:longest], True
        return padded_targets(tokens, cut)

    def _further_inputs(self, encoded: Encoded, indices: NDArray) -> dict[str, Tensor]:
        labels = encoded.labels[torch.from_numpy(np.asarray(indices))]
        return {"labels": labels[:, : int(encoded.target_length[indices].max())].contiguous()}

    def forward(self, board: Switchboard, batch: dict[str, Tensor], call: Callable[..., Any] | None = None) -> Tensor:
        """See ``Head.forward``; the decoder reads the labels' tokens."""
        model: Any = board.model
        # Given labels, the model would compute a loss as well.
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        if (start := model.generation_config.decoder_start_token_id) is not None:
            decoder_input_ids[:, 0] = start  # mBART takes the last label, but that of a cut text is a word
        return (call or model)(**model_inputs(batch), decoder_input_ids=decoder_input_ids, use_cache=False).logits

    def resume_points(self, board: Switchboard) -> list[int]:
        """With an encoder, its start and its end: a text is always generated from its first token."""
        if BETWEEN not in board.stages:
            return super().resume_points(board)
        return [columns.start for columns in board.decided_at([board.stages[0], BETWEEN]).values()]

    def lengths(self, source: NDArray, target: NDArray, kept: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """The decoder runs on the answer's tokens."""
        return source, target, kept

    def positions(self, source: int, target: int) -> dict[str, int]:
        """Positions of the encoder and of the decoder."""
        return {"max_source_length": source, "max_target_length": target}

    def exact(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """1.0 where greedy decoding gives the reference, its end included.

        This is so if and only if the reference's next token is the most probable one after each of its prefixes. So
        one forward pass is enough.
        """
        return ((logits.argmax(dim=-1) == labels) | (labels == IGNORED)).all(dim=1).float()

    def likelihood(self, logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
        """The geometric mean of the probabilities of the reference's tokens."""
        counted = labels != IGNORED
        return ((log_likelihoods(logits, labels) * counted).sum(dim=1) / counted.sum(dim=1)).exp()

    # Log-odds of the tokens' geometric mean probability and of the lowest one, and the logarithm of their number.
    judgement = ("mean_log_odds", "least_log_odds", "log_length")
    judges_passes = False  # in a pass the decoder reads the reference

    def facts(self, encoded: Encoded) -> dict[str, NDArray]:
        """Tokens of each target."""
        return {"target_length": encoded.target_length}


def judged_text(model: Any, output: Any, lengths: Tensor) -> Tensor:
    """The ``judgement`` of the texts of ``generate()``, float64 ``[n, values]`` on the CPU.

    ``output`` is made with ``return_dict_in_generate`` and ``output_scores``. ``lengths``: tokens of each text, its end
    included, ``[n]``.
    """
    beams = getattr(output, "beam_indices", None)
    log_prob = model.compute_transition_scores(output.sequences, output.scores, beams, normalize_logits=beams is None)
    log_prob, length = log_prob.cpu().double(), lengths.cpu()  # not every device has float64
    log_prob = log_prob.clamp(min=MOST_UNSURE)
    log_prob = log_prob.masked_fill(torch.arange(log_prob.shape[1]) >= length[:, None], 0.0)
    mean, least = log_prob.sum(dim=1) / length, log_prob.amin(dim=1)
    return torch.stack([log_odds_of(mean), log_odds_of(least), length.log()], dim=1).double()


def generated_tokens(output: Any) -> Tensor:
    """The tokens that ``generate()`` wrote, int64 ``[n, length]``; ``output``: see ``judged_text``."""
    beams = getattr(output, "beam_indices", None)  # padded to the number of steps, where the best text may be shorter
    length = len(output.scores) if beams is None else int((beams >= 0).sum(dim=1).max())
    return output.sequences[:, -length:]


def until_end(tokens: Tensor, ends: int | Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """How many of ``tokens [n, length]`` each text has, its end included, and whether it has one, each ``[n]``.

    ``ends``: the tokens that end a text.
    """
    ended = torch.isin(tokens, torch.tensor([] if ends is None else ends, device=tokens.device))
    return ((ended.cumsum(dim=1) - ended.long()) == 0).sum(dim=1), ended.any(dim=1)


def padded_targets(tokens: Sequence[Sequence[int]], cut: NDArray) -> Targets:
    """Targets of these tokens, padded at the right; ``cut``: which of them were cut, bool ``[n]``."""
    rows = [torch.tensor(row, dtype=torch.int64) for row in tokens]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    return Targets(labels, np.array([len(row) for row in rows]), cut)


def was_cut(tokens: BatchEncoding, limit: int) -> NDArray:
    """Which texts were longer than the limit, bool ``[n]``; with slow tokenizers, which reached it."""
    if tokens.encodings is None:
        return np.array([int(sum(mask)) >= limit for mask in tokens.attention_mask])
    return np.array([bool(encoding.overflowing) for encoding in tokens.encodings])
