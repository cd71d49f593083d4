"""Commands for models: prepare them, run them on files with a policy, and serve them over HTTP."""

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer import Argument, Option

from sd_gym.cli import terminal
from sd_gym.cli.terminal import Imports, Settings
from sd_gym.serving.limits import Limits, RequestLimits

Draw = Literal["even", "deeper", "staged", "layers"]
FOR_SERVING = ("starlette", "uvicorn", "prometheus_client")


def prepare(
    output: Annotated[Path, Option(help="Folder to write the prepared model to.")],
    backbone: Annotated[str | None, Option(help="Local folder or hub id of a supported model.")] = None,
    policy: Annotated[Path | None, Option(help="Run folder: prepare its backbone further, under its policy.")] = None,
    env: Annotated[str, Option(help="Env with the task and data.")] = "SD/Classification-Custom-v0",
    dataset: Annotated[str | None, Option(help="The env's data set: a file, a folder, or a hub id.")] = None,
    rows: Annotated[
        float,
        Option(help="Share (0.6) or number (5000) of training rows to prepare on; policies learn on the rest."),
    ] = 0.6,
    steps: Annotated[int, Option(min=1, help="Optimiser steps.")] = 1500,
    batch_size: Annotated[int, Option(min=1)] = 32,
    accumulate: Annotated[int, Option(min=1, help="Parts to split a batch into, to save memory.")] = 1,
    learning_rate: Annotated[float, Option()] = 5e-5,
    max_rate: Annotated[float, Option(min=0, max=1, help="Highest skip rate; 0: plain fine-tuning.")] = 0.6,
    draw: Annotated[
        Draw,
        Option(
            help="How decisions are drawn: at one rate per row (even); at a rate that grows with depth (deeper); all "
            "layers run up to a random one, then half of the rows skip all (staged); or whole layers, the least "
            "important first, at a rising rate (layers)."
        ),
    ] = "even",
    patience: Annotated[
        int | None, Option(min=1, help="Stop after this many validations (of at most ten) without progress.")
    ] = None,
    max_length: Annotated[int | None, Option(min=2, help="Longest input, in tokens [default: env's].")] = None,
    resume: Annotated[bool, Option(help="Resume an interrupted preparation from its checkpoint.")] = False,
    checkpoint_minutes: Annotated[float, Option(min=0, help="Minutes between checkpoints.")] = 10,
    seed: Annotated[int, Option()] = 0,
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Fine-tune a backbone so that it stays accurate when layers are skipped.

    Half of each batch runs densely under the task's loss, half under random decisions with the dense output as target.
    The weights with the best quality under random decisions on held-out rows are saved. The output folder also holds
    curves, for `tensorboard --logdir`, and a picture of quality against skip rate.

    Example: `sd-gym prepare --backbone ./minilm --dataset ./sst2 --output ./minilm-sst2 --steps 2000`
    """
    terminal.import_all(imports)
    first = os.environ.get("RANK", "0") == "0"  # only the first of several processes prints
    with terminal.errors_as_lines(), terminal.progress_bar(visible=first) as progress:
        bar = progress.add_task("loading", total=steps, figures="")
        latest: dict[str, float] = {}

        def on_phase(phase: str) -> None:
            progress.update(bar, description=phase)
            if not terminal.errors.is_terminal:
                terminal.say(f"{phase} ...")

        def on_step(step: int, figures: dict[str, float]) -> None:
            latest.update({name: value for name, value in figures.items() if name != "learning_rate"})
            progress.update(bar, completed=step, figures=terminal.figures_text(latest))

        from sd_gym.backbones.prepare import Recipe
        from sd_gym.config import dotted
        from sd_gym.envs.config import load_config
        from sd_gym.registration import config_of
        from sd_gym.tasks.preparation import prepare_backbone

        if (backbone is None) == (policy is None):
            raise ValueError("pass either --backbone, or --policy for the backbone of a run")
        options = {"backbone.name": backbone, "data.dataset": dataset, "backbone.max_source_length": max_length}
        overrides = {key: value for key, value in options.items() if value is not None}
        settings = dotted(terminal.settings_of(set_), "--set")
        if twice := [key for key in settings if key in overrides]:
            raise ValueError(f"{twice[0]} is given as an option and by --set; leave one of them out")
        overrides |= settings
        recipe = Recipe(steps, learning_rate, batch_size, accumulate, max_rate, draw, patience, seed)
        skip_logits = None
        if policy is not None:
            from sd_gym.agents.experiment.skip_logits import skip_logits_of_run

            if "backbone.name" in overrides:
                raise ValueError("--policy tunes the run's own backbone; leave out backbone=")
            config, skip_logits = skip_logits_of_run(policy, overrides)
        else:
            config = load_config(config_of(env), overrides)
        report = prepare_backbone(
            config.backbone,
            config.data,
            config.task,
            output,
            recipe,
            rows=rows,
            tokens=config.tokens,
            label_range=config.quality.label_range,
            skip_logits=skip_logits,
            resume=resume,
            checkpoint_minutes=checkpoint_minutes,
            on_step=on_step,
            on_phase=on_phase,
        )
    if not first:
        return
    from sd_gym.agents.report.terminal import preparation_tables

    terminal.console.print(*preparation_tables(str(output), report), sep="\n")
    if report["steps_done"] < steps:
        terminal.print_line(f"Ended early, after {report['steps_done']} steps.")
    terminal.print_line(f"Prepared backbone: {output}")


def run(
    policy: Annotated[
        str, Argument(help="Run folder, saved or exported policy, or id of one on the Hugging Face hub.")
    ],
    source: Annotated[str, Option("--input", help=".jsonl, .csv or .parquet file; -: JSON lines from stdin.")],
    output: Annotated[Path, Option(help="JSON lines file to write, one line per row, in the same order.")],
    backbone: Annotated[str | None, Option(help="Path of the backbone [default: that of the run].")] = None,
    max_loss: Annotated[float | None, Option(help="The point with fewest FLOPs at this loss, such as 0.005.")] = None,
    max_flops: Annotated[
        float | None, Option(help="Most cautious point within this share of FLOPs (0.4), without the policy's.")
    ] = None,
    comparing: Annotated[bool, Option("--compare", help="Also run densely: time, agreement, and quality.")] = False,
    resume: Annotated[bool, Option(help="Resume an interrupted run from OUTPUT.part.")] = False,
    device: Annotated[str, Option(help="Device of the backbone: cpu, cuda, cuda:1.")] = "cpu",
    batch_size: Annotated[int | None, Option(min=1, help="Largest number of rows per batch [default: auto].")] = None,
    ray: Annotated[
        str | None, Option(metavar="ADDRESS", help="A Ray cluster that answers and can access POLICY.")
    ] = None,
    columns: Annotated[list[str], Option("--column", metavar="FIELD=COLUMN", help="Column of a field.")] = [],
    imports: Imports = [],
) -> None:
    """Answer many inputs with a trained policy; rows of similar length, or with the same decision, run together.

    A row's object has its line (in CSV and Parquet the row's number), answer, skip (0 or 1 per switch), token_level,
    flops_ratio, unknown_tokens and went_on. A malformed line gets an "error" instead; the exit code is then 1. If all
    lines are malformed, nothing is written. Blank lines are skipped.

    Until the run is finished, answers are in the folder OUTPUT.part. --resume continues there, and refuses another
    policy, operating point, column or input.

    Example: `sd-gym run runs/reviews --input reviews.jsonl --output labels.jsonl --column text=review`
    """
    imported = terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.warnings_as_lines(), terminal.progress_bar() as progress:
        bar = progress.add_task("loading", total=None, figures="")
        from sd_gym.inference.bulk import OnCluster, count_rows, run_file
        from sd_gym.inference.manifest import is_exported
        from sd_gym.inference.onnx import OnnxModel
        from sd_gym.inference.texts import load

        if str(output) == "-":
            raise ValueError("--output: expected a file, not the standard output (-), so that the run can be resumed")
        file = None if source == "-" else Path(source)
        total = count_rows(file)
        if is_exported(policy):
            if backbone or device != "cpu":
                raise ValueError(f"{policy} is exported with its backbone, for the CPU; leave out --backbone, --device")
            make: Any = partial(OnnxModel, Path(policy), max_loss=max_loss, max_flops=max_flops)
        else:
            make = partial(load, policy, backbone, device=device, max_loss=max_loss, max_flops=max_flops)

        def on_chunk(rows: int, bulk: Any) -> None:
            figures = f"{bulk.speed} a second"
            progress.update(bar, completed=rows, total=total, description="answering", figures=figures)

        done = run_file(
            make(),
            file,
            output,
            resume=resume,
            compare=comparing,
            columns=dict(terminal.pairs_of(columns, "--column")),
            batch_size=batch_size,
            on_cluster=None if ray is None else OnCluster(ray, make, imported, device.startswith("cuda")),
            on_chunk=on_chunk,
        )
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, value in done.figures().items():
        table.add_row(name, value)
    terminal.console.print(table)
    where = "their errors are in the output"
    if done.malformed and not (done.rows or done.before):
        output.unlink()
        where = (
            f"no line was answered, so {output} was not kept; --column FIELD=COLUMN takes a field from another column"
        )
    else:
        terminal.print_line(f"Answers: {output}")
    for line in done.malformed[:3]:
        terminal.say(f"line {line.number}: {line.error}", "yellow")
    if done.malformed:
        terminal.say(f"malformed lines: {len(done.malformed)}; {where}", "yellow")
        raise typer.Exit(1)


def serve(
    policy: Annotated[
        str, Argument(metavar="POLICY_OR_FOLDER", help="Run folder, saved or exported policy, or its id on the hub.")
    ],
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    backbone: Annotated[str | None, Option(help="Where the backbone is [default: where it was in training].")] = None,
    device: Annotated[str, Option(help="Where the backbone runs: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int | None, Option(min=1, help="Threads of the model [default: all cores].")] = None,
    max_loss: Annotated[float | None, Option(help="Default point: fewest FLOPs at this loss, such as 0.005.")] = None,
    max_flops: Annotated[
        float | None, Option(help="Or the most cautious point within this share of FLOPs (0.4), without the policy's.")
    ] = None,
    allow_loss: Annotated[
        float | None, Option(help="Highest loss that a request may ask for [default: points that passed].")
    ] = None,
    allow_flops: Annotated[
        float, Option(min=0, max=1, help="Largest share of FLOPs that a request may ask for.")
    ] = 1.0,
    dial: Annotated[
        Path | None,
        Option(metavar="RUN", help="Run on a serving env: its dial chooses the operating point of each group."),
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Most rows that run together.")] = Limits.rows,
    batch_tokens: Annotated[int, Option(min=1, help="Most padded tokens that run together.")] = Limits.tokens,
    queue: Annotated[int, Option(min=1, help="Most waiting rows; further requests get 429.")] = Limits.queued_rows,
    queue_tokens: Annotated[int, Option(min=1, help="Most waiting tokens.")] = Limits.queued_tokens,
    max_wait: Annotated[
        float, Option(min=0, help="Seconds for which larger groups may overtake a row; then deadlines count.")
    ] = Limits.max_wait,
    timeout: Annotated[
        float | None, Option(min=0.001, help="Seconds after which a request gets 504 [default: 30, or the dial's].")
    ] = None,
    max_body: Annotated[int, Option(min=1, help="Most bytes of a request; longer ones get 413.")] = RequestLimits.body,
    max_inputs: Annotated[
        int, Option(min=1, help="Most inputs of a request; longer ones get 413.")
    ] = RequestLimits.inputs,
    max_characters: Annotated[
        int, Option(min=1, help="Most characters of an input; longer ones get 413.")
    ] = RequestLimits.characters,
    imports: Imports = [],
) -> None:
    """Serve a policy over HTTP: requests that share a mask run together. Needs `pip install "sd-gym[serve]"`.

    `POST /predict` (or `/generate`, and `/v1/completions` of decoder-only models), `/readyz`, `/metrics`, and a page at
    `/`. SIGTERM answers what was accepted, then stops.

    Example: `sd-gym serve runs/reviews-8 --port 8000 --max-loss 0.005`
    """
    terminal.import_all(imports)
    with terminal.errors_as_lines():
        if lacking := [name for name in FOR_SERVING if find_spec(name) is None]:
            raise ValueError(f"sd-gym serve needs {', '.join(lacking)}: pip install 'sd-gym[serve]'")
        with terminal.status("loading"):
            from sd_gym.serving.server import run as run_server
            from sd_gym.serving.server import service, timeout_of

            served = service(
                policy,
                Limits(batch_size, batch_tokens, queue, queue_tokens, max_wait),
                RequestLimits(timeout_of(timeout, dial), max_body, max_inputs, max_characters),
                backbone=backbone,
                device=device,
                max_loss=max_loss,
                max_flops=max_flops,
                allow_loss=allow_loss,
                allow_flops=allow_flops,
                threads=threads,
                dial=dial,
            )
        if not served.engine.groups_masks:
            terminal.say(
                "this policy has too many masks to group requests by, or decides in the pass: requests run together on "
                "the switchboard; sd-gym reduce makes a policy of few masks",
                "yellow",
            )
        run_server(served, host, port, lambda address: terminal.print_line(f"Serving {Path(policy).name}: {address}"))
