"""The modules of an export that become ONNX graphs: the policy, a model per mask, and what goes on densely."""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.execution.bank import FirstLayerInput, path_of_layers, without_skipped
from sd_gym.inference.choices import learned_network
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.features import pooled_features, standardised
from sd_gym.policy.table_export import TablePolicy
from sd_gym.policy.token_encoder import TokenEncoder
from sd_gym.projection import OBSERVATION_LIMIT, Projection
from sd_gym.switch import Switchboard
from sd_gym.switch.twin import twin_at

EMBEDDINGS = "embeddings", "embeddings_project"  # modules of an encoder before its layers
INPUTS = "input_ids", "attention_mask", "token_type_ids"  # of an encoder, in the order of a graph's inputs


class Graph(nn.Module):
    """A module that is written as a graph."""

    outputs: tuple[str, ...]

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Names and examples of the arguments of ``forward``, from those of the model's inputs."""
        return list(of_model.items())


class Masked(Graph):
    """The logits of a model under a mask, and the hidden states before the layer with switch ``first``, if given."""

    def __init__(self, board: Switchboard, mask: NDArray, first: int | None) -> None:
        super().__init__()
        self.model = without_skipped(board, mask)
        self.outputs = ("logits",) if first is None else ("logits", "hidden")
        self._hidden: list[Tensor] = []
        if first is not None:
            layer = twin_at(_layers(board, self.model), str(board.switches[first].index))
            layer.register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, args: tuple) -> None:
        self._hidden = [args[0]]

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The logits, and where rows may go on the states ``[n, tokens, width]`` before that layer."""
        logits = _logits(self.model(**dict(zip(INPUTS, inputs, strict=False))))
        return (logits, *self._hidden) if self._hidden else logits


class Rest(Graph):
    """The dense logits, from the hidden states before the layer with switch ``first``."""

    outputs = ("logits",)

    def __init__(self, board: Switchboard, first: int) -> None:
        super().__init__()
        self.model, self.before = without_skipped(board, np.zeros(len(board), bool)), _GivenHidden()
        parts = twin_at(self.model, self.model.base_model_prefix)._modules
        parts.update({name: self.before for name in EMBEDDINGS if name in parts})
        layers = _layers(board, self.model)
        layers._modules = dict(list(layers._modules.items())[board.switches[first].index :])

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Graph``."""
        mask = of_model["attention_mask"]
        return [("hidden", torch.zeros(*mask.shape, self.model.config.hidden_size)), ("attention_mask", mask)]

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """The dense logits, from the states ``[n, tokens, width]`` before the layer."""
        self.before.given = hidden
        return _logits(self.model(inputs_embeds=hidden, attention_mask=attention_mask))


def _logits(output: Any) -> Tensor:
    """Logits; those of starts and ends stacked, if answers are extracted."""
    return torch.stack([output.start_logits, output.end_logits], dim=1) if "start_logits" in output else output.logits


class Decider(Graph):
    """The score of each choice for each input; if the answer is judged, also the features that this needs."""

    def __init__(self, board: Switchboard, policy: SkipPolicy, choices: NDArray) -> None:
        super().__init__()
        self.first_input = FirstLayerInput(board)
        network, self.longest = learned_network(policy), policy.longest
        self.encoder = deepcopy(network.token_encoder) if isinstance(network.token_encoder, TokenEncoder) else None
        self.of_tokens = [torch.from_numpy(values) for values in policy.of_tokens or (policy.mean, policy.deviation)]
        self.size = 2 * board.model.config.hidden_size + 2
        self.network, self.answers = _Network(policy, 0, self.size), policy.sees_answer
        padded = np.pad(choices, ((0, 0), (0, int(self.answers))), constant_values=-1)
        likelihood = network._log_likelihood(torch.eye(sum(network.nvec)), torch.from_numpy(padded))
        self.register_buffer("chosen", likelihood)
        self.outputs = ("scores", "seen") if self.answers else ("scores",)

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Graph``."""
        return [("share", torch.zeros(2)), *of_model.items()]

    def forward(self, share: Tensor, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The scores ``[n, choices]``, and what the answer stage sees again; ``share [n]``: FLOPs spent."""
        hidden, attention_mask = self.first_input(**dict(zip(INPUTS, inputs, strict=False))), inputs[1]
        pooled = pooled_features(hidden, attention_mask).float()
        read = pooled[:, :0]
        if self.encoder is not None:
            hidden, mask = hidden[:, : self.longest], attention_mask[:, : self.longest]
            tokens = standardised(hidden.float(), *self.of_tokens) * mask[:, :, None]
            read = (self.encoder.read(tokens, mask) - self.encoder.mean) / self.encoder.deviation
        judged = torch.zeros_like(pooled[:, : self.network.judged])
        scores = self.network(pooled, read, share, judged) @ self.chosen
        return (scores, torch.cat([pooled, read], dim=1)) if self.answers else scores


