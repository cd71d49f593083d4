"""What a text is worth that a backbone generates or extracts: SQuAD's exact match and F1, and ROUGE."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, with single spaces: as SQuAD compares (Rajpurkar et al. 2016)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 of an answer, each the best over the references.

    Without references the question has no answer (SQuAD 2.0): then only an empty text is right.
    """
    references = references or ("",)
    return {
        "exact_match": float(max(normalised(answer) == normalised(reference) for reference in references)),
        "f1": max(_token_f1(normalised(answer).split(), normalised(reference).split()) for reference in references),
    }


def summary_scores(summary: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming (Lin 2004), each the best over the references."""
    scores = [_scorer().score(reference, summary) for reference in references]
    return {name: max(score[name].fmeasure for score in scores) for name in ROUGE}


def text_quality(metric: str, text: str, references: Sequence[str]) -> float:
    """Quality of one text in [0, 1]: F1 for ``squad``, ``exact_match``, the mean of the three ROUGE for ``rouge``.

    Both metrics of a data set are means over its instances, so mean quality kept is metric kept: of SQuAD's two
    figures F1 is the one that a reward can grade, and of the three ROUGE none is preferred.

    Raises:
        ValueError: If there is no such metric for texts.
    """
    if metric == "squad":
        return answer_scores(text, references)["f1"]
    if metric == "exact_match":
        return answer_scores(text, references)["exact_match"]
    if metric == "rouge":
        return float(np.mean(list(summary_scores(text, references).values())))
    raise ValueError(f"unknown metric {metric!r} of generated texts; expected rouge, squad or exact_match")


def text_metrics(metric: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over a data set of what ``metric`` (``squad`` or ``rouge``) consists of."""
    score = answer_scores if metric == "squad" else summary_scores
    scores = [score(text, wanted) for text, wanted in zip(texts, references, strict=True)]
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def _token_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))


@lru_cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)
