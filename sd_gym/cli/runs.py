"""Commands about one run: it is trained, evaluated, reduced, played again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sd_gym.cli.terminal import (
    Imports,
    console,
    errors_as_lines,
    import_all,
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
            help="ppo, a2c (the env's reward); ppo_lagrangian (a penalty that learns); ppo_lex, reinforce "
            "(quality first); imitation (of a search); "
            "controls: static, every-other, early-exit, confidence, cascade, oracle, dense, random, hash; or, as "
            "blind-NAME, an agent that sees nothing; or your own, registered by what --import imports."
        ),
    ] = "ppo",
    steps: Annotated[int, typer.Option(min=1, help="Decisions to learn from.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Of the agent and of the instances drawn.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Run folder [default: runs/TASK-ALGO-SEED].")] = None,
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
    `sd-gym train SD/Classification-Mini-v0 --algo ppo_lex --set start=runs/searched`

    An agent of your own: `sd-gym train SD/Classification-Mini-v0 --import examples/own_agent.py --algo gradient`

    Watch the curves with `tensorboard --logdir runs`.
    """
    imported = import_all(imports)
    with errors_as_lines():
        settings = settings_of(set_)
        with progress_bar() as progress:
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
                progress.update(bar, completed=min(done, steps), total=steps, description=state, figures=shown)

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
        console.print(
            "No artefact (skip_policy.json) was written: what decides here (by more than the env's own observations, "
            "or on a table that no policy can leave) cannot leave its env; sd-gym evaluate and compare take the run.",
            style="dim",
        )
    console.print(f"Run folder: {folder}", highlight=False, soft_wrap=True)


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
    codebook: Annotated[int, typer.Option(min=1, help="Different decisions at most, of several stages at each.")] = 8,
    imports: Imports = [],  # noqa: B006  (typer wants a list)
) -> None:
    """Have a run's policy decide among a few masks, so that inputs agree and run together.

    The masks are those of its decisions that serve the training inputs best; how boldly it decides among them is
    selected on the validation split anew. It becomes a run of its own, evaluated on the test split.

    Example: `sd-gym reduce runs/Summarization-Mini-ppo-0 --codebook 8 --output runs/reduced`
    """
    import_all(imports)
    with errors_as_lines(), status("reducing"):
        from sd_gym.agents.experiment.run import reduce as reduce_run

        result = reduce_run(run, codebook, output)
    print_result(f"{run}, a codebook of {codebook}", result)
    console.print(f"Run folder: {output}", highlight=False, soft_wrap=True)


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
    import_all(imports)
    with errors_as_lines(), status("playing again"):
        if Path(what).is_dir():
            from sd_gym.agents.experiment.replay import replay

            lines, failed = replay(Path(what)).lines(), False
        else:
            from sd_gym.agents.experiment.env_checker import check_env

            checks = check_env(what, settings_of(set_))
            lines, failed = [check.line() for check in checks], not all(check.passed for check in checks)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)
