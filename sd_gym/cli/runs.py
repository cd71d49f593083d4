"""Commands for one run: train, evaluate, reduce, export and validate it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from sd_gym.cli import terminal
from sd_gym.cli.terminal import Confidence, Imports, Places, Settings


def train(
    env: Annotated[str, Argument(help="Env id, such as SD/Classification-Mini-v0.")],
    algo: Annotated[
        str,
        Option(
            help="ppo, a2c (the env's reward); ppo_lagrangian (a learned penalty); ppo_lex, reinforce (quality first); "
            "imitation (of a search); controls: hull, static, every-other, early-exit, confidence, cascade, "
            "full-information, oracle, dense, random, hash (of serving envs: fixed, threshold, staircase, foresight); "
            "blind-NAME, without the input; or an agent of --import."
        ),
    ] = "ppo",
    steps: Annotated[
        int, Option(min=1, help="Decisions to learn from; agents that search (imitation, static) ignore it.")
    ] = 50_000,
    seed: Annotated[int, Option(help="Seed of the agent and of the drawn instances.")] = 0,
    output: Annotated[Path | None, Option(help="Run folder [default: runs/TASK-ALGO-SEED].")] = None,
    confidence: Confidence = 0.95,
    resume: Annotated[bool, Option(help="Resume an interrupted run.")] = False,
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Train an agent on an env, then evaluate it on the test split.

    `--set start=RUN` starts from the policy of another run. Watch the curves with `tensorboard --logdir runs`.

    Example: `sd-gym train SD/Classification-Mini-v0 --algo reinforce --seed 1 --set learning_rate=0.002`
    """
    imported = terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.progress_bar() as progress:
        bar = progress.add_task("loading", total=None, figures="")

        def on_progress(done: int, figures: dict[str, float]) -> None:
            state, shown = "learning" if done < steps else "evaluating", terminal.figures_text(figures)
            total, completed = steps, min(done, steps)
            if not figures:  # a search, or dense passes before learning, have no fixed number of steps
                total, completed = None, done
                state, shown = ("searching", "decisions scored") if done else ("running densely", "")
            progress.update(bar, completed=completed, description=state, figures=shown)
            progress.tasks[0].total = total

        import sd_gym  # noqa: F401  (registers the ids)
        from sd_gym.agents.experiment.run import default_folder
        from sd_gym.agents.experiment.run import train as run_training

        settings, folder = terminal.settings_of(set_, call=run_training), output or default_folder(env, algo, seed)
        options = {"confidence": confidence, "resume": resume, "imports": imported, "on_progress": on_progress}
        result = run_training(env, algo, folder, steps=steps, seed=seed, **options, **settings)
    terminal.print_result(f"{env}, {algo}, seed {seed}", result)
    if result["artefact"] is None and "goodput" not in result:
        terminal.print_line(
            "No artefact (skip_policy.json) was written: this policy needs its env, because it uses more than the "
            "observation, or its table has no export. sd-gym evaluate and compare accept the run."
        )
    terminal.print_line(f"Run folder: {folder}")


def evaluate(
    run: Annotated[Path, Argument(help="Folder written by sd-gym train or sd-gym export.")],
    split: Annotated[Literal["train", "validation", "test"], Option()] = "test",
    output: Annotated[Path | None, Option(help="Folder for the result, its instances and its picture.")] = None,
    set_: Settings = [],
    imports: Imports = [],
) -> None:
    """Evaluate a run's policy, or its export, on any split; `--set` changes its env, such as the data or the backbone.

    Example: `sd-gym evaluate runs/Classification-Mini-ppo-0 --split validation`
    """
    terminal.import_all(imports)
    from sd_gym.agents.experiment.api import evaluate as run_evaluation
    from sd_gym.agents.runs.folder import read_description
    from sd_gym.inference.manifest import is_exported, read_manifest

    with terminal.errors_as_lines(), terminal.status("evaluating"):
        if is_exported(run):
            manifest = read_manifest(run)
            env = manifest["env"]["id"]
            algo = f"{manifest['run']['algo']} in ONNX"
            seed = manifest["run"].get("seed")
        else:
            description = read_description(run)
            env = description["env"]
            algo = description["algo"]
            seed = description.get("seed")
        settings = terminal.settings_of(set_, call=run_evaluation)
        result = run_evaluation(env, run, split, output, **settings)
    terminal.print_result(f"{env}, {algo}, seed {seed}", result)


