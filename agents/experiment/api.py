"""Evaluation of any policy, and training of all agents, as ``sd_gym.evaluate`` and ``sd_gym.train_all``."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment import run
from sd_gym.agents.experiment.comparison_plan import plan_comparison
from sd_gym.agents.experiment.evaluation import summary
from sd_gym.agents.experiment.exported import ExportedCore, ExportedPolicy
from sd_gym.agents.experiment.models import other_spaces, predicting
from sd_gym.agents.experiment.parallel import OnStatus, RunStatus, train_many
from sd_gym.agents.experiment.selection import Selection
from sd_gym.agents.experiment.trained import run_config
from sd_gym.agents.learning.decisions import DENSE_MARGIN, Dense, PolicyLike, SplitPolicy, Version, check_fits, versions
from sd_gym.agents.runs.folder import check_backbone, read_description, run_description
from sd_gym.agents.runs.lineage import check_not_learned
from sd_gym.agents.runs.verdict import CONFIDENCE

from sd_gym.config import EnvConfig, dotted, stored_config
from sd_gym.envs.config import load_config, make_config
from sd_gym.envs.infos import checked_split
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import unbatched
from sd_gym.files import write_json
from sd_gym.folders import contents, locked, other_content_error
from sd_gym.inference.manifest import is_exported
from sd_gym.inference.onnx import OnnxModel
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.card import FILE
from sd_gym.policy.table_export import TablePolicy
from sd_gym.registration import config_of, is_of_table
from sd_gym.tasks.splits import check_unchanged

Policy = DecisionPolicy | str | Path | Callable[[Observations], Any]
COPIED_KEYS = (
    "steps",
    "seed",
    "confidence",
    "agent_settings",
    "origins",
    "origin_seeds",
    "data",
)  # copied from the run
WRITTEN_FIRST = {"instances.csv", "config.json", "result.png"}  # by an evaluation, before its result


def train_all(
    env_ids: Sequence[str],
    algos: Sequence[str] = ("ppo", "a2c", "reinforce"),
    output: str | Path = "runs/compare",
    *,
    controls: bool = True,
    seeds: int = 10,
    steps: int = 50_000,
    confidence: float = CONFIDENCE,
    jobs: int = 1,
    ray: str | None = None,
    imports: Sequence[str] = (),
    on_status: OnStatus = lambda status: None,
    **settings: Any,
) -> list[RunStatus]:
    """Train every agent and control on every env with the same seeds: what ``sd-gym compare ENV...`` does first.

    Finished runs are kept, interrupted ones are continued, and a run that fails does not stop the others.

    Args:
        env_ids: Registered ids.
        algos: Agents' names; ``NAME-from-OTHER`` starts from the run of OTHER with the same seed.
        output: The runs are ``OUTPUT/ENV/ALGO-SEED``.
        controls: Whether to train controls: ``hull``, ``early-exit`` where it applies, ``random``, ``hash``,
            ``dense``, and the first learning agent, blind.
        seeds: Number of seeds.
        steps: Decisions to learn from.
        confidence: See ``train``.
        jobs: Processes, of one thread each; 1: this process. With more, guard your script by
            ``if __name__ == "__main__":``.
        ray: Address of a Ray cluster that trains them instead, one thread per run: ``auto``, ``local`` (starts one
            here), or any address of ``ray.init``. It needs sd_gym, and ``output`` under the same path.
        imports: Modules and files that register what is needed; import them first.
        on_status: Called whenever the status of a run changes.
        settings: Keys of the env's config, and settings of those agents that have them.

    Returns:
        The last status of each run: ``status.run.folder`` (for ``sd_gym.compare``), ``status.state``, and
        ``status.message`` if it is ``failed``.

    Raises:
        ValueError: If a name or setting is unknown, or both ``jobs`` and ``ray`` are given.
        MissingExtraError: If Ray is needed and not installed.
    """
    more = {"seeds": seeds, "steps": steps, "confidence": confidence}
    runs = plan_comparison(env_ids, algos, output=Path(output), controls=controls, settings=settings, **more)
    return train_many(runs, jobs=jobs, ray=ray, imports=imports, on_status=on_status)


def evaluate(
    env_id: str,
    policy: Policy | Sequence[Policy | Sequence[int] | NDArray] | NDArray,
    split: str = "test",
    output: str | Path | None = None,
    *,
    select: bool = False,
    confidence: float = CONFIDENCE,
    policy_flops: int | None = None,
    name: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The result of any policy on a split, as ``sd-gym train`` and ``sd-gym evaluate`` give it.

    Args:
        env_id: A registered id.
        policy: One of

            * a callable from observations, float32 ``[n, features]``, to decisions, integers ``[n, switches + 1]``, or
              to the env's actions if these differ; with several stages an observation begins with its stage, one-hot,
              and the action is of that stage;
            * a model of Stable-Baselines3, or anything with its ``predict``;
            * a ``DecisionPolicy``;
            * the folder of a run, whose env settings hold where ``settings`` has no others; a run on a table can also
              be evaluated on the env that the table was made from;
            * the folder of an export (``sd_gym.export``), whose graphs then decide and answer;
            * with ``select``, a list of policies (no folders) and of masks, each one decision for all inputs; an array
              of masks ``[n, switches + 1]`` is such a list.
        split: ``train``, ``validation`` or ``test``.
        output: Folder to write ``result.json``, ``instances.csv``, ``result.png`` and ``config.json`` to;
            ``compare`` takes it like a run. ``None``: nothing is written.
        select: Whether to select an operating point, like ``train``. The result is that of the selected point, and
            ``last_policy`` has the results of the policy as given. Points are the versions of a run's policy or of a
            ``DecisionPolicy``, or the policies of a list; a callable is one point. No point may depend on the
            validation or test split, else the guarantee is void.
        confidence: Confidence of the guarantee; see ``train``.
        policy_flops: FLOPs of one decision; ``None``: the policy's attribute ``flops`` if it has one, else they are not
            counted (``policy_flops_counted`` in the result).
        name: Name of the policy for ``compare``: results with one name are runs of one agent. ``None``: the agent's
            name for a run's folder; else the name of ``output``, and the result stands alone.
        settings: Overrides of the env's config, as for ``gym.make``.

    Returns:
        The result: see ``train``.

    Raises:
        FileNotFoundError: If there is no such run.
        FileExistsError: If ``output`` holds a result, or anything but the files of an evaluation that was cut off.
        ValueError: If a name or setting is unknown, the policy's decisions are malformed, a list is given without
            ``select``, or the data of a run have changed (unless ``settings`` name other data).

    Example:
        >>> import numpy as np, sd_gym
        >>> def dense(observations):
        ...     return np.zeros((len(observations), 13), dtype=int)
        >>> result = sd_gym.evaluate("SD/Classification-Mini-v0", dense, test_size=20)  # doctest: +SKIP
    """
    checked_split(split)
    policy = list(np.atleast_2d(policy)) if isinstance(policy, np.ndarray) else policy
    folder = None if output is None else Path(output)
    with nullcontext() if folder is None else locked(folder):
        if folder is not None:
            _check_free(folder)
        given = _given(env_id, policy, settings, select)
        core = given.core
        selection, last = Selection(core, confidence), None
        if select:
            evaluated, last = _selected(selection, given.policy, policy_flops, split)
        elif isinstance(policy, list | tuple):
            raise ValueError("expected one policy, got a list; to select from it, pass select=True")
        else:
            evaluated = _policy_like(given.policy, policy_flops, core)
        splits = list(dict.fromkeys(("train", split)))  # observations are standardised by the training split
        result = run.measure(selection, evaluated, split, splits, folder, last)
        if folder is not None:
            description = _description(env_id, given, name, folder, splits)
            if select:
                description["confidence"] = confidence
            write_json(folder / "config.json", description)
            run.write_result(result, core, folder)
        return result


