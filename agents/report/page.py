"""One self-contained page about runs, and the same as Markdown, CSV and PNG."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, Template
from matplotlib.figure import Figure
from sd_gym.agents.report import panels
from sd_gym.agents.report.collect import Task, collect, strips
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.report.style import Look, as_svg, figure, looks, style, write_png
from sd_gym.agents.report.words import (
    Table,
    everywhere,
    levels_table,
    overall_tables,
    overall_words,
    reproduction_table,
    results_table,
    verdict_words,
    versions_table,
)
from sd_gym.agents.runs.statistics import performance_profile

from sd_gym.files import write_text

THRESHOLDS = np.linspace(0, 1, 101)
MOST_LEVEL_PICTURES = 6  # of an env: the first agents
RUN_COLUMNS = ["env", "agent", "seed", "steps", "quality", "quality_ref", "quality_difference", "low", "high"]
RUN_COLUMNS += ["flops_ratio_with_policy", "quality_kept", "verdict", "instances", "epsilon", "folder"]


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        name: Of a file, without its ending.
        caption: What is seen.
        figure: To be written as PNG.
    """

    name: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> str:
        """As an element of the page."""
        return as_svg(self.figure, self.name, self.caption)


@dataclass(frozen=True)
class Section:
    """What the report says of one task."""

    name: str
    words: list[str]
    results: Table
    levels: Table
    runs: Table
    pictures: list[Picture]


@dataclass(frozen=True)
class Overall:
    """What the report says over all tasks."""

    words: list[str]
    tables: list[Table]
    pictures: list[Picture]


def write_report(folders: Iterable[str | Path], output: str | Path, *, also: bool = False) -> list[Path]:
    """Write a page about runs: ``sd-gym report``.

    It needs neither their backbones nor their data, and agents of one's own need not be known.

    Args:
        folders: Of runs, and of what ``sd_gym.evaluate`` wrote.
        output: The page, an HTML file.
        also: Whether to write the same beside it: a Markdown file, a CSV file with a line a run, and PNG files.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If what one holds is damaged.

    Warns:
        UserWarning: If folders hold none, or one is given twice.
    """
    output = Path(output)
    tasks = collect(folders)
    agents = [one for task in tasks for one in task.agents]
    look_of = looks(
        sorted({one.name for one in agents if not one.is_control}),
        sorted({one.name for one in agents if one.is_control}),
    )
    with style():
        sections = [_section(number, task, look_of) for number, task in enumerate(tasks, start=1)]
        overall = _overall(tasks, look_of)
        output.parent.mkdir(parents=True, exist_ok=True)
        said = {
            "title": "What was learned not to compute",
            "summary": _counted(sum(len(one.runs) for one in agents), len(tasks)),
            "sections": sections,
            "overall": overall,
            "versions": versions_table(tasks),
        }
        write_text(output, _template().render(said))
        return [output, *(_beside(output, tasks, said) if also else [])]


def _counted(runs: int, envs: int) -> str:
    return f"{runs:,} run{'s' if runs > 1 else ''} on {envs} env{'s' if envs > 1 else ''}."


def _section(number: int, task: Task, look_of: dict[str, Look]) -> Section:
    pictures = [*_main_pictures(f"{number:02d}", task, look_of), *_level_pictures(f"{number:02d}", task)]
    tables = results_table(task), levels_table(task), reproduction_table(task)
    return Section(task.name, verdict_words(task), *tables, pictures)


def _main_pictures(name: str, task: Task, look_of: dict[str, Look]) -> list[Picture]:
    plane = figure(3.9)
    panels.plane(plane.subplots(), {one.name: one.points for one in task.agents}, look_of, task.epsilon)
    caption = (
        "Quality and FLOPs on the test split: a filled marker is a run's selected policy, a hollow one what learning "
    )
    found = [Picture(f"{name}-plane", f"{caption}had ended with before selection.", plane)]
    histories = {one.name: one.histories for one in task.agents if one.histories}
    if histories:
        curves = figure(4.2)
        panels.curves(*curves.subplots(2, 1, sharex=True), histories, look_of, task.epsilon)
        caption = "Learning: what validation has seen, interquartile means over runs with 95% intervals."
        found.append(Picture(f"{name}-curves", caption, curves))
    shown = next(iter(task.learned), task.agents[0])
    if chosen := strips(shown.middle):
        made = figure(1.3 + 0.2 * len(chosen))
        panels.strips(made.subplots(), chosen, task.switches)
        caption = (
            f"Where the compute went for single test instances, {shown.name}, seed {shown.middle.seed}: a cell a "
            "switch, in the order of execution; behind it the FLOPs. Lost: more quality than may be lost on average."
        )
        found.append(Picture(f"{name}-instances", caption, made))
    return found


