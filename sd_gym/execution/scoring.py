"""The quality of the backbone's answers under decisions; each is computed once."""

from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray as Array

from sd_gym.backbones.heads.answers import LEAST_LIKELIHOOD
from sd_gym.backbones.heads.losses import IGNORED
from sd_gym.config import QualityConfig
from sd_gym.execution.passes import Passes, columns
from sd_gym.going_on import answer_masks
from sd_gym.switch import PassState
from sd_gym.tasks.metrics import ACCURACY, METRICS, corpus_metric, text_metrics, text_quality

DENSE_BATCH = 1024  # rows per call that scores the dense backbone
CACHED_QUALITIES = 2**18  # most qualities in the cache, about 60 MB; the least recently used are evicted
BATCHES = 256  # batches whose judgement is cached: the points of a selection may differ by the threshold alone
Key = tuple[int, bytes]  # a row, and its decision


class Scoring:
    """Qualities of rows under decisions ``[n, switches + 1]``; raises ``ValueError`` if answers have no such quality.

    With the answer stage decisions may be ``[n, switches + 2]``: where a row goes on, the answer is the dense one.
    """

    def __init__(self, settings: QualityConfig, passes: Passes) -> None:
        self._settings = settings
        self._passes = passes
        self._head = passes.head
        self._instances = passes.instances
        self._encoded = passes.encoded
        self._measure = self._head.measured_by(settings.kind)
        self._dense: tuple[dict[Key, float], Array] | None = None  # dense qualities and likelihoods of all rows
        self._judged = OrderedDict[tuple[bytes, bytes], Array]()  # of batches of rows and masks
        self.load_scores(None)

    def quality(self, rows: Array, decisions: Array, resume_from: PassState | None = None) -> tuple[Array, Array]:
        """Quality under the decisions and dense quality, each float64 ``[n]``.

        The backbone is frozen, so the last ``CACHED_QUALITIES`` qualities are cached. Dense decisions that are not
        known yet run in the same forward pass as the others.
        """
        decisions = self._answering(decisions)
        both = np.concatenate([decisions, np.zeros_like(decisions)])
        keys = list(zip([*rows.tolist()] * 2, map(bytes, _packed(both)), strict=True))
        known = {key: self._scores[key] for key in keys if key in self._scores}
        if resume_from is not None and not known.keys() >= set(keys[: len(rows)]):
            known.update(zip(keys[: len(rows)], self.run(rows, decisions, resume_from).tolist(), strict=True))
        missing: dict[Key, int] = {}
        for position, key in enumerate(keys):
            if key not in known:
                missing.setdefault(key, position)
        if missing:
            positions = np.fromiter(missing.values(), dtype=np.int64)
            qualities = self.run(np.concatenate([rows, rows])[positions], both[positions])
            known.update(zip(missing, qualities.tolist(), strict=True))
        self._remember(known)
        values = np.array([known[key] for key in keys])
        return values[: len(rows)], values[len(rows) :]

    @torch.inference_mode()
    def judged(self, rows: Array, masks: Array, resume_from: PassState | None = None) -> Array:
        """The head's judgement of its answers under masks ``[n, switches + 1]``, float64 ``[n, values]``.

        Passes resume from the state ``resume_from``. The qualities are cached, and so are the judgements of the last
        batches. A threshold may depend on a judgement's last bits, which are equal only in the same batch.
        """
        batch = rows.tobytes(), masks.tobytes()
        if batch not in self._judged:
            quality, self._judged[batch] = self._run_and_judge(rows, masks, resume_from)
            keys = zip(rows.tolist(), map(bytes, _packed(masks)), quality.tolist(), strict=True)
            self._remember({(row, mask): value for row, mask, value in keys if (row, mask) not in self._scores})
            while len(self._judged) > BATCHES:
                self._judged.popitem(last=False)
        return self._judged[batch].copy()

    def _run_and_judge(self, rows: Array, masks: Array, resume_from: PassState | None) -> tuple[Array, Array]:
        """Quality ``[n]`` and judgement ``[n, values]``; one pass gives both, unless a text is generated and scored."""
        if self._measure.score is not None and self._head.judges_passes:
            values = self._passes.in_passes(
                rows, masks, columns(self._score, lambda logits, _: self._head.judge(logits)), resume_from
            )
            return self._of_score(rows, masks, values[:, 0]), values[:, 1:]
        texts, judged = self._passes.answers_and_judgement(rows, masks, resume_from)
        is_of_texts = self._measure.score is None
        return self._text_quality(rows, texts) if is_of_texts else self.run(rows, masks, resume_from), judged

    @torch.inference_mode()
    def judged_under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """Quality under every mask, float64 ``[n, masks]``, and ``judged``, ``[n, masks, values]``."""
        if self._measure.score is None or not self._head.judges_passes:
            of_masks = [self._run_and_judge(rows, np.tile(mask, (len(rows), 1)), None) for mask in masks]
            quality, judged = zip(*of_masks, strict=True)
            return np.stack(quality, axis=1), np.stack(judged, axis=1)
        values = self._passes.under_all(rows, masks, columns(self._score, lambda logits, _: self._head.judge(logits)))
        return self._of_scores(rows, masks, values[..., 0]), values[..., 1:]

    def _answering(self, decisions: Array) -> Array:
        return answer_masks(decisions, len(self._passes.backbone.board) + 1)

    def score_dense(self, on_batch: Callable[[], None] = lambda: None) -> None:
        """Compute the dense quality of every row, unless these would fill more than half of the cache.

        Batches are always the same, of similar length, so all runs of a process have the same scores to the last bit.
        """
        if len(self._encoded) > CACHED_QUALITIES // 2:
            return
        if self._dense is None:
            order = np.argsort(self._encoded.source_length, kind="stable")
            nothing = np.zeros((len(order), len(self._passes.backbone.board) + 1), dtype=np.int64)
            values = np.empty(len(order))
            for rows in np.split(order, range(DENSE_BATCH, len(order), DENSE_BATCH)):
                values[rows] = self.run(rows, nothing[rows])
                on_batch()
            keys = zip(range(len(order)), map(bytes, _packed(nothing)), strict=True)
            self._dense = dict(zip(keys, values.tolist(), strict=True)), self._dense_log.copy()
        qualities, dense_log = self._dense
        self._scores = OrderedDict(qualities) | self._scores
        self._dense_log = np.where(np.isnan(self._dense_log), dense_log, self._dense_log)

    def _remember(self, qualities: dict[Key, float]) -> None:
        for key, value in qualities.items():
            self._scores[key] = value
            self._scores.move_to_end(key)
        while len(self._scores) > CACHED_QUALITIES:
            self._scores.popitem(last=False)

    def scores(self) -> dict[str, torch.Tensor]:
        """The cached qualities as tensors: rows, packed decisions and values; and dense log-likelihoods."""
        packed = np.frombuffer(b"".join(decision for _, decision in self._scores), np.uint8)
        width = len(packed) // max(1, len(self._scores))
        return {
            "rows": torch.tensor([row for row, _ in self._scores], dtype=torch.int64),
            "decisions": torch.from_numpy(packed.reshape(len(self._scores), width).copy()),
            "values": torch.tensor(list(self._scores.values()), dtype=torch.float64),
            "dense_log": torch.from_numpy(self._dense_log.copy()),
        }

    def load_scores(self, scores: dict[str, torch.Tensor] | None) -> None:
        """Replace the cache by what ``scores()`` returned; ``None``: empty it."""
        self._scores: OrderedDict[Key, float] = OrderedDict()
        self._dense_log = np.full(len(self._encoded), np.nan)  # logarithms of dense likelihoods; NaN: not known
        if scores is not None:
            keys = zip(scores["rows"].tolist(), map(bytes, scores["decisions"].numpy()), strict=True)
            self._remember(dict(zip(keys, scores["values"].tolist(), strict=True)))
            self._dense_log = scores["dense_log"].numpy()

    @torch.inference_mode()
    def run(self, rows: Array, decisions: Array, resume_from: PassState | None = None) -> Array:
        """Run the backbone on rows under decisions and score it: float64 ``[n]``. Nothing is cached.

        A likelihood counts as one plus the logarithm of its ratio to the dense one, between 0 and 2. So dense has 1, a
        loss of 0.01 is one percent of perplexity, and no instance loses more than 1.

        Rows of about the same length, or of the same decision, run together. With ``resume_from``, all rows resume from
        that state in one pass.
        """
        decisions = self._answering(decisions)
        if self._measure.score is None:
            return self._text_quality(rows, self._passes.answers(rows, decisions, resume_from))
        return self._of_score(rows, decisions, self._passes.in_passes(rows, decisions, self._score, resume_from))

    @torch.inference_mode()
    def quality_and_likelihood(self, rows: Array, decisions: Array) -> tuple[Array, Array]:
        """Quality as ``run`` gives it, and the likelihood of the reference; each float64 ``[n]``. Nothing is cached."""
        decisions = self._answering(decisions)
        if self._measure.score is None:
            texts, likely = self._passes.answers_and_likelihood(rows, decisions, self._likelihood)
            return self._text_quality(rows, texts), likely
        values = self._passes.in_passes(rows, decisions, columns(self._score, self._likelihood))
        return self._of_score(rows, decisions, values[:, 0]), values[:, 1]

    @torch.inference_mode()
    def under_all(self, rows: Array, masks: Array) -> tuple[Array, Array]:
        """``quality_and_likelihood`` of rows ``[n]`` under every mask: each float64 ``[n, masks]``.

        Masks that agree on the first switches share their pass; if texts are generated, that of the encoder.
        """
        masks = self._answering(masks)
        if self._measure.score is None:
            texts, likely = self._passes.answers_under_all(rows, masks, self._likelihood)
            return np.stack([self._text_quality(rows, answers) for answers in texts], axis=1), likely
        values = self._passes.under_all(rows, masks, columns(self._score, self._likelihood))
        return self._of_scores(rows, masks, values[..., 0]), values[..., 1]

    def _text_quality(self, rows: Array, texts: list[str]) -> Array:
        metric = self._settings.metric if self._settings.kind == "metric" else "exact_match"
        pairs = zip(rows, texts, strict=True)
        return np.array([text_quality(metric, text, self._instances[row].references) for row, text in pairs])

    def _likelihood(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._head.likelihood(logits, labels, self._settings.label_range)

    def _score(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        score = self._measure.score
        assert score is not None  # without a score texts are compared
        if self._forced_first is not None and not self._measure.is_relative:
            labels = labels.clone()
            labels[:, 0].masked_fill_(labels[:, 0] == self._forced_first, IGNORED)
        return score(logits, labels, self._settings.label_range)

    @property
    def _forced_first(self) -> int | None:
        """The token that ``generate()`` begins each text with, whatever the decoder says; ``None``: it is free."""
        model: Any = self._passes.backbone.model
        written = self._head.gives == "text" and model.config.is_encoder_decoder
        return model.generation_config.forced_bos_token_id if written else None

    def _of_score(self, rows: Array, decisions: Array, values: Array) -> Array:
        """The quality that a score gives: a likelihood relative to dense, a balanced one weighted by class."""
        if self._measure.is_balanced:
            return values * self._class_weight[rows]
        return self._relative(rows, decisions, values) if self._measure.is_relative else values

    def _of_scores(self, rows: Array, masks: Array, values: Array) -> Array:
        tiled = [np.tile(mask, (len(rows), 1)) for mask in masks]
        return np.stack([self._of_score(rows, *pair) for pair in zip(tiled, values.T, strict=True)], axis=1)

    @property
    def highest(self) -> float:
        """The highest quality that an instance can have or lose: 1, or the weight of the rarest class."""
        return float(self._class_weight.max()) if self._measure.is_balanced else 1.0

    @cached_property
    def _class_weight(self) -> Array:
        """The weight of a right answer, float64 ``[n]``: all classes have the same total weight."""
        labels = self._head.classes(self._instances)
        classes, of_class, count = np.unique(labels, return_inverse=True, return_counts=True)
        return len(self._encoded) / (len(classes) * count[of_class])

    def _relative(self, rows: Array, decisions: Array, probability: Array) -> Array:
        """One plus the logarithm of the likelihood over the dense one, between 0 and 2."""
        log = np.log(np.maximum(probability, LEAST_LIKELIHOOD))
        dense = ~decisions.any(axis=1)
        self._dense_log[rows[dense]] = log[dense]
        unknown = np.unique(rows[np.isnan(self._dense_log[rows])])
        if len(unknown):
            nothing = np.zeros((len(unknown), decisions.shape[1]), dtype=np.int64)
            reference = self._passes.in_passes(unknown, nothing, self._likelihood)
            self._dense_log[unknown] = np.log(np.maximum(reference, LEAST_LIKELIHOOD))
        return np.clip(1 + log - self._dense_log[rows], 0, 2)

    @torch.inference_mode()
    def metrics(self, rows: Array, decisions: Array) -> dict[str, float]:
        """The metric of the rows under the decisions, by name; empty where it is the mean quality."""
        decisions = self._answering(decisions)
        name, kind = self._settings.metric, self._settings.kind
        is_mean = name == ACCURACY and (kind == "exact_match" or self._head.name == "score")
        if kind == "agreement" or name == "exact_match" or is_mean:
            return {}
        of_texts = METRICS.find(name).of_text is not None
        if of_texts or self._head.gives != "label":  # accuracy of a class's name as a text
            references = [self._instances[row].references for row in rows]
            compared = name if of_texts else "exact_match"
            means = text_metrics(compared, self._passes.answers(rows, decisions), references)
            return means if of_texts else {name: means["exact_match"]}
        predicted = self._passes.in_passes(rows, decisions, lambda logits, labels: self._head.prediction(logits))
        labels = self._encoded.labels[torch.from_numpy(rows)].numpy()
        pair = (self._head.in_data_order(classes, self._instances) for classes in (predicted, labels))
        return {name: corpus_metric(name, *pair)}


def _packed(decisions: Array) -> Array:
    """Decisions ``[n, switches + 1]`` in as few bytes as hold them, uint8 ``[n, bytes]``."""
    level = decisions[:, -1:].astype(np.uint32).view(np.uint8)
    return np.concatenate([np.packbits(decisions[:, :-1].astype(bool), axis=1), level], axis=1)