def _check_free(folder: Path) -> None:
    """Raise ``FileExistsError`` unless a folder is free for a result, or has what was cut off."""
    if (folder / "result.json").exists():
        raise FileExistsError(f"{folder} holds a result; choose another output")
    if contents(folder) and not _was_cut_off(folder):
        raise other_content_error(folder, "place for a result")


def _was_cut_off(folder: Path) -> bool:
    """Whether a folder holds what an evaluation wrote before it was killed, and nothing else."""
    instances = folder / "instances.csv"
    if not {instances.name} <= set(contents(folder)) <= WRITTEN_FIRST:
        return False
    with instances.open(encoding="utf-8", errors="replace") as lines:
        return lines.readline().startswith("id,level,")


def _selected(
    selection: Selection, policy: Any, flops: int | None, split: str
) -> tuple[PolicyLike | SplitPolicy, dict[str, Any]]:
    """The selected policy, and the results of the policy as given (for a list, of the best one on policy rows)."""
    core = selection.core
    given = policy if isinstance(policy, list | tuple) else [policy]
    points = [version for item in given for version in _versions(item, flops, core)]
    chosen, dense = selection.select(points), Dense(core)
    if chosen is None and selection.origin is not None:
        dense = _policy_like(selection.origin.with_margin(DENSE_MARGIN), flops, core)
    searched = selection.as_searched()
    as_given = (searched.policy if searched else dense) if policy is given else _policy_like(policy, flops, core)
    return chosen.policy if chosen else dense, summary(core, as_given, split)


