"""Tuning of an agent's settings on an env: quality first, then FLOPs, both on the validation split."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import yaml
from sd_gym.agents.experiment.comparison_plan import PlannedRun
from sd_gym.agents.experiment.evaluation import summary
from sd_gym.agents.experiment.parallel import RunStatus, train_many
from sd_gym.agents.experiment.run import split_settings
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.registry import agent_class, make_settings
from sd_gym.agents.runs.verdict import CONFIDENCE

from sd_gym import cluster
from sd_gym.errors import one_line
from sd_gym.files import as_json, write_text
from sd_gym.folders import contents, locked, other_content_error
from sd_gym.registration import config_of, plain_id

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY, BEST = "study.db", "best.yaml"
HIGHEST_CONFIDENCE = 0.9999  # as of ``sd-gym train``
FOLDER = "folder"  # attribute of a trial that repeats another: the number of that one, in whose folder it goes on


class TrialResult(NamedTuple):
    """A finished trial: its settings, and its score (lower is better); or, if it failed, ``None`` and the message.

    ``number`` is that of its folder.
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
    confidence: float = CONFIDENCE,
    jobs: int = 1,
    ray: str | None = None,
    imports: Sequence[str] = (),
    on_trial: Callable[[TrialResult], None] = lambda trial: None,
    **settings: Any,
) -> Path:
    """Search an agent's settings on an env with Optuna: ``sd-gym tune``.

    The first trial has the defaults. Trials are scored on the validation split (``score``), never on the test split.
    Each trial's runs are in a folder of their own. An interrupted search is resumed, and a finished one can go on
    with more trials; trials that were interrupted or failed are repeated.

    Args:
        env_id: A registered id.
        algo: An agent whose ``Settings`` have a ``space``.
        output: Folder of the study (``study.db``), its runs and the best settings (``best.yaml``).
        trials: Trials in all, including those in the folder that succeeded.
        seeds: Runs of each trial; their scores are averaged.
        steps: Decisions that each run learns from.
        confidence: Confidence of selection.
        jobs: Processes, of one thread each, for runs of several trials at once.
        ray: Address of a Ray cluster that trains them instead; see ``sd_gym.train_all``.
        imports: Modules and files that register what is needed; import them first.
        on_trial: Called after each trial.
        settings: Keys of the env's config, and settings of the agent, which are then not searched.

    Returns:
        The file with the best settings that differ from the defaults: a YAML mapping for ``sd_gym.train``. All trials
        have seen the rows of the guarantee, so it has a ``confidence`` that allows for their number (Bonferroni).

    Raises:
        ValueError: If Optuna is not installed, a name or setting is unknown, there is nothing to search, no trial
            succeeded, the folder holds another study, or ``study.db`` is damaged.
        FileExistsError: If the folder holds anything else.
    """
    if find_spec("optuna") is None:
        raise ValueError("to tune, Optuna has to be installed: pip install 'sd-gym[tune]'")
    env_id = plain_id(env_id)
    config_of(env_id)
    defaults = make_settings(algo, split_settings(algo, settings)[1]).model_dump()  # others with a start
    space = {key: values for key, values in agent_class(algo).Settings.space.items() if key not in settings}
    if not space:
        raise ValueError(f"{algo} has nothing to search; expected an agent whose Settings have a space")
    folder = Path(output)

    with locked(folder), _naming(folder / STUDY):
        if contents(folder) and not (folder / STUDY).exists():
            raise other_content_error(folder, "folder of a study")
        what = {"env": env_id, "algo": algo, "seeds": seeds, "steps": steps, "confidence": confidence}
        study = _study(folder, {**what, "settings": settings})
        _enqueue(study, {key: defaults[key] for key in space})
        at_once = -(-(jobs if ray is None else cluster.cores(cluster.connect(ray))) // seeds)
        failed = 0
        while True:
            left = trials - failed - len(_complete(study))
            asked = [study.ask(_distributions(space)) for _ in range(min(left, at_once))]
            if not asked:
                break
            places = [folder / f"trial-{_number(trial)}" for trial in asked]
            runs = [
                PlannedRun(env_id, algo, place / str(seed), steps, seed, {**settings, **trial.params}, confidence)
                for place, trial in zip(places, asked, strict=True)
                for seed in range(seeds)
            ]
            statuses = train_many(runs, jobs=jobs, ray=ray, imports=imports)
            for number, trial in enumerate(asked):
                result = _record(study, trial, statuses[number * seeds : (number + 1) * seeds])
                failed += result.score is None
                on_trial(result)
        return _write_best(study, folder / BEST, defaults, what)


def score(validated: dict[str, Any]) -> float:
    """The score of a policy on the validation split; lower is better.

    It is the FLOPs ratio if the quality is kept; else 2 plus the loss.
    """
    if validated["quality_kept"]:
        return validated["flops_ratio_with_policy"]
    return 2.0 + max(0.0, -validated["quality_difference"])


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn errors of a study's file into one that names it."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = error.__cause__ or error
        cause = getattr(cause, "orig", cause)  # SQLAlchemy's own message has the whole statement
        problem = f"{file} cannot be read or written ({one_line(cause)})"
        raise ValueError(f"{problem}; free the disk if it is full, else choose another --output") from error


def _study(folder: Path, what: dict[str, Any]) -> Study:
    """The study in a folder, new or to resume; raises ``ValueError`` if it is another one."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = f"sqlite:///{quote(str(folder.resolve() / STUDY))}"
    study = optuna.create_study(study_name="sd_gym", storage=storage, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))  # a resumed study draws other numbers
    now, was = as_json(what), study.user_attrs.get("what")
    if was not in (None, now):
        raise ValueError(f"{folder} holds another study, {was}, and this one is {now}; choose another --output")
    study.set_user_attr("what", now)
    return study


def _enqueue(study: Study, defaults: dict[str, Any]) -> None:
    """Enqueue the defaults first, and again what was interrupted or failed, in its folder."""
    from optuna.trial import TrialState

    if not study.trials:
        study.enqueue_trial(defaults)
    for number, trial in {_number(trial): trial for trial in study.trials}.items():  # the last one of each folder
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        # If it was killed as it was asked for, what was enqueued is not yet all in its parameters.
        parameters = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and parameters:
            study.enqueue_trial(parameters, {FOLDER: number})


def _number(trial: Trial | FrozenTrial) -> int:
    return trial.user_attrs.get(FOLDER, trial.number)


def _complete(study: Study) -> list[FrozenTrial]:
    return sorted((trial for trial in study.trials if trial.state.name == "COMPLETE"), key=_number)


def _distributions(space: dict[str, list[Any] | tuple[float, float]]) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        key: FloatDistribution(*values, log=True) if isinstance(values, tuple) else CategoricalDistribution(values)
        for key, values in space.items()
    }


def _record(study: Study, trial: Trial, statuses: list[RunStatus]) -> TrialResult:
    from optuna.trial import TrialState

    if messages := [status.message for status in statuses if status.message]:
        study.tell(trial, state=TrialState.FAIL)
        return TrialResult(_number(trial), trial.params, None, messages[0])
    confidence = statuses[0].run.confidence
    policies = (load_run(status.run.folder)[1:] for status in statuses)
    mean = fmean(score(summary(core, policy, "validation", confidence)) for core, policy in policies)
    study.tell(trial, mean)
    return TrialResult(_number(trial), trial.params, mean)


def _write_best(study: Study, file: Path, defaults: dict[str, Any], what: dict[str, Any]) -> Path:
    complete = _complete(study)
    if not complete:
        raise ValueError(f"all trials of {file.parent} failed; see their messages, then repeat the command")
    first, best = complete[0], study.best_trial
    settings = {key: value for key, value in best.params.items() if value != defaults[key]}
    confidence = min(HIGHEST_CONFIDENCE, round(1 - (1 - what["confidence"]) / len(complete), 6))
    settings |= {} if confidence == CONFIDENCE else {"confidence": confidence}
    lines = [
        f"# Found by: {json.dumps(shlex.join(sys.argv))}",
        f"# {len(complete)} trials of {what['steps']} decisions, seeds {what['seeds']}. Score on validation of the "
        f"best (trial {_number(best)}): {best.value:.4f},",
        f"# of trial {_number(first)}: {first.value:.4f}. FLOPs ratio, or 2 and more if quality is not kept.",
        f"# All trials have seen the rows of the guarantee: {confidence:g} for one is {what['confidence']:g} for all.",
    ]
    write_text(file, "\n".join([*lines, yaml.safe_dump(settings, sort_keys=False)]))
    return file
