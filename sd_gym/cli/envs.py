"""Commands for envs: list them, and make tables of them."""

from pathlib import Path
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer import Argument, Option

from sd_gym.cli import terminal
from sd_gym.cli.terminal import Imports, Ray, Settings


def envs(
    name: Annotated[str | None, Argument(metavar="ENV", help="Env to describe.")] = None,
    imports: Imports = [],
) -> None:
    """List the envs, or describe one of them.

    Example: `sd-gym envs SD/Classification-Mini-v0`
    """
    terminal.import_all(imports)
    from sd_gym.envs.listing import page_of
    from sd_gym.registration import all_ids

    with terminal.errors_as_lines():
        if name is not None:
            found = page_of(name)
            terminal.print_line(f"{name}\n\n{found.about}\n")
            for fact, value in {**found.facts, **dict(line.split(": ", 1) for line in found.versions)}.items():
                terminal.print_line(f"{fact:12} {value}")
            return
        table = Table(title="sd_gym envs", box=SIMPLE_HEAD, padding=0)
        table.add_column("id", no_wrap=True, min_width=max(map(len, all_ids())))  # to be copied in one piece
        for column in ("data set", "backbone"):
            table.add_column(column, overflow="fold")
        for identity in all_ids():
            try:
                facts = page_of(identity).facts
            except FileNotFoundError as error:  # its table is missing
                facts = {"data set": str(error), "backbone": "-"}
            table.add_row(identity, facts["data set"], facts["backbone"])
        terminal.console.print(table, crop=False)


def tabulate(
    env: Annotated[str, Argument(metavar="ENV_OR_RUN", help="Env id, or the folder of a run.")],
    output: Annotated[Path, Option(help="Folder to write the table to.")],
    decisions: Annotated[
        list[str],
        Option(
            help="all; or, repeatable: layers (all that skip whole layers), random:N, path (greedy search), codebook "
            "(the env's), codebook:FILE [default: path if there are stages, else all if they are at most 4,096, else "
            "random:64]."
        ),
    ] = [],
    instances: Annotated[int | None, Option(min=1, help="Use the first so many instances of each split.")] = None,
    seed: Annotated[int, Option(help="Of random:N.")] = 0,
    pca: Annotated[int | None, Option(min=1, help="Reduce observations to this many principal components.")] = None,
    share: Annotated[bool, Option(help="Leave out the data's ids, words and paths.")] = False,
    bf16: Annotated[bool, Option(help="Compute in bfloat16, nearly twice as fast.")] = False,
    references: Annotated[bool, Option(help="Also compute the hull, full-information learner and oracle.")] = False,
    resume: Annotated[bool, Option(help="Resume a table that was interrupted.")] = False,
    jobs: Annotated[int, Option(min=1, help="Processes, of one thread each.")] = 1,
    ray: Ray = None,
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
            ray=ray,
            imports=imported,
            on_progress=on_progress,
            **terminal.settings_of(set_, call=write_table),
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
