"""Seeded generation of the procedural tasks, with disjoint splits."""

import hashlib
from collections.abc import Iterator, Sequence
from random import Random

from sd_gym.config import SPLITS
from sd_gym.data.instance import Instance
from sd_gym.tasks.procedural import classification, question_answering, summarization

TASKS = {"classification": classification, "question_answering": question_answering, "summarization": summarization}
TASK_WORDS = {"classification": "classify", "question_answering": "answer", "summarization": "summarize"}
TRACE_WORD = "trace"  # asks for all people on the way to the answer: only in training, to teach the hops
LEVELS = (1, 2, 3, 4)
LEVEL_WEIGHTS = (0.3, 0.3, 0.25, 0.15)


def vocabulary() -> list[str]:
    """All words of all procedural tasks, sorted."""
    words = set().union(*(task.WORDS for task in TASKS.values()))
    return sorted(words | {*TASK_WORDS.values(), TRACE_WORD, ":"})


def split_of(source: str) -> str:
    """The split of the instances with this text: 70% train, 10% validation, 20% test."""
    bucket = hashlib.blake2b(source.encode(), digest_size=2).digest()[0] % 10
    return "train" if bucket < 7 else "validation" if bucket == 7 else "test"


def stream(
    task: str, split: str, seed: int, *, max_level: int = 4, weights: Sequence[float] = LEVEL_WEIGHTS, trace: float = 0
) -> Iterator[Instance]:
    """An endless seeded stream of instances of one task and split; ValueError if either is unknown.

    For training: ``max_level`` is the highest level drawn, ``weights`` are the frequencies of levels, and ``trace`` is
    the share of the questions that ask for the whole way instead of the answer.
    """
    if task not in TASKS:
        raise ValueError(f"unknown procedural task {task!r}; expected one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    random = Random(f"{task}/{split}/{seed}")
    number = 0
    while True:
        level = random.choices(LEVELS[:max_level], weights[:max_level])[0]
        text, target, *way = TASKS[task].generate(random, level)
        if split_of(text) != split:
            continue
        word = TASK_WORDS[task]
        if way and random.random() < trace:
            word, target = TRACE_WORD, " ".join(way[0])
        source = f"{word} : {text}"
        protected = [(0, len(word) + 2)]
        if task == "question_answering":  # the question follows the facts
            protected.append((source.index("who "), len(source)))
        yield Instance(f"{split}-{number}", source, target, level, protected=tuple(protected))
        number += 1


def generate_split(task: str, split: str, size: int, seed: int = 0) -> list[Instance]:
    """``size`` different instances of one split; ValueError if ``task``, ``split`` or ``size`` is wrong."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    chosen: dict[str, Instance] = {}
    instances = stream(task, split, seed)
    while len(chosen) < size:
        instance = next(instances)
        chosen.setdefault(instance.source, instance)
    return list(chosen.values())
