"""The leaderboard of the tables in the package: runs that were played again, a row an env and agent."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sd_gym.agents.experiment.replay import read_instances, replay
from sd_gym.agents.experiment.verdict import Verdict
from sd_gym.agents.registry import BLIND, LEARNING
from sd_gym.agents.report.compare import Run, agent_of, alike, finished_runs, read_run

from sd_gym.config import spelled
from sd_gym.envs.config import load_config
from sd_gym.envs.core import shared_core
from sd_gym.envs.exact import regret, static_regret
from sd_gym.envs.table import CODEBOOK, LEAVING, TableCore, table_folder
from sd_gym.files import write_text
from sd_gym.registration import config_of, shipped_tables

SETTLED = ("table", "reward.epsilon")  # keys of the env that rows of one leaderboard share


class Entry(BaseModel):
    """A row of ``leaderboard.csv``.

    Attributes:
        env: An id whose table is in the package.
        algorithm: The agent, and what sets these runs apart from others of it.
        decisions: That each run learned on; 0 of a control, which does not learn.
        seeds: How many runs.
        flops_ratio: On the test split, the policy's own FLOPs included; mean over seeds.
        worst_flops_ratio: The highest of a seed.
        quality_difference: Against dense, mean over seeds.
        worst_difference: Of the seed that loses most.
        worst_low: The lower end of that seed's 95% interval.
        worst_high: The upper end.
        verdict: Whether the quality is kept, at the env's epsilon.
        regret_static: How much less mean reward than the one mask that is best for the test split; negative: more.
        regret_oracle: How much less mean reward than the best mask of each instance.
        table: Hash of the table.
        versions: Of sd_gym and the libraries that learned.
        code: Where the agent's code is, such as a commit; empty: in sd_gym.
        who: Who submitted it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str
    algorithm: str = Field(min_length=1)
    decisions: int = Field(ge=0)
    seeds: int = Field(ge=1)
    flops_ratio: float = Field(ge=0)
    worst_flops_ratio: float = Field(ge=0)
    quality_difference: float = Field(allow_inf_nan=False)
    worst_difference: float = Field(allow_inf_nan=False)
    worst_low: float = Field(allow_inf_nan=False)
    worst_high: float = Field(allow_inf_nan=False)
    verdict: str = Field(min_length=1)
    regret_static: float = Field(allow_inf_nan=False)
    regret_oracle: float = Field(ge=0)
    table: str = Field(min_length=1)
    versions: str
    code: str
    who: str = Field(min_length=1)

    @property
    def same(self) -> tuple[Any, ...]:
        """What a later entry replaces."""
        return self.env, self.algorithm, self.decisions, self.code, self.who

    @property
    def rank(self) -> tuple[Any, ...]:
        """Quality first, then FLOPs."""
        return self.env, self.verdict != Verdict.KEPT, self.flops_ratio, self.same


def entries(folders: Iterable[str | Path], who: str, code: str = "") -> list[Entry]:
    """Play runs again, and say in an entry an env and agent what they reached.

    Args:
        folders: Of runs on envs whose tables are in the package.
        who: Who submits them.
        code: Where the agent's code is; empty: in sd_gym.

    Raises:
        FileNotFoundError: If no folder holds a finished run, or an env's table is not there.
        ReplayError: If a run says something else than what its decisions give.
        ValueError: If a run is of another env, another table or another epsilon, or what it holds is damaged.

    Warns:
        UserWarning: As ``compare``.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for folder in finished_runs(folders):
        run = read_run(folder)
        _check_settled(run)
        replay(folder)
        groups.setdefault((run.config["env"], agent_of(run.config)), []).append(run)
    return [
        _entry(name, runs, who, code)
        for (_, agent), of_agent in sorted(groups.items())
        for name, runs in alike(agent, of_agent)
    ]


def table_hash(folder: Path) -> str:
    """A hash of what is in a table: its masks, outcomes and observations."""
    digest = hashlib.blake2b(digest_size=8)
    files = {*folder.glob(CODEBOOK), *folder.glob("*.safetensors")} - {folder / LEAVING}
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def read_leaderboard(file: Path) -> list[Entry]:
    """The entries of a ``leaderboard.csv``.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a line is no entry; the message says which.
    """
    with file.open(encoding="utf-8", newline="") as text:
        lines = csv.DictReader(text)
        found = []
        for line in lines:
            try:
                found.append(Entry.model_validate(line))
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ValueError(f"{file}, line {lines.line_num}: {where}: {first['msg']}") from error
    return found


def add(file: Path, new: Sequence[Entry]) -> None:
    """Write entries to a ``leaderboard.csv``, best first; a later one of the same agent, code and person replaces one.

    Raises:
        ValueError: If the file is there, and damaged.
    """
    there = read_leaderboard(file) if file.exists() else []
    merged = {one.same: one for one in [*there, *new]}
    write_text(file, as_csv(sorted(merged.values(), key=lambda one: one.rank)))


def as_csv(rows: Iterable[Entry]) -> str:
    """The text of a ``leaderboard.csv``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Entry.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return text.getvalue()


