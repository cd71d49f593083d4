"""The modules of an export that become ONNX graphs: the policy and the model."""

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sd_gym.backbones.heads.base import Head
from sd_gym.inference.branches import Sides
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.features import pooled_features
from sd_gym.policy.network import DecisionPolicy
from sd_gym.policy.table_export import TablePolicy
from sd_gym.policy.token_encoder import TokenEncoder
from sd_gym.projection import OBSERVATION_LIMIT, Projection, standardised
from sd_gym.switch import Switchboard
from sd_gym.switch.architectures import Switch
from sd_gym.switch.cache import hidden_states
from sd_gym.switch.first_layer import FirstLayerInput
from sd_gym.switch.twin import twin_at, twin_of

INPUTS = "input_ids", "attention_mask", "token_type_ids"  # of an encoder, in the order of a graph's inputs


class Graph(nn.Module):
    """A module that is written as a graph."""

    outputs: tuple[str, ...]

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Names and examples of the arguments of ``forward``, from those of the model's inputs."""
        return list(of_model.items())


class Switched(Graph):
    """The dense logits, and the states from which ``branched`` makes branches.

    ``branches`` are indices of switches that are skipped together, ``resumed`` those before whose layers rows go on,
    ``given`` the model's inputs.

    Attributes:
        sides: What enters and leaves each branch, by index of its first switch.
        hidden: The hidden states before the layers of ``resumed``, by index of the switch.
        logits: The dense logits of ``given``.
    """

    def __init__(
        self, board: Switchboard, branches: list[list[int]], resumed: list[int], given: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.model = twin_of(board.model)
        self._names = dict[str, str]()
        self._seen = dict[int, tuple[str, Tensor]]()
        layers = twin_at(self.model, board.path_of_layers(board.architecture.stacks[0]))
        for branch in branches:
            first = _module(layers, board.switches[branch[0]], 0)
            first.register_forward_pre_hook(partial(self._enters, f"enters.{branch[0]}"), with_kwargs=True)
            last = _module(layers, board.switches[branch[-1]], -1)
            last.register_forward_hook(partial(self._leaves, f"leaves.{branch[0]}"))
        for number in resumed:
            layer = twin_at(layers, str(board.switches[number].index))
            layer.register_forward_pre_hook(partial(self._enters, f"before.{number}"), with_kwargs=True)
        with torch.no_grad():
            self.logits, *_ = self.forward(*given.values())
        names = self._names
        self.outputs = ("logits", *(name for name, _ in self._seen.values()))
        self.sides = {
            number: Sides(
                names[f"enters.{number}"], names[f"leaves.{number}"], board.switches[number].sublayer.adds_residual
            )
            for number, *_ in branches
        }
        self.hidden = {number: names[f"before.{number}"] for number in resumed}

    def _enters(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._mark(name, hidden_states(args, kwargs))

    def _leaves(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        self._mark(name, output[0] if isinstance(output, tuple) else output)

    def _mark(self, name: str, state: Tensor) -> None:
        """One output has one name, although what leaves a sublayer may enter the next."""
        self._names[name] = self._seen.setdefault(id(state), (name, state))[0]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The logits and all states."""
        self._seen.clear()
        given = dict(zip(INPUTS, inputs, strict=False))
        logits = logits_of(self.model(**given | {"attention_mask": _added_to_scores(inputs[1])}))
        return (logits, *(state for _, state in self._seen.values()))


def _module(layers: nn.Module, switch: Switch, at: int) -> nn.Module:
    """A module of a switch in the layers of a twin: the first (0) or the last one (-1) that it skips."""
    return twin_at(layers, f"{switch.index}.{switch.sublayer.modules[at]}")


def _added_to_scores(attention_mask: Tensor) -> Tensor:
    """The mask ``[n, 1, 1, length]`` added to attention scores; Hugging Face's own takes fifty nodes of a graph."""
    return (1 - attention_mask[:, None, None].float()) * torch.finfo(torch.float32).min


def logits_of(output: Any) -> Tensor:
    """Logits; those of starts and ends stacked, if answers are extracted."""
    return torch.stack([output.start_logits, output.end_logits], dim=1) if "start_logits" in output else output.logits


class Decider(Graph):
    """The score of each choice for each input; if the policy judges answers, also the features for that.

    Attributes:
        constant: The scores ``[choices]`` of a policy that does not read its input: it has one mask for all, and judges
            answers by the head's judgement alone. ``None`` for all others.
    """

    chosen: Tensor

    def __init__(self, board: Switchboard, policy: SkipPolicy, choices: NDArray) -> None:
        super().__init__()
        self.first_input = FirstLayerInput(board)
        network, self.max_source_length = policy.learned, policy.max_source_length
        self.encoder = deepcopy(network.token_encoder) if isinstance(network.token_encoder, TokenEncoder) else None
        self.token_statistics = [
            torch.from_numpy(values) for values in policy.token_statistics or (policy.mean, policy.deviation)
        ]
        self.size = 2 * board.model.config.hidden_size + 2
        self.network = _Network(policy, 0, self.size)
        self.answers = policy.has_answer_stage
        padded = np.pad(choices, ((0, 0), (0, int(self.answers))), constant_values=-1)
        likelihood = network.log_likelihood(torch.eye(sum(network.nvec)), torch.from_numpy(padded))
        self.register_buffer("chosen", likelihood)
        reads_input = not self.answers or _reads_input(network, self.network.judged)
        self.constant = None if reads_input else self.network.network.head.bias @ self.chosen
        self.outputs = ("scores", "seen") if self.answers else ("scores",)

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Graph``."""
        return [("share", torch.zeros(2)), *of_model.items()]

    def forward(self, share: Tensor, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The scores ``[n, choices]``, and what the answer stage sees again; ``share [n]``: FLOPs spent."""
        hidden, attention_mask = self.first_input(**dict(zip(INPUTS, inputs, strict=False))), inputs[1]
        pooled, share = pooled_features(hidden, attention_mask), share[:, None]
        read = list[Tensor]()
        if self.encoder is not None:
            hidden, mask = hidden[:, : self.max_source_length], attention_mask[:, : self.max_source_length]
            tokens = standardised(hidden.float(), *self.token_statistics) * mask[:, :, None]
            read = [(self.encoder.read(tokens, mask) - self.encoder.mean) / self.encoder.deviation]
        scores = self.network([pooled, *_unknown(self.network.judged, share)], read, share) @ self.chosen
        return (scores, torch.cat([pooled, *read], dim=1)) if self.answers else scores


class AnswerDecider(Graph):
    """The policy's preference for going on over accepting the answer, in log-odds.

    ``first`` decides before the first layer; ``logits`` are an example of the head's output.
    """

    outputs = ("preference",)

    def __init__(self, policy: SkipPolicy, head: Head, first: Decider, logits: Tensor) -> None:
        super().__init__()
        self.network = _Network(policy, 1, first.size)
        self.head = head
        self.logits = logits
        self.sizes = [first.size]
        self.others = self.network.judged - len(head.judgement)
        if first.encoder is not None:
            self.sizes.append(len(first.encoder.mean))
        self.reads_input = first.constant is None

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Graph``."""
        seen = [("seen", torch.zeros(2, sum(self.sizes)))] if self.reads_input else []
        return [("share", torch.zeros(2)), *seen, ("logits", self.logits)]

    def forward(self, share: Tensor, *given: Tensor) -> Tensor:
        """The preference ``[n]``, from what the first stage saw, if it reads inputs, and the logits of the answer."""
        share, (*seen, logits) = share[:, None], given
        [features] = seen or _unknown(sum(self.sizes), share)
        pooled, *read = features.split(self.sizes, dim=1)
        observed = [pooled, *_unknown(self.others, share), self.head.judge(logits)]
        scores = self.network(observed, read, share)
        return scores[:, -1] - scores[:, -2]


def _reads_input(network: DecisionPolicy, judged: int) -> bool:
    """Whether masks, or which answers are accepted, depend on more than ``judged`` features and the FLOPs."""
    if network.network is not None:
        return True
    layer = (network.body.of_stage[-1] if network.per_stage else network.body)[0]
    flat, own = network.observation_size, len(network.stages) + 1
    unread = torch.cat([layer.weight[:, own : flat - judged], layer.weight[:, flat:]], dim=1)
    return bool(network.head.weight[:-2].any() or unread.any())


def _unknown(features: int, share: Tensor) -> list[Tensor]:
    """Zeros ``[n, features]`` for what is not known at a stage, as many as ``share [n, 1]`` has rows."""
    return [share * torch.zeros(features)] if features else []  # expand() would fix the traced number of rows


class _Network(nn.Module):
    """The logits of a policy at one of its stages, from features that are not standardised."""

    def __init__(self, policy: SkipPolicy, number: int, pooled: int) -> None:
        super().__init__()
        table, self.network = policy.network, deepcopy(policy.learned)
        self.projection: Projection | None = table.projection if isinstance(table, TablePolicy) else None
        self.sees_pooled = policy.is_staged or self.network.channels is None
        self.network.channels = None
        self.network.token_encoder = nn.Identity()
        if self.network.per_stage:
            self.network.body = self.network.body.of_stage[number]
            self.network.per_stage = False
        of_stage = number if policy.is_staged else slice(None)
        self.mean, self.deviation = (torch.from_numpy(values[of_stage]) for values in (policy.mean, policy.deviation))
        self.stage = torch.eye(len(self.network.stages))[number] if policy.is_staged else None
        self.judged = len(self.mean) - pooled if policy.is_staged else 0

    def forward(self, features: list[Tensor], read: list[Tensor], share: Tensor) -> Tensor:
        """Logits ``[n, actions]``, from what is pooled and judged, what a token encoder reads, and ``share [n, 1]``."""
        observed = read
        if self.sees_pooled:
            observed = [standardised(torch.cat(features, dim=1), self.mean, self.deviation)]
        if self.stage is not None:
            observed = [share * 0 + self.stage, share, *observed]
        if self.projection is not None:
            mean, components = (torch.from_numpy(values).double() for values in self.projection[:2])
            reduced = (torch.cat(observed, dim=1).double() - mean) @ components.T
            observed = [reduced.clip(-OBSERVATION_LIMIT, OBSERVATION_LIMIT).half().float()]
        if self.stage is not None:
            observed = [*observed, *read]
        return self.network(torch.cat(observed, dim=1))