def _versions(policy: Any, flops: int | None, core: Core) -> list[Version]:
    if isinstance(policy, DecisionPolicy | TablePolicy):
        points = versions(core, policy)
        return [point._replace(policy=_policy_like(point.policy, flops, core)) for point in points]
    if isinstance(policy, list | tuple | np.ndarray):  # a mask
        flops, mask = flops or 0, policy
        policy = lambda observations: np.tile(mask, (len(unbatched(observations)), 1))  # noqa: E731
    return [Version(_policy_like(policy, flops, core))]


def _policy_like(policy: Any, flops: int | None, core: Core) -> Any:
    """A policy as ``PolicyLike`` or ``SplitPolicy``; ``flops``: see ``evaluate``."""
    if isinstance(policy, ExportedPolicy):
        return policy
    if isinstance(policy, DecisionPolicy | TablePolicy):
        check_fits(policy, core)
        if flops is None and isinstance(policy, DecisionPolicy):
            return policy
        return SimpleNamespace(decide=policy.decide, flops=policy.flops if flops is None else flops)
    act: Any = predicting(policy, core) if callable(getattr(policy, "predict", None)) else policy
    if not callable(act):
        raise ValueError(
            "expected a policy: a callable from observations to decisions, a model with predict(), a DecisionPolicy or "
            f"the folder of a run; got {policy!r}"
        )

    def decide(observations: Any) -> NDArray:
        try:
            choices = core.actions.decisions(act(observations), len(unbatched(observations)))
        except ValueError as error:
            raise ValueError(f"{error}".rstrip(".") + other_spaces(policy, core)) from error
        return core.stage_actions.observed_to_decisions(observations, choices)

    return SimpleNamespace(decide=decide, flops=getattr(policy, "flops", None) if flops is None else flops)


class _Origin(NamedTuple):
    """The run of a policy; if it is on a table and the env is not, also its artefact and the artefact's env."""

    folder: Path
    description: dict[str, Any]
    exported: SkipPolicy | None
    exported_env: str | None


class _Given(NamedTuple):
    """What to evaluate: a policy, or several, on an env; the run that it is of, and whether the env has its data."""

    core: Core
    policy: Any
    origin: _Origin | None = None
    same_data: bool = False


