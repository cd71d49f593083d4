"""Training and evaluation from Python, as ``sd_gym.train`` and ``sd_gym.evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from sd_gym.agents.experiment import run
from sd_gym.agents.experiment.many import OnWord, Word, train_many
from sd_gym.agents.experiment.plan import plan
from sd_gym.agents.learning.decisions import PolicyLike, check_fits
from sd_gym.agents.runs.folder import check_backbone, read_description
from sd_gym.agents.runs.verdict import ONE_SIDED_95

from sd_gym.config import EnvConfig, dotted, stored_config
from sd_gym.envs.config import load_config, make_config
from sd_gym.envs.protocols import Core, Observations
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import each
from sd_gym.files import write_json
from sd_gym.folders import MARKER, contents, foreign, locked
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.card import FILE
from sd_gym.policy.table_export import TablePolicy
from sd_gym.registration import config_of, is_of_table
from sd_gym.tasks.splits import check_unchanged
from sd_gym.version import __version__

Policy = DecisionPolicy | str | Path | Callable[[Observations], Any]


def train(
    env_id: str,
    algo: str = "ppo",
    output: str | Path | None = None,
    *,
    steps: int = 50_000,
    seed: int = 0,
    strictness: float = ONE_SIDED_95,
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
        strictness: Standard errors of luck that validation has to leave room for, for a policy to be selected.
        resume: Whether to go on with a run that was cut off.
        imports: Modules and files that register what the run needs, to be named by errors where they are missing.
        on_progress: Called after each rollout with (steps so far, figures to show).
        settings: Keys of the env's config and settings of the agent.

    Returns:
        The result, as in the folder's ``result.json``: ``quality``, ``quality_ref`` (dense), ``flops_ratio``,
        ``flops_ratio_with_policy``, the verdict ``quality_kept`` at ``epsilon``, ``quality_difference_interval``,
        ``by_difficulty``, ``time`` by batch size, and more.

    Raises:
        FileExistsError: If the folder holds a finished run, or one that was cut off and shall not be resumed.
        ValueError: If a name or setting is unknown, or the run to resume is another one.
    """
    folder = default_folder(env_id, algo, seed) if output is None else Path(output)
    return run.train(
        env_id,
        algo,
        folder,
        steps=steps,
        seed=seed,
        settings=settings,
        strictness=strictness,
        resume=resume,
        imports=imports,
        on_progress=on_progress,
    )


def train_all(
    env_ids: Sequence[str],
    algos: Sequence[str] = ("ppo", "a2c", "reinforce"),
    output: str | Path = "runs/compare",
    *,
    controls: bool = True,
    seeds: int = 10,
    steps: int = 50_000,
    strictness: float = ONE_SIDED_95,
    jobs: int = 1,
    ray: str | None = None,
    imports: Sequence[str] = (),
    on_word: OnWord = lambda word: None,
    **settings: Any,
) -> list[Word]:
    """Train every agent and control on every env with the same seeds: what ``sd-gym compare ENV...`` does first.

    What is finished is kept, what was cut off goes on, and what fails stops nothing else.

    Args:
        env_ids: Registered ids.
        algos: Agents' names; ``NAME-from-OTHER`` begins with the run of OTHER with the same seed.
        output: The runs are ``OUTPUT/ENV/ALGO-SEED``.
        controls: Whether controls are trained as well: ``static``, ``early-exit`` where it applies, ``random``,
            ``hash``, ``dense``, and the first agent that learns, blind.
        seeds: How many.
        steps: Decisions to learn from.
        strictness: As of ``train``.
        jobs: Processes, of one thread each; 1: this process. With more, guard your script by
            ``if __name__ == "__main__":``.
        ray: Address of a Ray cluster that trains them instead: ``auto``, ``local``, or as ``ray.init`` takes it. It has
            sd_gym installed, and sees ``output`` under the same path.
        imports: Modules and files that register what is needed; import them first.
        on_word: Called whenever something happens to a run.
        settings: Keys of the env's config, and settings of those agents that have them.

    Returns:
        What became of each run: ``word.run.folder`` (for ``sd_gym.compare``), ``word.state``, and ``word.message`` if
        it is ``failed``.

    Raises:
        ValueError: If a name or setting is unknown, or both ``jobs`` and ``ray`` are asked for.
        ImportError: If Ray is asked for and not installed.
    """
    how = {"seeds": seeds, "steps": steps, "strictness": strictness}
    runs = plan(env_ids, algos, output=Path(output), controls=controls, settings=settings, **how)
    return train_many(runs, jobs=jobs, ray=ray, imports=imports, on_word=on_word)


