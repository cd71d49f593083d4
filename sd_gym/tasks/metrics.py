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