def _given(env_id: str, policy: Any, settings: dict[str, Any], select: bool) -> _Given:
    """The policy and its env; raises as ``evaluate`` does."""
    if is_exported(policy):
        if select:
            raise ValueError("an exported policy was selected already; select from the run that it was made of")
        model = OnnxModel(Path(policy))
        return _Given(ExportedCore(_config(env_id, model.manifest["env"], settings), model), ExportedPolicy(model))
    origin = _origin(env_id, policy)
    core = shared_core(_config_of_origin(env_id, origin, settings))
    if origin is None:
        return _Given(core, policy)
    same_data = _check_origin(origin, env_id, core, dotted(settings))
    if select:
        check_not_learned(origin.folder, core.data, str(policy))
    network = origin.exported.network if origin.exported else DecisionPolicy.load(origin.folder)
    return _Given(core, network, origin, same_data)


def _description(env_id: str, given: _Given, name: str | None, folder: Path, splits: list[str]) -> dict[str, Any]:
    """``config.json`` of the result."""
    core, origin = given.core, given.origin
    names = {"env": env_id, "algo": name or (origin.description["algo"] if origin else folder.resolve().name)}
    names |= {"named": name is not None or origin is not None, "agent_settings": {}}
    names["control"] = bool(origin and origin.description["control"])
    description = run_description(names, core.config, core.backbone, core.data, splits)
    if origin is not None and given.same_data:  # compare then counts it as the same seed as the run
        description |= {key: origin.description[key] for key in COPIED_KEYS if key in origin.description}
        was = stored_config(origin.description["env_config"], str(origin.folder))
        description["env_config"]["reward"]["objective"] = was.reward.objective
    return description


def _origin(env_id: str, policy: object) -> _Origin | None:
    """The run, if the policy is a folder; raises ``ValueError`` if its table does not say which masks it decides on."""
    if not isinstance(policy, str | Path):
        return None
    folder, exported = Path(policy), None
    description = read_description(folder)
    if description["env_config"].get("table") is not None and not is_of_table(config_of(env_id)):
        if (folder / FILE).is_file():
            exported = SkipPolicy.from_pretrained(folder)
        elif not DecisionPolicy.load(folder).switches:  # else it decides switch by switch, also on the env itself
            raise ValueError(
                f"{folder}: its policy decides by indices of masks, and no {FILE} beside it says which masks. Its "
                "table has no export, so evaluate the policy on the table (docs/tables.md)"
            )
    return _Origin(folder, description, exported, exported and exported.card["env"]["id"])


def _check_origin(origin: _Origin, env_id: str, core: Core, settings: dict[str, Any]) -> bool:
    """Whether the env has the run's data; raises ``ValueError`` if they, or the backbone, have changed since."""
    names_data = any(key == "table" or key.startswith("data.") for key in settings)
    same_data = env_id in (origin.description["env"], origin.exported_env) and not names_data
    if same_data:
        check_unchanged(origin.folder, origin.description["data"], core.data)
    if origin.exported or (same_data and "backbone.name" not in settings):
        check_backbone(origin.folder, origin.description["weights"], core.backbone)
    return same_data


def _config_of_origin(env_id: str, origin: _Origin | None, settings: dict[str, Any]) -> EnvConfig:
    """The env's config: that of the run if the run is on this env or on a table of it."""
    if origin is not None and origin.description["env"] == env_id:
        return run_config(origin.description, settings)
    exported = None if origin is None or origin.exported_env != env_id else origin.exported
    if exported is not None and "backbone.name" not in dotted(settings, env_id):
        exported.check_reachable()
    return _config(env_id, exported and exported.card["env"], settings)


def _config(env_id: str, stored: dict[str, Any] | None, settings: dict[str, Any]) -> EnvConfig:
    """An env's config: the ``stored`` one of a policy of this env, or the env's own, with overrides."""
    if stored is not None and stored["id"] == env_id:
        return make_config({**dotted(stored), **dotted(settings, env_id)}, env_id)
    return load_config(config_of(env_id), settings)
