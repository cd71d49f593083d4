"""The decision network as an artefact: made, saved, loaded. Agents train it, inference runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.files import write_json, write_tensors
from sd_gym.policy.batches import blinded, rows_of, tensors
from sd_gym.policy.choices import bounded, groups_of
from sd_gym.policy.codebook import greedy_cover, of_each_stage
from sd_gym.policy.layers import PerStageMLP, hidden_layers, on_meta, own_network
from sd_gym.policy.network_files import FORMAT, NetworkDescription, read_network_description, read_weights
from sd_gym.policy.noise import Noise, with_noise
from sd_gym.policy.token_encoder import TokenEncoder, flops_a_token
from sd_gym.registry import naming_imports

HIDDEN = 64


def _most_probable(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1)


class DecisionPolicy(nn.Module):
    """From observations to decisions: two hidden layers, then one categorical choice an action component.

    The choices are independent given the observation: ``pi(a|x) = prod_i pi_i(a_i|x)`` (Zhang et al. 2024, section 3).

    Args:
        observation_size: Features of an observation; where it sees the tokens of a text, numbers that a token has; of
            several stages, what each shows beside the tokens.
        nvec: Sizes of the action's components.
        switches: Names of the switches, in the action's order; only stored, so that a policy tells what it decides on.
        blind: Whether the observation is zeroed: the control that sees nothing of its input.
        noise: Decisions are the most probable ones (``none``), drawn from a fixed seed (``random``), or drawn from a
            hash of the observation (``hash``): the same input is always decided on alike, for no reason.
        network: Name of a registered network that gives the logits instead of two hidden layers.
        hidden: Width of the hidden layers.
        codebook: Decisions: then no others are made (``reduced``); ``None``: any. Each has all components, or of
            several stages those of one, and -1 in the place of the others.
        stages: Names of the stages that it decides at. Of several, an observation begins with the stage, one-hot, and
            of what is decided there only the stage's own components count.
        per_stage: Whether each of several stages has hidden layers of its own, else all share them.
        channels: Of the ``TokenEncoder`` that reads the tokens of a text; ``None``: its observations are flat.
        token_width: Numbers that a token has, where several stages show tokens; else ``None``.

    Attributes:
        token_encoder: What makes features of tokens; a flat observation has them already.
        features: How many of them the hidden layers see.
        body: The hidden layers ``[n, hidden]``, those of each stage (``PerStageMLP``), or the registered network.
        head: What makes logits of its output: linear, or, of a registered network, a bias for each.

    Raises:
        ValueError: If the network is unknown, or is none from observations to logits; or if one that is ``per_stage``
            has one stage or a registered network; or if it has a token encoder at several stages and no
            ``token_width``, or that without it.
    """

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
            raise ValueError(
                "expected token_width where several stages show tokens, and there only; got "
                f"token_width={token_width}, channels={channels}, stages={list(stages)}"
            )
        if per_stage and (len(stages) == 1 or network is not None):
            raise ValueError(
                "per_stage=True gives each of several stages hidden layers; expected stages, and no network"
            )
        self.stages = list(stages)
        self.observation_size = observation_size
        self.nvec = [int(size) for size in nvec]
        self.switches = list(switches)
        self.blind = blind
        self.noise = noise
        self.network = network
        self.hidden = hidden
        self.per_stage = per_stage
        self.channels = channels
        self.token_width = token_width
        if channels is None:
            self.token_encoder: nn.Module = nn.Identity()
        elif token_width is None:
            self.token_encoder = TokenEncoder(observation_size, channels)
        else:
            self.token_encoder = TokenEncoder(token_width, channels, beside=observation_size)
        self.features = observation_size if channels is None else self.token_encoder.size
        if network is None:
            size = self.features, hidden
            self.body = PerStageMLP(*size, len(stages)) if per_stage else hidden_layers(*size)
            self.head = nn.Linear(hidden, sum(self.nvec))
        else:
            self.body, self.head = own_network(network, self.features, sum(self.nvec))
        self._groups = groups_of(self.nvec)
        ends = np.cumsum(self.nvec)[:, None]
        places = ends - np.array(self.nvec)[:, None] + np.arange(max(self.nvec))
        # Of each component's choices in the logits; behind its last one, the place behind them all.
        places = torch.from_numpy(np.where(places < ends, places, ends[-1]))
        self.register_buffer("_places", places, persistent=False)
        self.register_buffer("codebook", None if codebook is None else torch.tensor(codebook), persistent=False)

    def forward(self, observations: Tensor | dict[str, Tensor]) -> Tensor:
        """Logits of all components, side by side, ``[n, sum(nvec)]``.

        Args:
            observations: ``[n, features]``, or what a ``TokenEncoder`` reads.
        """
        if self.blind:
            observations = blinded(observations, self.stages)
        features = observations if self.channels is None else self.token_encoder(observations)
        if self.per_stage or self.network is not None:
            return self.head(self.body(features))
        first, _, second, _ = self.body  # called without the modules, a fifth of what deciding takes
        hidden = F.linear(features, first.weight, first.bias).tanh()
        return F.linear(F.linear(hidden, second.weight, second.bias).tanh(), self.head.weight, self.head.bias)

    def evaluate(self, logits: Tensor, decisions: Tensor, exploration: float = 0.0) -> tuple[Tensor, Tensor]:
        """How probable decisions are, and how open each is: what policy gradients are taken of.

        Args:
            logits: Of ``forward``, ``[n, sum(nvec)]``.
            decisions: int64 ``[tries * n, components]``: row ``k * n + i`` is the ``k``-th on observation ``i``.
            exploration: No choice is less probable than this (Wu et al. 2018, BlockDrop, equation 5).

        Returns:
            The logarithm of each component's probability, ``[tries * n, components]``; and the entropy of the choices,
            summed over components, ``[n]``.
        """
        log_probs, entropy = [], torch.zeros(len(logits), device=logits.device)
        for group in self._groups:
            of_all = bounded(group.of(logits), exploration)
            chosen = decisions[:, group.components].unflatten(0, (-1, len(logits)))[..., None]
            log_probs.append(of_all.expand(len(chosen), -1, -1, -1).gather(3, chosen)[..., 0].flatten(0, 1))
            entropy = entropy - (of_all.exp() * of_all).sum(dim=(1, 2))
        return torch.cat(log_probs, dim=1), entropy

    def choose(self, logits: Tensor, pick: Callable[[Tensor], Tensor] = _most_probable) -> Tensor:
        """Decisions, int64 ``[n, components]``.

        Args:
            logits: Of ``forward``.
            pick: Takes logits ``[rows, size]``, each row those of one component, to choices
                ``[rows]``.
        """
        if pick is _most_probable and self.codebook is not None:
            return self._from_codebook(logits)
        if pick is _most_probable:
            return self._side_by_side(logits).argmax(dim=2)
        return self._picked(logits, pick)

    def _from_codebook(self, logits: Tensor) -> Tensor:
        """The most probable masks of the codebook: of each stage's one, of which those of another do not count."""
        decisions = torch.zeros(len(logits), len(self.nvec), dtype=torch.int64, device=logits.device)
        for masks in [self.codebook] if self.stages == ["first"] else of_each_stage(self.codebook):
            best = masks[self._likely(logits, masks).argmax(dim=1)]
            decisions = torch.where(masks[0] >= 0, best, decisions)
        return decisions

    @torch.no_grad()
    def _picked(self, logits: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """Group by group."""
        decisions = torch.zeros(len(logits), len(self.nvec), dtype=torch.int64, device=logits.device)
        for group in self._groups:
            choices = group.of(logits).transpose(0, 1).reshape(-1, group.size)
            decisions[:, group.components] = pick(choices).view(-1, len(logits)).T
        return decisions

    def _side_by_side(self, logits: Tensor) -> Tensor:
        """Logits ``[n, components, longest]`` of all components; minus infinity where one has fewer choices."""
        longest = max(self.nvec)
        lacking = longest * len(self.nvec) - logits.shape[1]
        if lacking == longest - self.nvec[-1]:  # of the last one alone
            return F.pad(logits, (0, lacking), value=-torch.inf).unflatten(1, (-1, longest))
        return torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], dim=1)[:, self._places]

    def _likely(self, logits: Tensor, masks: Tensor) -> Tensor:
        """How probable decisions ``[masks, components]`` are, ``[n, masks]``: logarithms, but for what they share.

        A component that is -1 does not count.
        """
        places = self._places.gather(1, masks.T.clamp(min=0))
        chosen = torch.zeros(logits.shape[1], len(masks), device=logits.device)
        return logits @ chosen.scatter_(0, places, (masks.T >= 0).to(chosen.dtype))

    @torch.inference_mode()
    def decide(self, observations: NDArray | dict[str, NDArray]) -> NDArray:
        """Decisions, int64 ``[n, components]``, for observations ``[n, features]``, or for ``TokenEncoder``."""
        seen = tensors(observations, self.head.weight.device)
        logits = self(seen)
        return self.choose(with_noise(logits, seen, self.noise)).cpu().numpy()

    @torch.inference_mode()
    def skip_logits(self, observations: NDArray | dict[str, NDArray]) -> NDArray:
        """Log-odds of skipping each switch, float32 ``[n, switches]``, for observations as ``decide`` takes them.

        Of those at a stage only the stage's own switches count.

        Raises:
            ValueError: If the policy has a codebook.
        """
        if self.codebook is not None:
            raise ValueError("a policy with a codebook has no odds of a switch by itself")
        choices = self._side_by_side(self(tensors(observations, self.head.weight.device)))[:, :-1]
        return (choices[..., 1] - choices[..., 0]).cpu().numpy()

    @torch.no_grad()
    def begin_at(self, logits: Tensor) -> None:
        """Decide by ``logits [sum(nvec)]``, nearly alike for all inputs; a registered network adds its own to them."""
        if self.network is None:
            self.head.weight.mul_(0.01)
        self.head.bias.copy_(logits)

    def with_margin(self, margin: float) -> DecisionPolicy:
        """A copy that skips only where it prefers skipping by more than ``margin`` in log-odds: a knob for caution."""
        copy = deepcopy(self)
        running = np.cumsum([0, *self.nvec[:-1]])  # the first choice of each component leaves everything running
        with torch.no_grad():
            copy.head.bias[torch.from_numpy(running)] += margin
        return copy

    def with_decision(self, decision: NDArray) -> DecisionPolicy:
        """A copy that makes one decision ``[components]`` for every input."""
        copy = deepcopy(self)
        copy.codebook = None
        chosen = torch.from_numpy(np.cumsum([0, *self.nvec[:-1]]) + np.asarray(decision))
        with torch.no_grad():
            copy.head.weight.zero_()
            copy.head.bias.zero_()
            copy.head.bias[chosen] = 1.0
        return copy

    @torch.inference_mode()
    def reduced(
        self, size: int, observations: NDArray | dict[str, NDArray], components: Sequence[NDArray] | None = None
    ) -> DecisionPolicy:
        """A copy that makes at most ``size`` different decisions, so that inputs agree and run together more often.

        They are decisions that it makes itself, and the dense one; each input gets the one that is the most probable
        for it. Which they are, ``greedy_cover`` says. A policy that decides in the pass makes at most ``size`` at each
        of its stages.

        Args:
            size: At least 1, the dense one.
            observations: Of inputs that it shall do well on, as ``decide`` takes them; a thousand are enough. Where it
                decides in the pass, at all its stages.
            components: Where it decides in the pass, the components that each stage decides, int64.

        Raises:
            ValueError: If there is no size or no observation, or the components of stages are not given.
        """
        if self.stages != ["first"] and components is None:
            raise ValueError(f"a policy that decides at {', '.join(self.stages)} needs the components of each stage")
        if components is None:
            parts = [(observations, np.arange(len(self.nvec)))]
        else:
            shown = observations["stage"] if isinstance(observations, dict) else observations
            parts = [(rows_of(observations, shown[:, number] == 1), own) for number, own in enumerate(components)]
        copy = deepcopy(self)
        copy.codebook = torch.cat([self._masks_for(size, seen, own) for seen, own in parts])
        return copy

    def _masks_for(self, size: int, observations: NDArray | dict[str, NDArray], components: NDArray) -> Tensor:
        """The codebook ``[masks, components]`` of one stage, which decides these components; -1 in the others."""
        decisions = self.decide(observations)
        if size < 1 or not len(decisions):
            raise ValueError(f"expected at least one decision and one observation, got {size} and {len(decisions)}")
        decisions[:, np.setdiff1d(np.arange(len(self.nvec)), components)] = -1
        masks = torch.from_numpy(np.unique(decisions, axis=0))
        masks = torch.cat([masks[:1].clamp(max=0), masks])
        likely = self._likely(self(tensors(observations)), masks)
        return masks[greedy_cover(likely, size)].clone()

    def with_weights(self, weights: dict[str, Tensor]) -> DecisionPolicy:
        """A copy with other weights (a ``state_dict``)."""
        copy = deepcopy(self)
        copy.load_state_dict(weights)
        return copy.eval()

    @property
    def flops(self) -> int:
        """FLOPs of one decision, at all its stages, 2 per multiply-add, as torch's ``FlopCounterMode`` counts them.

        Those of ``token_encoder``, which grow with the text, come on top: ``flops_a_token``.
        """
        body = self.body.of_stage[0] if self.per_stage else self.body  # those of all stages are alike
        counted, _ = on_meta(nn.Sequential(body, self.head), len(self.stages), self.features)
        if self.codebook is None:
            return counted
        return counted + len(self.stages) * len(self.codebook) * 2 * sum(self.nvec)

    @property
    def flops_a_token(self) -> int:
        """FLOPs of ``token_encoder`` for each token, at all stages, counted likewise; 0 without it, or if blind."""
        if self.channels is None or self.blind:
            return 0
        return len(self.stages) * flops_a_token(self.token_width or self.observation_size, self.channels)

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
        """Read a policy that ``save`` wrote.

        Raises:
            FileNotFoundError: If the folder holds none.
            ValueError: If its format is another one, its network is not registered, or what it says or its weights are
                none that ``save`` writes; the message names what was expected.
        """
        folder = Path(folder)
        file = folder / "policy.json"
        if not file.exists():
            raise FileNotFoundError(f"no policy.json in {folder}; expected the folder of a run (sd-gym train)")
        description = read_network_description(file)
        with naming_imports(folder):
            policy = cls(**description.model_dump(exclude={"format"}))
        policy.load_state_dict(read_weights(folder / "policy.safetensors", policy))
        return policy.eval()