class AnswerDecider(Graph):
    """The policy's preference for going on over accepting the answer, in log-odds."""

    outputs = ("preference",)

    def __init__(self, policy: SkipPolicy, pooled: int, judged: int) -> None:
        super().__init__()
        self.network, self.pooled, self.size = _Network(policy, 1, pooled), pooled, pooled
        self.judged, self.others = judged, self.network.judged - judged
        if isinstance(encoder := learned_network(policy).token_encoder, TokenEncoder):
            self.size += len(encoder.mean)

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """See ``Graph``."""
        shown = {"seen": self.size, "judged": self.judged}
        return [("share", torch.zeros(2)), *((name, torch.zeros(2, size)) for name, size in shown.items())]

    def forward(self, share: Tensor, seen: Tensor, judged: Tensor) -> Tensor:
        """The preference ``[n]``, from what the first stage saw and the judgement of the answer."""
        judged = F.pad(judged, (self.others, 0))
        logits = self.network(seen[:, : self.pooled], seen[:, self.pooled :], share, judged)
        return logits[:, -1] - logits[:, -2]


class _Network(nn.Module):
    """The logits of a policy at one of its stages, from features that are not standardised."""

    def __init__(self, policy: SkipPolicy, number: int, pooled: int) -> None:
        super().__init__()
        table, self.network = policy.network, deepcopy(learned_network(policy))
        self.projection: Projection | None = table.projection if isinstance(table, TablePolicy) else None
        self.sees_pooled = policy.is_staged or self.network.channels is None
        self.network.channels, self.network.token_encoder = None, nn.Identity()
        if self.network.per_stage:
            self.network.body, self.network.per_stage = self.network.body.of_stage[number], False
        of_stage = number if policy.is_staged else slice(None)
        self.mean, self.deviation = (torch.from_numpy(values[of_stage]) for values in (policy.mean, policy.deviation))
        self.stage = torch.eye(len(self.network.stages))[number] if policy.is_staged else None
        self.judged = len(self.mean) - pooled if policy.is_staged else 0

    def forward(self, pooled: Tensor, read: Tensor, share: Tensor, judged: Tensor) -> Tensor:
        observed = read
        if self.sees_pooled:
            observed = standardised(torch.cat([pooled, judged], dim=1), self.mean, self.deviation)
        if self.stage is not None:
            stage = torch.zeros_like(share)[:, None] + self.stage  # expand() would fix the traced number of rows
            observed = torch.cat([stage, share[:, None], observed], dim=1)
        if self.projection is not None:
            mean, components = (torch.from_numpy(values).double() for values in self.projection[:2])
            reduced = (observed.double() - mean) @ components.T
            observed = reduced.clip(-OBSERVATION_LIMIT, OBSERVATION_LIMIT).half().float()
        if self.stage is not None:
            observed = torch.cat([observed, read], dim=1)
        return self.network(observed)


class _GivenHidden(nn.Module):
    """Replaces embeddings by hidden states that are ``given``."""

    given: Tensor

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.given


def _layers(board: Switchboard, twin: nn.Module) -> nn.Module:
    """The layers of an encoder's twin."""
    return twin_at(twin, path_of_layers(board, board.architecture.stacks[0]))
