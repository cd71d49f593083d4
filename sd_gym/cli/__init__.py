"""The command ``sd-gym``: the only package that imports every other one."""

import io
import sys

import typer

from sd_gym.cli.comparison import compare, report, tune
from sd_gym.cli.envs import envs, tabulate
from sd_gym.cli.models import prepare, run, serve
from sd_gym.cli.runs import evaluate, export, reduce, train, validate

app = typer.Typer(
    help="Learn which layers a transformer can skip per input. Start with: sd-gym envs",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def escape_unprintable() -> None:
    """Escape what the terminal's encoding lacks, and half surrogate pairs of damaged files."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may have replaced it
            stream.reconfigure(errors="backslashreplace")


for command in (envs, train, evaluate, compare, report, run, serve, reduce, export, validate, tune, tabulate, prepare):
    app.command()(command)
