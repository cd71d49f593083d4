"""One split of a data set: its instances, their costs, and their scores under decisions."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray as Array
from transformers import PreTrainedTokenizerBase

from sd_gym.backbones import Backbone, load_backbone
from sd_gym.backbones.checks import check_positions
from sd_gym.config import ConfigError, EnvConfig
from sd_gym.data.encoded import Encoded
from sd_gym.execution.costs import Costs
from sd_gym.execution.passes import Passes
from sd_gym.execution.scoring import Scoring
from sd_gym.policy.features import input_features
from sd_gym.tasks.cache import encode_cached
from sd_gym.tasks.data import Instances
from sd_gym.tasks.difficulty import quartiles
from sd_gym.tasks.encoding import encode
from sd_gym.tasks.family import TASKS
from sd_gym.tasks.marked_text import MarkedText, marked_texts
from sd_gym.tasks.metrics import ACCURACY, METRICS, OF_CLASSES
from sd_gym.tasks.ranking import in_batches, training_rarity
from sd_gym.tasks.splits import Splits, answered_densely
from sd_gym.tasks.token_dropping import TokenDropping

# Settings of ``generate()`` that give other texts than the most probable next tokens, and values that change nothing.
NOT_GREEDY = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
)
NEUTRAL = (None, 0, 1.0, [], {})


class BackboneSplit:
    """One split of a data set, a ``Split``: its instances, costs and scores, which never change.

    ``backbone=None`` loads the one of the config, which all envs of the process share. ``reading`` is the backbone's
    part of the config, with the head's prompt and stop; ``tokens`` decides which tokens a token level drops.
    """

    def __init__(self, config: EnvConfig, name: str, data: Splits, backbone: Backbone | None = None) -> None:
        self.backbone = backbone or load_backbone(config.backbone.name, config.backbone.device)
        self.config = config
        self.name = name
        self._data = data
        self.head = self.backbone.head
        self.task = TASKS.find(config.task)
        without_labels = name in answered_densely(config)
        try:
            self.reading = self.head.prompting(config.backbone)
            self._check_output()
            self.head.measured_by(config.quality.kind)
            if without_labels:
                self.head.measured_by("agreement")
        except ValueError as error:
            raise ConfigError(f"{config.id}: {error}") from error
        tokenizer = self.backbone.tokenizer
        check_positions(self.reading, self.backbone.positions, tokenizer, self.head)
        instances = data[name]
        arguments, unanswerable = (tokenizer, self.head, self.reading), config.data.unanswerable
        encoding = encode_cached if instances.file else encode  # only files have a cache
        self._set_rows(instances, encoding(instances, *arguments, unanswerable=unanswerable))
        if without_labels:
            answered = self._answered_densely()
            encoded = encode(answered, *arguments, unanswerable=unanswerable)
            if self.head.gives == "text":
                encoded = replace(encoded, **vars(self.passes.written_targets(np.arange(len(self)))))
            self._set_rows(answered, encoded)

    def _answered_densely(self) -> Instances:
        rows, answered = np.arange(len(self)), copy(self.instances)
        texts = self.passes.answers(rows, np.zeros((len(self), len(self.backbone.board) + 1), dtype=np.int64))
        answered[:] = [
            replace(instance, target=text, more_targets=(), answer_spans=(), is_cut=not finished)
            for instance, text, finished in zip(self.instances, texts, self.passes.finished.tolist(), strict=True)
        ]
        answered.hash = self.instances.hash  # they are the data's rows, although the references differ
        return answered

    def _set_rows(self, instances: Instances, encoded: Encoded) -> None:
        config, backbone = self.config, self.backbone
        self.instances = instances
        self.encoded = encoded
        board, tokenizer = backbone.board, backbone.tokenizer
        self.tokens = TokenDropping(
            instances, encoded, board, tokenizer, self.head, self.reading, config.tokens, rarity=lambda: self.rarity
        )
        self.costs = Costs(backbone, encoded, self.tokens, self.reading.num_beams)
        self.passes = Passes(backbone, instances, encoded, self.tokens, self.reading)
        self.scoring = Scoring(config.quality, self.passes)
        self.ids = np.array([instance.id for instance in instances], dtype=object)
        self.row_of = {instance.id: row for row, instance in enumerate(instances)}
        self.difficulty = np.array([instance.difficulty for instance in instances])

    def _check_output(self) -> None:
        """Raise ValueError if the head's kind of output does not fit the task, ``backbone.answers`` or the metric."""
        config = self.config
        name = self.reading.name
        gives = self.head.gives
        if gives not in self.task.gives:
            needed = f"{config.task} needs a {' or a '.join(self.task.gives)}"
            remedy = f"'sd-gym prepare --env {config.id}' makes one that does"
            raise ValueError(f"the backbone {name!r} gives a {gives}, but {needed}; {remedy}")
        if (wanted := self.reading.answers) not in (None, self.head.answering):
            needed = f"{wanted!r} needs a backbone whose answers are {wanted}"
            raise ValueError(f"config key 'backbone.answers': {needed}, but {name!r} gives a {gives}")
        metric, kind = config.quality.metric, config.quality.kind
        if gives == "text" and kind in ("exact_match", "balanced", "agreement"):
            self._check_greedy(kind)
        if self.head.name == "score" and metric in OF_CLASSES:
            raise ValueError(f"config key 'quality.metric': {name!r} gives a score, and {metric} compares classes")
        if gives != "label" and kind != "agreement" and METRICS.find(metric).of_text is None and metric != ACCURACY:
            expected = f"which compares classes or scores; expected {ACCURACY}, or a metric of texts"
            raise ValueError(f"config key 'quality.metric': {name!r} gives a {gives}, got {metric!r}, {expected}")

    def _check_greedy(self, kind: str) -> None:
        """Raise ValueError if texts are not those of plain greedy decoding, which one pass can compare."""
        if kind == "agreement" and (beams := self.reading.num_beams) > 1:
            raise ValueError(
                f"config key 'quality': agreement compares greedy texts; expected num_beams=1, got {beams}"
            )
        settings: Any = self.backbone.model.generation_config
        changing = [f"{key}={value}" for key in NOT_GREEDY if (value := getattr(settings, key, None)) not in NEUTRAL]
        if changing:
            raise ValueError(
                f"config key 'quality': {kind} compares plain greedy texts, and the backbone's generation_config.json "
                f"has {', '.join(changing)}; remove that, or choose quality=metric or likelihood"
            )

    def __len__(self) -> int:
        return len(self.instances)

    def uncached(self, rows: Array) -> BackboneSplit:
        """These rows as a tokenised split without cached observations, rankings and scores, to time these."""
        part, shared = BackboneSplit.__new__(BackboneSplit), ("config", "name", "_data", "task", "backbone", "head")
        vars(part).update({name: vars(self)[name] for name in (*shared, "reading")})
        part._set_rows(Instances(self.instances[row] for row in rows), self.encoded.part(rows))
        if len(self.config.tokens.shares) > 1:
            part.tokens.droppable = self.tokens.droppable[rows]  # comes with tokenising
        return part

    @cached_property
    def dense_loss(self) -> Array:
        """``dense_loss_of`` all instances, computed once."""
        return self.dense_loss_of(np.arange(len(self)))

    def dense_loss_of(self, rows: Array) -> Array:
        """Loss of the dense backbone on rows ``[n]``, float64 ``[n]``: one forward pass.

        It is the negative logarithm of the reference's likelihood (see ``Head.likelihood``), at most 30; for scores,
        the absolute error.
        """
        scale, head = self.config.quality.label_range, self.head
        dense = np.zeros((len(rows), len(self.backbone.board) + 1), dtype=np.int64)
        likely = self.passes.in_passes(rows, dense, lambda logits, labels: head.likelihood(logits, labels, scale))
        return head.measured_by("likelihood").loss(likely, scale)

    @property
    def levels(self) -> Array:
        """Difficulty for reports, int64 ``[n]``: the data's own, or else the quartile of the dense loss."""
        return self.difficulty if self.difficulty.any() else quartiles(self.dense_loss)

    def facts(self) -> dict[str, Array]:
        """Facts about each instance that no decision changes, by name, each ``[n]``.

        ``source_length`` and ``target_length`` in tokens (the latter where texts are generated), ``dense_loss``, and
        the ``label`` where instances are classified, or ``answerable`` where questions are answered.
        """
        facts = {"source_length": self.encoded.source_length, "dense_loss": self.dense_loss}
        return facts | self.head.facts(self.encoded) | self.task.facts(self.instances, self.head)

    @property
    def provenance(self) -> dict[str, Any]:
        """Which rows these are (``Instances.provenance``), and how many had their input or target cut."""
        return {**self.instances.provenance, **self.encoded.counts}

    def reference(self, row: int) -> str:
        """The right answer in words; of several right texts the first one, empty if there is no answer."""
        return self.head.reference(self.instances[row], self.encoded.labels[row])

    def marked_texts(self, row: int, level: int) -> list[MarkedText]:
        """The texts of an instance, with the parts that are read at a token level."""
        keep = self.tokens.kept(np.array([row]), np.array([level]))
        return marked_texts(
            self.instances[row], self.backbone.tokenizer, self.reading, None if keep is None else keep[0]
        )

    @cached_property
    def rarity(self) -> Array:
        """How rare each token is in the training split: ``training_rarity``."""
        return _rarity(self._data, self.backbone.tokenizer)

    @cached_property
    def features(self) -> Array:
        """``input_features`` of each instance, float32 ``[n, features]``."""
        return np.concatenate(list(in_batches(input_features, self.encoded, self.backbone.board)))


@lru_cache(maxsize=8)
def _rarity(data: Splits, tokenizer: PreTrainedTokenizerBase) -> Array:
    """How rare each token is in the training split, which is counted once."""
    return training_rarity(tokenizer, data["train"])
