"""One split of a data set: what its instances cost, and what they are worth, under any decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sd_gym.backbones import load_backbone
from sd_gym.backbones.checks import check_positions
from sd_gym.backbones.forward import kept_of_pass
from sd_gym.backbones.load import Output
from sd_gym.backbones.spans import best_spans
from sd_gym.envs.config import ConfigError, EnvConfig
from sd_gym.policy.observation import observed
from sd_gym.switch import dropped_tokens, passes
from sd_gym.tasks.cache import encode_cached
from sd_gym.tasks.data import Instances
from sd_gym.tasks.difficulty import quartiles
from sd_gym.tasks.encoding import droppable_tokens
from sd_gym.tasks.marks import MarkedText, marked_texts
from sd_gym.tasks.metrics import corpus_metric, likelihood, prediction, quality
from sd_gym.tasks.ranking import in_batches, kept_tokens, token_scores, training_rarity
from sd_gym.tasks.splits import Splits
from sd_gym.tasks.text import text_metrics, text_quality

Array = NDArray
OUTPUTS: dict[str, tuple[Output, ...]] = {
    "classification": ("label", "text"),
    "question_answering": ("text", "span"),
    "summarization": ("text",),
}
LEAST_LIKELIHOOD = 1e-13  # whose logarithm is taken: about minus 30
PASS_TOKENS = 2**15  # padded tokens of a forward pass at most, which bounds its memory


class Split:
    """One split of a data set, with everything about it that never changes.

    Args:
        config: The env's configuration.
        name: The split.
        data: The splits of the data set.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        instances: The instances, in order.
        encoded: Their tensors.
    """

    def __init__(self, config: EnvConfig, name: str, data: Splits) -> None:
        self.backbone = load_backbone(config.backbone, config.device)
        self.config = config
        self.name = name
        if self.backbone.causal and config.prompt is None:
            raise ConfigError(
                f"{config.id}: the backbone is decoder-only; say with the config key 'prompt' what it shall read, such "
                "as '{source}\\nLabel:'"
            )
        self._check_output()
        check_positions(
            config.backbone,
            self.backbone.model,
            self.backbone.tokenizer,
            config.max_source_length,
            config.max_target_length,
        )
        self.prompt, self.stop = (config.prompt, config.stop) if self.backbone.causal else (None, None)
        self._data = data
        self.instances: Instances = data[name]
        self.encoded = encode_cached(
            self.instances,
            self.backbone.tokenizer,
            output=self.backbone.output,
            max_source_length=config.max_source_length,
            max_target_length=config.max_target_length,
            label2id=self.backbone.model.config.label2id,
            prompt=self.prompt,
            stop=self.stop,
            unanswerable=config.unanswerable,
        )
        if config.quality == "balanced" and self.encoded.labels.is_floating_point():
            raise ConfigError(f"{config.id}: config key 'quality': 'balanced' weighs classes, not scores")
        self._always, self._switched = self._costs(np.arange(len(self)), np.zeros(len(self), dtype=np.int64))
        self._scores: dict[tuple[int, bytes], float] = {}
        self._dense_log = np.full(len(self), np.nan)  # of the likelihood, where it is known

    def _check_output(self) -> None:
        """Raise ConfigError if the backbone's head cannot do the task, or not in the way that is asked for."""
        config, output = self.config, self.backbone.output
        if output not in OUTPUTS[config.task]:
            raise ConfigError(
                f"{config.id}: the backbone {config.backbone!r} gives a {output}, but {config.task} needs a "
                f"{' or a '.join(OUTPUTS[config.task])}; 'sd-gym prepare --env {config.id}' makes one that does"
            )
        wanted = {"generated": "text", "extracted": "span"}.get(config.answers or "", output)
        if output != wanted:
            raise ConfigError(
                f"{config.id}: config key 'answers': {config.answers!r} needs a backbone that gives a {wanted}, but "
                f"{config.backbone!r} gives a {output}"
            )

    def __len__(self) -> int:
        return len(self.instances)

    def unseen(self, rows: Array) -> Split:
        """These rows as a split of their own: tokenised, but neither observed, nor ranked, nor scored yet.

        So everything that comes of the model's inputs is computed anew, as for inputs that nobody has seen before; to
        measure what that takes.
        """
        part = Split.__new__(Split)
        part.backbone, part.config, part.name = self.backbone, self.config, self.name
        part.prompt, part.stop = self.prompt, self.stop
        part._data = self._data
        part.instances = Instances(self.instances[row] for row in rows)
        part.encoded = self.encoded.part(rows)
        part._always, part._switched = self._always[rows], self._switched[rows]
        part._scores, part._dense_log = {}, np.full(len(rows), np.nan)
        if len(self.config.token_shares) > 1:
            part.droppable = self.droppable[rows]  # comes with tokenising
        return part

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Row of each instance, by its id."""
        return {instance.id: row for row, instance in enumerate(self.instances)}

    @cached_property
    def paired(self) -> bool:
        """Whether inputs are pairs of texts."""
        return any(instance.source_pair is not None for instance in self.instances)

    @cached_property
    def difficulty(self) -> Array:
        """Difficulty of each instance, int64 ``[n]``; 0 where it is not known."""
        return np.array([instance.difficulty for instance in self.instances])

    @cached_property
    def dense_loss(self) -> Array:
        """Loss of the dense backbone on each instance, float64 ``[n]``: one forward pass over the split.

        The negative logarithm of the reference's likelihood (see ``sd_gym.tasks.metrics.likelihood``), at most 30; of
        scores, how far the backbone is off.
        """
        dense = np.zeros((len(self), len(self.backbone.board) + 1), dtype=np.int64)
        likely = self._teacher_forced(np.arange(len(self)), dense, self._likelihood)
        if self.encoded.labels.is_floating_point():
            return self.config.label_range * (1 - likely)
        return -np.log(np.maximum(likely, LEAST_LIKELIHOOD))

    @cached_property
    def levels(self) -> Array:
        """Difficulty for reports, int64 ``[n]``: the data's own where they have one, else the dense loss's quartile."""
        return self.difficulty if self.difficulty.any() else quartiles(self.dense_loss)

    def facts(self) -> dict[str, Array]:
        """What is known of each instance before any decision, by name, each ``[n]``.

        ``source_length`` and ``target_length`` in tokens (the latter where texts are generated), ``dense_loss``, and
        the ``label`` where instances are classified, or ``answerable`` where questions are answered.
        """
        facts = {"source_length": self.encoded.source_length, "dense_loss": self.dense_loss}
        if self.backbone.generates:
            facts["target_length"] = self.encoded.target_length
        if self.config.task == "classification":
            facts["label"] = self._labels
        if self.config.task == "question_answering":
            facts["answerable"] = np.array([bool(instance.references) for instance in self.instances])
        return facts

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are (``Instances.provenance``), and how many had their input or target cut."""
        return {**self.instances.provenance, **self.encoded.counts}

    def flops_ratio(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under ``decisions [n, switches + 1]`` over dense FLOPs, float64 ``[n]``."""
        return self.flops(rows, decisions) / self.dense_flops(rows)

    def flops(self, rows: Array, decisions: Array) -> Array:
        """FLOPs under ``decisions [n, switches + 1]``, int64 ``[n]``.

        To rank tokens by attention is part of them where any is dropped; if few are, it can cost more than it saves.
        """
        level = decisions[:, -1]
        always, switched = self._costs(rows, level) if level.any() else (self._always[rows], self._switched[rows])
        ranking = 0
        if self.config.token_ranking == "attention" and level.any():  # the first attention ran densely to rank
            length = self.encoded.source_length[rows]
            dropped = self.kept_length(rows, level) < length
            ranking = np.where(dropped, self.backbone.flops.costs(length, length)[1][:, 0], 0)
        return always + (switched * (1 - decisions[:, :-1])).sum(axis=1) + ranking

    def executed_flops(self, rows: Array, decisions: Array, parts: list[Array]) -> int:
        """FLOPs that forward passes on rows really take: each row is padded to the longest that is left in its pass.

        As torch's counter counts them; ``flops`` are those of each row alone.

        Args:
            rows: The rows, ``[n]``.
            decisions: Their decisions, ``[n, switches + 1]``.
            parts: Positions in ``rows`` of each pass.
        """
        length, level = self.encoded.source_length[rows], decisions[:, -1]
        total = 0
        if self.config.token_ranking == "attention" and (self.kept_length(rows, level) < length).any():
            longest = np.full(len(rows), length.max())
            total = self.backbone.flops.costs(longest, longest)[1][:, 0].sum()  # all are ranked in one pass
        for part in parts:
            lengths = (length[part], self.encoded.target_length[rows[part]], self.kept_length(rows[part], level[part]))
            always, switched = self._costs_of(*(np.full(len(part), values.max()) for values in lengths))
            total += always.sum() + (switched * (1 - decisions[part, :-1])).sum()
        return int(total)

    def dense_flops(self, rows: Array) -> Array:
        """FLOPs of the dense backbone, int64 ``[n]``."""
        return self._always[rows] + self._switched[rows].sum(axis=1)

    def quality(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality under the decisions ``[n, switches + 1]`` and dense quality, each float64 ``[n]``.

        The backbone is frozen, so every (instance, decision) is computed once; the dense decisions that are not known
        yet run in the same forward pass as the others.
        """
        both = np.concatenate([decisions, np.zeros_like(decisions)])
        level = both[:, -1:].astype(np.uint32).view(np.uint8)
        packed = np.concatenate([np.packbits(both[:, :-1].astype(bool), axis=1), level], axis=1)
        keys = [(row, bits.tobytes()) for row, bits in zip([*rows.tolist()] * 2, packed, strict=True)]
        missing: dict[tuple[int, bytes], int] = {}
        for position, key in enumerate(keys):
            if key not in self._scores:
                missing.setdefault(key, position)
        if missing:
            wanted = np.fromiter(missing.values(), dtype=np.int64)
            qualities = self.run(np.concatenate([rows, rows])[wanted], both[wanted])
            self._scores.update(zip(missing, qualities.tolist(), strict=True))
        found = np.array([self._scores[key] for key in keys])
        return found[: len(rows)], found[len(rows) :]

    def scores(self) -> dict[str, torch.Tensor]:
        """The qualities that were computed so far, as tensors: the rows, their packed decisions, the values."""
        packed = np.frombuffer(b"".join(decision for _, decision in self._scores), np.uint8)
        width = len(packed) // max(1, len(self._scores))
        return {
            "rows": torch.tensor([row for row, _ in self._scores], dtype=torch.int64),
            "decisions": torch.from_numpy(packed.reshape(len(self._scores), width).copy()),
            "values": torch.tensor(list(self._scores.values()), dtype=torch.float64),
            "dense_log": torch.from_numpy(self._dense_log.copy()),
        }

    def load_scores(self, scores: dict[str, torch.Tensor] | None) -> None:
        """Know what ``scores`` gave and nothing else; ``None``: nothing."""
        self._scores = {}
        self._dense_log = np.full(len(self), np.nan)
        if scores is not None:
            keys = zip(scores["rows"].tolist(), map(bytes, scores["decisions"].numpy()), strict=True)
            self._scores = dict(zip(keys, scores["values"].tolist(), strict=True))
            self._dense_log = scores["dense_log"].numpy()

    @torch.inference_mode()
    def run(self, rows: Array, decisions: Array) -> Array:
        """Run the backbone on rows under decisions and score it: float64 ``[n]``. Nothing is cached.

        Of a likelihood: one plus the logarithm of its ratio to the dense backbone's, between 0 and 2, so that dense has
        1, a loss of 0.01 is one percent of perplexity, and no instance weighs more than any other's loss of all.

        The rows run in the passes that are the cheapest: of about the same length that is left, or the same decision.
        """
        if self._text_metric is not None:
            return self._text_quality(rows, self.texts(rows, decisions))
        return self._of_score(rows, decisions, self._teacher_forced(rows, decisions, self._score))

    @torch.inference_mode()
    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality as ``run`` gives it, and the likelihood of the reference; each float64 ``[n]``. Nothing is cached."""
        of_text = self._text_metric is not None
        if of_text and self.backbone.output != "span":
            return self.run(rows, decisions), self._teacher_forced(rows, decisions, self._likelihood)

        def both(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            first = self._best_spans(logits, labels) if of_text else self._score(logits, labels)[:, None]
            return torch.cat([first, self._likelihood(logits, labels)[:, None]], dim=1)

        values = self._teacher_forced(rows, decisions, both)
        first, probability = values[:, :-1], values[:, -1]
        if of_text:
            return self._text_quality(rows, self._span_texts(rows, first)), probability
        return self._of_score(rows, decisions, first[:, 0]), probability

    @property
    def _text_metric(self) -> str | None:
        """What scores the answer's text, where the quality is one of texts; else ``None``."""
        if self.config.quality == "metric":
            return self.config.metric
        return "exact_match" if self.backbone.output == "span" and self.config.quality == "exact_match" else None

    def _text_quality(self, rows: Array, texts: list[str]) -> Array:
        pairs = zip(rows, texts, strict=True)
        return np.array([text_quality(self._text_metric, text, self.instances[row].references) for row, text in pairs])

    def _best_spans(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return best_spans(logits, self.config.max_target_length)

    def _span_texts(self, rows: Array, spans: Array) -> list[str]:
        contexts = [self.instances[row].source_pair for row in rows]
        return self.encoded.span_texts(rows, spans.astype(np.int64), contexts)

    def _likelihood(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return likelihood(logits, labels, self.config.label_range)

    def _score(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        score = likelihood if self.config.quality == "likelihood" else quality
        return score(logits, labels, self.config.label_range)

    def _of_score(self, rows: Array, decisions: Array, values: Array) -> Array:
        """The quality that a score gives: a likelihood relative to dense, a balanced one weighted by class."""
        if self.config.quality == "balanced":
            return values * self._class_weight[rows]
        # Numbers (regression) have their own quality under both names.
        relative = self.config.quality == "likelihood" and not self.encoded.labels.is_floating_point()
        return self._relative(rows, decisions, values) if relative else values

    @cached_property
    def _class_weight(self) -> Array:
        """What a right answer is worth, by instance, float64 ``[n]``: the same in all for each class."""
        classes, of_class, count = np.unique(self._labels, return_inverse=True, return_counts=True)
        return len(self) / (len(classes) * count[of_class])

    @property
    def _labels(self) -> Array:
        """Of classified instances, ``[n]``: scores, or names of classes."""
        if self.encoded.labels.is_floating_point():
            return np.array([one.target for one in self.instances], dtype=float)
        return np.array([str(one.target) for one in self.instances])

    def _relative(self, rows: Array, decisions: Array, probability: Array) -> Array:
        """One plus the logarithm of the likelihood over the dense one, between 0 and 2."""
        log = np.log(np.maximum(probability, LEAST_LIKELIHOOD))
        dense = ~decisions.any(axis=1)
        self._dense_log[rows[dense]] = log[dense]
        unknown = np.unique(rows[np.isnan(self._dense_log[rows])])
        if len(unknown):
            nothing = np.zeros((len(unknown), decisions.shape[1]), dtype=np.int64)
            reference = self._teacher_forced(unknown, nothing, self._likelihood)
            self._dense_log[unknown] = np.log(np.maximum(reference, LEAST_LIKELIHOOD))
        return np.clip(1 + log - self._dense_log[rows], 0, 2)

    @torch.inference_mode()
    def texts(self, rows: Array, decisions: Array) -> list[str]:
        """What the backbone generates for rows under decisions, by greedy or beam search; or the spans it extracts."""
        config, backbone = self.config, self.backbone
        if backbone.output == "span":
            return self._span_texts(rows, self._teacher_forced(rows, decisions, self._best_spans))
        texts = [""] * len(rows)
        for picked, inputs in self.passes(rows, decisions, config.max_target_length):
            inputs.pop("labels")
            with self.decide(rows[picked], decisions[picked]):
                tokens = backbone.model.generate(
                    **inputs,
                    max_new_tokens=config.max_target_length,
                    num_beams=config.num_beams,
                    do_sample=False,
                    **self._end,
                    pad_token_id=backbone.tokenizer.pad_token_id,
                )
            if backbone.causal:
                tokens = tokens[:, inputs["input_ids"].shape[1] :]
            for position, text in zip(
                picked, backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True
            ):
                texts[position] = (text if self.stop is None else text.partition(self.stop)[0]).strip()
        return texts

    def answers(self, rows: Array, decisions: Array) -> list[str]:
        """What the backbone says to rows under decisions, to be read: as ``texts``, or a class's name, or a score."""
        if self.backbone.output != "label":
            return self.texts(rows, decisions)
        return [
            self._said(value) for value in self._teacher_forced(rows, decisions, lambda logits, _: prediction(logits))
        ]

    def reference(self, row: int) -> str:
        """What is right, to be read like an answer; of several right texts the first, empty if there is no answer."""
        if self.backbone.output != "label":
            return str(self.instances[row].target)
        return self._said(self.encoded.labels[row].item())

    def _said(self, value: float) -> str:
        return (
            f"{value:.2f}"
            if self.encoded.labels.is_floating_point()
            else self.backbone.model.config.id2label[int(value)]
        )

    def marked_texts(self, row: int, level: int) -> list[MarkedText]:
        """The texts of an instance, and what of them is read at a token level."""
        keep, instance = self._keep(np.array([row]), np.array([level])), self.instances[row]
        if self.prompt is None and self.paired and instance.source_pair is None:  # tokenised as the others are
            instance = replace(instance, source_pair="")
        return marked_texts(
            instance,
            self.backbone.tokenizer,
            self.config.max_source_length,
            self.prompt,
            None if keep is None else keep[0],
        )

    @property
    def _end(self) -> dict[str, list[int]]:
        """Where ``generate()`` ends early: at a stop of one token; a longer one is cut off its text."""
        if self.stop is None:
            return {}
        tokens = self.backbone.tokenizer(self.stop, add_special_tokens=False).input_ids
        return {"eos_token_id": [self.backbone.tokenizer.eos_token_id, *tokens]} if len(tokens) == 1 else {}

    @torch.inference_mode()
    def confidence(self, rows: Array, decisions: Array) -> Array:
        """Highest class probability of each row under decisions, float64 ``[n]``, of a backbone that classifies."""
        return self._teacher_forced(rows, decisions, lambda logits, labels: logits.softmax(dim=-1).amax(dim=-1))

    @torch.inference_mode()
    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """The metric of the rows under the decisions, by name; empty where it is the mean quality."""
        name = self.config.metric
        if name in ("rouge", "squad"):
            return text_metrics(name, self.texts(rows, decisions), [self.instances[row].references for row in rows])
        if name == "exact_match" or (name == "accuracy" and self.config.quality == "exact_match"):
            return {}
        predicted = self._teacher_forced(rows, decisions, lambda logits, labels: prediction(logits))
        return {name: corpus_metric(name, predicted, self.encoded.labels[torch.from_numpy(rows)].numpy())}

    @torch.inference_mode()
    def _teacher_forced(
        self,
        rows: Array,
        decisions: Array,
        value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> Array:
        """A value, or several, of each row's logits and labels, float64 ``[n]`` or ``[n, values]``."""
        order, values = [], []
        for picked, logits, labels in self.logits(rows, decisions):
            order.append(picked)
            values.append(value(logits, labels).double().cpu().numpy())
        return np.concatenate(values)[np.argsort(np.concatenate(order))]

    def logits(self, rows: Array, decisions: Array) -> Iterator[tuple[Array, torch.Tensor, torch.Tensor]]:
        """Positions in ``rows``, logits and labels of each forward pass under decisions ``[n, switches + 1]``."""
        for picked, inputs in self.passes(rows, decisions):
            yield picked, self._pass(rows[picked], decisions[picked], inputs), inputs["labels"]

    def _pass(self, rows: Array, decisions: Array, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits of one pass; no generator, since a block that is open in one is slower."""
        with self.backbone.board.decide(decisions[:, :-1], self._keep_of(rows, decisions, inputs)):
            return self.backbone.logits(inputs)

    def _keep_of(self, rows: Array, decisions: Array, inputs: dict[str, torch.Tensor]) -> Array | torch.Tensor | None:
        """The tokens that a pass of ``Backbone.logits`` keeps; dropped ones neither begin nor end an answer."""
        keep = self._keep(rows, decisions[:, -1])
        if keep is not None and "context_mask" in inputs:
            inputs["context_mask"] = inputs["context_mask"] & torch.from_numpy(keep).to(self.backbone.model.device)
        return kept_of_pass(self.backbone.board, keep, inputs["labels"])

    def logits_of_one(
        self, row: int, decide: Callable[[torch.Tensor, torch.Tensor], Array]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of one instance, decided on in its pass: the input is embedded once.

        Args:
            row: The instance.
            decide: Takes the first layer's input ``[1, length, width]`` and the mask of its tokens ``[1, length]`` to a
                decision ``[1, switches + 1]``.
        """
        board, rows = self.backbone.board, np.array([row])
        inputs = self.inputs(rows)
        mask = inputs["attention_mask"]

        def choose(hidden: torch.Tensor) -> tuple[Array, Array | None]:
            decisions = decide(hidden[:, : mask.shape[1]], mask)  # behind a prompt the answer follows
            return decisions[:, :-1], self._keep_of(rows, decisions, inputs)

        with board.decide_in_pass(choose):
            return self.backbone.logits(inputs), inputs["labels"]

    def passes(self, rows: Array, decisions: Array, steps: int = 0) -> Iterator[tuple[Array, dict[str, torch.Tensor]]]:
        """Positions in ``rows`` and inputs of each forward pass, or of each ``generate()`` of so many steps."""
        kept = self.kept_length(rows, decisions[:, -1])[:, None]
        reads_input = np.array([switch.reads_input for switch in self.backbone.board.switches])
        # Behind an encoder: the target; of a decoder that classifies, the input once more.
        target = self.encoded.target_length[rows][:, None] if self.backbone.generates else kept
        length = np.where(reads_input, kept, target)
        for picked in passes(decisions[:, :-1], length, self.backbone.model.config.hidden_size, steps):
            tokens = int(kept[picked].max() + self.encoded.target_length[rows[picked]].max())
            most = max(1, PASS_TOKENS // tokens)
            for part in np.split(picked, range(most, len(picked), most)):
                yield part, self.inputs(rows[part])

    def inputs(self, rows: Array) -> dict[str, torch.Tensor]:
        """The backbone's inputs, with ``labels``, of a batch of these rows."""
        return self.encoded.batch(rows, self.backbone.model.device, padding_side=self._padding_side)

    @property
    def _padding_side(self) -> str:
        return "left" if self.backbone.causal else "right"

    def decide(self, rows: Array, decisions: Array, labels: torch.Tensor | None = None) -> AbstractContextManager[None]:
        """The switchboard's ``decide`` for a batch of these rows, padded to the longest of them.

        Args:
            rows: The rows.
            decisions: Their decisions, ``[n, switches + 1]``.
            labels: Of a pass of ``backbone.logits``, what it is teacher-forced on; ``None``: for ``generate()``.
        """
        board, keep = self.backbone.board, self._keep(rows, decisions[:, -1])
        return board.decide(decisions[:, :-1], keep if labels is None else kept_of_pass(board, keep, labels))

    def kept_length(self, rows: Array, level: Array) -> Array:
        """Tokens of the inputs that are left at the token levels, int64 ``[n]``."""
        length = self.encoded.source_length[rows]
        if not level.any():
            return length
        share = np.array(self.config.token_shares)[level]
        return length - dropped_tokens(self.droppable[rows], share)

    @cached_property
    def droppable(self) -> Array:
        """Which tokens may be dropped, bool ``[n, longest]``."""
        return droppable_tokens(self.instances, self.backbone.tokenizer, self.config.max_source_length, self.prompt)

    @cached_property
    def rarity(self) -> Array:
        """How rare each token is in the training split, as ``training_rarity`` says it."""
        return _rarity(self._data, self.backbone.tokenizer)

    @cached_property
    def token_scores(self) -> Array:
        """How much each token matters, by the configured ranking, float ``[n, longest]``."""
        return token_scores(
            self.config.token_ranking,
            self.encoded,
            self.backbone.board,
            lambda: self.rarity,
        )

    def _keep(self, rows: Array, level: Array) -> Array | None:
        if not level.any():
            return None
        share, length = np.array(self.config.token_shares)[level], self.encoded.source_length[rows]
        return kept_tokens(self.token_scores[rows], self.droppable[rows], length, share, self._padding_side)

    def _costs(self, rows: Array, level: Array) -> tuple[Array, Array]:
        return self._costs_of(
            self.encoded.source_length[rows], self.encoded.target_length[rows], self.kept_length(rows, level)
        )

    def _costs_of(self, source: Array, target: Array, kept: Array) -> tuple[Array, Array]:
        if self.backbone.causal:  # prompt and answer in one pass, but for the answer's last token
            return self.backbone.flops.costs(source + target - 1, target, kept + target - 1)
        # A decoder that classifies reads the input again.
        return self.backbone.flops.costs(source, target if self.backbone.generates else source, kept)

    @cached_property
    def features(self) -> Array:
        """What ``observed`` says of each instance, float32 ``[n, features]``: one look at the whole split."""
        return np.concatenate(list(in_batches(observed, self.encoded, self.backbone.board)))


@lru_cache(maxsize=8)
def _rarity(data: Splits, tokenizer: PreTrainedTokenizerBase) -> Array:
    """How rare each token is in the training split, which is counted once."""
    return training_rarity(tokenizer, data["train"])
