"""Tuning an agent's settings on an env: quality first, then the fewest FLOPs, both on the validation split."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from sd_gym.agents.experiment.comparison_plan import PlannedRun
from sd_gym.agents.experiment.evaluation import summary
from sd_gym.agents.experiment.parallel import RunStatus, train_many
from sd_gym.agents.experiment.run import load_run, split_settings
from sd_gym.agents.registry import agent_class
from sd_gym.agents.runs.verdict import ONE_SIDED_95

from sd_gym.files import as_json, write_text
from sd_gym.folders import contents, foreign, locked
from sd_gym.registration import config_of

if TYPE_CHECKING:
    from optuna import Study, Trial

STUDY, BEST = "study.db", "best.yaml"
FOLDER, CUT_OFF = "folder", "cut off"  # of a trial, in the study


class TrialResult(NamedTuple):
    """A trial that is over.

    Attributes:
        number: Of the trial.
        settings: What was tried.
        score: The lower the better (``score``); ``None``: it failed.
        message: Why.
    """

    number: int
    settings: dict[str, Any]
    score: float | None
    message: str = ""


def tune(
    env_id: str,
    algo: str,
    output: str | Path,
    *,
    trials: int = 20,
    seeds: int = 1,
    steps: int = 20_000,
    strictness: float = ONE_SIDED_95,
    imports: Sequence[str] = (),
    on_trial: Callable[[TrialResult], None] = lambda tried: None,
    **settings: Any,
) -> Path:
    """Search an agent's settings on an env with Optuna: ``sd-gym tune``.

    The first trial has the defaults. What a trial is worth is read off the validation split (``score``); the test split
    plays no part. Each trial's runs are in a folder of their own. A search that was cut off goes on, the trial that was
    cut off too; with more trials it goes on from where it ended.

    Args:
        env_id: A registered id.
        algo: An agent whose ``Settings`` have a ``space``.
        output: Folder of the study (``study.db``), its runs and the best settings (``best.yaml``).
        trials: How many in all, with those that the folder holds.
        seeds: Runs of each trial; their scores are averaged.
        steps: Decisions that each run learns from.
        strictness: Of selection.
        imports: Modules and files that register what is needed; import them first.
        on_trial: Called after each trial.
        settings: Keys of the env's config, and settings of the agent that are not searched then.

    Returns:
        The file with the best settings where they differ from the defaults: a YAML mapping, by
        keyword for ``sd_gym.train``, by ``--set`` for ``sd-gym train``.

    Raises:
        ValueError: If Optuna is not installed, a name or setting is unknown, there is nothing to search, no trial came
            to an end, or the folder holds another study.
        FileExistsError: If the folder holds anything else.
    """
    if find_spec("optuna") is None:
        raise ValueError("to tune, Optuna has to be installed: pip install 'sd-gym[tune]'")
    config_of(env_id)
    split_settings(algo, settings)
    space = {key: values for key, values in agent_class(algo).Settings.space.items() if key not in settings}
    if not space:
        raise ValueError(f"{algo} has nothing to search; expected an agent whose Settings have a space")
    folder = Path(output)

    def planned(number: int, found: dict[str, Any]) -> list[PlannedRun]:
        every = {"settings": {**settings, **found}, "strictness": strictness}
        return [PlannedRun(env_id, algo, folder / f"trial-{number}" / str(n), steps, n, **every) for n in range(seeds)]

    with locked(folder):
        if contents(folder) and not (folder / STUDY).exists():
            raise foreign(folder, "folder of a study")
        what = {"env": env_id, "algo": algo, "seeds": seeds, "steps": steps, "strictness": strictness}
        study = _study(folder, {**what, "settings": settings})
        _begin(study, {key: agent_class(algo).Settings.model_fields[key].default for key in space})
        while _tried(study) < trials:
            trial = study.ask()
            found = {key: _suggest(trial, key, values) for key, values in space.items()}
            number = trial.user_attrs.get(FOLDER, trial.number)
            on_trial(_tell(study, trial, train_many(planned(number, found), imports=imports), found))
        return _write_best(study, folder / BEST, algo, what)


def score(validated: dict[str, Any]) -> float:
    """What a policy is worth by what it does on the validation split: the lower, the better.

    Where the quality is kept, its share of the FLOPs; where not, more than any of those, and the more the more is lost.
    """
    if validated["quality_kept"]:
        return validated["flops_ratio_with_policy"]
    return 2.0 + max(0.0, -validated["quality_difference"])


def _study(folder: Path, what: dict[str, Any]) -> Study:
    """The study in a folder, new or to go on with.

    Raises:
        ValueError: If it is another one.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = f"sqlite:///{folder.resolve() / STUDY}"
    study = optuna.create_study(study_name="sd_gym", storage=storage, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # going on draws nothing twice
    now, was = as_json(what), study.user_attrs.get("what")
    if was not in (None, now):
        raise ValueError(f"{folder} holds another study, {was}, and this one is {now}; choose another --output")
    study.set_user_attr("what", now)
    return study


def _begin(study: Study, defaults: dict[str, Any]) -> None:
    """The defaults come first; a trial that was cut off goes on."""
    from optuna.trial import TrialState

    if not study.trials:
        study.enqueue_trial(defaults)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        storage = study._storage
        storage.set_trial_user_attr(trial._trial_id, CUT_OFF, True)
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, {FOLDER: trial.user_attrs.get(FOLDER, trial.number)})


def _tried(study: Study) -> int:
    from optuna.trial import TrialState

    over = study.get_trials(states=[TrialState.COMPLETE, TrialState.FAIL])
    return sum(CUT_OFF not in trial.user_attrs for trial in over)


def _suggest(trial: Trial, key: str, values: list[Any] | tuple[float, float]) -> Any:
    if isinstance(values, tuple):
        return trial.suggest_float(key, *values, log=True)
    return trial.suggest_categorical(key, values)


def _tell(study: Study, trial: Trial, words: list[RunStatus], found: dict[str, Any]) -> TrialResult:
    """Tell the study what became of a trial's runs."""
    from optuna.trial import TrialState

    for word in words:
        if word.message:
            study.tell(trial, state=TrialState.FAIL)
            return TrialResult(trial.number, found, None, word.message)
    reached = fmean(score(_validated(word.run.folder)) for word in words)
    study.tell(trial, reached)
    return TrialResult(trial.number, found, reached)


def _validated(folder: Path) -> dict[str, Any]:
    _, core, policy = load_run(folder)
    return summary(core, policy, "validation")


def _write_best(study: Study, file: Path, algo: str, what: dict[str, Any]) -> Path:
    """Write the best settings where they differ from the defaults."""
    from optuna.trial import TrialState

    over = study.get_trials(states=[TrialState.COMPLETE])
    if not over:
        raise ValueError(f"no trial of {file.parent} came to an end; the messages say why")
    fields, best = agent_class(algo).Settings.model_fields, study.best_trial
    settings = {key: value for key, value in best.params.items() if value != fields[key].default}
    lines = [
        f"# Found by: {shlex.join(sys.argv)}",
        f"# {len(over)} trials of {what['steps']} decisions, seeds {what['seeds']}; on validation the best (trial "
        f"{best.number}) reached {best.value:.4f},",
        f"# trial {over[0].number} {over[0].value:.4f}: share of the FLOPs, 2 and more if the quality is not kept.",
    ]
    write_text(file, "\n".join([*lines, yaml.safe_dump(settings, sort_keys=False)]))
    return file
