"""Data sets as lists of instances: generated, from JSONL files, or from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_gym.tasks.instance import Instance
from sd_gym.tasks.procedural import generate_split

SPLITS = ("train", "validation", "test")
FIELDS = {
    "classification": ("text", "label"),
    "question_answering": ("question", "context", "answers"),
    "summarization": ("document", "summary"),
}


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and line."""


def load_split(dataset: str, task: str, split: str, size: int | None) -> list[Instance]:
    """The instances of one split, in the data set's order.

    Args:
        dataset: ``procedural``; a JSONL file; a folder of ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``; or
            the id of a data set on the Hugging Face hub.
        task: ``classification`` (fields ``text``, ``text_pair``?, ``label``), ``question_answering`` (``question``,
            ``context``, ``answers``) or ``summarization`` (``document``, ``summary``).
        split: ``train``, ``validation`` or ``test``. A single file is divided by row: every tenth row is validation,
            every tenth test, the rest train. A folder without ``test.jsonl`` tests on its validation split.
        size: At most so many instances; ``None``: all.

    Raises:
        FileNotFoundError: If the file, folder, split or hub id does not exist.
        DataError: If the data set is empty or a row is malformed.
    """
    if dataset == "procedural":
        if size is None:
            raise DataError(f"the procedural data set is endless; set {split}_size")
        return generate_split(task, split, size)
    path = Path(dataset)
    if path.is_file():
        rows = _divide(_read_jsonl(path), split)
    elif path.is_dir():
        rows = _read_jsonl(_split_file(path, split))
    elif path.suffix == ".jsonl" or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise FileNotFoundError(
            f"no data at {dataset!r}; expected a JSONL file, a folder with {', '.join(f'{s}.jsonl' for s in SPLITS)}, "
            "'procedural', or the id of a data set on the Hugging Face hub"
        )
    else:
        rows = _read_hub(dataset, split)
    instances = []
    for origin, row in rows:
        if size is not None and len(instances) == size:
            break
        instances.append(_instance(row, task, f"{split}-{len(instances)}", origin))
    if not instances:
        raise DataError(f"the split {split!r} of {dataset!r} is empty")
    return instances


def _split_file(folder: Path, split: str) -> Path:
    file = folder / f"{split}.jsonl"
    if not file.exists() and split == "test":
        file = folder / "validation.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"no {split}.jsonl in {folder}; expected {', '.join(f'{s}.jsonl' for s in SPLITS)}")
    return file


def _read_jsonl(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of every line that is not blank."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise DataError(f"{file}, line {number}: expected a JSON object, got {type(row).__name__}")
            yield f"{file}, line {number}", row


def _divide(rows: Iterable[tuple[str, dict[str, Any]]], split: str) -> list[tuple[str, dict[str, Any]]]:
    place = {8: "validation", 9: "test"}
    return [row for number, row in enumerate(rows) if place.get(number % 10, "train") == split]


def _read_hub(dataset: str, split: str) -> Iterable[tuple[str, dict[str, Any]]]:
    from datasets import get_dataset_split_names, load_dataset  # heavy, and only needed here

    try:
        known = get_dataset_split_names(dataset)
        if split == "test" and "test" not in known:
            split = "validation"
        rows = load_dataset(dataset, split=split)
    except Exception as error:  # the library raises errors of many kinds when the hub cannot be reached
        raise FileNotFoundError(
            f"cannot load the split {split!r} of {dataset!r}: it is no local file or folder, and the Hugging Face hub "
            "did not give it. Without network, pass the path of a local copy as dataset=..."
        ) from error
    return ((f"{dataset}, row {number}", row) for number, row in enumerate(rows))


def _instance(row: dict[str, Any], task: str, identity: str, origin: str) -> Instance:
    missing = [field for field in FIELDS[task] if field not in row]
    if missing:
        raise DataError(f"{origin}: no field {missing[0]!r}; {task} needs {', '.join(FIELDS[task])}")
    difficulty = row.get("difficulty", 0)
    if task == "classification":
        text, label = row["text"], row["label"]
        if isinstance(label, bool) or not isinstance(label, int | str) or (isinstance(label, int) and label < 0):
            raise DataError(f"{origin}: label must be a class index from 0 or a label word, got {label!r}")
        _require_text(text, "text", origin)
        return Instance(identity, text, label, difficulty, row.get("text_pair"))
    if task == "question_answering":
        answers = row["answers"].get("text", []) if isinstance(row["answers"], dict) else row["answers"]
        _require_text(row["question"], "question", origin)
        _require_text(row["context"], "context", origin)
        question = row["question"]
        target = answers[0] if answers else ""
        return Instance(identity, question, target, difficulty, row["context"], ((0, len(question)),))
    _require_text(row["document"], "document", origin)
    _require_text(row["summary"], "summary", origin)
    return Instance(identity, row["document"], row["summary"], difficulty)


def _require_text(value: Any, field: str, origin: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{origin}: {field} must be a text that is not empty, got {value!r}")
