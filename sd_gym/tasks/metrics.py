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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd_gym.registry import Registry
from sd_gym.tasks import text

OfText = Callable[[str, Sequence[str]], float | Mapping[str, float]]
OfAll = Callable[[NDArray, NDArray], float]


@dataclass(frozen=True)
class Metric:
    """What a task is measured by: one of the two functions.

    Attributes:
        of_text: Scores in [0, 1] of one text by its references, a number or several by name, of which a data set has
            the means.
        of_all: One number of a whole data set, of predictions ``[n]`` and labels ``[n]`` (class indices, or scores).
        quality: Which of several scores of a text its quality is; ``None``: their mean.
        own: Whether it is a user's: then any task may be measured by it.
    """

    of_text: OfText | None = None
    of_all: OfAll | None = None
    quality: str | None = None
    own: bool = False

    @property
    def of_texts(self) -> bool:
        """Whether it is one of texts."""
        return self.of_text is not None


def text_scores(metric: str, said: str, references: Sequence[str]) -> dict[str, float]:
    """What a metric of texts says of one text, by name.

    Raises:
        ValueError: If there is no such metric of texts.
    """
    function = METRICS.find(metric).of_text
    if function is None:
        raise ValueError(f"the metric {metric!r} is none of texts")
    given = function(said, references or ("",))
    return dict(given) if isinstance(given, Mapping) else {metric: float(given)}


def text_quality(metric: str, said: str, references: Sequence[str]) -> float:
    """Quality of one text in [0, 1]: F1 for ``squad``, ``exact_match``, the mean of the three ROUGE for ``rouge``.

    Both metrics of a data set are means over its instances, so mean quality kept is metric kept: of SQuAD's two
    figures F1 is the one that a reward can grade, and of the three ROUGE none is preferred.

    Raises:
        ValueError: If there is no such metric of texts.
    """
    scores, chosen = text_scores(metric, said, references), METRICS.find(metric).quality
    return float(np.mean(list(scores.values()))) if chosen is None else scores[chosen]


def text_metrics(metric: str, said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over a data set of what a metric of texts consists of."""
    scores = [text_scores(metric, one, wanted) for one, wanted in zip(said, references, strict=True)]
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def corpus_metric(name: str, predictions: NDArray, labels: NDArray) -> float:
    """The metric of a whole data set: see ``Metric.of_all``.

    Raises:
        ValueError: If there is no such metric.
    """
    function = METRICS.find(name).of_all
    if function is None:
        raise ValueError(f"the metric {name!r} is one of texts")
    return float(function(predictions, labels))


def _accuracy(predictions: NDArray, labels: NDArray) -> float:
    return float((predictions == labels).mean())


def _f1(predictions: NDArray, labels: NDArray) -> float:
    """Of class 1, as GLUE defines it."""
    from sklearn.metrics import f1_score

    return f1_score(labels, predictions)


def _matthews(predictions: NDArray, labels: NDArray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _correlation(predictions: NDArray, labels: NDArray) -> float:
    """The mean of Pearson's and Spearman's, of scores."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predictions) == 0:  # not defined; a constant score says nothing
        return 0.0
    return (pearsonr(labels, predictions).statistic + spearmanr(labels, predictions).statistic) / 2


def _exact_match(said: str, references: Sequence[str]) -> float:
    return text.answer_scores(said, references)["exact_match"]


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "exact_match": Metric(of_text=_exact_match),
        "squad": Metric(of_text=text.answer_scores, quality="f1"),
        "rouge": Metric(of_text=text.summary_scores),
        "accuracy": Metric(of_all=_accuracy),
        "f1": Metric(of_all=_f1),
        "matthews": Metric(of_all=_matthews),
        "correlation": Metric(of_all=_correlation),
    },
)


def register_metric(name: str, *, of_text: OfText | None = None, of_all: OfAll | None = None) -> None:
    """Make a metric of your own known: then ``metric=name`` works in ``gym.make``, YAML files and ``--set``.

    Args:
        name: What it is called; a later one of the same name replaces it.
        of_text: Takes a text and its references (a list of texts) to a score in [0, 1], higher is better; a data set
            has the mean. With ``quality=metric`` rewards are made of it.
        of_all: Takes predictions and labels, each ``[n]``, to the metric of a whole data set, where instances are
            classified or scored.

    Raises:
        ValueError: If not just one of the two is given, or the name is one of the project's.
    """
    if (of_text is None) == (of_all is None):
        raise ValueError(f"the metric {name!r} needs either of_text or of_all")
    METRICS.register(name, Metric(of_text, of_all, own=True))
