"""Envs that look up the outcomes of decisions in a table: no backbone, no data set, no torch."""

from gymnasium.vector import AutoresetMode

from sd_gym.envs.single import SwitchableEnv
from sd_gym.envs.vector import SwitchableVectorEnv

METADATA = {"render_modes": [], "render_fps": 1}


class TableEnv(SwitchableEnv):
    """The env that was tabulated, with its outcomes looked up: a step takes microseconds.

    Description:
        A table holds what decisions do to every instance of an env. The env of a table looks this up, so it needs no
        backbone, no data set and no torch. Quality, FLOPs, rewards and observations equal those of the original env.

    Action Space:
        If the table has all decisions, the ``MultiDiscrete`` of the original env. If it has all masks of whole layers,
        a ``MultiDiscrete`` of layers. Otherwise ``Discrete(K)``: the number of one of its K masks, the first of which
        is dense. ``info["decision"]`` is the mask.

        With several stages the action is the number of one of the choices of the stage; 0 runs everything.
        ``info["action_mask"]`` tells how many the stage has.

    Observation Space:
        The ``Box`` of the original env, or its principal components (``sd-gym tabulate --pca``).

    Reward:
        The config's ``objective``. The default is ``1 - flops_ratio - penalty * cost / cost_scale`` with ``cost =
        quality_ref - quality``. ``vector_reward=True`` gives ``[quality, -flops_ratio]``.

        With several stages the reward comes at the end.

    Episode End:
        The episode terminates after the last stage (with one stage, after one step). It is never truncated.

    Info:
        A step has ``quality``, ``quality_ref``, ``cost``, ``flops_ratio``, ``vector_reward``, ``is_success`` (cost <=
        epsilon), ``instance`` (id), ``difficulty`` and ``decision``. A reset has the same keys; all but ``instance``
        and ``difficulty`` are zeros there.

        With several stages both also have ``action_mask``: the choices of the next step.

    Arguments:
        table: Folder of the table, as ``sd-gym tabulate`` writes it.
        overrides: ``split``, ``objective``, ``epsilon``, ``penalty``, ``cost_scale``, ``gains``, ``vector_reward``, and
            ``stages=["first"]``, which decides all stages at once. The default of each is that of the original env.

    Version History:
        * v0: first version.

    Raises:
        ConfigError: If there is no ``table``, or a key or value is wrong.
        FileNotFoundError: If the folder holds no table.
        ValueError: If the table is damaged, incomplete or of another version, or for a ``render_mode``: a table has no
            texts.
    """

    metadata = METADATA


class TableVectorEnv(SwitchableVectorEnv):
    """A batch of ``TableEnv``, with the sections and autoreset modes of ``SwitchableVectorEnv``."""

    metadata = METADATA | {"autoreset_mode": AutoresetMode.SAME_STEP}
