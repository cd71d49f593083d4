"""References that come with a table: what a learner on it has to beat, what it can reach, and what bounds it."""

from __future__ import annotations

from typing import Any

from sd_gym.agents.baselines.full_information import full_information

from sd_gym.envs.config import load_config
from sd_gym.envs.exact import REFERENCES, hull, oracle
from sd_gym.envs.table import table_core
from sd_gym.files import write_json
from sd_gym.registration import config_of

AHEAD = 0.05  # of the FLOPs, by which full information has to be ahead of the hull, or there is nothing to learn


def write_references(env_id: str, **settings: Any) -> dict[str, Any]:
    """Compute the references of a table on its test split, and write ``references.json`` into its folder.

    Args:
        env_id: Of an env on the table; its epsilon is the loss that is looked at, and half of it.
        settings: Overrides of its config, such as ``table``.

    Returns:
        ``losses`` (0, epsilon / 2, epsilon) and at each the FLOPs ratio of ``hull``, ``full_information`` and
        ``oracle``; ``negative_control``: whether full information is at no loss 5 points ahead of the hull; and
        ``curves``, the corners of each (``sd_gym.envs.exact.Curve``).
    """
    core = table_core(load_config(config_of(env_id), settings))
    split, epsilon = core.split("test"), core.config.reward.epsilon
    losses = [0.0, epsilon / 2, epsilon]
    curves = {"hull": hull(split), "full_information": full_information(split), "oracle": oracle(split)}
    at = {name: [curve.at(loss) for loss in losses] for name, curve in curves.items()}
    ahead = max(masks - full for masks, full in zip(at["hull"][1:], at["full_information"][1:], strict=True))
    corners = {name: {"loss": curve.loss, "flops": curve.flops} for name, curve in curves.items()}
    written = {"losses": losses, **at, "negative_control": ahead < AHEAD, "curves": corners}
    write_json(core.folder / REFERENCES, written)
    return written
