"""The decision network: made, saved, loaded. Agents train it, inference runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.files import write_json, write_tensors
from sd_gym.going_on import ANSWER
from sd_gym.policy.choices import Noise, bounded, codebook_of_each_stage, greedy_cover, groups_of, with_noise
from sd_gym.policy.network_files import FORMAT, NetworkDescription, read_model, read_weights
from sd_gym.policy.networks import Bias, PerStageMLP, counted_flops, hidden_layers, registered_network
from sd_gym.policy.observations import Observations, TensorObservations, blinded, select_rows, to_tensors
from sd_gym.policy.token_encoder import TokenEncoder, flops_per_token
from sd_gym.registry import naming_imports

HIDDEN = 64


class DecisionPolicy(nn.Module):
    """From observations to decisions: two hidden layers, then one categorical choice an action component.

    The choices are independent given the observation: ``pi(a|x) = prod_i pi_i(a_i|x)`` (Zhang et al. 2024, section 3).

    Args:
        observation_size: Features of an observation; with tokens, numbers that a token has; of several stages, what
            each shows beside the tokens.
        nvec: Sizes of the action's components.
        switches: Names of the switches, in the action's order.
        blind: Whether the observation is zeroed, for the control that sees nothing of its input.
        noise: Decisions are the most probable ones (``none``), or drawn: from a fixed seed (``random``), or from a hash
            of the observation (``hash``).
        network: Name of a registered network that gives the logits instead of two hidden layers.
        hidden: Width of the hidden layers.
        codebook: The only decisions that are made (``reduced``); ``None``: any. Each has all components, or of several
            stages those of one, and -1 for the others.
        stages: Names of the stages that it decides at. Of several, an observation begins with the stage, one-hot, and
            of what is decided there only the stage's own components count.
        per_stage: Whether each of several stages has its own hidden layers.
        channels: Of the ``TokenEncoder`` that reads the tokens of a text; ``None``: its observations are flat.
        token_width: Numbers that a token has, where several stages show tokens; else ``None``.

    Attributes:
        token_encoder: Makes features of tokens; of a flat observation it is the identity.
        features: How many of them the hidden layers see.
        body: The hidden layers ``[n, hidden]``, those of each stage (``PerStageMLP``), or the registered network.
        head: Makes logits of its output: linear, or, of a registered network, a bias for each.

    Raises:
        ValueError: If the network is unknown or its shapes are wrong, or if arguments contradict each other.
    """

    body: Any  # whose parts only those use who know which of the three it is
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
    ) -> None:
        super().__init__()
        if (token_width is not None) != (channels is not None and len(stages) > 1):
            got = f"token_width={token_width}, channels={channels}, stages={list(stages)}"
            raise ValueError(f"expected token_width where several stages show tokens, and there only; got {got}")
        if per_stage and (len(stages) == 1 or network is not None):
            raise ValueError("per_stage=True gives each of several stages hidden layers; expected stages, no network")
        self.observation_size, self.stages = observation_size, list(stages)
        self.nvec, self.switches = [int(size) for size in nvec], list(switches)
        self.blind, self.noise = blind, noise
        self.network, self.hidden, self.per_stage = network, hidden, per_stage
        self.channels, self.token_width = channels, token_width
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
        # Of each component's choices in the logits; after its last one, the place after them all.
        places = torch.from_numpy(np.where(places < ends, places, ends[-1]))
        self.register_buffer("_places", places, persistent=False)
        self.register_buffer("codebook", None if codebook is None else torch.tensor(codebook), persistent=False)

    def forward(self, observations: TensorObservations) -> Tensor:
        """Logits of all components, side by side, ``[n, sum(nvec)]``, of observations as ``decide`` takes them."""
        if self.blind:
            observations = blinded(observations, self.stages)
        features: Any = observations if self.channels is None else self.token_encoder(observations)
        if self.per_stage or self.network is not None:
            return self.head(self.body(features))
        first, _, second, _ = self.body  # called without the modules, a fifth of what deciding takes
        hidden = F.linear(features, first.weight, first.bias).tanh()
        return F.linear(F.linear(hidden, second.weight, second.bias).tanh(), self.head.weight, self.head.bias)

    def evaluate(self, logits: Tensor, decisions: Tensor, exploration: float = 0.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[tries * n, components]`` of decisions, and the entropy summed over components, ``[n]``.

        Of ``logits [n, sum(nvec)]``; in ``decisions [tries * n, components]`` row ``k * n + i`` is the ``k``-th on
        observation ``i``. No choice is less probable than ``exploration`` (Wu et al. 2018, BlockDrop, equation 5).
        """
        log_probs, entropy = [], torch.zeros(len(logits), device=logits.device)
        for group in self._groups:
            of_all = bounded(group.of(logits), exploration)
            chosen = decisions[:, group.components].unflatten(0, (-1, len(logits)))[..., None]
            log_probs.append(of_all.expand(len(chosen), -1, -1, -1).gather(3, chosen)[..., 0].flatten(0, 1))
            entropy = entropy - (of_all.exp() * of_all).sum(dim=(1, 2))
        return torch.cat(log_probs, dim=1), entropy

    def choose(self, logits: Tensor, pick: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Decisions, int64 ``[n, components]``, for the logits of ``forward``.

        ``pick`` takes logits ``[rows, size]``, each row those of one component, to choices ``[rows]``. ``None``: the
        most probable ones, of the codebook if there is one.
        """
        if pick is None and self.codebook is None:
            return self._padded(logits).argmax(dim=2)
        decisions = torch.zeros(len(logits), len(self.nvec), dtype=torch.int64, device=logits.device)
        if pick is None and self.codebook is not None:
            for masks in [self.codebook] if self.stages == ["first"] else codebook_of_each_stage(self.codebook):
                best = masks[self._log_likelihood(logits, masks).argmax(dim=1)]
                decisions = torch.where(masks[0] >= 0, best, decisions)
        elif pick is not None:
            with torch.no_grad():
                for group in self._groups:
                    choices = group.of(logits).transpose(0, 1).reshape(-1, group.size)
                    decisions[:, group.components] = pick(choices).view(-1, len(logits)).T
        return decisions

    def _padded(self, logits: Tensor) -> Tensor:
        """Logits ``[n, components, longest]`` of all components; minus infinity where one has fewer choices."""
        longest = max(self.nvec)
        lacking = longest * len(self.nvec) - logits.shape[1]
        if lacking == longest - self.nvec[-1]:  # of the last one alone
            return F.pad(logits, (0, lacking), value=-torch.inf).unflatten(1, (-1, longest))
        return torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], dim=1)[:, self._places]

    def _log_likelihood(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Of decisions ``[masks, components]`` (-1 does not count), up to a constant a row: ``[n, masks]``."""
        places = self._places.gather(1, masks.T.clamp(min=0))
        chosen = torch.zeros(logits.shape[1], len(masks), device=logits.device)
        return logits @ chosen.scatter_(0, places, (masks.T >= 0).to(chosen.dtype))

    @torch.inference_mode()
    def decide(self, observations: Observations | Tensor) -> NDArray:
        """Decisions, int64 ``[n, components]``, for observations ``[n, features]``, or for ``TokenEncoder``."""
        shown = to_tensors(observations, self.head.weight.device)
        return self.choose(with_noise(self(shown), shown, self.noise)).cpu().numpy()

    @torch.inference_mode()
    def skip_logits(self, observations: Observations) -> NDArray:
        """Log-odds of skipping each switch, float32 ``[n, switches]``, of which at a stage only its own count.

        ValueError if the policy has a codebook.
        """
        if self.codebook is not None:
            raise ValueError("a policy with a codebook has no odds of a switch by itself")
        choices = self._padded(self(to_tensors(observations, self.head.weight.device)))[:, : len(self.switches)]
        return (choices[..., 1] - choices[..., 0]).cpu().numpy()

    @torch.inference_mode()
    def preference(self, observations: Observations) -> NDArray:
        """By how much each component prefers another choice to running, log-odds, float32 ``[n, components]``.

        A margin of as much (``with_margin``) makes it run. Minus infinity where there is no other choice. Of a policy
        without a codebook, at one stage.
        """
        choices = self._padded(self(to_tensors(observations, self.head.weight.device)))
        return (F.pad(choices[..., 1:], (0, 1), value=-torch.inf).amax(dim=2) - choices[..., 0]).cpu().numpy()

    @torch.no_grad()
    def initialise(self, logits: Tensor) -> None:
        """Decide by ``logits [sum(nvec)]``, nearly alike for all inputs; a registered network adds its own logits."""
        if self.network is None:
            self.head.weight.mul_(0.01)
        self.head.bias.copy_(logits)

    def with_margin(self, margin: float) -> DecisionPolicy:
        """A copy that skips only where it prefers skipping by more than ``margin`` in log-odds: a knob for caution.

        At the answer stage it accepts only where it prefers that by as much.
        """
        copy = deepcopy(self)
        cautious = np.cumsum([0, *self.nvec[:-1]])  # the first choice of each component leaves everything running
        cautious[-1] += self.stages[-1] == ANSWER  # where it is the second one that goes on
        with torch.no_grad():
            copy.head.bias[torch.from_numpy(cautious)] += margin
        return copy

    def with_sureness(self, margin: float) -> DecisionPolicy:
        """A copy that accepts an answer only where it prefers that by more than ``margin`` in log-odds."""
        copy = deepcopy(self)
        with torch.no_grad():
            copy.head.bias[-1] += margin
        return copy

    def with_decision(self, decision: NDArray) -> DecisionPolicy:
        """A copy that makes one decision ``[components]`` for every input."""
        copy = deepcopy(self)
        copy.codebook, copy.noise = None, "none"
        chosen = torch.from_numpy(np.cumsum([0, *self.nvec[:-1]]) + np.asarray(decision))
        with torch.no_grad():
            copy.head.weight.zero_()
            copy.head.bias.zero_()
            copy.head.bias[chosen] = 1.0
        return copy

    @torch.inference_mode()
    def reduced(
        self, size: int, observations: Observations, components: Sequence[NDArray] | None = None
    ) -> DecisionPolicy:
        """A copy that makes at most ``size`` different decisions (at each stage), so that more inputs run together.

        They are the dense one and some of its own (``greedy_cover``); each input gets the most probable one. The
        ``observations`` are of inputs that it shall do well on (a thousand are enough), in the pass at all its stages,
        and ``components`` what each stage decides, int64. ValueError if one of these is missing.
        """
        if self.stages == ["first"]:
            parts = [(observations, np.arange(len(self.nvec)))]
        elif components is not None:
            shown = observations["stage"] if isinstance(observations, dict) else observations
            parts = [(select_rows(observations, shown[:, number] == 1), own) for number, own in enumerate(components)]
        else:
            raise ValueError(f"a policy that decides at {', '.join(self.stages)} needs the components of each stage")
        copy = deepcopy(self)
        copy.codebook = torch.cat([self._masks_for(size, seen, own) for seen, own in parts])
        return copy

    def _masks_for(self, size: int, observations: Observations, components: NDArray) -> Tensor:
        """The codebook ``[masks, components]`` of one stage, which decides these components; -1 in the others."""
        decisions = self.decide(observations)
        if size < 1 or not len(decisions):
            raise ValueError(f"expected at least one decision and one observation, got {size} and {len(decisions)}")
        decisions[:, np.setdiff1d(np.arange(len(self.nvec)), components)] = -1
        masks = torch.from_numpy(np.unique(decisions, axis=0))
        masks = torch.cat([masks[:1].clamp(max=0), masks])
        if self.stages[-1] == ANSWER and components.tolist() == [len(self.nvec) - 1]:
            both = masks[:1].repeat(2, 1)  # to accept, and to go on
            both[1, -1] = 1
            return both
        return masks[greedy_cover(self._log_likelihood(self(to_tensors(observations)), masks), size)].clone()

    @property
    def flops(self) -> int:
        """FLOPs of one decision at all stages (``FlopCounterMode``), without ``flops_per_token``."""
        body = self.body.of_stage[0] if self.per_stage else self.body  # those of all stages are alike
        counted, _ = counted_flops(nn.Sequential(body, self.head), len(self.stages), self.features)
        if self.codebook is None:
            return counted
        return counted + len(self.stages) * len(self.codebook) * 2 * sum(self.nvec)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of ``token_encoder`` for each token, at all stages; 0 without it, or if blind."""
        if self.channels is None or self.blind:
            return 0
        return len(self.stages) * flops_per_token(self.token_width or self.observation_size, self.channels)

    def save(self, folder: Path) -> None:
        """Write ``policy.safetensors`` and ``policy.json``; each file appears complete or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        keys = NetworkDescription.model_fields.keys() - {"format", "codebook"}
        description = {"format": FORMAT, **{key: getattr(self, key) for key in sorted(keys)}}
        if self.codebook is not None:
            description["codebook"] = self.codebook.tolist()
        write_tensors(folder / "policy.safetensors", self.state_dict())
        write_json(folder / "policy.json", description)

    @classmethod
    def load(cls, folder: Path) -> DecisionPolicy:
        """Read a policy that ``save`` wrote; FileNotFoundError if a file is missing.

        ValueError if its network is not registered, or its files are broken; the message names what was expected.
        """
        folder, file = Path(folder), Path(folder, "policy.json")
        if not file.exists():
            raise FileNotFoundError(f"no policy.json in {folder}; expected the folder of a run (sd-gym train)")
        description = read_model(NetworkDescription, file, "not a policy that was saved here")
        with naming_imports(folder):
            policy = cls(**description.model_dump(exclude={"format"}))
        policy.load_state_dict(read_weights(folder / "policy.safetensors", policy))
        return policy.eval()
