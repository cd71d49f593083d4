"""Envs that take the outcomes of decisions from a table: no backbone, no data set, no torch."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from sd_gym.envs.actions import as_array
from sd_gym.envs.infos import chosen
from sd_gym.envs.protocols import Outcome
from sd_gym.envs.single import SwitchableEnv
from sd_gym.envs.table import TableCore, TableLookup
from sd_gym.envs.vector import SwitchableVectorEnv

Array = NDArray
METADATA = {"render_modes": [], "render_fps": 1}
_ONE = np.zeros(1, dtype=np.int64)  # the only env of a batch of one


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
        ValueError: If the table is damaged, incomplete or of another version, or for a ``render_mode`` or
            ``info_text``: a table has no texts.
    """

    metadata = METADATA
    core: TableCore

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As ``SwitchableEnv.reset``."""
        if self.core.lookup is None:
            return super().reset(seed=seed, options=options)
        gym.Env.reset(self, seed=seed)
        split, row = chosen(self.core, 1, options)
        row = self.np_random.integers(len(split), size=1) if row is None else row
        self._episode.split = split
        self._episode.begin(_ONE, row)
        return self._told(self.core.lookup, np.zeros_like(self.core.decision_nvec), None)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As ``SwitchableEnv.step``; of one stage with numbers, as arrays of one are four times slower."""
        if self.core.lookup is None:
            return super().step(action)
        lookup, episode = self.core.lookup, self._episode
        if episode.stage[0]:
            raise gym.error.ResetNeeded("the episode is over: call reset() before the next step()")
        action = as_array(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"expected an action of shape {self.action_space.shape}, got {action.shape}")
        decisions = self.core.actions.decisions(action[None], 1)
        episode.decide(_ONE, decisions)
        split: Any = episode.split
        outcome, mask = lookup.outcome(split, int(episode.rows[0]), decisions)
        if self.config.reward.vector:
            reward: Any = np.array([outcome.quality, -outcome.flops_ratio], dtype=np.float32)
        else:
            values = [np.array([one]) for one in (outcome.quality, outcome.quality_ref, outcome.flops_ratio)]
            reward = float(self.objective.rewards(*values)[0])
        observation, info = self._told(lookup, mask, outcome)
        return observation, reward, True, False, info

    def _told(self, lookup: TableLookup, mask: Array, outcome: Outcome | None) -> tuple[Any, dict[str, Any]]:
        """Observation and info, as ``Episodes`` has them, under a mask."""
        split: Any = self._episode.split
        row = int(self._episode.rows[0])
        nothing: Any = 0.0
        known = outcome or Outcome(nothing, nothing, nothing)
        return lookup.observation(split, row), {
            "quality": known.quality,
            "quality_ref": known.quality_ref,
            "cost": known.cost,
            "flops_ratio": known.flops_ratio,
            "vector_reward": np.array([known.quality, 0 - known.flops_ratio]),
            "is_success": outcome is not None and known.cost <= self.config.reward.epsilon,
            "instance": split.ids[row],
            "difficulty": split.difficulty.item(row),
            "decision": mask,
        }


class TableVectorEnv(SwitchableVectorEnv):
    """A batch of ``TableEnv``, with the sections and autoreset modes of ``SwitchableVectorEnv``."""

    metadata = METADATA | {"autoreset_mode": AutoresetMode.SAME_STEP}
