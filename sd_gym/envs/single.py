"""The core as a ``gymnasium.Env``."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.actions import as_array
from sd_gym.envs.config import load_config
from sd_gym.envs.episodes import Episodes
from sd_gym.envs.infos import check_render_mode, chosen_rows, info_of_one, pictures
from sd_gym.envs.render import Shown
from sd_gym.envs.shared import shared_core
from sd_gym.envs.spaces import reward_space, spaces, unbatched

METADATA: dict[str, Any] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 1}  # gym.make adds human
_ONE = np.zeros(1, dtype=np.int64)  # the only env of a batch of one


class SwitchableEnv(gym.Env):
    """Decide, for one input, which parts of a transformer are skipped.

    Description:
        An episode is one instance of an NLP task. With one stage it is also one decision: the backbone runs the
        instance under this decision, and the episode ends. What is skipped is not executed. This is a constrained
        contextual bandit: save FLOPs while the mean of ``quality_ref - quality`` is at most ``epsilon``.

        With several ``stages`` an episode has as many steps. Each step observes what the pass has computed so far and
        decides the switches up to the next stage.

        ``copy.deepcopy`` and ``pickle`` keep the running episode and the random state. The backbone is shared.

    Action Space:
        ``action="multi_discrete"`` (default) is ``MultiDiscrete([2] * switches + [token levels])``. 1 skips the
        sublayer. The last component chooses one of ``token_shares``, the share of tokens to drop. All zeros is dense.
        Switches of kinds that are not in ``candidates`` have one choice: they run.

        ``"multi_binary"`` is ``MultiBinary(switches)``; it needs a single token level and one stage.

        ``"discrete"`` is ``Discrete(K)``: the index of a mask in ``codebook``. In the codebooks of the Mini envs the
        first mask is dense and the masks are nested.

        With several stages the space is that of the stage with the most switches. Components that a stage does not
        have are ignored. The token level counts at the stage ``first`` only.

    Observation Space:
        ``observation="pooled"`` (default) is ``Box(-10, 10, (2 * width + 2,), float32)``: mean and maximum over the
        tokens of the first layer's input, the length and its logarithm, standardised on the training split.

        ``"tokens"`` is ``Dict(tokens=Box(-10, 10, (max_source_length, width), float32),
        mask=MultiBinary(max_source_length))``: the first layer's input, standardised and padded with zeros.

        The name of an observation of ``sd_gym.register_observation`` gives the space of its class.

        With several stages it is ``Box(-10, 10, (stages + 1 + 2 * width + 2,), float32)``: the stage (one-hot), the
        share of the FLOPs spent, mean and maximum of the hidden states there, their number and its logarithm. Where the
        head can judge a layer, the log-odds of its answer follow (``BackboneStageObserver``). With
        ``observation="tokens"`` this is the entry ``stage`` of a ``Dict``, next to ``tokens`` and ``mask``.

    Reward:
        The config's ``objective`` with its ``epsilon``, ``penalty`` and ``cost_scale`` (``sd_gym.objectives``). The
        default, ``lexicographic``, is ``1 - flops_ratio - penalty * cost / cost_scale`` with ``cost = quality_ref -
        quality``. So a gained answer makes up for a lost one.

        The reward lies in ``[-penalty / cost_scale, 1 + penalty / cost_scale]``; with ``gains="ignored"`` in
        ``[-penalty, 1]``. It can lie outside in two cases: an answer counts more than 1 (``quality="balanced"``), or
        ranking tokens costs more FLOPs than dropping them saves.

        The same outcome always has the same reward. A learned penalty belongs to the agent (``ppo_lagrangian``) or to
        ``sd_gym.envs.wrappers.LagrangianWrapper``.

        ``vector_reward=True`` gives ``[quality, -flops_ratio]``, float32, within ``reward_space``, as in
        MO-Gymnasium; the objective is not used. ``sd_gym.envs.wrappers.SafetyWrapper`` returns the cost as well.

        With several stages the reward comes at the end and equals that of the same decision in one step. With
        ``dense_reward=True`` each step earns what it has saved, and the last step the rest.

    Episode End:
        The episode terminates after the last stage (with one stage, after one step). It is never truncated.

    Info:
        A step has ``quality``, ``quality_ref``, ``cost``, ``flops_ratio``, ``vector_reward`` = [quality,
        -flops_ratio], ``is_success`` (cost <= epsilon), ``instance`` (id), ``difficulty`` and ``decision``. A reset has
        the same keys, so that recorders can stack infos; all but ``instance`` and ``difficulty`` are zeros there.

        ``sd_gym.instances`` has the texts of an instance by its id.

        With several stages both also have ``action_mask``, int8 ``[choices]``: the choices of the next step. Steps
        before the last one have the info of a reset, and the ``decision`` so far.

    Arguments:
        config_file: Name of a file in ``envs_configs/``, or the path of any such file.
        render_mode: ``ansi`` (lines of text), ``rgb_array`` (a picture, 960 by 720), ``human`` (the picture in a
            window of pygame), or ``None``. Each shows the last step: the text, its dropped tokens, the sublayers that
            ran, the given and the right answer, FLOPs, quality and reward; after a reset only the text. Nothing is
            generated or drawn before it is asked for.
        overrides: Any key of the config, such as ``epsilon``, ``action``, ``codebook`` or ``observation``.
            ``reset(options={"split": ..., "instance": id})`` chooses the instance.

    Version History:
        * v0: first version.

    Raises:
        ConfigError: If a config key or value is wrong. For an unknown key it is a ``TypeError`` too.
        FileNotFoundError: If the data set, the backbone or the codebook does not exist.
        DataError: If the data set is malformed.
        UnsupportedArchitectureError: If the backbone cannot be switched.
    """

    metadata = METADATA

    def __init__(self, config_file: str, render_mode: str | None = None, **overrides: Any) -> None:
        check_render_mode(render_mode, type(self).metadata["render_modes"])
        self.config = load_config(config_file, overrides)
        self.core = shared_core(self.config)
        self.observation_space, self.action_space = spaces(self.core)
        if self.config.reward.vector:
            self.reward_space = reward_space(self.core)
        self.render_mode = render_mode
        self._episode = Episodes(self.core, 1)
        self.objective = self._episode.objective
        self._shown: Shown | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draw an instance; see the class for ``options``.

        Raises:
            TypeError: If ``options`` is not a dictionary.
            ValueError: If an option or its value is unknown.
        """
        super().reset(seed=seed)
        episode = self._episode
        episode.split, row = chosen_rows(self.core, 1, options)
        episode.begin(_ONE, self.np_random.integers(len(episode.split), size=1) if row is None else row)
        return self._begun()

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Run the backbone under the decision that an action of the action space stands for.

        Raises:
            ValueError: If the action is malformed.
            gymnasium.error.ResetNeeded: If the episode is over.
        """
        episode = self._episode
        if episode.over.all():
            raise gym.error.ResetNeeded("the episode is over: call reset() before the next step()")
        action = as_array(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"expected an action of shape {self.action_space.shape}, got {action.shape}")
        decisions = self.core.actions.decisions(action[None], 1)
        episode.decide(_ONE, decisions)
        return self._outcome(decisions)

    def _begun(self) -> tuple[Any, dict[str, Any]]:
        """What a reset gives."""
        episode = self._episode
        self._show({}, episode.no_rewards(1))
        return unbatched(episode.observe())[0], info_of_one(episode.infos(_ONE))

    def _outcome(self, decisions: NDArray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """What a step gives, after ``decisions [1, components]`` were taken."""
        episode = self._episode
        infos, rewards = episode.results(_ONE)
        self._show(infos, rewards)
        reward = rewards[0] if self.config.reward.vector else float(rewards[0])
        return unbatched(episode.observe())[0], reward, bool(episode.over[0]), False, info_of_one(infos)

    def action_masks(self) -> NDArray:
        """Choices that are allowed, bool ``[choices]``, for sb3-contrib's maskable algorithms."""
        return self._episode.masks()[0]

    def render(self) -> Any:
        """The outcome of the last step, or after a reset the instance; text or a picture, by the render mode."""
        if self.render_mode is None or self._shown is None:
            return None
        (picture,) = pictures(self.core, self._shown, self.render_mode)
        return picture

    def _show(self, infos: dict[str, NDArray], rewards: NDArray) -> None:
        if self.render_mode is not None:
            episode = self._episode
            self._shown = Shown(episode.backbone_split, episode.rows.copy(), episode.over, infos, rewards)
