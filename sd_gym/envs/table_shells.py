"""Envs that take the outcomes of decisions from a table: no backbone, no data set, no torch."""

from __future__ import annotations

from gymnasium.vector import AutoresetMode

from sd_gym.envs.single import SwitchableEnv
from sd_gym.envs.vector import SwitchableVectorEnv

METADATA = {"render_modes": [], "render_fps": 1}


class TableEnv(SwitchableEnv):
    """The env that a table is of, with outcomes looked up: a step takes microseconds.

    Everything is as ``SwitchableEnv`` has it, but for:

    Action Space:
        As of the env that the table is of (``MultiDiscrete``), where the table has all decisions; else ``Discrete(K)``,
        the number of one of its K masks, the first of which is dense. ``info["decision"]`` is the mask. Of several
        stages it is the number of one of the ways to decide a stage, the first of which runs all;
        ``info["action_mask"]`` says how many the stage has.

    Observation Space:
        As of the env that the table is of, a ``Box``.

    Arguments:
        table: Folder of the table, as ``sd-gym tabulate`` writes it.
        overrides: ``split``, ``objective``, ``epsilon``, ``penalty``, ``cost_scale``, ``gains`` and
            ``vector_reward``, and ``stages=["first"]`` to decide all that several stages decide at the first look; what
            is left out is as in the env that the table is of.

    Raises:
        ConfigError: If there is no ``table``, or a key or value is wrong.
        FileNotFoundError: If the folder holds no table.
        ValueError: If the table is damaged, not complete, or of another version; or for a ``render_mode`` or
            ``info_text``: a table has no texts.
    """

    metadata = METADATA


class TableVectorEnv(SwitchableVectorEnv):
    """``TableEnv`` for a batch, as ``SwitchableVectorEnv`` is ``SwitchableEnv``; arguments as of both."""

    metadata = METADATA | {"autoreset_mode": AutoresetMode.SAME_STEP}