def _check_settled(run: Run) -> None:
    """Raise ``ValueError`` if a run is not on an env of the leaderboard as the package has it."""
    env = run.config["env"]
    if env not in shipped_tables():
        raise ValueError(
            f"{run.folder} is of {env}, which has no table in the package; the leaderboard is of "
            f"{', '.join(shipped_tables())}"
        )
    ours, theirs = spelled(load_config(config_of(env), {}).model_dump()), spelled(run.env.model_dump())
    for key in SETTLED:
        if (came := theirs[key]) != ours[key]:
            raise ValueError(f"{run.folder}: the leaderboard has {key} {ours[key]!r} of {env}, got {came!r}")


def _entry(name: str, runs: list[Run], who: str, code: str) -> Entry:
    """What runs of one agent reached; the numbers are rounded to what a reader compares."""
    results = [run.result for run in runs]
    core = shared_core(load_config(config_of(runs[0].config["env"]), {}))
    split = core.split("test")
    lost = fmean(_regret(core, run) for run in runs)
    worst = min(results, key=lambda result: result["quality_difference"])
    low, high = worst["quality_difference_interval"]
    flops = [result["flops_ratio_with_policy"] for result in results]
    numbers = {
        "flops_ratio": fmean(flops),
        "worst_flops_ratio": max(flops),
        "quality_difference": fmean(result["quality_difference"] for result in results),
        "worst_difference": worst["quality_difference"],
        "worst_low": low,
        "worst_high": high,
        "regret_static": lost - static_regret(split),
        "regret_oracle": lost,
    }
    return Entry(
        env=runs[0].config["env"],
        algorithm=name,
        decisions=_learned_on(runs[0].config),
        seeds=len(runs),
        verdict=_verdict([result["verdict"] for result in results]),
        table=table_hash(table_folder(core.config.table)),
        versions=_versions(runs[0].config),
        code=code,
        who=who,
        **{key: round(value, 5) for key, value in numbers.items()},
    )


def _regret(core: TableCore, run: Run) -> float:
    recorded = read_instances(run.folder / "instances.csv", core.decision_nvec)
    return float(regret(core.split("test"), lambda seen: core.numbered(recorded.decisions)).mean())


def _learned_on(config: dict[str, Any]) -> int:
    """Decisions that a run learned on."""
    return (config.get("steps") or 0) if config["algo"].removeprefix(BLIND) in LEARNING else 0


def _verdict(verdicts: list[str]) -> str:
    """Of all seeds, if they agree; else how many of them keep the quality."""
    if len(set(verdicts)) == 1:
        return str(verdicts[0])
    return f"{Verdict.KEPT} in {verdicts.count(Verdict.KEPT)} of {len(verdicts)}"


def _versions(config: dict[str, Any]) -> str:
    known = config.get("versions", {})
    return ", ".join(f"{name} {known[name]}" for name in ("sd-gym", "stable-baselines3", "torch") if name in known)
