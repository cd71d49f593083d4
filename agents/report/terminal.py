"""Results for the terminal: rich tables and lines."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from sd_gym.agents.report.compare import COLUMNS
from sd_gym.agents.runs.guarantee import in_points

IN_TITLE = "env", "dense quality", "test rows"  # columns of a comparison
COUNTED = {  # changes to rows of a split
    "left_out": "rows left out (an empty text)",
    "dropped": "rows left out (they are in a later split too)",
    "of_backbone": "rows left out (the backbone was prepared on them)",
    "cut_inputs": "inputs cut",
    "cut_targets": "targets cut, or answers cut off",
}
DENSE_TIMES = {"dense_by_length": "dense, sorted", "dense_shortened": "dense, cut"}


def result_tables(title: str, result: dict[str, Any]) -> Iterator[RenderableType]:
    """A result of ``sd_gym.train`` or ``evaluate``: quality, FLOPs and time, the data, and the verdict."""
    yield _quality_and_cost(title, result)
    yield from _data(result["data"])
    if last := result["last_policy"]:
        yield _dim(f"as learned: the policy at the end of learning, before selection ({last['verdict']}).")
    cut = any(timed.get("dense_shortened") for timed in result["time"].values())
    if result["time"]:
        yield _dim(
            "time B: at most B texts of a queue run together, deciding included, over dense; dense, sorted: dense, "
            "texts of similar length together"
            + ("; in bulk: over that" if "in bulk" in result["time"] else "")
            + ("; dense, cut: on texts cut to what the policy keeps." if cut else ".")
        )
    low, high = result["quality_difference_interval"]
    yield Text(
        f"{result['verdict']}: difference {result['quality_difference'] * 100:+.2f} points "
        f"[{low * 100:+.2f}, {high * 100:+.2f}] at epsilon {in_points(result['epsilon'])}; "
        f"different decisions used: {result['decisions_used']}."
    )
    if share := result.get("goes_on"):
        yield Text(f"{share:.1%} of the answers went on densely.")
    if result["guarantee"]:
        yield Text(f"Guarantee: {result['guarantee']}.")
    if "goodput" in result:
        low, high = result["goodput_interval"]
        yield Text(
            f"Goodput: {result['goodput']:.1%} [{low:.1%}, {high:.1%}] of the requests were answered in time, in "
            f"{result.get('episodes', 'all')} episodes."
        )
    fewest = result["fewest_instances"]
    power = f"a verdict needs {'an epsilon above 0' if fewest is None else f'at least {fewest:,} instances'}."
    if (allowed := result["losses_allowed"]) is not None:
        answers = f"{allowed:,} answer{'s' * (allowed != 1)}"
        power = f"with at most {answers} lost and none gained, the quality is still shown to be kept."
    yield _dim(f"Power: {power}")


def comparison_tables(rows: list[list[str]]) -> Iterator[Table]:
    """Rows of ``compare.COLUMNS``: a table for each env, with a title, so that it is narrow."""

    def broken(cell: str) -> str:  # text in brackets gets its own line
        return cell.replace(" (", "\n(")

    keys = [COLUMNS.index(name) for name in IN_TITLE]
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for (env, quality, test_rows), group in groups.items():
        title = f"Runs on the test split: {env}, dense quality {quality}, test rows {test_rows}"
        table = Table(title=title, box=SIMPLE_HEAD, padding=0)
        known = [number for number in range(len(COLUMNS)) if any(row[number] != "-" for row in group)]
        shown = [number for number in known if number not in keys]
        for number in shown:
            words = " ".join([COLUMNS[number], *(row[number] for row in group)]).split()
            table.add_column(broken(COLUMNS[number]), min_width=max(map(len, words)))
        for row in group:
            table.add_row(*(broken(row[number]) for number in shown))
        yield table


def fit(table: Table, console: Console) -> Table:
    """Make each column as narrow as its longest word if rich shares out more characters than the terminal has."""
    with console.capture() as printed:
        console.print(table, crop=False)
    if max(cell_len(line.rstrip()) for line in printed.get().splitlines()) > console.width:
        for column in table.columns:
            column.max_width = column.min_width
    return table


def preparation_tables(output: str, report: dict[str, Any]) -> Iterator[RenderableType]:
    """Results of preparing a backbone: the data, and the quality under random decisions before and after."""
    yield from _data(report["rows"])
    table = Table(title=f"{output}: mean quality ({report['measure']}) on held-out rows")
    by_layer = report["draw"] == "layers"
    for column in ("skipped" if by_layer else "skipped at random", "before", "after"):
        table.add_column(column, justify="right")
    sublayers = "layers, the least important" if by_layer else "sublayers"
    for what, key in ((sublayers, "quality"), ("tokens", "quality_by_token_share")):
        for rate, after in report[key]["after"].items():
            table.add_row(f"{float(rate):.0%} of {what}", f"{report[key]['before'][rate]:.1%}", f"{after:.1%}")
    yield table


def _quality_and_cost(title: str, result: dict[str, Any]) -> Table:
    """A table: dense, the policy, dense runs that check the timing, levels of difficulty, the policy as learned."""
    split, times = result["split"], result["time"]
    shared = (f", {count} of them also in {name}" for name, count in result["data"][split]["also_in"].items())
    table = Table(title=f"{title} ({split} split, {result['instances']} instances{''.join(shared)})")
    rewards = [key for key in ("return", "regret") if result.get(key) is not None]
    for column in ("", "quality", "FLOPs", *rewards, *(f"time\n{size}" for size in times)):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)

    def figures(values: dict[str, Any]) -> list[str]:
        shares = [f"{values[key]:.1%}" for key in ("quality", "flops_ratio_with_policy")]
        return [*shares, *(f"{values[key]:+.3f}" for key in rewards)]

    blank = [""] * len(rewards)
    table.add_row("dense", f"{result['quality_ref']:.1%}", "100.0%", *blank, *["100%"] * len(times))
    table.add_row("policy", *figures(result), *(f"{timed['time_ratio']:.0%}" for timed in times.values()))
    for key, name in DENSE_TIMES.items():
        controls = [timed.get(key) for timed in times.values()]
        if any(controls):
            shown = ("" if time is None else f"{time:.0%}" for time in controls)
            table.add_row(f"  {name}", "", "", *blank, *shown, style="dim")
    levels = result["by_difficulty"]
    for level in levels if len(levels) > 1 else ():
        cells = f"  level {level['difficulty']}", f"{level['quality']:.1%}", f"{level['flops_ratio_with_policy']:.1%}"
        table.add_row(*cells, style="dim")
    if last := result["last_policy"]:
        table.add_row("as learned", *figures(last), style="dim")
    for column in table.columns:  # a narrow terminal wraps lines, and cuts no figures
        lines = (line for cell in (column.header, *column.cells) for line in str(cell).splitlines())
        column.min_width = max(map(len, lines), default=0)
    return table


def _data(data: dict[str, dict[str, Any]]) -> Iterator[Text]:
    """The rows of each split, how many were left out or cut, and how many are in another split too."""
    for split, counts in data.items():
        changes = [f"{counts[key]} {what}" for key, what in COUNTED.items() if counts.get(key)]
        rows = f"{counts['instances']} instances, {counts['part']} of {counts['file']}, hash {counts['hash']}"
        yield _dim(f"{split}: {', '.join([rows, *changes])}")
        for other, count in counts["also_in"].items():
            line = f"{split} overlaps {other}: {count} of its {counts['instances']} instances are in both."
            yield Text(line, style="bold yellow")


def _dim(line: str) -> Text:
    return Text(line, style="dim")
