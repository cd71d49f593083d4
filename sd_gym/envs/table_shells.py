"""Envs that look up the outcomes of decisions in a table: no backbone, no data set, no torch."""

from typing import Any, cast

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray as Array

from sd_gym.envs.single import SwitchableEnv
from sd_gym.envs.table import TableCore, TableSplit
from sd_gym.envs.vector import SwitchableVectorEnv

METADATA = {"render_modes": [], "render_fps": 1}


class TableEnv(SwitchableEnv):
    """The env that was tabulated, with its outcomes looked up: a step takes microseconds.

    Description:
        A table holds what decisions do to every instance of an env. The env of a table looks this up, so it needs no
        backbone, no data set and no torch. Quality, FLOPs, rewards and observations equal those of the original env.

    Action Space:
        If the table has all decisions, the ``MultiDiscrete`` of the original env. If it has all masks of whole layers,
        a ``MultiDiscrete`` of layers. Otherwise ``Discrete(K)``: the index of one of its K masks, the first of which is
        dense. ``info["decision"]`` is the mask.

        With several stages the action is the index of one of the stage's choices; 0 runs everything.
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
    core: TableCore

    # With one stage, numbers are looked up instead of arrays of length one, which take three times as long.

    def _begun(self) -> tuple[Any, dict[str, Any]]:
        if self.core.is_staged:
            return super()._begun()
        return self._observation(), self._info(np.zeros_like(self.core.mask_nvec), None)

    def _outcome(self, decisions: Array) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        core = self.core
        split = self._split
        row = int(self._episode.rows[0])
        if core.is_staged:
            return super()._outcome(decisions)
        number = int(core.masks_of(decisions)[0])
        outcome = (*split.scoring.of_one(row, number), split.costs.ratio_of_one(row, number))
        if self.config.reward.vector:
            reward: Any = np.array([outcome[0], -outcome[2]], dtype=np.float32)
        else:
            reward = float(self.objective.rewards(*np.array(outcome)[:, None])[0])
        return self._observation(), reward, True, False, self._info(core.masks[number].copy(), outcome)

    @property
    def _split(self) -> TableSplit:
        return cast("TableSplit", self._episode.split)

    def _observation(self) -> Array:
        return self._split.tensors["observations"][self._episode.rows[0]].astype(np.float32)

    def _info(self, mask: Array, outcome: tuple[float, float, float] | None) -> dict[str, Any]:
        """As ``Episodes.infos``; ``outcome``: quality, dense quality and FLOPs ratio, ``None`` after a reset."""
        quality, quality_ref, flops_ratio = outcome or (0.0, 0.0, 0.0)
        split, row = self._split, int(self._episode.rows[0])
        return {
            "quality": quality,
            "quality_ref": quality_ref,
            "cost": quality_ref - quality,
            "flops_ratio": flops_ratio,
            "vector_reward": np.array([quality, 0 - flops_ratio]),
            "is_success": outcome is not None and quality_ref - quality <= self.config.reward.epsilon,
            "instance": split.ids[row],
            "difficulty": split.difficulty.item(row),
            "decision": mask,
        }


class TableVectorEnv(SwitchableVectorEnv):
    """A batch of ``TableEnv``, with the sections and autoreset modes of ``SwitchableVectorEnv``."""

    metadata = METADATA | {"autoreset_mode": AutoresetMode.SAME_STEP}
