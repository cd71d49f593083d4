"""Commands for envs: list them, and make tables of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer import Argument, Option

from sd_gym.cli import terminal
from sd_gym.cli.terminal import Imports, Settings


def envs(imports: Imports = []) -> None:
    """List the envs.

    Example: `sd-gym envs`
    """
    terminal.import_all(imports)
    from sd_gym.envs.config import read_values
    from sd_gym.registration import SERVING, config_files

    table = Table(title="sd_gym envs", box=SIMPLE_HEAD, padding=0)
    table.add_column("id", no_wrap=True)  # to be copied in one piece
    for column in ("data set", "backbone"):
        table.add_column(column, overflow="fold")
    with terminal.errors_as_lines():
        for file in config_files():
            table.add_row(*_row(read_values(file)))
        for identity, file in SERVING.items():
            of_table = str(read_values(file)["table"])
            table.add_row(identity, f"requests to a server, on {of_table}", "-")
    terminal.console.print(table)


def _row(values: dict[str, Any]) -> tuple[str, str, str]:
    """The id, data set and backbone of a configuration."""
    if values.get("table") is not None:
        from sd_gym.config import dotted
        from sd_gym.envs.table_files import read_description, table_folder

        folder = table_folder(values["table"])
        if not folder.is_dir():
            return str(values["id"]), f"no table at {folder}", "-"
        was = dotted(read_description(folder)["env_config"], str(folder))
        return str(values["id"]), f"{was['data.dataset']}, tabulated", str(was["backbone.name"])
    tested = (values.get("data.splits") or {}).get("test", "test")
    data = f"{values.get('data.dataset') or 'yours'}{'' if tested == 'test' else f', tested on its {tested}'}"
    return str(values.get("id")), data, str(values.get("backbone.name") or "yours")


def tabulate(
    env: Annotated[str, Argument(metavar="ENV_OR_RUN", help="Env id, or the folder of a run.")],
    output: Annotated[Path, Option(help="Folder to write the table to.")],
    decisions: Annotated[
        list[str],
        Option(
            help="all; or, repeatable: layers (all that skip whole layers), random:N, path (greedy search), codebook "
            "(the env's), codebook:FILE [default: all if there are at most 4,096, otherwise random:64]."
        ),
    ] = [],
    instances: Annotated[int | None, Option(min=1, help="Largest number of instances per split.")] = None,
    seed: Annotated[int, Option(help="Of random:N.")] = 0,
    pca: Annotated[int | None, Option(min=1, help="Reduce observations to this many principal components.")] = None,
    share: Annotated[bool, Option(help="Leave out the data's ids, words and paths.")] = False,
    bf16: Annotated[bool, Option(help="Compute in bfloat16, nearly twice as fast.")] = False,
    references: Annotated[bool, Option(help="Also compute the hull, full-information learner and oracle.")] = False,
    resume: Annotated[bool, Option(help="Resume a table that was interrupted.")] = False,
    jobs: Annotated[int, Option(min=1, help="Processes, of one thread each.")] = 1,
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Compute outcomes of decisions for every instance of an env; the env SD/Table-v0 looks them up in microseconds.

    Then train on the table: `sd-gym train SD/Table-v0 --set table=table`

    Example: `sd-gym tabulate SD/Classification-Mini-v0 --output table --decisions random:64 --instances 2000`
    """
    imported = terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.progress_bar() as progress:
        bar = progress.add_task("loading", total=None, figures="")
        from sd_gym.agents.experiment.tabulation import tabulate as write_table

        def on_progress(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total, description="scoring", figures="decisions")

        description = write_table(
            env,
            output,
            decisions=decisions or None,
            instances=instances,
            seed=seed,
            pca=pca,
            share=share,
            bf16=bf16,
            references=references,
            resume=resume,
            jobs=jobs,
            imports=imported,
            on_progress=on_progress,
            **terminal.settings_of(set_),
        )
    counts = ", ".join(f"{split['instances']} of {name}" for name, split in description["splits"].items())
    kind = f"{description['masks']} decisions ({description['chosen']})" if description["masks"] else "all decisions"
    size = sum(file.stat().st_size for file in output.iterdir())
    terminal.print_line(f"{kind} on instances: {counts}; {size / 2**20:.1f} MB")
    if pca is not None:
        from sd_gym.envs.table_files import PROJECTION
        from sd_gym.projection import read_projection

        kept = read_projection(output / PROJECTION).explained.sum()
        terminal.print_line(f"Observations: {pca} components, {kept:.0%} of the variance")
    terminal.print_line(f"Table: {output}")
