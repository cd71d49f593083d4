"""Training and evaluation from Python, as ``sd_gym.train`` and ``sd_gym.evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sd_gym.agents.experiment import run
from sd_gym.agents.experiment.comparison_plan import plan_comparison
from sd_gym.agents.experiment.evaluation import summary
from sd_gym.agents.experiment.exported import ExportedCore, ExportedPolicy, exported_config, is_exported
from sd_gym.agents.experiment.parallel import OnStatus, RunStatus, train_many
from sd_gym.agents.experiment.selection import Selection
from sd_gym.agents.learning.decisions import (
    DENSE_MARGIN,
    Dense,
    PolicyLike,
    SplitPolicy,
    Version,
    check_fits,
    versions,
)
from sd_gym.agents.runs.folder import check_backbone, read_description
from sd_gym.agents.runs.verdict import CONFIDENCE

from sd_gym.config import EnvConfig, dotted, stored_config
from sd_gym.envs.config import load_config, make_config
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import each
from sd_gym.files import write_json
from sd_gym.folders import MARKER, contents, foreign, locked
from sd_gym.inference.onnx import OnnxModel
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.card import FILE
from sd_gym.policy.table_export import TablePolicy
from sd_gym.registration import config_of, is_of_table
from sd_gym.tasks.data import SPLITS
from sd_gym.tasks.splits import check_unchanged
from sd_gym.version import __version__

Policy = DecisionPolicy | str | Path | Callable[[Observations], Any]
KEPT = ("steps", "seed", "confidence", "agent_settings", "data")  # of a run's description, by its evaluation


def train(
    env_id: str,
    algo: str = "ppo",
    output: str | Path | None = None,
    *,
    steps: int = 50_000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    resume: bool = False,
    imports: Sequence[str] = (),
    on_progress: Callable[[int, dict[str, float]], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train an agent, select its best policy on validation, and evaluate that on the test split: ``sd-gym train``.

    Args:
        env_id: A registered id.
        algo: An agent's name.
        output: Run folder; ``None``: ``default_folder``.
        steps: Decisions to learn from.
        seed: Of the agent and of the instances drawn.
        confidence: Of the guarantee that the selected policy loses less than the env's ``epsilon``, one-sided.
        resume: Whether to go on with an interrupted run.
        imports: Modules and files that register what the run needs, to be named by errors where they are missing.
        on_progress: Called after each rollout with (steps so far, figures to show).
        settings: Keys of the env's config and settings of the agent.

    Returns:
        The result, as in the folder's ``result.json``: ``quality``, ``quality_ref`` (dense), ``flops_ratio``,
        ``flops_ratio_with_policy``, the verdict ``quality_kept`` at ``epsilon``, ``quality_difference_interval``,
        ``by_difficulty``, ``time`` by batch size, and more. ``guarantee`` says in words what was selected on how many
        rows, and ``last_policy`` how the policy as learned does.

    Raises:
        FileExistsError: If the folder holds a finished run, an interrupted one without ``resume``, or anything else.
        ValueError: If a name or setting is unknown, the data of any split are malformed, or the run to resume is
            another one, on other data, or damaged.
    """
    folder = default_folder(env_id, algo, seed) if output is None else Path(output)
    options: dict[str, Any] = {"steps": steps, "seed": seed, "confidence": confidence, "resume": resume}
    options |= {"settings": settings, "imports": imports, "on_progress": on_progress}
    return run.train(env_id, algo, folder, **options)


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

    Finished runs are kept, interrupted ones go on, and a run that fails does not stop the others.

    Args:
        env_ids: Registered ids.
        algos: Agents' names; ``NAME-from-OTHER`` begins with the run of OTHER with the same seed.
        output: The runs are ``OUTPUT/ENV/ALGO-SEED``.
        controls: Whether controls are trained as well: ``hull``, ``early-exit`` where it applies, ``random``,
            ``hash``, ``dense``, and the first agent that learns, blind.
        seeds: How many.
        steps: Decisions to learn from.
        confidence: See ``train``.
        jobs: Processes, of one thread each; 1: this process. With more, guard your script by
            ``if __name__ == "__main__":``.
        ray: Address of a Ray cluster that trains them instead, one thread per run: ``auto``, ``local`` (starts one
            here), or as ``ray.init`` takes it. It has sd_gym installed, and sees ``output`` under the same path.
        imports: Modules and files that register what is needed; import them first.
        on_status: Called whenever the status of a run changes.
        settings: Keys of the env's config, and settings of those agents that have them.

    Returns:
        The last status of each run: ``status.run.folder`` (for ``sd_gym.compare``), ``status.state``, and
        ``status.message`` if it is ``failed``.

    Raises:
        ValueError: If a name or setting is unknown, or both ``jobs`` and ``ray`` are asked for.
        ImportError: If Ray is asked for and not installed.
    """
    more = {"seeds": seeds, "steps": steps, "confidence": confidence}
    runs = plan_comparison(env_ids, algos, output=Path(output), controls=controls, settings=settings, **more)
    return train_many(runs, jobs=jobs, ray=ray, imports=imports, on_status=on_status)


def default_folder(env_id: str, algo: str, seed: int) -> Path:
    """``runs/TASK-ALGO-SEED``, such as ``runs/Classification-Mini-ppo-0``."""
    name = env_id.removeprefix("SD/").removesuffix("-v0").replace("/", "-")
    return Path("runs") / f"{name}-{algo}-{seed}"


def evaluate(
    env_id: str,
    policy: Policy | Sequence[Policy | Sequence[int] | NDArray],
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
        policy: A callable from observations, float32 ``[n, features]``, to decisions, integers ``[n, switches + 1]``
            (with another ``observation`` or ``action``, or several stages: to those actions, of the stage that the
            observations begin with); a model of Stable-Baselines3 (or anything with its ``predict``); a
            ``DecisionPolicy``; or the folder of a run, whose settings of the env then hold where ``settings`` give no
            others (of a run on a table: also on the env that the table is of, where it decides as it did there); or the
            folder of an export (``sd_gym.export``), whose graphs then decide and answer. To
            select from: also a list of these (no folders) and of masks, one decision for all inputs each.
        split: ``train``, ``validation`` or ``test``.
        output: Folder to write ``result.json``, ``instances.csv``, ``result.png`` and ``config.json`` to, which
            ``compare`` takes as it takes runs; ``None``: nothing is written.
        select: Whether an operating point is selected, as ``train`` does; then the result is that point's, and
            ``last_policy`` describes the policy as it was given. Points are the versions of a run's policy or of a
            ``DecisionPolicy``, or those of a list; a single callable is one. No point may depend on the validation or
            test split, else the guarantee is void.
        confidence: Of the guarantee; see ``train``.
        policy_flops: FLOPs of one decision; ``None``: the policy's attribute ``flops`` if it has one, else they are not
            counted, and the result says so (``policy_flops_counted``).
        name: Of the policy, for ``compare``: results of one name are runs of one agent. ``None``: of a run's folder the
            agent's name, else the name of ``output``, and the result stands alone.
        settings: Overrides of the env's config, as for ``gym.make``.

    Returns:
        The result: see ``train``.

    Raises:
        FileNotFoundError: If there is no such run.
        FileExistsError: If ``output`` holds a result, or anything else.
        ValueError: If a name or setting is unknown, the policy's decisions are malformed, a list is given and nothing
            is to be selected, or the data of a run have changed (where ``settings`` name no other data).

    Example:
        >>> import numpy as np, sd_gym
        >>> def dense(observations):
        ...     return np.zeros((len(observations), 13), dtype=int)
        >>> result = sd_gym.evaluate("SD/Classification-Mini-v0", dense, test_size=20)  # doctest: +SKIP
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected train, validation or test")
    folder = None if output is None else Path(output)
    with nullcontext() if folder is None else locked(folder):
        if folder is not None and (folder / "result.json").exists():
            raise FileExistsError(f"{output} holds a result; choose another output")
        if folder is not None and contents(folder):
            raise foreign(folder, "place for a result")
        exported = OnnxModel(Path(str(policy))) if is_exported(policy) else None
        if exported is not None and select:
            raise ValueError("an exported policy was selected already; select from the run that it was made of")
        origin = None if exported else _origin(env_id, policy)
        if exported is not None:
            core: Core = ExportedCore(exported_config(exported, env_id, settings), exported)
        else:
            core = shared_core(_config(env_id, origin, settings))
        given = dotted(settings)  # data, or a backbone, that are named here may differ from the run's
        same_data = False
        if origin is not None:
            names_data = any(key == "table" or key.startswith("data.") for key in given)
            same_data = env_id in (origin.description["env"], origin.table_of) and not names_data
            if same_data:
                check_unchanged(origin.folder, origin.description["data"], core.data)
            if origin.exported or (same_data and "backbone.name" not in given):
                check_backbone(origin.folder, origin.description["weights"], core.backbone)
        given_policy = origin.exported.network if origin and origin.exported else policy
        if isinstance(given_policy, list | tuple) and not select:
            raise ValueError("expected one policy, got a list; to select from it, pass select=True")
        selection = Selection(core, confidence) if select else None
        if exported is not None:
            decides, last = ExportedPolicy(exported), None
        elif selection is None:
            decides, last = _policy_like(given_policy, policy_flops, core), None
        else:
            decides, last = _selected(selection, given_policy, policy_flops, split)
        used = list(dict.fromkeys(("train", split)))  # observations are standardised by the training split
        if folder is not None:
            algo = name or (origin.description["algo"] if origin else folder.resolve().name)
            description = {MARKER: __version__, "env": env_id, "algo": algo, "agent_settings": {}}
            description["named"] = name is not None or origin is not None
            description["control"] = bool(origin and origin.description["control"])
            description |= run.run_metadata(core.config)
            description["weights"] = core.backbone.weights
            description["data"] = {name: core.data[name].identity for name in used}
            if origin is not None and same_data:  # next to the run, this is no other seed
                description |= {key: origin.description[key] for key in KEPT if key in origin.description}
                was = stored_config(origin.description["env_config"], str(policy))
                description["env_config"]["reward"]["objective"] = was.reward.objective
            if select:
                description["confidence"] = confidence
            write_json(folder / "config.json", description)
        result = run.measure(core, decides, split, folder)
        result["history"] = []
        if select:
            result |= run.selected_result(selection, last, result)
        result["data"] = {name: core.split(name).provenance for name in used}
        if folder is not None:
            run.write_result(result, core, folder)
        return result


def _selected(
    selection: Selection, policy: Any, flops: int | None, split: str
) -> tuple[PolicyLike | SplitPolicy, dict[str, Any]]:
    """What decides as selected, and results of the policy as it was given (of a list: as policy rows choose)."""
    core = selection.core
    if isinstance(policy, str | Path):
        policy = DecisionPolicy.load(Path(policy))
    several = policy if isinstance(policy, list | tuple) else [policy]
    points = [version for one in several for version in _versions(one, flops, core)]
    chosen, dense = selection.select(points), Version(Dense(core))
    if chosen is None and selection.origin is not None:
        dense = Version(_policy_like(selection.origin.with_margin(DENSE_MARGIN), flops, core))
    as_given = (selection.as_searched() or dense).policy if policy is several else _policy_like(policy, flops, core)
    return (chosen or dense).policy, summary(core, as_given, split)


def _versions(policy: Any, flops: int | None, core: Core) -> list[Version]:
    """The operating points that a policy, or a mask, stands for."""
    if isinstance(policy, DecisionPolicy | TablePolicy):
        return [one._replace(policy=_policy_like(one.policy, flops, core)) for one in versions(core, policy)]
    if isinstance(policy, list | tuple | np.ndarray):
        return [
            Version(_policy_like(lambda observations: np.tile(policy, (len(each(observations)), 1)), flops or 0, core))
        ]
    return [Version(_policy_like(policy, flops, core))]


@dataclass
class _PolicyFunction:
    """A function that decides, and the FLOPs of one decision, as ``PolicyLike``."""

    function: Callable[[Any], NDArray]
    flops: int | None

    def decide(self, observations: Observations) -> NDArray:
        return self.function(observations)


def _policy_like(policy: Any, flops: int | None, core: Core) -> PolicyLike:
    if isinstance(policy, str | Path):
        policy = DecisionPolicy.load(Path(policy))
    if isinstance(policy, DecisionPolicy):
        check_fits(policy, core)
        return policy if flops is None else _PolicyFunction(policy.decide, flops)
    if isinstance(policy, TablePolicy):
        check_fits(policy, core)
        return _PolicyFunction(policy.decide, policy.flops if flops is None else flops)
    predict: Callable[..., Any] | None = getattr(policy, "predict", None)
    act: Any = (lambda observations: predict(observations, deterministic=True)[0]) if callable(predict) else policy
    if not callable(act):
        raise ValueError(
            "expected a policy: a callable from observations to decisions, a model with predict(), a DecisionPolicy or "
            f"the folder of a run; got {policy!r}"
        )

    def decide(observations: Any) -> NDArray:
        return core.steps.spread_seen(observations, core.actions.decisions(act(observations), len(each(observations))))

    return _PolicyFunction(decide, getattr(policy, "flops", None) if flops is None else flops)


class _Origin(NamedTuple):
    """The run that a policy is from; ``exported`` is its artefact, if it is a run on a table and the env is not."""

    folder: Path
    description: dict[str, Any]
    exported: SkipPolicy | None

    @property
    def table_of(self) -> str | None:
        """The env that the table is of."""
        return self.exported and self.exported.card["env"]["id"]


def _origin(env_id: str, policy: object) -> _Origin | None:
    """The run, if the policy is a folder; raises ``ValueError`` if it is of a table that no policy can leave."""
    if not isinstance(policy, str | Path):
        return None
    folder, exported = Path(policy), None
    description = read_description(folder)
    if description["env_config"].get("table") is not None and not is_of_table(config_of(env_id)):
        if (folder / FILE).is_file():
            exported = SkipPolicy.from_pretrained(folder)
        elif not DecisionPolicy.load(folder).switches:  # else it decides switch by switch, also on the env itself
            raise ValueError(
                f"{folder}: its policy decides by numbers of masks, and no {FILE} beside it says which these are. "
                "Its table is one that no policy can leave (docs/tables.md)"
            )
    return _Origin(folder, description, exported)


def _config(env_id: str, origin: _Origin | None, settings: dict[str, Any]) -> EnvConfig:
    """The env's config; of a run on this env, or on a table of it, the one that it had there."""
    if origin is not None and origin.description["env"] == env_id:
        return run.run_config(origin.description, settings)
    if origin is not None and origin.exported is not None and origin.table_of == env_id:
        if "backbone.name" not in dotted(settings, env_id):
            origin.exported.check_reachable()
        return make_config({**dotted(origin.exported.card["env"]), **dotted(settings, env_id)}, env_id)
    return load_config(config_of(env_id), settings)
