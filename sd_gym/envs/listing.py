"""Descriptions of envs, and their instances, without running anything."""

import re
from dataclasses import dataclass
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any

from sd_gym.config import dotted
from sd_gym.envs.config import is_table, load_config, read_values
from sd_gym.envs.infos import checked_split
from sd_gym.envs.serving.config import make_serving_config
from sd_gym.envs.table_files import naming_damage, read_table, table_folder
from sd_gym.registration import SERVING, config_of
from sd_gym.tasks.splits import Splits

_VERSION = re.compile(r"v\d+: ")
_FACTS = {
    "metric": "quality.metric",
    "quality": "quality.kind",
    "epsilon": "reward.epsilon",
    "penalty": "reward.penalty",
    "action": "action",
    "observation": "observation",
}


@dataclass
class Page:
    """The head of an env's page."""

    about: str  # the comment at the top of its YAML file
    versions: list[str]  # lines of that comment about what a version changed, such as ``v1: new rows``
    facts: dict[str, str]  # by name: task, data set, backbone, stages, metric, epsilon and so on


def page_of(env_id: str) -> Page:
    """The head of an env's page; neither its data nor its backbone are loaded.

    Raises:
        ValueError: If the id is unknown.
        FileNotFoundError: If the env's table does not exist.

    Example:
        >>> from sd_gym.envs.listing import page_of
        >>> page_of("SD/Classification-Mini-v0").facts["stages"]
        'first'
    """
    if env_id in SERVING:
        return _serving_page(env_id)
    file = config_of(env_id)
    values = read_values(file)
    tabulated = is_table(values)
    description = read_table(table_folder(values["table"])) if values.get("table") is not None else None
    if description is not None:
        given = {key: value for key, value in values.items() if value is not None}
        values = {**dotted(description["env_config"], env_id), **given}
    tested = (dict(values.get("data.splits") or {})).get("test", "test")
    data = f"{values.get('data.dataset') or 'yours'}{'' if tested == 'test' else f', tested on its {tested}'}"
    facts = {"task": str(values.get("task", "of the table"))}
    facts["data set"] = f"{data}, tabulated" if tabulated else data
    facts["backbone"] = str(values.get("backbone.name") or "yours")
    facts["stages"] = ", ".join(values.get("stages") or ["of the table"])
    if description is not None:
        with naming_damage(table_folder(values["table"])):
            facts["decisions"] = f"{description['masks'] or prod(description['nvec']):,}"
            counts = [f"{split['instances']:,} {name}" for name, split in description["splits"].items()]
        facts["instances"] = ", ".join(counts)
    facts |= {name: str(values[key]) for name, key in _FACTS.items() if values.get(key) is not None}
    if description is not None and description.get("chosen"):  # not all decisions of the original env
        at_once = description.get("ways") and list(values["stages"]) == ["first"]
        facts["action"] = "multi_discrete" if description.get("units") or at_once else "discrete"
    about, versions = _comment(file, env_id)
    return Page(about, versions, facts)


def _serving_page(env_id: str) -> Page:
    file = SERVING.find(env_id)
    config = make_serving_config(file, {})
    facts = {"task": "serving", "data set": f"requests to a server, on {config.table}", "backbone": "-"}
    facts["points"] = str(len(config.points))
    keys = ("arrivals", "load", "requests", "deadline", "max_batch", "epsilon", "penalty")
    return Page(*_comment(file, env_id), facts | {key: str(getattr(config, key)) for key in keys})


def _comment(file: Path, env_id: str) -> tuple[str, list[str]]:
    """The comment at the top of a YAML file without the id, and its lines about versions."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8-sig").splitlines())
    texts = [line.lstrip("# ") for line in lines]
    versions = [text for text in texts if _VERSION.match(text)]
    about = " ".join(text for text in texts if text not in versions).removeprefix(f"{env_id}: ")
    return about[:1].upper() + about[1:], versions


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
    checked_split(split)
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
