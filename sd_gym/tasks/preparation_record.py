"""What a preparation writes beside its model: its settings, to resume it by, its curves and its picture."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sd_gym.backbones.prepare import Recipe, TrainingHistory
from sd_gym.config import SPLITS, BackboneConfig, DataConfig, TokensConfig
from sd_gym.files import as_json, read_json, write_file, write_json
from sd_gym.folders import MARKER, contents, other_content_error
from sd_gym.tasks.splits import Splits
from sd_gym.tasks.validation import EncodedSplit
from sd_gym.version import __version__

CHECKPOINT = "checkpoint.pt"
INTERRUPTED = "preparing.json"  # the settings of a preparation that runs or was interrupted

OnStep = Callable[[int, dict[str, float]], None]


def settings_of(
    data: DataConfig, reading: BackboneConfig, recipe: Recipe, tokens: TokensConfig, accelerator: Accelerator
) -> dict[str, Any]:
    """What a preparation is made with, for its report and to compare when it is resumed."""
    return {
        MARKER: __version__,
        "backbone": reading.name,
        "source": data.model_dump(),
        "unanswerable": data.unanswerable,
        **asdict(recipe),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        **{key: getattr(reading, key) for key in ("prompt", "stop", "max_source_length", "max_target_length")},
        "token_shares": list(tokens.shares),
        "token_ranking": tokens.ranking,
    }


def rows_of(splits: Splits, encoded: Mapping[str, EncodedSplit]) -> dict[str, Any]:
    """Which data and rows a preparation is made with."""
    return {
        "data": {name: splits[name].identity for name in SPLITS if name in splits},
        "rows": {name: split.provenance for name, split in encoded.items()},
        "backbone_rows": encoded["backbone"].instances.hash,
    }


def interrupted_settings(output: Path, resume: bool) -> dict[str, Any] | None:
    """The settings of the interrupted preparation to be resumed; ``None``: the folder is empty."""
    if not contents(output):
        return None
    if not (output / INTERRUPTED).exists():
        if (output / "config.json").exists():
            raise FileExistsError(f"{output} holds a model; choose another --output")
        raise other_content_error(output, "interrupted preparation")
    if not resume:
        raise FileExistsError(
            f"{output} holds an interrupted preparation; continue it with --resume, or choose another --output"
        )
    return read_json(output / INTERRUPTED)


def check_same(output: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise ValueError if the preparation in the folder has other settings; the data files may have moved."""
    now = json.loads(as_json(settings))
    keys = [key for key in now if key not in (MARKER, "source", "data", "rows")]
    differ = [f"its {key} is {before.get(key)}, now it is {now[key]}" for key in keys if before.get(key) != now[key]]
    if differ:
        raise ValueError(f"{output} holds another preparation: {', '.join(differ)}")


@contextmanager
def curves(output: Path, on_step: OnStep, *, write: bool) -> Iterator[OnStep]:
    """Logs each step to TensorBoard and calls ``on_step``, in the process that writes."""
    writers: list[SummaryWriter] = []

    def log(step: int, figures: dict[str, float]) -> None:
        if not writers:  # later steps of an interrupted preparation are hidden
            writers.append(SummaryWriter(output, purge_step=step))
        for name, value in figures.items():
            writers[0].add_scalar(f"validation/{name}" if name == "quality" else f"train/{name}", value, step)
        on_step(step, figures)

    try:
        yield log if write else lambda step, figures: None
    finally:
        for writer in writers:
            writer.close()


def figures_of(
    history: TrainingHistory, measure: str, importance: Tensor | None, before: list[Any], after: list[Any]
) -> dict[str, Any]:
    """What a preparation measured; ``before`` and ``after`` hold quality by skip rate and by share of tokens."""
    return {
        "steps_done": history.step,
        "validation": [{"step": step, "quality": value} for step, value in history.validation],
        "measure": measure,
        "importance": None if importance is None else importance.tolist(),
        "quality": {"before": before[0], "after": after[0]},
        "quality_by_token_share": {"before": before[1], "after": after[1]},
    }


def write_report(output: Path, report: dict[str, Any]) -> None:
    """Write picture and report of a finished preparation, and remove what one is resumed from."""
    _plot(report, output / "preparation.png")
    write_json(output / "preparation.json", report)
    for name in (INTERRUPTED, CHECKPOINT):  # a kill in between leaves a finished preparation
        (output / name).unlink(missing_ok=True)


def _plot(report: dict[str, Any], file: Path) -> None:
    """Plot quality against skip rate, share of tokens dropped, and step, as one PNG."""
    skipped = "share of layers skipped" if report["draw"] == "layers" else "skip rate of every sublayer"
    panels = {skipped: report["quality"]}
    if report["quality_by_token_share"]["after"]:
        panels["share of tokens dropped"] = report["quality_by_token_share"]
    figure = Figure(figsize=(5 * (len(panels) + 1), 4), layout="constrained")
    *curves, by_step = figure.subplots(1, len(panels) + 1)
    for axes, (label, values) in zip(curves, panels.items(), strict=True):
        for name, marker in (("before", "s"), ("after", "o")):
            axes.plot([float(x) for x in values[name]], list(values[name].values()), marker=marker, label=name)
        axes.set(xlabel=label, ylabel=f"{report['measure']}, held-out rows")
        axes.legend()
    by_step.plot([row["step"] for row in report["validation"]], [row["quality"] for row in report["validation"]], "o-")
    by_step.set(xlabel="step", ylabel=f"{report['measure']} under random decisions")
    for axes in (*curves, by_step):
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
    write_file(file, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