def default_folder(env_id: str, algo: str, seed: int) -> Path:
    """``runs/TASK-ALGO-SEED``, such as ``runs/Classification-Mini-ppo-0``."""
    name = env_id.removeprefix("SD/").removesuffix("-v0").replace("/", "-")
    return Path("runs") / f"{name}-{algo}-{seed}"


def evaluate(
    env_id: str,
    policy: Policy,
    split: str = "test",
    output: str | Path | None = None,
    *,
    policy_flops: int | None = None,
    name: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The result of any policy on a split: what ``sd-gym train`` and ``sd-gym evaluate`` give of theirs.

    Args:
        env_id: A registered id.
        policy: A callable from observations, float32 ``[n, features]``, to decisions, integers ``[n, switches + 1]``
            (where ``settings`` have another ``observation`` or ``action``, or the env has several stages: to those
            actions, of the stage that the observations begin with); a model of
            Stable-Baselines3 (or anything with its ``predict``); a ``DecisionPolicy``; or the folder of a run, whose
            settings of the env then hold where ``settings`` say nothing else (of a run on a table: also on the env
            that the table is of, where it decides as it did there).
        split: ``train``, ``validation`` or ``test``.
        output: Folder to write ``result.json``, ``instances.csv``, ``result.png`` and ``config.json`` to, so that
            ``compare`` can set it beside runs; ``None``: nothing is written.
        policy_flops: FLOPs of one decision; ``None``: the policy's attribute ``flops`` if it has one, else they are not
            counted, and the result says so (``policy_flops_counted``).
        name: Of the policy, in ``config.json``; ``None``: of the function or class.
        settings: Overrides of the env's config, as for ``gym.make``.

    Returns:
        The result, as ``train`` gives it.

    Raises:
        FileNotFoundError: If there is no such run.
        FileExistsError: If ``output`` holds a result, or anything else.
        ValueError: If a name or setting is unknown, what the policy decides is malformed, or the data of a run have
            changed (where ``settings`` name no other data).

    Example:
        >>> import numpy as np, sd_gym
        >>> def dense(observations):
        ...     return np.zeros((len(observations), 13), dtype=int)
        >>> result = sd_gym.evaluate("SD/Classification-Mini-v0", dense, test_size=20)  # doctest: +SKIP
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"unknown split {split!r}; expected train, validation or test")
    if output is None:
        return _evaluate(env_id, policy, split, None, policy_flops, name, settings)
    with locked(Path(output)):
        if (Path(output) / "result.json").exists():
            raise FileExistsError(f"{output} holds a result; choose another output")
        if contents(Path(output)):
            raise foreign(Path(output), "place for a result")
        return _evaluate(env_id, policy, split, Path(output), policy_flops, name, settings)


