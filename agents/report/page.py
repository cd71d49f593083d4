"""A self-contained page about runs, and the same as Markdown, CSV and PNG."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, Template
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sd_gym.agents.drawing.run_picture import plot_skip_rates
from sd_gym.agents.drawing.style import AgentStyle, agent_styles, as_svg, figure, style, write_png
from sd_gym.agents.report import charts, text
from sd_gym.agents.report.collect import AgentRuns, EnvRuns, collect, example_decisions
from sd_gym.agents.report.compare import markdown
from sd_gym.agents.runs.statistics import performance_profile

from sd_gym.files import write_text

THRESHOLDS = np.linspace(0, 1, 101)
MOST_LEVEL_PICTURES = 6  # per env: the first agents
RUN_COLUMNS = ["env", "agent", "seed", "steps", "quality", "quality_ref", "quality_difference", "low", "high"]
RUN_COLUMNS += ["flops_ratio_with_policy", "return", "regret", "learned_quality_difference"]
RUN_COLUMNS += ["learned_flops_ratio_with_policy", "learned_return", "learned_regret"]
RUN_COLUMNS += ["quality_kept", "verdict", "instances", "epsilon", "folder"]


@dataclass(frozen=True)
class Picture:
    """A picture of the report: the name of its file without suffix, its caption, and the figure."""

    name: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> str:
        """As an element of the page."""
        return as_svg(self.figure, self.name, self.caption)


def write_report(folders: Iterable[str | Path], output: str | Path, *, also: bool = False) -> list[Path]:
    """Write a page about runs: ``sd-gym report``.

    It needs neither backbones nor data, and agents of your own need not be registered.

    Args:
        folders: Run folders, folders of runs, and results of ``sd_gym.evaluate``.
        output: The page, an HTML file.
        also: Whether to write also a Markdown file, a CSV file with a line per run, and PNG files.

    Returns:
        The written files.

    Raises:
        FileNotFoundError: If no folder holds a finished run.
        ValueError: If the output is no ``.html`` file, or a file is damaged.

    Warns:
        UserWarning: If a folder holds no finished run, or a run is given twice.
    """
    output = Path(output)
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"expected a page with the suffix .html, got {output}")
    envs = collect(folders)
    agents = [agent for env in envs for agent in env.agents]
    names = [sorted({agent.name for agent in agents if agent.is_control == control}) for control in (False, True)]
    styles, runs = agent_styles(*names), sum(len(agent.runs) for agent in agents)
    with style():
        report = {
            "title": "Results of skipping policies",
            "summary": f"{runs:,} run{'s' if runs > 1 else ''} on {len(envs)} env{'s' if len(envs) > 1 else ''}.",
            "overall": _overall(envs, styles),
            "sections": [_section(f"{number:02d}", env, styles) for number, env in enumerate(envs, start=1)],
            "versions": text.versions_table(envs),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, _template("report.html.jinja").render(report))
        return [output, *(_write_beside(output, envs, report) if also else [])]


def _section(number: str, env: EnvRuns, styles: dict[str, AgentStyle]) -> dict[str, Any]:
    return {
        "name": env.name,
        "sentences": text.verdict_sentences(env),
        "results": text.results_table(env),
        "levels": text.levels_table(env),
        "runs": text.reproduction_table(env),
        "pictures": [*_main_pictures(number, env, styles), *_level_pictures(number, env)],
    }


def _main_pictures(number: str, env: EnvRuns, styles: dict[str, AgentStyle]) -> list[Picture]:
    results = figure(3.9)
    charts.draw_results(results.subplots(), {agent.name: _points(agent) for agent in env.agents}, styles, env.epsilon)
    caption = "Quality and FLOPs on the test split. Filled: policies as selected. Hollow: as learned, before selection."
    pictures = [Picture(f"{number}-plane", caption, results)]
    histories: dict[str, list[list[dict[str, Any]]]] = {}
    for agent, run in env.runs:
        if len(run.result["history"]) > 1:  # it learned step by step
            histories.setdefault(agent.name, []).append(run.result["history"])
    if histories:
        curves = figure(4.2)
        quality, flops = curves.subplots(2, 1, sharex=True)
        charts.draw_curves(quality, flops, histories, styles, env.epsilon)
        caption = "Learning: results on validation, interquartile means over runs with 95% intervals."
        pictures.append(Picture(f"{number}-curves", caption, curves))
    best = env.best or env.agents[0]
    if decisions := example_decisions(best.median_run):
        instances = figure(1.3 + 0.2 * len(decisions))
        charts.draw_decisions(instances.subplots(), decisions, env.switches)
        caption = (
            f"Decisions on single test instances, {best.name}, seed {text.cell(best.median_run.seed)}: a cell per "
            "switch, in the order of execution, and the FLOPs. Lost: more than the allowed mean loss."
        )
        pictures.append(Picture(f"{number}-instances", caption, instances))
    return pictures


def _points(agent: AgentRuns) -> list[NDArray]:
    keys = ("quality_difference", "flops_ratio_with_policy")
    return [100 * agent.values(key, as_learned=learned) for learned in (False, True) for key in keys]


def _level_pictures(number: str, env: EnvRuns) -> list[Picture]:
    pictures = []
    for n, agent in enumerate(env.agents[:MOST_LEVEL_PICTURES] if env.switches else []):
        caption = f"{agent.name}: how often each switch runs by difficulty, mean over its runs ({len(agent.runs)})."
        picture = plot_skip_rates(agent.levels, env.switches)
        pictures.append(Picture(f"{number}-skipped-{n}", caption, picture))
    return pictures


def _overall(envs: Sequence[EnvRuns], styles: dict[str, AgentStyle]) -> dict[str, Any] | None:
    """The part of the report over all envs; ``None`` if no agent has runs on all envs."""
    shared = text.agents_on_all(envs)
    if not shared:
        return None
    picture = figure(3.4)
    scores = {name: [agent.score for agent in agents] for name, agents in shared.items()}
    profiles = {name: performance_profile(of_agent, THRESHOLDS) for name, of_agent in scores.items()}
    charts.draw_profiles(picture.subplots(), profiles, styles, THRESHOLDS)
    caption = "Performance profiles: the share of runs with at least these savings and the quality kept, over all envs."
    return {
        "sentences": text.overall_sentences(envs),
        "tables": text.overall_tables(envs),
        "pictures": [Picture("00-profiles", caption, picture)],
    }


def _write_beside(output: Path, envs: Sequence[EnvRuns], report: dict[str, Any]) -> list[Path]:
    """Write the same as Markdown, CSV and PNG; returns the files."""
    folder = output.with_suffix("") / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    written = [output.with_suffix(".md"), output.with_suffix(".csv")]
    page = _template("report.md.jinja").render(report, folder=quote(f"{output.stem}/pictures"))
    write_text(written[0], page.rstrip() + "\n")
    write_text(written[1], _as_csv(envs))
    parts = [*([report["overall"]] if report["overall"] else []), *report["sections"]]
    for picture in (picture for part in parts for picture in part["pictures"]):
        written.append(folder / f"{picture.name}.png")
        write_png(picture.figure, written[-1])
    return written


def _as_csv(envs: Sequence[EnvRuns]) -> str:
    lines = io.StringIO()
    writer = csv.DictWriter(lines, RUN_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for env in envs:
        for agent, run in env.runs:
            low, high = run.result["quality_difference_interval"]
            values = run.config | run.result | {"low": low, "high": high, "epsilon": env.epsilon}
            values |= {f"learned_{key}": value for key, value in (run.result["last_policy"] or {}).items()}
            writer.writerow({**values, "env": env.name, "agent": agent.name, "folder": str(run.folder)})
    return lines.getvalue()


@cache
def _template(name: str) -> Template:
    source = files("sd_gym.agents.report").joinpath(name).read_text(encoding="utf-8")
    environment = Environment(autoescape=".html" in name, trim_blocks=True)
    environment.filters["markdown"] = lambda table: markdown(table.columns, table.rows)
    return environment.from_string(source)
