"""The quality of one answer, which rewards are made of, and the metric of a whole data set, which reports show.

Accuracy and exact match are the mean quality. F1, Matthews correlation and the correlations of scores are properties of
the whole data set: a policy that keeps the mean quality keeps them only nearly, so reports show both. With
``quality=balanced`` a right answer counts inversely to the frequency of its class, and the mean is balanced accuracy B.
For two classes, Matthews correlation is (2 B - 1) times the standard deviation of the labels over that of the
predictions. So ``balanced`` keeps it if one class is rare, which accuracy does not.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_gym.errors import short
from sd_gym.registry import Registry, check_function

ROUGE = ("rouge1", "rouge2", "rougeL")
ACCURACY = "accuracy"
OF_CLASSES = "f1", "matthews"
SLACK = 1e-6  # libraries round: sacrebleu gives up to 100.00000000000004

# From a text and its references to a score in [0, 1], or to several by name.
TextMetric = Callable[[str, Sequence[str]], float | Mapping[str, float]]
CorpusMetric = Callable[[NDArray, NDArray], float]


@dataclass(frozen=True)
class Metric:
    """A metric: one of two functions."""

    of_text: TextMetric | None = None  # from a text and its references; a data set has the means
    of_all: CorpusMetric | None = None  # from predictions ``[n]`` and labels ``[n]``: class indices, or scores
    quality: str | None = None  # the name of the score that is a text's quality; ``None``: the mean of its scores
    own: bool = False  # whether a user registered it; then it applies to any task


def text_scores(metric: str, answer: str, references: Sequence[str]) -> dict[str, float]:
    """Scores of one text, by name; ValueError if the metric does not compare texts, or gives no score in [0, 1]."""
    function = METRICS.find(metric).of_text
    if function is None:
        raise ValueError(f"the metric {metric!r} does not compare texts")
    given: Any = function(answer, references or ("",))
    try:
        scores = {
            name: float(score) for name, score in (given if isinstance(given, Mapping) else {metric: given}).items()
        }
    except (TypeError, ValueError):
        scores = {}
    if not scores or not all(-SLACK <= score <= 1 + SLACK for score in scores.values()):
        raise ValueError(
            f"the metric {metric!r} has to give a score in [0, 1], or several by name, got {short(given)} for the text "
            f"{short(answer)}"
        )
    return {name: min(max(score, 0.0), 1.0) for name, score in scores.items()}


def text_quality(metric: str, answer: str, references: Sequence[str]) -> float:
    """Quality of one text in [0, 1]: F1 for ``squad``, ``exact_match``, the mean of the three ROUGE for ``rouge``.

    The metric of a data set is the mean over its instances. Raises: see ``text_scores``.
    """
    scores, chosen = text_scores(metric, answer, references), METRICS.find(metric).quality
    return float(np.mean(list(scores.values()))) if chosen is None else scores[chosen]


def text_metrics(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means of ``text_scores`` over a data set."""
    scores = [text_scores(metric, answer, right) for answer, right in zip(answers, references, strict=True)]
    return {name: float(np.mean([of_text[name] for of_text in scores])) for name in scores[0]}


def corpus_metric(name: str, predictions: NDArray, labels: NDArray) -> float:
    """The metric of a whole data set, see ``Metric.of_all``; ValueError if the metric compares texts."""
    function = METRICS.find(name).of_all
    if function is None:
        raise ValueError(f"the metric {name!r} compares texts")
    return float(function(predictions, labels))


def normalised(text: str) -> str:
    """A text in lower case, without punctuation, articles and double spaces, as in SQuAD (Rajpurkar et al. 2016)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 of an answer, each the best over the references.

    Without references the question has no answer, and only an empty text is right. As in SQuAD 2.0's script, a
    reference without words other than articles does not count beside others.
    """
    references = [reference for reference in references if normalised(reference)] or ("",)
    return {
        "exact_match": float(max(normalised(answer) == normalised(reference) for reference in references)),
        "f1": max(_token_f1(normalised(answer).split(), normalised(reference).split()) for reference in references),
    }


def summary_scores(summary: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming (Lin 2004), each the best over the references."""
    scores = [_scorer().score(reference, summary) for reference in references]
    return {name: max(score[name].fmeasure for score in scores) for name in ROUGE}


def _token_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))


@lru_cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


def _f1(predictions: NDArray, labels: NDArray) -> float:
    """F1 of class 1, as GLUE defines it; other classes are the others."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels == 1, predictions == 1, zero_division=0))  # pyright: ignore[reportArgumentType]  (0 is right, too)


def _matthews(predictions: NDArray, labels: NDArray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _correlation(predictions: NDArray, labels: NDArray) -> float:
    """The mean of Pearson's and Spearman's correlations of scores."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:  # not defined for a constant
        return 0.0
    results: list[Any] = [pearsonr(labels, predictions), spearmanr(labels, predictions)]
    return sum(result.statistic for result in results) / 2


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "exact_match": Metric(of_text=lambda answer, references: answer_scores(answer, references)["exact_match"]),
        "squad": Metric(of_text=answer_scores, quality="f1"),
        "rouge": Metric(of_text=summary_scores),
        ACCURACY: Metric(of_all=lambda predictions, labels: (predictions == labels).mean()),
        "f1": Metric(of_all=_f1),
        "matthews": Metric(of_all=_matthews),
        "correlation": Metric(of_all=_correlation),
    },
)


def register_metric(name: str, *, of_text: TextMetric | None = None, of_all: CorpusMetric | None = None) -> None:
    """Register a metric of your own: ``metric=name`` then works in ``gym.make``, YAML files and ``--set``.

    Args:
        name: Its name. A second one of the same name replaces the first.
        of_text: Takes a text and its references to a score in [0, 1], higher is better, or to several by name. A data
            set has the means. With ``quality=metric`` rewards are made of it.
        of_all: Takes predictions ``[n]`` and labels ``[n]`` (class indices, or scores) to one number.

    Raises:
        ValueError: If not exactly one of the two is given, or the name is one of the project's.
        TypeError: If it is no function.
    """
    if (of_text is None) == (of_all is None):
        raise ValueError(f"the metric {name!r} needs either of_text or of_all")
    check_function(f"the metric {name!r}", of_text or of_all)
    METRICS.register(name, Metric(of_text, of_all, own=True))
