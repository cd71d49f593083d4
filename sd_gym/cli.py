"""The command ``sd-gym``; the only file that knows every room."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from sd_gym.errors import quiet, short

app = typer.Typer(
    help="Learn what a transformer need not compute. Start with: sd-gym envs",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
# What is printed is text: brackets and colons in names, paths and messages stand for themselves.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)
ADVICE = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "free some space on the disk",
    errno.EFBIG: "choose a disk that takes larger files",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENOTDIR: "choose a folder: what was given is a file, or lies in one",
    errno.EISDIR: "choose a file: what was given is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


PresetName = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE|none",
        help="Settings of agents that were measured to be better than their defaults; --set wins. env: those that the "
        "env has by itself, if any; refine: to go on from a run (start=RUN); a YAML file such as sd-gym tune writes.",
    ),
]
Imports = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE_OR_FILE",
        help="Import a module or .py file of yours first: what it registers is known then.",
    ),
]


def _import(names: list[str]) -> list[str]:
    """Import a user's modules; returns their names, with absolute paths."""
    from sd_gym.registry import import_own

    with _errors_as_lines():
        return [import_own(name) for name in names]


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """What a user can do something about becomes a line and the exit code 2."""
    threading.excepthook = _thread_failed
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(error)
    except Exception as error:
        if type(error).__module__.startswith("gymnasium.error"):
            _fail(error)
        raise


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; the disk's error is told here too, where it is met."""
    if issubclass(failure.exc_type, OSError):
        errors.print(_as_line(failure.exc_value), soft_wrap=True)
    else:
        threading.__excepthook__(failure)


def _fail(error: Exception) -> None:
    errors.print(_as_line(error), soft_wrap=True)
    raise typer.Exit(2)


def _as_line(error: BaseException) -> Text:
    advice = ADVICE.get(getattr(error, "errno", None))
    said = " ".join(str(error).split()) + (f"; {advice}" if advice else "")
    # Half a character, as a damaged file may hold, cannot be printed.
    said = said.encode(errors="backslashreplace").decode()
    return Text.assemble((type(error).__name__, "bold red"), f": {said}")


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as noted:
        try:
            yield
        finally:
            for warning in noted:
                errors.print(str(warning.message), style="yellow", highlight=False, soft_wrap=True)


