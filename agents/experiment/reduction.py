"""A run's policy, restricted to a few masks: ``sd-gym reduce``."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sd_gym.agents.experiment.run import finish, unfinished_run
from sd_gym.agents.experiment.selection import Selection
from sd_gym.agents.experiment.trained import load_run
from sd_gym.agents.learning.decisions import observed, row_batches, versions

from sd_gym.envs.protocols import Core
from sd_gym.envs.spaces import joined
from sd_gym.files import as_json, write_json
from sd_gym.folders import locked
from sd_gym.policy import DecisionPolicy
from sd_gym.tasks.ranking import STATISTICS_SIZE


def reduce(run: str | Path, codebook: int, output: str | Path, **places: Any) -> dict[str, Any]:
    """Make a run's policy choose among a few masks, select its operating point, and evaluate it: ``sd-gym reduce``.

    More inputs then share a decision, and those run together, which is faster.

    Args:
        run: The run.
        codebook: Different decisions per stage, at most; see ``DecisionPolicy.reduced``.
        output: A run folder, written like that of ``train``; its ``agent_settings`` have ``codebook``.
        **places: Where the run's ``dataset`` and ``backbone``, or its ``table``, are now, if they moved.

    Returns:
        The result, as in ``result.json``.

    Raises:
        FileNotFoundError: If there is no such run.
        FileExistsError: If the output holds anything but the same reduction, cut off.
        ValueError: If the codebook is empty, the run's policy decides at random, or its data have changed.
    """
    folder = Path(output)
    with locked(folder):
        unfinished = unfinished_run(folder, resume=True)
        description, core, policy = load_run(Path(run), places)
        description["agent_settings"] = {**description["agent_settings"], "codebook": codebook}
        description["command"] = shlex.join(sys.argv)
        # The same reduction starts anew, as it takes minutes at most.
        given_again = unfinished and as_json(unfinished | {"command": description["command"]}) == as_json(description)
        if (unfinished and not given_again) or folder.resolve() == Path(run).resolve():
            raise FileExistsError(f"{folder} holds a run that was cut off; choose another --output, or delete it")
        if policy.noise != "none":
            raise ValueError(f"{run}: its policy decides at random; expected the run of an agent that learns")
        selection = Selection(core, description["confidence"])
        reduced = _reduced(policy, codebook, core)
        selection.select(versions(core, reduced))
        selected = reduced.with_margin(selection.margin)
        write_json(folder / "config.json", description)
        selected.save(folder)
        return finish(folder, description, selected, selection)


def _reduced(policy: DecisionPolicy, codebook: int, core: Core) -> DecisionPolicy:
    """The policy with a codebook from the first training inputs, per stage after its own earlier decisions."""
    train = core.split("train")
    batches = row_batches(core, np.arange(min(len(train), STATISTICS_SIZE)))
    batches = batches if policy.channels is None else batches[:1]  # tokens of one batch fit into memory
    seen = joined([observations for rows in batches for observations in observed(core, policy, train, rows)])
    return policy.reduced(codebook, seen, core.stage_actions.components)
