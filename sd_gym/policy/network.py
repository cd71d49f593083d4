"""The decision network, which agents train and inference runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.files import write_json, write_tensors
from sd_gym.going_on import ANSWER
from sd_gym.policy.choices import (
    Noise,
    bounded,
    codebook_of_each_stage,
    first_columns,
    greedy_cover,
    groups_of,
    margins_of_changes,
    with_noise,
)
from sd_gym.policy.network_files import FORMAT, NetworkDescription, read_model, read_weights
from sd_gym.policy.networks import Bias, PerStageMLP, counted_flops, hidden_layers, registered_network
from sd_gym.policy.observations import Observations, TensorObservations, blinded, select_rows, to_tensors
from sd_gym.policy.token_encoder import TokenEncoder, flops_per_token
from sd_gym.registry import naming_imports

HIDDEN = 64
STATIC_LOG_ODDS = 6.0  # of a static mask's choices: low enough that learning from it as a start can still change them
# Share of the margin that applies before the answer stage; of dense's margin, 1,000, it still prevents all skipping.
EARLIER_MARGIN_SHARE = 0.1
Method = TypeVar("Method", bound=Callable[..., Any])


def _deciding(method: Method) -> Method:
    """Runs a policy's method without gradients, and in float32, in which it was tested, also under autocast."""

    @wraps(method)
    @torch.inference_mode()
    def run(policy: DecisionPolicy, *args: Any, **kwargs: Any) -> Any:
        device = policy._places.device.type
        if not torch.is_autocast_enabled(device):  # much faster than a context manager
            return method(policy, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(policy, *args, **kwargs)

    return cast("Method", run)


class DecisionPolicy(nn.Module):
    """From observations to decisions: two hidden layers, then one categorical choice an action component.

    The choices are independent given the observation: ``pi(a|x) = prod_i pi_i(a_i|x)`` (Zhang et al. 2024, section 3).

    Args:
        observation_size: Features of an observation; with tokens, the width of a token; with tokens and several stages,
            the features of a stage.
        nvec: Sizes of the action's components.
        switches: Names of the switches, in the action's order.
        blind: Whether the observation is zeroed, for a control that does not use its input.
        noise: Whether decisions are the most probable ones (``none``), drawn with a fixed seed (``random``), or drawn
            by a hash of the observation (``hash``).
        network: Name of a registered network that replaces the hidden layers.
        hidden: Width of the hidden layers.
        codebook: The only decisions that it makes (``reduced``); ``None``: any. Each has all components, or with
            several stages those of one stage, and -1 for the others.
        stages: Names of its stages. With several, an observation begins with the stage, one-hot, and only the stage's
            own components of a decision count.
        per_stage: Whether each of several stages has its own hidden layers.
        channels: Channels of the ``TokenEncoder``; ``None``: observations are flat.
        token_width: Width of a token, with tokens and several stages; else ``None``.
        graded: Whether a component's choices are ordered, each skipping more than the one before. A margin then counts
            once for each step up (``with_margin``). Else it counts once, for all choices but the first.

    Attributes:
        token_encoder: From tokens to features; the identity for flat observations.
        features: Number of inputs of the hidden layers.
        body: The hidden layers ``[n, hidden]``, those of each stage (``PerStageMLP``), or the registered network.
        head: From the output of ``body`` to logits: linear, or a bias for a registered network.

    Raises:
        ValueError: If the network is unknown or its shapes are wrong, or if arguments contradict each other.
    """

    body: Any  # one of three types; see above
    head: nn.Linear | Bias
    token_encoder: TokenEncoder | nn.Identity
    codebook: Tensor | None
    noise: Noise
    _places: Tensor

    def __init__(
        self,
        observation_size: int,
        nvec: list[int],
        switches: list[str],
        *,
        blind: bool = False,
        noise: Noise = "none",
        network: str | None = None,
        hidden: int = HIDDEN,
        codebook: list[list[int]] | None = None,
        stages: Sequence[str] = ("first",),
        per_stage: bool = False,
        channels: int | None = None,
        token_width: int | None = None,
        graded: bool = False,
    ) -> None:
        super().__init__()
        if (token_width is not None) != (channels is not None and len(stages) > 1):
            got = f"token_width={token_width}, channels={channels}, stages={list(stages)}"
            raise ValueError(f"expected token_width with tokens and several stages, and only then; got {got}")
        if per_stage and (len(stages) == 1 or network is not None):
            raise ValueError("per_stage=True: expected several stages, and no network")
        self.observation_size = observation_size
        self.stages = list(stages)
        self.nvec = [int(size) for size in nvec]
        self.switches = list(switches)
        self.blind = blind
        self.noise = noise
        self.network = network
        self.hidden = hidden
        self.per_stage = per_stage
        self.channels = channels
        self.token_width = token_width
        self.graded = graded
        features = observation_size
        if channels is None:
            self.token_encoder = nn.Identity()
        else:
            width, stage_size = (features, 0) if token_width is None else (token_width, features)
            self.token_encoder = TokenEncoder(width, channels, stage_size)
            features = self.token_encoder.size
        self.features = features
        if network is None:
            self.body = PerStageMLP(features, hidden, len(stages)) if per_stage else hidden_layers(features, hidden)
            self.head = nn.Linear(hidden, sum(self.nvec))
        else:
            self.body, self.head = registered_network(network, features, sum(self.nvec))
        self._groups = groups_of(self.nvec)
        ends = np.cumsum(self.nvec)[:, None]
        places = ends - np.array(self.nvec)[:, None] + np.arange(max(self.nvec))
        # Place of each component's choices in the logits; missing choices have the place after the last logit.
        places = torch.from_numpy(np.where(places < ends, places, ends[-1]))
        self.register_buffer("_places", places, persistent=False)
        self.register_buffer("codebook", None if codebook is None else torch.tensor(codebook), persistent=False)

    def forward(self, observations: TensorObservations) -> Tensor:
        """Logits of all components, concatenated, ``[n, sum(nvec)]``; observations as in ``decide``."""
        if self.blind:
            observations = blinded(observations, self.stages)
        features: Any = observations if self.channels is None else self.token_encoder(observations)
        if self.per_stage or self.network is not None:
            return self.head(self.body(features))
        first, _, second, _ = self.body  # functional calls save a fifth of the time of a decision
        hidden = F.linear(features, first.weight, first.bias).tanh()
        return F.linear(F.linear(hidden, second.weight, second.bias).tanh(), self.head.weight, self.head.bias)

    def evaluate_decisions(self, logits: Tensor, decisions: Tensor, exploration: float = 0.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[tries * n, components]`` of decisions, and the entropy summed over components, ``[n]``.

        Args:
            logits: ``[n, sum(nvec)]``.
            decisions: ``[tries * n, components]``; row ``k * n + i`` is the ``k``-th decision on observation ``i``.
            exploration: Lower bound of each choice's probability (Wu et al. 2018, BlockDrop, equation 5).
        """
        log_probs, entropy = [], torch.zeros(len(logits), device=logits.device)
        for group in self._groups:
            log_prob = bounded(group.of(logits), exploration)
            chosen = decisions[:, group.components].unflatten(0, (-1, len(logits)))[..., None]
            log_probs.append(log_prob.expand(len(chosen), -1, -1, -1).gather(3, chosen)[..., 0].flatten(0, 1))
            entropy = entropy - (log_prob.exp() * log_prob).sum(dim=(1, 2))
        return torch.cat(log_probs, dim=1), entropy

    def choose(self, logits: Tensor, pick: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Decisions, int64 ``[n, components]``, for the logits of ``forward``.

        ``pick`` takes logits ``[rows, size]``, one component per row, to choices ``[rows]``. ``None``: the most
        probable choices, or the most probable decision of the codebook.
        """
        if pick is None and self.codebook is None:
            return self._padded(logits).argmax(dim=2)
        decisions = torch.zeros(len(logits), len(self.nvec), dtype=torch.int64, device=logits.device)
        if pick is None and self.codebook is not None:
            for masks in [self.codebook] if self.stages == ["first"] else codebook_of_each_stage(self.codebook):
                best = masks[self.log_likelihood(logits, masks).argmax(dim=1)]
                decisions = torch.where(masks[0] >= 0, best, decisions)
        elif pick is not None:
            with torch.no_grad():
                for group in self._groups:
                    choices = group.of(logits).transpose(0, 1).reshape(-1, group.size)
                    decisions[:, group.components] = pick(choices).view(-1, len(logits)).T
        return decisions

    def _padded(self, logits: Tensor) -> Tensor:
        """Logits ``[n, components, longest]`` of all components; minus infinity for missing choices."""
        longest = max(self.nvec)
        lacking = longest * len(self.nvec) - logits.shape[1]
        if lacking == longest - self.nvec[-1]:  # only the last component has fewer choices
            return F.pad(logits, (0, lacking), value=-torch.inf).unflatten(1, (-1, longest))
        return torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], dim=1)[:, self._places]

    def log_likelihood(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Log-likelihood of decisions ``[masks, components]`` (-1 is ignored), up to a constant: ``[n, masks]``."""
        places = self._places.gather(1, masks.T.clamp(min=0))
        chosen = torch.zeros(logits.shape[1], len(masks), device=logits.device)
        return logits @ chosen.scatter_(0, places, (masks.T >= 0).to(chosen.dtype))

    @_deciding
    def decide(self, observations: Observations | Tensor) -> NDArray:
        """Decisions, int64 ``[n, components]``, for observations ``[n, features]``, or those of ``TokenEncoder``."""
        tensors = to_tensors(observations, self.head.weight.device)
        return self.choose(with_noise(self(tensors), tensors, self.noise)).cpu().numpy()

    @_deciding
    def skip_logits(self, observations: Observations) -> NDArray:
        """Log-odds of skipping each switch, float32 ``[n, switches]``; at a stage, only its own switches count.

        Raises:
            ValueError: If the policy has a codebook.
        """
        if self.codebook is not None:
            raise ValueError("a policy with a codebook has no odds of a single switch")
        choices = self._padded(self(to_tensors(observations, self.head.weight.device)))[:, : len(self.switches)]
        return (choices[..., 1] - choices[..., 0]).cpu().numpy()

    @_deciding
    def preference(self, observations: Observations) -> NDArray:
        """The margins at which decisions change (``with_margin``), in log-odds, float32 ``[n, margins]``.

        At the answer stage there is one, that of accepting against going on. Otherwise each component has one, that of
        its best choice against running; if ``graded``, each choice has one, against the choice before it. With a
        codebook these are the margins at which another of its masks becomes the most probable one. Not finite where
        there is no such choice. For a policy with that stage, or with one stage.
        """
        logits = self(to_tensors(observations, self.head.weight.device))
        if self.stages[-1] == ANSWER:
            return (logits[:, -2:-1] - logits[:, -1:]).cpu().numpy()
        if self.codebook is not None:
            added = torch.from_numpy(self.per_margin).to(logits)[None]
            scores, slopes = (self.log_likelihood(values, self.codebook) for values in (logits, added))
            return margins_of_changes(scores, slopes[0]).cpu().numpy()
        choices = self._padded(logits)
        if self.graded:
            return choices.diff(dim=2).flatten(1).cpu().numpy()
        return (F.pad(choices[..., 1:], (0, 1), value=-torch.inf).amax(dim=2) - choices[..., 0]).cpu().numpy()

    @torch.no_grad()
    def initialise(self, logits: Tensor) -> None:
        """Decide by ``logits [sum(nvec)]``, nearly equal for all inputs; a registered network adds its own logits."""
        if self.network is None:
            self.head.weight.mul_(0.01)
        self.head.bias.copy_(logits)

    def with_margin(self, margin: float) -> DecisionPolicy:
        """A copy that skips only where it prefers skipping by more than ``margin`` in log-odds.

        With an answer stage, it accepts an answer only where it prefers accepting by more than ``margin``. At earlier
        stages only ``EARLIER_MARGIN_SHARE`` of the margin counts, since the answer tells more about the risk. A blind
        policy, which sees no answer, skips less instead.
        """
        copy = deepcopy(self)
        with torch.no_grad():
            copy.head.bias.add_(torch.from_numpy(margin * self.per_margin).to(copy.head.bias))
        return copy

    def with_mask(self, mask: NDArray) -> DecisionPolicy:
        """A copy that skips by one ``mask [components]`` for all inputs; for a policy with an answer stage.

        It accepts the same answers as before.
        """
        copy, first = deepcopy(self), first_columns(self.nvec)
        with torch.no_grad():
            for values in copy.head.weight, copy.head.bias:
                values[:-2] = 0
            copy.head.bias[torch.from_numpy(first + mask)[:-1]] = STATIC_LOG_ODDS
        return copy

    @property
    def per_margin(self) -> NDArray:
        """What a margin of 1 adds to each logit, float64 ``[sum(nvec)]``."""
        added = np.zeros(sum(self.nvec))
        added[first_columns(self.nvec)] = 1  # the first choice is to run
        if self.graded:
            added = -np.concatenate([np.arange(size, dtype=np.float64) for size in self.nvec])
        if self.stages[-1] == ANSWER:  # where the second choice is to go on
            added *= 1 if self.blind else EARLIER_MARGIN_SHARE  # a blind policy sees no answer
            added[-2:] = 0, 1
        return added

    @_deciding
    def reduced(
        self, size: int, observations: Observations, components: Sequence[NDArray] | None = None
    ) -> DecisionPolicy:
        """A copy that makes at most ``size`` different decisions (per stage), so that more inputs run together.

        They are the dense one and some of its own (``greedy_cover``); each input gets the most probable one.

        Args:
            size: Most decisions per stage.
            observations: Observations of typical inputs (a thousand are enough), at all stages.
            components: With several stages, the components that each decides, int64.

        Raises:
            ValueError: If there is no observation, or ``components`` are missing.
        """
        if self.stages == ["first"]:
            parts = [(observations, np.arange(len(self.nvec)))]
        elif components is not None:
            flat = observations["stage"] if isinstance(observations, dict) else observations
            parts = [(select_rows(observations, flat[:, number] == 1), own) for number, own in enumerate(components)]
        else:
            raise ValueError(f"a policy that decides at {', '.join(self.stages)} needs the components of each stage")
        copy = deepcopy(self)
        copy.codebook = torch.cat([self._masks_for(size, *part) for part in parts])
        return copy

    def _masks_for(self, size: int, observations: Observations, components: NDArray) -> Tensor:
        """The codebook ``[masks, components]`` of the stage that decides these components; -1 in the others."""
        decisions = self.decide(observations)
        if size < 1 or not len(decisions):
            raise ValueError(f"expected at least one decision and one observation, got {size} and {len(decisions)}")
        decisions[:, np.setdiff1d(np.arange(len(self.nvec)), components)] = -1
        masks = torch.from_numpy(np.unique(decisions, axis=0))
        masks = torch.cat([masks[:1].clamp(max=0), masks])
        if self.stages[-1] == ANSWER and components.tolist() == [len(self.nvec) - 1]:
            both = masks[:1].repeat(2, 1)  # accept, and go on
            both[1, -1] = 1
            return both
        return masks[greedy_cover(self.log_likelihood(self(to_tensors(observations)), masks), size)].clone()

    @property
    def flops(self) -> int:
        """FLOPs of one decision at all stages (``FlopCounterMode``), without ``flops_per_token``."""
        masks = 0 if self.codebook is None else len(self.codebook)
        return self._layer_flops + len(self.stages) * masks * 2 * sum(self.nvec)

    @cached_property
    def _layer_flops(self) -> int:
        if self.network is None:  # selection has a policy for each mask, and counting takes milliseconds
            return 2 * len(self.stages) * self.hidden * (self.features + self.hidden + sum(self.nvec))
        return counted_flops(nn.Sequential(self.body, self.head), len(self.stages), self.features)[0]

    @property
    def flops_per_token(self) -> int:
        """FLOPs of ``token_encoder`` per token, at all stages; 0 without it, or if blind."""
        if self.channels is None or self.blind:
            return 0
        return len(self.stages) * flops_per_token(self.token_width or self.observation_size, self.channels)

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json``; each file is complete or missing."""
        folder.mkdir(parents=True, exist_ok=True)
        keys = NetworkDescription.model_fields.keys() - {"format", "codebook"}
        description = {"format": FORMAT, **{key: getattr(self, key) for key in sorted(keys)}}
        if self.codebook is not None:
            description["codebook"] = self.codebook.tolist()
        write_tensors(folder / "policy.safetensors", self.state_dict())
        write_json(folder / "policy.json", description)

    @classmethod
    def load(cls, folder: Path) -> DecisionPolicy:
        """Load a policy that ``save`` wrote.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If its network is not registered, or a file is damaged.
        """
        file = folder / "policy.json"
        if not file.exists():
            raise FileNotFoundError(f"no policy.json in {folder}; expected the folder of a run (sd-gym train)")
        description = read_model(NetworkDescription, file, "not a policy that was saved here")
        with naming_imports(folder):
            policy = cls(**description.model_dump(exclude={"format"}))
        policy.load_state_dict(read_weights(folder / "policy.safetensors", policy))
        return policy.eval()
