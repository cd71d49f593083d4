"""Commands about one run: it is trained, evaluated, reduced, played again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sd_gym.cli.terminal import (
    Imports,
    Settings,
    Strictness,
    errors_as_lines,
    figures_text,
    import_all,
    print_line,
    print_result,
    progress_bar,
    settings_of,
    status,
)


def train(
    env: Annotated[str, typer.Argument(help="Env id, such as SD/Classification-Mini-v0.")],
    algo: Annotated[
        str,
        typer.Option(
            help="ppo, a2c (the env's reward); ppo_lagrangian (a penalty that learns); ppo_lex, reinforce (quality "
            "first); imitation (of a search); controls: static, every-other, early-exit, confidence, cascade, oracle, "
            "dense, random, hash; blind-NAME, which sees no input; or one that --import registers."
        ),
    ] = "ppo",
    steps: Annotated[int, typer.Option(min=1, help="Decisions to learn from.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Of the agent and of the instances drawn.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Run folder [default: runs/TASK-ALGO-SEED].")] = None,
    strictness: Strictness = 1.645,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was cut off.")] = False,
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Train an agent on an env, then evaluate it on the test split.

    `--set start=RUN` starts from the policy of another run. Watch the curves with `tensorboard --logdir runs`.

    Example: `sd-gym train SD/Classification-Mini-v0 --algo reinforce --seed 1 --set learning_rate=0.002`
    """
    imported = import_all(imports)
    with errors_as_lines():
        settings = settings_of(set_)
        with progress_bar() as progress:
            bar = progress.add_task("loading", total=steps, figures="")

            def on_progress(done: int, figures: dict[str, float]) -> None:
                if not figures:  # a search takes as many decisions as it takes
                    nonlocal bar
                    if progress.tasks[0].total is not None:
                        progress.remove_task(bar)
                        bar = progress.add_task("searching", total=None, figures="decisions scored")
                    progress.update(bar, completed=done)
                    return
                state = "learning" if done < steps else "evaluating"
                progress.update(
                    bar, completed=min(done, steps), total=steps, description=state, figures=figures_text(figures)
                )

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
                strictness=strictness,
                resume=resume,
                imports=imported,
                on_progress=on_progress,
            )
    print_result(f"{env}, {algo}, seed {seed}", result)
    if result["artefact"] is None:
        print_line(
            "No artefact (skip_policy.json) was written: this policy needs its env , as it sees more than the env "
            "observes, or its table has no export; sd-gym evaluate and compare take the run."
        )
    print_line(f"Run folder: {folder}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder that sd-gym train wrote.")],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    output: Annotated[
        Path | None, typer.Option(help="Folder to write the result, its table of instances and its picture to.")
    ] = None,
    imports: Imports = [],
) -> None:
    """Evaluate a run's policy again, on any split.

    Example: `sd-gym evaluate runs/Classification-Mini-ppo-0 --split validation`
    """
    if split not in ("train", "validation", "test"):
        raise typer.BadParameter(f"expected train, validation or test, got {split!r}", param_hint="--split")
    import_all(imports)
    from sd_gym.agents.experiment.api import evaluate as run_evaluation
    from sd_gym.agents.runs.folder import read_description

    with errors_as_lines(), status("evaluating"):
        description = read_description(run)
        result = run_evaluation(description["env"], run, split, output)
    title = [description[key] for key in ("env", "algo")]
    print_result(f"{', '.join(title)}, seed {description.get('seed')}", result)


def reduce(
    run: Annotated[Path, typer.Argument(help="Run folder that sd-gym train wrote.")],
    output: Annotated[Path, typer.Option(help="Run folder to write.")],
    codebook: Annotated[int, typer.Option(min=1, help="Different decisions at most (per stage).")] = 8,
    imports: Imports = [],
) -> None:
    """Let a run's policy choose among a few masks, so that more inputs share one and run together.

    The masks are those of its decisions that fit the training inputs best. Its operating point is selected again on the
    validation split. The result is a new run, evaluated on the test split.

    Example: `sd-gym reduce runs/Summarization-Mini-ppo-0 --codebook 8 --output runs/reduced`
    """
    import_all(imports)
    with errors_as_lines(), status("reducing"):
        from sd_gym.agents.experiment.run import reduce as reduce_run

        result = reduce_run(run, codebook, output)
    print_result(f"{run}, a codebook of {codebook}", result)
    print_line(f"Run folder: {output}")


def validate(
    what: Annotated[str, typer.Argument(metavar="RUN_OR_ENV", help="Folder of a finished run, or the id of an env.")],
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Replay a run's recorded decisions and fail on any difference; or check an env before learning on it.

    Example: `sd-gym validate runs/Classification-Mini-ppo-0`
    """
    import_all(imports)
    with errors_as_lines(), status("checking"):
        if Path(what).is_dir():
            from sd_gym.agents.experiment.replay import replay

            lines, failed = replay(Path(what)).words(), False
        else:
            from sd_gym.agents.experiment.env_check import check_env

            checks = check_env(what, settings_of(set_))
            lines, failed = [check.words() for check in checks], not all(check.passed for check in checks)
    for line in lines:
        print_line(line)
    if failed:
        raise typer.Exit(1)