def _level_pictures(name: str, task: Task) -> list[Picture]:
    found = []
    for number, one in enumerate(task.agents[:MOST_LEVEL_PICTURES] if task.switches else []):
        made = figure(1.4 + 0.15 * len(task.switches))
        panels.skip_rates(made.subplots(), one.levels, task.switches)
        caption = f"{one.name}: skip rate of each switch against difficulty, mean over {len(one.runs)} runs."
        found.append(Picture(f"{name}-skipped-{number}", caption, made))
    return found


def _overall(tasks: Sequence[Task], look_of: dict[str, Look]) -> Overall | None:
    """``None`` where no agent has runs on all tasks."""
    shared = everywhere(tasks)
    if not shared:
        return None
    made = figure(3.4)
    found = {name: performance_profile([one.score for one in agents], THRESHOLDS) for name, agents in shared.items()}
    panels.profiles(made.subplots(), found, look_of, THRESHOLDS)
    caption = "Performance profiles: how many runs save at least so much with the quality kept, over all envs."
    return Overall(overall_words(tasks), overall_tables(tasks), [Picture("00-profiles", caption, made)])


def _beside(output: Path, tasks: Sequence[Task], said: dict[str, Any]) -> list[Path]:
    """The same as Markdown, CSV and PNG."""
    pictures = output.with_suffix("") / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    written = [output.with_suffix(".md"), output.with_suffix(".csv")]
    write_text(written[0], _as_markdown(said, f"{output.stem}/pictures"))
    write_text(written[1], _as_csv(tasks))
    everything = [*(said["overall"].pictures if said["overall"] else []), *_all_pictures(said["sections"])]
    for picture in everything:
        written.append(pictures / f"{picture.name}.png")
        write_png(picture.figure, written[-1])
    return written


def _all_pictures(sections: Sequence[Section]) -> list[Picture]:
    return [picture for section in sections for picture in section.pictures]


def _as_markdown(said: dict[str, Any], pictures: str) -> str:
    def shown(table: Table) -> str:
        return f"**{table.title}**\n\n{markdown(table.columns, table.rows)}"

    def drawn(found: Sequence[Picture]) -> list[str]:
        return [f"![{one.caption}]({pictures}/{one.name}.png)" for one in found]

    parts = [f"# {said['title']}", said["summary"], *(said["overall"].words if said["overall"] else [])]
    for section in said["sections"]:
        parts += [f"## {section.name}", *section.words]
    if overall := said["overall"]:
        parts += ["## Over all envs", *map(shown, overall.tables), *drawn(overall.pictures)]
    for section in said["sections"]:
        parts += [
            f"## {section.name}: results",
            shown(section.results),
            *drawn(section.pictures),
            shown(section.levels),
        ]
    parts += ["## To reproduce it", shown(said["versions"]), *(shown(section.runs) for section in said["sections"])]
    return "\n\n".join(parts) + "\n"


def _as_csv(tasks: Sequence[Task]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(RUN_COLUMNS)
    for task in tasks:
        for one in task.agents:
            for run in one.runs:
                low, high = run.result["quality_difference_interval"]
                known = run.config | run.result | {"low": low, "high": high, "epsilon": task.epsilon}
                known |= {"env": task.name, "agent": one.name, "folder": str(run.folder)}
                writer.writerow([known.get(column) for column in RUN_COLUMNS])
    return text.getvalue()


@cache
def _template() -> Template:
    source = files("sd_gym.agents.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True).from_string(source)
