"""Commands for many runs: compare, report and tune."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from sd_gym.cli import terminal
from sd_gym.cli.terminal import Confidence, Imports, Ray, Settings


def compare(
    what: Annotated[list[str], Argument(metavar="ENV...|RUN...", help="Env ids to train on, or folders of runs.")],
    algos: Annotated[
        str, Option(metavar="NAME,...", help="With envs: agents to train; see sd-gym train --help.")
    ] = "ppo,a2c,reinforce",
    controls: Annotated[bool, Option(help="With envs: also train the controls and a blind first agent.")] = True,
    seeds: Annotated[int, Option(min=1, help="With envs: seeds per agent.")] = 10,
    steps: Annotated[int, Option(min=1, help="With envs: decisions to learn from.")] = 50_000,
    jobs: Annotated[int, Option(min=1, help="With envs: processes, of one thread each.")] = 1,
    ray: Annotated[
        str | None, Option(metavar="ADDRESS", help="With envs: a Ray cluster that can access OUTPUT.")
    ] = None,
    output: Annotated[Path, Option(help="With envs: folder of the runs, OUTPUT/ENV/ALGO-SEED.")] = Path("runs/compare"),
    confidence: Confidence = 0.95,
    set_: Settings = [],
    report: Annotated[Path | None, Option(help="Also write this page, as sd-gym report does.")] = None,
    markdown: Annotated[bool, Option(help="Print a Markdown table.")] = False,
    imports: Imports = [],
) -> None:
    """Compare agents: one row per env and agent, with means over seeds and the worst seed in brackets.

    With envs, all agents and controls are trained first, with the same seeds; NAME-from-OTHER starts from the run of
    OTHER. Repeating the command keeps finished runs, resumes interrupted runs and retries failed runs. The exit code is
    1 if a run failed.

    Example: `sd-gym compare SD/Classification-Mini-v0 --algos ppo,a2c --seeds 5 --jobs 2 --report report.html`
    """
    imported = terminal.import_all(imports)
    from sd_gym.registration import all_ids, plain_id
    from sd_gym.registry import UnknownNameError, unknown

    folders, failed = [Path(name) for name in what], []
    with terminal.errors_as_lines():
        for name in what:
            if plain_id(name) not in all_ids() and not Path(name).exists():
                raise UnknownNameError(f"no folder {name!r}, and {unknown('env', name, all_ids())}")
    if any(plain_id(name) in all_ids() for name in what):
        with terminal.errors_as_lines():
            from sd_gym.agents.experiment.comparison_plan import plan_comparison

            runs = plan_comparison(
                what,
                algos.split(","),
                controls=controls,
                seeds=seeds,
                steps=steps,
                output=output,
                settings=terminal.settings_of(set_),
                confidence=confidence,
            )
            folders, failed = _trained(runs, jobs, ray, imported)
    if folders:
        with terminal.errors_as_lines(), terminal.warnings_as_lines():
            _print_comparison(folders, as_markdown=markdown)
            if report is not None:
                _write_report(folders, report)
    for status in failed:
        terminal.say(f"failed: {status.run.folder}: {status.message}", "red")
        terminal.say(f"  again: this command; or alone: {status.run.command(imported)}")
    if failed:
        raise typer.Exit(1)


def _trained(runs: list[Any], jobs: int, ray: str | None, imports: list[str]) -> tuple[list[Path], list[Any]]:
    """Train planned runs and show progress; returns the folders of finished runs, and the failed runs."""
    from sd_gym.agents.experiment.parallel import UNFINISHED, RunStatus, train_many

    with terminal.progress_bar() as progress:
        all_runs, bars = progress.add_task("runs", total=len(runs), figures=""), {}

        def on_status(status: RunStatus) -> None:
            folder = status.run.folder
            name = f"{folder.parent.name}/{folder.name}"
            if status.state == "begun":
                bars[folder] = progress.add_task(name, total=None, figures="")
            elif status.state in UNFINISHED:
                total = status.run.steps if status.state == "learning" else None
                progress.update(bars[folder], completed=status.steps, total=total, figures=status.state)
            else:
                progress.advance(all_runs)
                if folder in bars:
                    progress.remove_task(bars.pop(folder))
                if status.state != "kept":
                    terminal.say(f"{name}: {status.state}{f' ({status.message})' if status.message else ''}")

        statuses = train_many(runs, jobs=jobs, ray=ray, imports=imports, on_status=on_status)
    finished = [status.run.folder for status in statuses if status.state in ("kept", "finished")]
    return finished, [status for status in statuses if status.state == "failed"]


def _print_comparison(folders: list[Path], *, as_markdown: bool) -> None:
    from sd_gym.agents.report import compare as results
    from sd_gym.agents.report.terminal import comparison_tables, fit

    rows = [results.cells(row) for row in results.compare(folders)]
    if as_markdown:
        print(results.markdown(results.COLUMNS, rows))
    else:
        for table in comparison_tables(rows):
            terminal.console.print(fit(table, terminal.console), crop=False)  # a file has all columns


def report(
    runs: Annotated[list[Path], Argument(help="Run folders, or folders of runs; others are ignored.")],
    output: Annotated[Path, Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    also: Annotated[bool, Option(help="Also write Markdown, a CSV file of all runs, and pictures as PNG.")] = False,
) -> None:
    """Write one page about runs: verdict, fronts, curves, skipped sublayers, tables, and how to reproduce them.

    It needs no network, backbone, data or --import.

    Example: `sd-gym report runs/* -o report.html`
    """
    with terminal.errors_as_lines(), terminal.warnings_as_lines():
        _write_report(runs, output, also)


def _write_report(runs: list[Path], output: Path, also: bool = False) -> None:
    with terminal.status("reading"):
        from sd_gym.agents.report.page import write_report

        written = write_report(runs, output, also=also)
    for file in written:
        terminal.print_line(str(file))


def tune(
    env: Annotated[str, Argument(help="Env id.")],
    algo: Annotated[str, Option(help="An agent that learns.")] = "ppo",
    trials: Annotated[int, Option(min=1, help="Total, including trials that the folder already has.")] = 20,
    seeds: Annotated[int, Option(min=1, help="Runs per trial.")] = 1,
    steps: Annotated[int, Option(min=1, help="Decisions to learn from, per run.")] = 20_000,
    jobs: Annotated[int, Option(min=1, help="Processes, of one thread each, for several trials at once.")] = 1,
    ray: Ray = None,
    output: Annotated[Path | None, Option(help="Folder of the study [default: runs/tune/TASK-ALGO].")] = None,
    confidence: Confidence = 0.95,
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Search an agent's settings with Optuna: quality kept on validation first, then fewer FLOPs.

    It prints the best settings as options of sd-gym train, with a confidence that allows for the number of trials: all
    have seen the rows of the guarantee. Settings given by --set are not searched. Repeating the command resumes the
    search, also with more trials, and retries failed trials. The exit code is 1 if a trial failed.

    Example: `sd-gym tune SD/Classification-Mini-v0 --algo a2c --trials 30 --seeds 2`
    """
    imported = terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.progress_bar() as progress:
        bar, failed = progress.add_task("trials", total=trials, figures=""), list[str]()
        from sd_gym.agents.experiment.comparison_plan import PlannedRun
        from sd_gym.agents.experiment.run import default_folder
        from sd_gym.agents.experiment.tune import TrialResult
        from sd_gym.agents.experiment.tune import tune as search
        from sd_gym.agents.runs.verdict import CONFIDENCE
        from sd_gym.envs.config import read_yaml

        def on_trial(trial: TrialResult) -> None:
            progress.update(bar, completed=min(trial.number + 1, trials))
            score = trial.message if trial.score is None else f"{trial.score:.4f}"
            failed.extend([str(trial.number)] * (trial.score is None))
            settings = ", ".join(f"{key} {value}" for key, value in trial.settings.items())
            terminal.say(f"trial {trial.number}: {settings}: {score}")

        settings = terminal.settings_of(set_, call=search)
        folder = output or Path("runs/tune") / default_folder(env, algo, 0).name.removesuffix("-0")
        file = search(
            env,
            algo,
            folder,
            trials=trials,
            seeds=seeds,
            steps=steps,
            confidence=confidence,
            jobs=jobs,
            ray=ray,
            imports=imported,
            on_trial=on_trial,
            **settings,
        )
    terminal.print_line(file.read_text(encoding="utf-8"))
    found = read_yaml(file)
    best = PlannedRun(env, algo, folder / "best", steps, 0, settings, found.pop("confidence", CONFIDENCE))
    best.settings.update(found)
    terminal.print_line(f"Settings: {file}; {best.command(imported)}")
    if failed:
        terminal.say(f"failed trials: {', '.join(failed)}; again: this command", "red")
        raise typer.Exit(1)
