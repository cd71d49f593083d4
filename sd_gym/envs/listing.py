"""The instances of an env, without a backbone."""

from __future__ import annotations

from typing import Any

from sd_gym.envs.config import load_config
from sd_gym.registration import config_of
from sd_gym.tasks.splits import Splits


def instances(env_id: str, split: str = "test", **settings: Any) -> list[dict[str, Any]]:
    """The instances of a split, in order; no backbone is loaded.

    Args:
        env_id: A registered id.
        split: ``train``, ``validation`` or ``test``.
        settings: Overrides of the env's config, as for ``gym.make``.

    Returns:
        One dictionary per instance: ``id`` (for ``reset(options={"instance": id})``), ``row`` (its place in the data,
        counted from 1: ``reviews.jsonl, row 9``), ``text`` (in question answering, the question), ``text_pair`` (the
        context or the second sentence, or ``None``), ``label`` (the reference: a text, a class or a score), ``level``
        (of difficulty, 1 and up; 0 if unknown).

    Raises:
        ValueError: If the id, the split or a setting is unknown.
        FileNotFoundError: If there is no such data set.

    Example:
        >>> import sd_gym
        >>> sd_gym.instances("SD/Summarization-Mini-v0", "test", test_size=3)[0]["id"]
        'test-0'
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; expected train, validation or test")
    config = load_config(config_of(env_id), settings)
    if config.table is not None:
        raise ValueError(f"{config.table}: a table has no texts; list the instances of the original env")
    rows = Splits.of_env(config)[split]
    return [
        {
            "id": instance.id,
            "row": f"{rows.file}, row {row + 1}",
            "text": instance.source,
            "text_pair": instance.source_pair,
            "label": instance.target,
            "level": instance.difficulty,
        }
        for row, instance in zip(rows.rows, rows, strict=True)
    ]