def reduce(
    run: Annotated[Path, Argument(help="Run folder that sd-gym train wrote.")],
    output: Annotated[Path, Option(help="Run folder to write.")],
    codebook: Annotated[int, Option(min=1, help="Largest number of different decisions (per stage).")] = 8,
    set_: Places = [],
    imports: Imports = [],
) -> None:
    """Restrict a run's policy to a few masks, so that more inputs share a mask and run together.

    The masks are those of its decisions that fit the training inputs best. The operating point is selected again on the
    validation split. The result is a new run, evaluated on the test split.

    Example: `sd-gym reduce runs/Summarization-Mini-ppo-0 --codebook 8 --output runs/reduced`
    """
    terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.status("reducing"):
        from sd_gym.agents.experiment.reduction import reduce as reduce_run

        result = reduce_run(run, codebook, output, **terminal.settings_of(set_, call=reduce_run))
    terminal.print_result(f"{run}, a codebook of {codebook}", result)
    terminal.print_line(f"Run folder: {output}")


def export(
    run: Annotated[Path, Argument(help="Run folder, or saved policy.")],
    output: Annotated[Path, Option(help="Folder to write.")],
    masks: Annotated[int, Option(min=1, help="Largest number of masks; a policy with more is reduced first.")] = 8,
    int8: Annotated[
        bool, Option("--int8", help="Use 8-bit integers in matrix products; decisions stay as they are.")
    ] = False,
    backbone: Annotated[str | None, Option(help="Where the backbone is [default: where it was in training].")] = None,
    imports: Imports = [],
) -> None:
    """Write a policy and its backbone as graphs for ONNX Runtime, which answers without torch.

    Needs `pip install 'sd-gym[onnx]'`, and an encoder that classifies, scores or extracts. A policy that decides among
    more masks is reduced as by `sd-gym reduce`: its operating point is selected again. `sd-gym run` and
    `sd_gym.onnx.load` choose among the operating points.

    Example: `sd-gym export runs/reviews --output reviews-onnx --masks 8 --int8`
    """
    terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.status("exporting"), TemporaryDirectory() as folder:
        from sd_gym.agents.experiment.reduction import reduce as reduce_run
        from sd_gym.inference.choices import decided_masks
        from sd_gym.inference.export import check_exportable
        from sd_gym.inference.export import export as export_policy
        from sd_gym.policy.artefact import SkipPolicy

        policy = SkipPolicy.from_pretrained(run)
        among = decided_masks(policy)
        if (among is None or len(among) > masks) and (run / "config.json").is_file():
            check_exportable(policy, output, backbone)  # before minutes of reducing
            terminal.say(f"the policy decides among more than {masks} masks, so it is reduced to those that fit best")
            reduce_run(run, masks, Path(folder, "reduced"), **({} if backbone is None else {"backbone": backbone}))
            policy = SkipPolicy.from_pretrained(Path(folder, "reduced"))
        manifest = export_policy(policy, output, masks=masks, int8=int8, backbone=backbone)
    points = len(manifest["operating_points"])
    terminal.print_line(f"{len(manifest['masks'])} masks, dense among them, {points} operating points: {output}")
    terminal.print_line(f"Judge it: sd-gym evaluate {output}")


def validate(
    what: Annotated[str, Argument(metavar="RUN_OR_ENV", help="Folder of a finished run, or the id of an env.")],
    set_: Places = [],
    imports: Imports = [],
) -> None:
    """Replay a run's recorded decisions and fail on any difference; or check an env before learning on it.

    Example: `sd-gym validate runs/Classification-Mini-ppo-0`
    """
    terminal.import_all(imports)
    with terminal.errors_as_lines(), terminal.status("checking"):
        if Path(what).is_dir():
            from sd_gym.agents.experiment.replay import replay

            lines, failed = replay(Path(what), terminal.settings_of(set_)).lines(), False
        else:
            from sd_gym.envs.checker import check_env

            checks = check_env(what, terminal.settings_of(set_))
            lines, failed = [check.line() for check in checks], not all(check.passed for check in checks)
    for line in lines:
        terminal.print_line(line)
    if failed:
        raise typer.Exit(1)
