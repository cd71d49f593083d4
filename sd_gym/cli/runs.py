"""Commands about one run: it is trained, evaluated, reduced, played again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from sd_gym.cli import terminal
from sd_gym.cli.terminal import Confidence, Imports, Settings


def train(
    env: Annotated[str, Argument(help="Env id, such as SD/Classification-Mini-v0.")],
    algo: Annotated[
        str,
        Option(
            help="ppo, a2c (the env's reward); ppo_lagrangian (a penalty that learns); ppo_lex, reinforce (quality "
            "first); imitation (of a search); controls: hull, static, every-other, early-exit, confidence, cascade, "
            "full-information, oracle, dense, random, hash; blind-NAME, which sees no input; or one of --import."
        ),
    ] = "ppo",
    steps: Annotated[int, Option(min=1, help="Decisions to learn from.")] = 50_000,
    seed: Annotated[int, Option(help="Of the agent and of the instances drawn.")] = 0,
    output: Annotated[Path | None, Option(help="Run folder [default: runs/TASK-ALGO-SEED].")] = None,
    confidence: Confidence = 0.95,
    resume: Annotated[bool, Option(help="Go on with a run that was cut off.")] = False,
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Train an agent on an env, then evaluate it on the test split.

    `--set start=RUN` starts from the policy of another run. Watch the curves with `tensorboard --logdir runs`.

    Example: `sd-gym train SD/Classification-Mini-v0 --algo reinforce --seed 1 --set learning_rate=0.002`
    """
    imported = terminal.import_all(imports)
    with terminal.errors_as_lines():
        settings = terminal.settings_of(set_)
        with terminal.progress_bar() as progress:
            bar = progress.add_task("loading", total=steps, figures="")

            def on_progress(done: int, figures: dict[str, float]) -> None:
                state, shown = "learning" if done < steps else "evaluating", terminal.figures_text(figures)
                if not figures:  # a search has no given number of steps
                    progress.tasks[0].total = None
                    state, shown = "searching", "decisions scored"
                completed = min(done, steps) if figures else done
                progress.update(bar, completed=completed, description=state, figures=shown)

            import sd_gym  # noqa: F401  (registers the ids)
            from sd_gym.agents.experiment.api import default_folder
            from sd_gym.agents.experiment.run import train as run_training

            folder = output or default_folder(env, algo, seed)
            result = run_training(
                env,
                algo,
                folder,
                steps=steps,
                seed=seed,
                settings=settings,
                confidence=confidence,
                resume=resume,
                imports=imported,
                on_progress=on_progress,
            )
    terminal.print_result(f"{env}, {algo}, seed {seed}", result)
    if result["artefact"] is None:
        terminal.print_line(
            "No artefact (skip_policy.json) was written: this policy needs its env, as it sees more than the env "
            "observes, or its table has no export; sd-gym evaluate and compare take the run."
        )
    terminal.print_line(f"Run folder: {folder}")


def evaluate(
    run: Annotated[Path, Argument(help="Run folder that sd-gym train wrote.")],
    split: Annotated[str, Option(help="train, validation or test.")] = "test",
    output: Annotated[Path | None, Option(help="Folder for the result, its instances and its picture.")] = None,
    imports: Imports = [],
) -> None:
    """Evaluate a run's policy again, on any split.

    Example: `sd-gym evaluate runs/Classification-Mini-ppo-0 --split validation`
    """
    if split not in ("train", "validation", "test"):
        raise typer.BadParameter(f"expected train, validation or test, got {split!r}", param_hint="--split")
    terminal.import_all(imports)
    from sd_gym.agents.experiment.api import evaluate as run_evaluation
    from sd_gym.agents.runs.folder import read_description

    with terminal.errors_as_lines(), terminal.status("evaluating"):
        description = read_description(run)
        result = run_evaluation(description["env"], run, split, output)
    title = [description[key] for key in ("env", "algo")]
    terminal.print_result(f"{', '.join(title)}, seed {description.get('seed')}", result)


def reduce(
    run: Annotated[Path, Argument(help="Run folder that sd-gym train wrote.")],
    output: Annotated[Path, Option(help="Run folder to write.")],
    codebook: Annotated[int, Option(min=1, help="Different decisions at most (per stage).")] = 8,
    imports: Imports = [],
) -> None:
    """Let a run's policy choose among a few masks, so that more inputs share one and run together.

    The masks are those of its decisions that fit the training inputs best. Its operating point is selected again on the
    validation split. The result is a new run, evaluated on the test split.

    Example: `sd-gym reduce runs/Summarization-Mini-ppo-0 --codebook 8 --output runs/reduced`
    """
    terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.status("reducing"):
        from sd_gym.agents.experiment.run import reduce as reduce_run

        result = reduce_run(run, codebook, output)
    terminal.print_result(f"{run}, a codebook of {codebook}", result)
    terminal.print_line(f"Run folder: {output}")


def validate(
    what: Annotated[str, Argument(metavar="RUN_OR_ENV", help="Folder of a finished run, or the id of an env.")],
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Replay a run's recorded decisions and fail on any difference; or check an env before learning on it.

    Example: `sd-gym validate runs/Classification-Mini-ppo-0`
    """
    terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.status("checking"):
        if Path(what).is_dir():
            from sd_gym.agents.experiment.replay import replay

            lines, failed = replay(Path(what)).lines(), False
        else:
            from sd_gym.agents.experiment.env_checker import check_env

            checks = check_env(what, terminal.settings_of(set_))
            lines, failed = [check.line() for check in checks], not all(check.passed for check in checks)
    for line in lines:
        terminal.print_line(line)
    if failed:
        raise typer.Exit(1)