def _settings(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs, values read as YAML (numbers, booleans, lists, text).

    Raises:
        ValueError: If one is none.
    """
    from sd_gym.envs.config import parse_yaml

    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"--set: expected key=value, got {short(pair)}")
        settings[key] = parse_yaml(value, f"--set {short(pair)}")
    return settings


def _status(what: str) -> Status:
    quiet()
    return errors.status(what)


def _progress(visible: bool = True) -> Progress:
    quiet()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=errors,
        disable=not visible,
    )


@app.command()
def envs(imports: Imports = []) -> None:  # noqa: B006  (typer wants a list)
    """List the envs.

    Example: `sd-gym envs`
    """
    _import(imports)
    from sd_gym.envs.config import read_values
    from sd_gym.registration import config_files

    table = Table(title="sd_gym envs", box=SIMPLE_HEAD, padding=0)
    for column in ("id", "data set", "backbone"):
        table.add_column(column, overflow="fold")
    with _errors_as_lines():
        for file in config_files():
            values = read_values(file)
            tested = (values.get("splits") or {}).get("test", "test")
            data = f"{values.get('dataset') or 'yours'}{'' if tested == 'test' else f', tested on its {tested}'}"
            table.add_row(str(values.get("id")), data, str(values.get("backbone") or "yours"))
    console.print(table)


@app.command()
def train(
    env: Annotated[str, typer.Argument(help="Env id, such as SD/Classification-Mini-v0.")],
    algo: Annotated[
        str,
        typer.Option(
            help="ppo, a2c (the env's reward); ppo_lagrangian, a2c_lagrangian (a penalty that learns); ppo_lex, "
            "a2c_lex, reinforce (quality first); imitation (of a search); "
            "controls: static, every-other, early-exit, confidence, cascade, oracle, dense, random, hash; or, as "
            "blind-NAME, an agent that sees nothing; or your own, registered by what --import imports."
        ),
    ] = "ppo",
    steps: Annotated[int, typer.Option(min=1, help="Decisions to learn from.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Of the agent and of the instances drawn.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Run folder [default: runs/TASK-ALGO-SEED].")] = None,
    preset: PresetName = "env",
    strictness: Annotated[
        float,
        typer.Option(
            min=0,
            help="Standard errors of luck that validation has to leave room for, for a policy to be selected; lower it "
            "where the validation split is small.",
        ),
    ] = 1.645,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was cut off.")] = False,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a config key or a setting of the agent.")
    ] = [],  # noqa: B006  (typer wants a list)
    imports: Imports = [],  # noqa: B006
) -> None:
    """Train an agent on an env, then evaluate it on the test split.

    Examples:
    `sd-gym train SD/Classification-Mini-v0`

    `sd-gym train SD/Summarization-Mini-v0 --algo reinforce --seed 1 --set penalty=20 --set learning_rate=0.002`

    `sd-gym train SD/Classification-Custom-v0 --set dataset=reviews.jsonl --set backbone=my-model --algo a2c`

    A warm start, from what a search found:
    `sd-gym train SD/Classification-Mini-v0 --algo imitation --output runs/searched`, then
    `sd-gym train SD/Classification-Mini-v0 --algo ppo_lex --set start=runs/searched --preset refine`

    An agent of your own: `sd-gym train SD/Classification-Mini-v0 --import examples/own_agent.py --algo gradient`

    Watch the curves with `tensorboard --logdir runs`.
    """
    imported = _import(imports)
    with _errors_as_lines():
        settings = _settings(set_)
        with _progress() as progress:
            bar = progress.add_task("loading", total=steps, figures="")

            def on_progress(done: int, figures: dict[str, float]) -> None:
                shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
                if not figures:  # a search takes as many decisions as it takes
                    nonlocal bar
                    if progress.tasks[0].total is not None:
                        progress.remove_task(bar)
                        bar = progress.add_task("searching", total=None, figures="decisions scored")
                    progress.update(bar, completed=done)
                    return
                state = "learning" if done < steps else "evaluating"
                progress.update(bar, completed=min(done, steps), description=state, figures=shown)

            import sd_gym  # noqa: F401  (registers the ids)
            from sd_gym.agents.api import default_folder
            from sd_gym.agents.experiment.run import train as run_training
            from sd_gym.agents.presets import find_preset

            folder = output or default_folder(env, algo, seed)
            if chosen := find_preset(preset, env, algo):
                _say(f"Preset {chosen}")
            result = run_training(
                env,
                algo,
                folder,
                steps=steps,
                seed=seed,
                settings=settings,
                preset=preset,
                strictness=strictness,
                resume=resume,
                imports=imported,
                on_progress=on_progress,
            )
    _print_result(f"{env}, {algo}, seed {seed}", result)
    if result["artefact"] is None:
        console.print(
            "No artefact (skip_policy.json) was written: what decides here (at several stages, or by more than the "
            "pooled observation) cannot leave its env yet; sd-gym evaluate and compare take the run.",
            style="dim",
        )
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder that sd-gym train wrote.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    output: Annotated[
        Path | None, typer.Option(help="Folder to write the result, its table of instances and its picture to.")
    ] = None,
    imports: Imports = [],  # noqa: B006  (typer wants a list)
) -> None:
    """Evaluate a run's policy again, on any split.

    Example: `sd-gym evaluate runs/Classification-Mini-ppo-0 --split validation`
    """
    if split not in ("train", "validation", "test"):
        raise typer.BadParameter(f"expected train, validation or test, got {split!r}", param_hint="--split")
    _import(imports)
    from sd_gym.agents.api import evaluate as run_evaluation
    from sd_gym.agents.experiment.folder import read_description

    with _errors_as_lines(), _status("evaluating"):
        description = read_description(run)
        result = run_evaluation(description["env"], run, split, output)
    title = [description[key] for key in ("env", "algo")]
    _print_result(f"{', '.join(title)}, seed {description.get('seed')}", result)


@app.command()
def tabulate(
    env: Annotated[str, typer.Argument(metavar="ENV_OR_RUN", help="Env id, or the folder of a run.")],
    output: Annotated[Path, typer.Option(help="Folder to write the table to.")],
    decisions: Annotated[
        list[str],
        typer.Option(
            help="all; or, several times, random:N, path (searched greedily), codebook (the env's) and codebook:FILE "
            "[default: all where they are at most 4,096, else random:64]."
        ),
    ] = [],  # noqa: B006  (typer wants a list)
    instances: Annotated[int | None, typer.Option(min=1, help="So many of each split at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of random:N.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with a table that was cut off.")] = False,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a config key.")] = [],  # noqa: B006
    imports: Imports = [],  # noqa: B006
) -> None:
    """Compute once what decisions do to every instance of an env; SD/Table-v0 then looks it up in microseconds.

    Examples:
    `sd-gym tabulate SD/Classification-Mini-v0 --output table --decisions path --decisions random:64 --instances 2000`

    `sd-gym train SD/Table-v0 --set table=table --algo ppo --steps 200000`
    """
    _import(imports)
    with _errors_as_lines(), _progress() as progress:
        bar = progress.add_task("loading", total=None, figures="")
        from sd_gym.agents.tabulation import tabulate as write_table

        def on_progress(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, description="scoring", figures="decisions")

        said = write_table(
            env,
            output,
            decisions=decisions or None,
            instances=instances,
            seed=seed,
            resume=resume,
            on_progress=on_progress,
            **_settings(set_),
        )
    counts = ", ".join(f"{split['instances']} of {name}" for name, split in said["splits"].items())
    kind = f"{said['masks']} decisions ({said['chosen']})" if said["masks"] else "all decisions"
    size = sum(file.stat().st_size for file in output.iterdir())
    console.print(f"{kind} on instances: {counts}; {size / 2**20:.1f} MB", highlight=False, soft_wrap=True)
    console.print(f"Table: {output}", highlight=False, soft_wrap=True)


@app.command()
def run(
    policy: Annotated[str, typer.Argument(help="Run folder, saved policy, or id of one on the Hugging Face hub.")],
    source: Annotated[
        str, typer.Option("--input", help=".jsonl, .csv or .parquet file with the task's columns; -: JSON lines.")
    ],
    output: Annotated[Path, typer.Option(help="JSON lines to write, one a row, in the same order.")],
    backbone: Annotated[str | None, typer.Option(help="Where the backbone is [default: where it was].")] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Take the cheapest validated version that loses at most so much quality.")
    ] = None,
    max_flops: Annotated[
        float | None, typer.Option(help="Take the most cautious one that runs at most this share of the FLOPs.")
    ] = None,
    comparing: Annotated[
        bool, typer.Option("--compare", help="Run everything densely as well: time, agreement, and quality.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was cut off.")] = False,
    device: Annotated[str, typer.Option()] = "cpu",
    columns: Annotated[
        list[str], typer.Option("--column", metavar="FIELD=COLUMN", help="The column of a field: text=sentence.")
    ] = [],  # noqa: B006  (typer wants a list)
    imports: Imports = [],  # noqa: B006
) -> None:
    """Answer many inputs with a trained policy; rows of the same decision or length run together.

    A malformed line gets an "error" in its place and stops no other; the exit code is then 1.

    Examples:
    `sd-gym run runs/Summarization-Mini-ppo-0 --input documents.jsonl --output summaries.jsonl`

    `cat reviews.jsonl | sd-gym run runs/reviews --input - --output labels.jsonl --compare --column text=review`
    """
    _import(imports)
    with _errors_as_lines(), _progress() as progress:
        bar = progress.add_task("loading", total=None, figures="")
        from sd_gym.inference.bulk import run_file
        from sd_gym.inference.texts import load

        model = load(policy, backbone, device=device, max_loss=max_loss, max_flops=max_flops)

        def on_chunk(rows: int, bulk: Any) -> None:
            figures = f"{bulk.figures()['rows a second']} a second"
            progress.update(bar, completed=rows, description="answering", figures=figures)

        done = run_file(
            model,
            None if source == "-" else Path(source),
            output,
            resume=resume,
            compare=comparing,
            columns={str(field): str(column) for field, column in _settings(columns).items()},
            on_chunk=on_chunk,
        )
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, value in done.figures().items():
        table.add_row(name, value)
    console.print(table)
    console.print(f"Answers: {output}", highlight=False, soft_wrap=True)
    for line in done.malformed[:3]:
        errors.print(f"line {line.number}: {line.error}", style="yellow", highlight=False, soft_wrap=True)
    if done.malformed:
        errors.print(f"{len(done.malformed)} malformed lines; each has its error in the output", style="yellow")
        raise typer.Exit(1)


@app.command()
def reduce(
    run: Annotated[Path, typer.Argument(help="Run folder that sd-gym train wrote.")],
    output: Annotated[Path, typer.Option(help="Run folder to write.")],
    codebook: Annotated[int, typer.Option(min=1, help="Different decisions at most.")] = 8,
    imports: Imports = [],  # noqa: B006  (typer wants a list)
) -> None:
    """Have a run's policy decide among a few masks, so that inputs agree and run together.

    The masks are those of its decisions that serve the training inputs best; how boldly it decides among them is
    selected on the validation split anew. It becomes a run of its own, evaluated on the test split.

    Example: `sd-gym reduce runs/Summarization-Mini-ppo-0 --codebook 8 --output runs/reduced`
    """
    _import(imports)
    with _errors_as_lines(), _status("reducing"):
        from sd_gym.agents.experiment.run import reduce as reduce_run

        result = reduce_run(run, codebook, output)
    _print_result(f"{run}, a codebook of {codebook}", result)
    console.print(f"Run folder: {output}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="ENV...|RUN...",
            help="Env ids, to train what is missing first; or run folders (what is none is passed over).",
        ),
    ],
    algos: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="With envs: agents; NAME-from-OTHER goes on from the run of OTHER with the same seed, with the preset "
            "refine.",
        ),
    ] = "ppo,a2c,reinforce",
    controls: Annotated[
        bool,
        typer.Option(help="With envs: static, early-exit, random, hash, dense and the first agent that learns, blind."),
    ] = True,
    seeds: Annotated[int, typer.Option(min=1, help="With envs: seeds of each agent.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="With envs: decisions to learn from.")] = 50_000,
    jobs: Annotated[int, typer.Option(min=1, help="With envs: processes, which share the cores.")] = 1,
    output: Annotated[Path, typer.Option(help="With envs: the runs are OUTPUT/ENV/ALGO-SEED.")] = Path("runs/compare"),
    preset: PresetName = "env",
    strictness: Annotated[float, typer.Option(min=0, help="With envs: of selection, as of sd-gym train.")] = 1.645,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="KEY=VALUE", help="With envs: override a config key, or a setting of agents that have it."
        ),
    ] = [],  # noqa: B006  (typer wants a list)
    report: Annotated[Path | None, typer.Option(help="Page to write about the runs, as sd-gym report does.")] = None,
    fronts: Annotated[
        bool,
        typer.Option(
            help="How much more of the FLOPs each learned agent saves than static masks and blind agents at the same "
            "quality; policies are scored again, which takes minutes."
        ),
    ] = False,
    test_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="With --fronts: instances of the test split, for narrower intervals; generated data have as many as "
            "you like. Otherwise as in the runs.",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="With --fronts: PNG to write the fronts to, FLOPs against quality lost.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print a Markdown table.")] = False,
    imports: Imports = [],  # noqa: B006
) -> None:
    """Put agents side by side, one row an env and agent, means over seeds with the worst seed in brackets.

    Given envs, every agent and control is trained on them with the same seeds. The command can be given again: finished
    runs are kept, those that were cut off go on, those that failed are tried again. Exit code 1 if one failed.

    Examples:
    `sd-gym compare runs/*`

    `sd-gym compare SD/Classification-Mini-v0 --algos ppo,a2c --seeds 5 --steps 20000 --jobs 2 --report report.html`

    `sd-gym compare --fronts --picture fronts.png runs/static runs/blind runs/ppo-*`
    """
    imported = _import(imports)
    from sd_gym.registration import registered_ids

    folders, failed = [Path(name) for name in what], []
    if any(name in registered_ids() for name in what):
        with _errors_as_lines():
            from sd_gym.agents.experiment.plan import plan

            runs = plan(
                what,
                algos.split(","),
                controls=controls,
                seeds=seeds,
                steps=steps,
                output=output,
                settings=_settings(set_),
                preset=preset,
                strictness=strictness,
            )
            folders, failed = _trained(runs, jobs, imported)
    if folders:
        with _errors_as_lines(), _warnings_as_lines():
            _print_comparison(folders, fronts=fronts, test_size=test_size, picture=picture, as_markdown=markdown)
            if report is not None:
                _write_report(folders, report)
    for word in failed:
        _say(f"failed: {word.run.folder}: {word.message}", "red")
        _say(f"  again: this command; or alone: {word.run.command(imported)}")
    if failed:
        raise typer.Exit(1)


def _trained(runs: list[Any], jobs: int, imports: list[str]) -> tuple[list[Path], list[Any]]:
    """Train planned runs, and show how far they are; returns the folders of those that are there, and what failed."""
    from sd_gym.agents.experiment.many import GOING, Word, train_many

    presets = {f"{run.preset} for {run.algo}" for run in runs if run.preset not in ("env", "none")}
    for line in sorted(presets):
        _say(f"Preset {line}")
    with _progress() as progress:
        everything, bars = progress.add_task("runs", total=len(runs), figures=""), {}

        def on_word(word: Word) -> None:
            folder = word.run.folder
            name = f"{folder.parent.name}/{folder.name}"
            if word.state == "begun":
                bars[folder] = progress.add_task(name, total=None, figures="")
            elif word.state in GOING:
                total = word.run.steps if word.state == "learning" else None
                progress.update(bars[folder], completed=word.steps, total=total, figures=word.state)
            else:
                progress.advance(everything)
                if folder in bars:
                    progress.remove_task(bars.pop(folder))
                if word.state != "kept":
                    _say(f"{name}: {word.state}{f' ({word.message})' if word.message else ''}")

        words = train_many(runs, jobs=jobs, imports=imports, on_word=on_word)
    there = [word.run.folder for word in words if word.state in ("kept", "finished")]
    return there, [word for word in words if word.state == "failed"]


def _say(line: str, style: str | None = None) -> None:
    errors.print(line, style=style, highlight=False, soft_wrap=True)


def _print_comparison(
    folders: list[Path], *, fronts: bool, test_size: int | None, picture: Path | None, as_markdown: bool
) -> None:
    """Print the table of runs, or what they save at the same quality."""
    from sd_gym.agents.report import compare as results
    from sd_gym.agents.report.tables import of_comparison

    if fronts:
        from sd_gym.agents.report import plots, savings

        title, columns = "At the same quality, test split", savings.COLUMNS
        by = ["env", "points lost", "FLOPs of static / blind"]
        with _status("scoring"):
            found = savings.env_fronts(folders, test_size)
        rows = [row for one in found for row in savings.savings(one)]
        if picture is not None:
            plots.plot_fronts(found, picture)
    else:
        title, columns, by = "Runs on the test split", results.COLUMNS, ["env", "dense quality", "test rows"]
        rows = [results.cells(row) for row in results.compare(folders)]
    if as_markdown:
        print(results.markdown(columns, rows))
    else:
        console.print(*of_comparison(title, columns, rows, by), sep="\n")


@app.command()
def tune(
    env: Annotated[str, typer.Argument(help="Env id.")],
    algo: Annotated[str, typer.Option(help="An agent that learns.")] = "ppo",
    trials: Annotated[int, typer.Option(min=1, help="In all, with those that the folder holds.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each trial.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Decisions that each run learns from.")] = 20_000,
    output: Annotated[Path | None, typer.Option(help="Folder of the study [default: runs/tune/TASK-ALGO].")] = None,
    strictness: Annotated[float, typer.Option(min=0, help="Of selection, as of sd-gym train.")] = 1.645,
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; or set what is not to be searched."),
    ] = [],  # noqa: B006  (typer wants a list)
    imports: Imports = [],  # noqa: B006
) -> None:
    """Search an agent's settings with Optuna: quality kept on validation first, then fewer FLOPs.

    The best are written as a preset. The command can be given again, also with more trials: it goes on.

    Examples:
    `sd-gym tune SD/Classification-Mini-v0 --algo a2c --trials 30 --seeds 2`, then

    `sd-gym train SD/Classification-Mini-v0 --algo a2c --preset runs/tune/Classification-Mini-a2c/preset.yaml`
    """
    imported = _import(imports)
    with _errors_as_lines(), _progress() as progress:
        bar = progress.add_task("trials", total=trials, figures="")
        from sd_gym.agents.api import default_folder
        from sd_gym.agents.experiment.tune import Tried
        from sd_gym.agents.experiment.tune import tune as search

        def on_trial(tried: Tried) -> None:
            progress.update(bar, completed=min(tried.number + 1, trials))
            reached = tried.message if tried.score is None else f"{tried.score:.4f}"
            shown = ", ".join(f"{key} {value}" for key, value in tried.settings.items())
            _say(f"trial {tried.number}: {shown}: {reached}")

        folder = output or Path("runs/tune") / default_folder(env, algo, 0).name.removesuffix("-0")
        file = search(
            env,
            algo,
            folder,
            trials=trials,
            seeds=seeds,
            steps=steps,
            strictness=strictness,
            imports=imported,
            on_trial=on_trial,
            **_settings(set_),
        )
    console.print(file.read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    console.print(f"Preset: {file}", highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; what is none is passed over.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    also: Annotated[
        bool, typer.Option(help="Write the same beside it: Markdown, a CSV file of all runs, and the pictures as PNG.")
    ] = False,
) -> None:
    """Write one page about runs: the verdict in words, fronts, curves, what is skipped, tables, how to reproduce it.

    It needs no network, and neither backbone nor data; agents of your own need not be imported.

    Example: `sd-gym report runs/* -o report.html`
    """
    with _errors_as_lines(), _warnings_as_lines():
        _write_report(runs, output, also)


def _write_report(runs: list[Path], output: Path, also: bool = False) -> None:
    with _status("reading"):
        from sd_gym.agents.report.page import write_report

        written = write_report(runs, output, also=also)
    for file in written:
        console.print(str(file), highlight=False, soft_wrap=True)


@app.command()
def validate(
    what: Annotated[str, typer.Argument(metavar="RUN_OR_ENV", help="Folder of a finished run, or the id of an env.")],
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Of an env: override a key of its config.")
    ] = [],  # noqa: B006  (typer wants a list)
    imports: Imports = [],  # noqa: B006
) -> None:
    """Play a run's recorded decisions again and fail on any difference; or check an env before learning on it.

    Examples:
    `sd-gym validate runs/Classification-Mini-ppo-0`

    `sd-gym validate SD/Classification-Mini-v0`
    """
    _import(imports)
    with _errors_as_lines(), _status("playing again"):
        if Path(what).is_dir():
            from sd_gym.agents.experiment.replay import replay

            lines, failed = replay(Path(what)).words(), False
        else:
            from sd_gym.agents.experiment.env_check import check_env

            checks = check_env(what, _settings(set_))
            lines, failed = [check.words() for check in checks], not all(check.passed for check in checks)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def prepare(
    output: Annotated[Path, typer.Option(help="Folder to write the prepared model to.")],
    backbone: Annotated[
        str | None, typer.Option(help="Local folder or hub id of a supported model, such as a BERT.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Run folder: tune the run's backbone further, on the run's data, under the policy it learned."
        ),
    ] = None,
    env: Annotated[
        str, typer.Option(help="Env whose task and data it is prepared for.")
    ] = "SD/Classification-Custom-v0",
    dataset: Annotated[str | None, typer.Option(help="The env's data set: a file, a folder, or a hub id.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1500,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    learning_rate: Annotated[float, typer.Option()] = 5e-5,
    max_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Highest skip rate during preparation; 0: fine-tune densely, as usual.")
    ] = 0.6,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="End after so many validations (of ten) without a better quality [default: never]."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest input, in tokens [default: the env's].")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint of a preparation that was cut off.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the env's config.")
    ] = [],  # noqa: B006  (typer wants a list)
    imports: Imports = [],  # noqa: B006
) -> None:
    """Fine-tune a backbone so that it bears skipping.

    Half of each pass runs densely under the task's loss, half under random decisions with the dense output as target.
    The weights with the best validation quality under random decisions are kept. Curves are in the output folder, for
    `tensorboard --logdir`, and a picture of quality against skip rate.

    Examples:
    `sd-gym prepare --backbone ./minilm --dataset ./sst2 --output ./minilm-sst2 --steps 2000`

    `sd-gym prepare --backbone ./bart --env SD/Summarization-Custom-v0 --dataset ./mails --output ./bart-mails`

    `sd-gym prepare --backbone ./minilm --env SD/QuestionAnswering-SQuAD-v0 --output ./minilm-squad`

    Backbone and policy tuned to each other, alternating (--set takes other data than the run's own):
    `sd-gym prepare --policy runs/first --output tuned`, then
    `sd-gym train SD/Classification-Mini-v0 --set backbone=tuned --set start=runs/first --output runs/second`

    `accelerate launch --multi_gpu -m sd_gym.cli prepare --set device=cuda ...` shares the work between GPUs.
    """
    _import(imports)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that a launcher has started
    with _errors_as_lines(), _progress(visible=first) as progress:
        bar = progress.add_task("loading", total=steps, figures="")
        latest: dict[str, float] = {}

        def on_step(step: int, figures: dict[str, float]) -> None:
            latest.update(figures)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in latest.items() if name != "learning_rate")
            progress.update(bar, completed=step, description="preparing", figures=shown)

        import numpy as np

        from sd_gym.envs.config import load_config, make_config
        from sd_gym.registration import config_of
        from sd_gym.tasks.preparation import prepare_backbone

        if (backbone is None) == (policy is None):
            raise ValueError("pass either --backbone, or --policy for the backbone of a run")
        given = {"dataset": dataset, "max_source_length": max_length}
        overrides = {key: value for key, value in given.items() if value is not None} | _settings(set_)
        skip_logits = None
        if policy is not None:
            from sd_gym.agents.experiment.evaluation import seen_together
            from sd_gym.agents.experiment.run import load_run
            from sd_gym.envs.core import shared_core

            if "backbone" in overrides:
                raise ValueError("--policy tunes the run's own backbone; leave out backbone=")
            _, core, network = load_run(policy)
            config = make_config(core.config.model_dump() | overrides, core.config.id)
            splits = {name: shared_core(config).split(name) for name in ("train", "validation")}
            skip_logits = {
                name: np.concatenate(
                    [
                        network.skip_logits(core.observe(split, rows))
                        for rows in seen_together(core, np.arange(len(split)))
                    ]
                )
                for name, split in splits.items()
            }
        else:
            config = load_config(config_of(env), {**overrides, "backbone": backbone})
        report = prepare_backbone(
            config.backbone,
            config.source,
            config.task,
            output,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_rate=max_rate,
            patience=patience,
            answers=config.answers,
            prompt=config.prompt,
            stop=config.stop,
            token_shares=config.token_shares,
            token_ranking=config.token_ranking,
            max_source_length=config.max_source_length,
            max_target_length=config.max_target_length,
            label_range=config.label_range,
            train_size=config.train_size,
            validation_size=config.validation_size,
            test_size=config.test_size,
            skip_logits=skip_logits,
            resume=resume,
            seed=seed,
            device=config.device,
            on_step=on_step,
        )
    if not first:
        return
    from sd_gym.agents.report.tables import of_preparation

    console.print(*of_preparation(str(output), report), sep="\n")
    if report["steps_done"] < steps:
        console.print(f"Ended early, after {report['steps_done']} steps.")
    console.print(f"Prepared backbone: {output}", highlight=False, soft_wrap=True)


def _print_result(title: str, result: dict[str, Any]) -> None:
    from sd_gym.agents.report.tables import of_result

    console.print(*of_result(title, result), sep="\n")


if __name__ == "__main__":
    app()
