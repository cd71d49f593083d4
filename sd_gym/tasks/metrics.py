"""What a backbone's output is worth: the quality of one instance, and the metric of a whole data set.

The quality of an instance is what rewards are made of; the metric is what reports show. Accuracy and exact match are
the mean quality. F1, Matthews correlation and the correlations of a regression are properties of the whole data set,
that no single instance has: there the quality is what each instance adds to accuracy (or, for scores, how near it
comes), and a policy that keeps the mean quality keeps the metric only nearly, so reports show both. With
``quality=balanced`` a right answer counts inversely to how frequent its class is, and the mean is balanced accuracy B.
Of two classes, Matthews correlation is (2 B - 1) times the standard deviation of the labels over that of the
predictions, so this is what keeps it where one class is rare, which accuracy does not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.spans import span_log_likelihood

IGNORED = -100


def prediction(logits: Tensor) -> Tensor:
    """What a classifier says: class indices ``[batch]``, or scores where it has a single output."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(dim=1)


def quality(logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
    """Quality of each row in [0, 1], float32 ``[batch]``: 1.0 where the output is exactly the reference, else 0.0.

    A score (regression) has ``1 - |score - label| / label_range``, at least 0.

    For generated text the logits are teacher-forced: greedy decoding gives the reference if and only if, at every
    position, the most probable token after the reference's prefix is the reference's next token. So one forward pass
    tells what generating would, ``</s>`` included.

    Args:
        logits: ``[batch, target length, vocabulary]``, ``[batch, classes]``, or ``[batch, 1]`` (a score).
        labels: ``[batch, target length]``, -100 where padded, or ``[batch]``.
        label_range: Difference of the highest and the lowest score that there is.
    """
    if labels.is_floating_point():
        return (1 - (prediction(logits).float() - labels).abs() / label_range).clamp(min=0)
    if labels.ndim == 1:
        return (prediction(logits) == labels).float()
    return ((logits.argmax(dim=-1) == labels) | (labels == IGNORED)).all(dim=1).float()


def likelihood(logits: Tensor, labels: Tensor, label_range: float = 1.0) -> Tensor:
    """Probability of the reference, float32 ``[batch]``.

    Of a class; of a text, the geometric mean over its tokens; of the right spans of the context, where answers are
    extracted (labels ``[batch, spans, 2]``, logits ``[batch, 2, length]``), their sum.

    A graded quality where exact match is too coarse, from one teacher-forced pass; what an env makes of it is relative
    to the dense backbone's on the same instance (see ``Split.run``). Arguments as of ``quality``; a score has its
    quality there.
    """
    if labels.is_floating_point():
        return quality(logits, labels, label_range)
    if labels.ndim == 3:
        return span_log_likelihood(logits, labels).exp()
    if labels.ndim == 1:
        logits, labels = logits[:, None], labels[:, None]
    counted = labels != IGNORED
    log_prob = logits.float().log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return ((log_prob * counted).sum(dim=1) / counted.sum(dim=1)).exp()


def corpus_metric(name: str, predictions: NDArray, labels: NDArray) -> float:
    """The metric of a whole data set, as GLUE defines it.

    Args:
        name: ``accuracy``; ``f1`` (of class 1); ``matthews``; or ``correlation`` (the mean of Pearson's and
            Spearman's, of scores).
        predictions: ``[n]``.
        labels: ``[n]``.

    Raises:
        ValueError: If there is no such metric.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if name == "accuracy":
        return float(accuracy_score(labels, predictions))
    if name == "f1":
        return float(f1_score(labels, predictions))
    if name == "matthews":
        return float(matthews_corrcoef(labels, predictions))
    if name == "correlation":
        if np.ptp(predictions) == 0:  # not defined; a constant score says nothing
            return 0.0
        return float((pearsonr(labels, predictions).statistic + spearmanr(labels, predictions).statistic) / 2)
    raise ValueError(f"unknown metric {name!r}; expected accuracy, f1, matthews or correlation")
