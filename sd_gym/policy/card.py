"""The card of a policy: what it was trained on, how well, and which files belong to it; as JSON and as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sd_gym.config import EnvConfig
from sd_gym.files import as_json, hash_of, sha256, write_json
from sd_gym.operating_points import OperatingPoint
from sd_gym.policy.network_files import FORMAT, Strict, read_model
from sd_gym.policy.token_rule import TokenRule

FILE, TENSORS = "skip_policy.json", "skip_policy.safetensors"
HASHED = (TENSORS, "policy.json", "policy.safetensors")
FILES = (FILE, *HASHED, "README.md")


def _with_flops(point: OperatingPoint) -> OperatingPoint:
    if point.flops_ratio < 0:
        raise ValueError(f"flops_ratio: expected at least 0, got {point.flops_ratio}")
    return point


class _Selection(Strict):
    rows: int
    epsilon: float
    confidence: float


class _Table(Strict):
    nvec: list[Annotated[int, Field(ge=1)]]
    switches: list[str]


class _Backbone(Strict):
    name: str
    is_local: bool
    model_type: str
    auto_class: str
    weights: str
    tokenizer: str
    reading: str | None = None  # older policies have none
    token_types: bool


class _Result(Strict):
    split: str
    instances: int = Field(ge=1)
    quality: float
    quality_ref: float
    flops_ratio: float = Field(ge=0)
    flops_ratio_with_policy: float = Field(ge=0)
    quality_difference: float
    quality_difference_interval: tuple[float, float]
    verdict: str
    guarantee: str | None
    goes_on: float = Field(0.0, ge=0, le=1)


class _Run(Strict):
    env: str
    algo: str
    steps: Annotated[int, Field(ge=0)] | None
    seed: int | None
    versions: dict[str, str]
    data: dict[str, dict[str, Any]]


class _Card(Strict):
    """The content of ``skip_policy.json``."""

    format: Literal[2]
    files: dict[str, str]
    protection: TokenRule | None
    context: TokenRule | None
    ranking_costs_flops: bool
    operating_points: list[Annotated[OperatingPoint, AfterValidator(_with_flops)]]
    table: _Table | None
    env: EnvConfig
    backbone: _Backbone
    result: _Result
    selection: _Selection | None
    run: _Run


def write_card(folder: Path, values: dict[str, Any]) -> None:
    """Write ``skip_policy.json`` beside a policy's other files: values, format, and the hashes of all files."""
    values = {"format": FORMAT, **json.loads(as_json(values))}
    hashes = {name: sha256(folder / name) for name in HASHED} | {FILE: hash_of(values)}
    write_json(folder / FILE, {**values, "files": hashes})


def read_card(folder: Path) -> dict[str, Any]:
    """The values that ``write_card`` was given.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a key is missing, unknown or of a wrong type, or a file was changed after saving.
    """
    card = read_model(_Card, folder / FILE, "not the card of a policy (copy the policy's folder again)")
    values = json.loads((folder / FILE).read_bytes())
    hashes = values.pop("files")
    for name in FILES[:-1]:
        if name != FILE and not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; copy the policy's folder again, with all its files")
        if hashes.get(name) != (hash_of(values) if name == FILE else sha256(folder / name)):
            raise ValueError(
                f"{folder / name} is not the file that was saved with this policy: it was changed, damaged or comes "
                f"from another policy (its SHA-256 is not the one in {FILE}); copy the policy's folder again, with all "
                "its files"
            )
    del values["format"]
    values["env"] = card.env.model_dump(mode="json", exclude={"reward": {"objective"}})  # with the defaults
    return {**values, **{key: getattr(card, key) for key in ("protection", "context", "operating_points")}}


def model_card(card: dict[str, Any], operating_points: Sequence[OperatingPoint]) -> str:
    """Markdown: what a policy saves, on which data, with which guarantee, and how to use it."""
    env = card["env"]
    backbone = card["backbone"]
    result = card["result"]
    low, high = (100 * bound for bound in result["quality_difference_interval"])
    versions = "\n".join(
        f"| {point.margin:+.2f} | {point.flops_ratio:.1%} | {100 * point.loss:.2f} | {100 * point.highest_loss:.2f} | "
        f"{'yes' if point.passed else 'no'} |"
        for point in operating_points
    )
    points = f"""
Operating points, tested on the validation split from the bottom up (`attach(..., max_loss=0.005)` or `max_flops=0.4`
chooses one):

| margin | FLOPs | points lost | at most | passed |
| --- | --- | --- | --- | --- |
{versions}
"""
    on = card["run"]["env"]
    trained_on = env["id"] if on == env["id"] else f"{env['id']}, its outcomes in a table ({on})"
    base = "" if backbone["is_local"] else f"base_model: {backbone['name']}\n"
    guarantee = "" if result["guarantee"] is None else f"Guarantee: {result['guarantee']}.\n"
    if share := result.get("goes_on"):
        guarantee += f"{share:.1%} of the answers went on densely.\n"
    return f"""---
library_name: sd_gym
{base}tags: [sd_gym, skipping, {env["task"]}]
---

# A skipping policy for {backbone["name"]}

For each input it decides which attention and feed-forward blocks of the model (and which tokens) to skip. What is
skipped is not executed. Trained by {card["run"]["algo"]} on {trained_on}.

On the {result["split"]} split, {result["instances"]:,} instances:

| | dense | with the policy |
| --- | --- | --- |
| quality | {result["quality_ref"]:.4f} | {result["quality"]:.4f} |
| FLOPs | 100% | {result["flops_ratio_with_policy"]:.1%} |

Difference in quality: {100 * result["quality_difference"]:+.2f} points (95% interval {low:+.2f} to {high:+.2f}).
Verdict at epsilon {env["reward"]["epsilon"]:g}: {result["verdict"]}.
{guarantee}
```python
{_usage(backbone)}```
{points if operating_points else ""}"""


def _usage(backbone: dict[str, Any]) -> str:
    if backbone["is_local"]:  # its path means nothing on another machine
        return """import sd_gym

model = sd_gym.load("PATH OR ID OF THIS POLICY", backbone="WHERE THE BACKBONE IS")
model(["a text", "another one"])
sd_gym.attach(my_model, "PATH OR ID OF THIS POLICY")  # or inside the backbone itself, if you have it as my_model
"""
    return f"""import sd_gym
from transformers import {backbone["auto_class"]}

model = {backbone["auto_class"]}.from_pretrained({backbone["name"]!r})
sd_gym.attach(model, "PATH OR ID OF THIS POLICY")  # then use the model as before
"""