def _evaluate(
    env_id: str,
    policy: Policy,
    split: str,
    folder: Path | None,
    policy_flops: int | None,
    name: str | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """As ``evaluate``, into a folder that is empty."""
    origin = read_description(Path(policy)) if isinstance(policy, str | Path) else None
    exported = None if origin is None else _exported_policy(env_id, Path(policy), origin)
    core = shared_core(_config(env_id, origin, exported, settings))
    given = dotted(settings)  # who names data, or a backbone, means what is there now
    names_data = any(key == "table" or key.startswith("data.") for key in given)
    same_env = origin is not None and env_id in (origin["env"], exported and exported.card["env"]["id"])
    same_data = same_env and not names_data
    if same_data:
        check_unchanged(Path(policy), origin["data"], core.data)
    if exported or (same_data and "backbone.name" not in given):
        check_backbone(Path(policy), origin["weights"], core.backbone)
    decides = _decides(policy if exported is None else exported.network, policy_flops, core)
    used = list(dict.fromkeys(("train", split)))  # observations are standardised by the training split
    if folder is not None:
        description = {MARKER: __version__, "env": env_id, "algo": name or _name_of(policy), "agent_settings": {}}
        description["control"] = bool(origin and origin["control"])
        description |= run.circumstances(core.config)
        description["weights"] = core.backbone.weights
        description["data"] = {name: core.data[name].identity for name in used}
        if same_data:  # beside the run, this is no other seed
            description |= {
                key: origin[key] for key in ("steps", "seed", "strictness", "agent_settings", "data") if key in origin
            }
            was = stored_config(origin["env_config"], str(policy))
            description["env_config"]["reward"]["objective"] = was.reward.objective
        write_json(folder / "config.json", description)
    result = run.measured(core, decides, split, folder)
    result["history"] = []
    result["data"] = {name: core.split(name).provenance for name in used}
    if folder is not None:
        run.write_result(result, core, folder)
    return result


@dataclass
class _Decides:
    """Anything that decides, as ``PolicyLike``, by the actions of an env."""

    function: Callable[[Observations], Any]
    flops: int | None
    core: Core

    def decide(self, observations: Observations) -> NDArray:
        core, n = self.core, len(each(observations))
        choices = core.actions.decisions(self.function(observations), n)
        if not core.is_staged:
            return choices
        return core.steps.spread(observations[:, : len(core.stages)].argmax(axis=1), choices)


@dataclass
class _Counted:
    """A policy whose FLOPs are given."""

    decide: Callable[[Observations], NDArray]
    flops: int


def _decides(policy: Policy, flops: int | None, core: Core) -> PolicyLike:
    if isinstance(policy, str | Path):
        policy = DecisionPolicy.load(Path(policy))
    if isinstance(policy, DecisionPolicy | TablePolicy):
        check_fits(policy, core)
        return policy if flops is None else _Counted(policy.decide, flops)
    counted = getattr(policy, "flops", None) if flops is None else flops
    if callable(getattr(policy, "predict", None)):
        return _Decides(lambda observations: policy.predict(observations, deterministic=True)[0], counted, core)
    if not callable(policy):
        raise ValueError(
            "expected a policy: a callable from observations to decisions, a model with predict(), a DecisionPolicy or "
            f"the folder of a run; got {policy!r}"
        )
    return _Decides(policy, counted, core)


def _exported_policy(env_id: str, folder: Path, origin: dict[str, Any]) -> SkipPolicy | None:
    """The artefact of a run on a table, where an env is asked for that computes; ``None`` of anything else.

    Raises:
        ValueError: If the run has none, and decides by numbers.
    """
    if origin["env_config"].get("table") is None or is_of_table(config_of(env_id)):
        return None
    if (folder / FILE).is_file():
        return SkipPolicy.from_pretrained(folder)
    if not DecisionPolicy.load(folder).switches:
        raise ValueError(
            f"{folder}: its policy decides by numbers of masks, and no {FILE} beside it says which these are. "
            "Its table is one that no policy can leave (docs/tables.md)"
        )
    return None  # of all decisions, and not reduced: it is one for the env itself


def _config(
    env_id: str, origin: dict[str, Any] | None, exported: SkipPolicy | None, settings: dict[str, Any]
) -> EnvConfig:
    """The env's config; of a run on this env, or on a table of it, that which it had there."""
    if origin is not None and origin["env"] == env_id:
        return run.run_config(origin, settings)
    if exported is not None and exported.card["env"]["id"] == env_id:
        if "backbone.name" not in dotted(settings, env_id):
            exported.check_reachable()
        return make_config({**dotted(exported.card["env"]), **dotted(settings, env_id)}, env_id)
    return load_config(config_of(env_id), settings)


def _name_of(policy: Policy) -> str:
    if isinstance(policy, str | Path):
        return read_description(Path(policy))["algo"]
    return getattr(policy, "__name__", type(policy).__name__)
