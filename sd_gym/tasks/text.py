"""Scores of a text that a backbone generates or extracts: SQuAD's exact match and F1, and ROUGE."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

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


def _token_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))


@lru_cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)
