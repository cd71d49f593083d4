"""An exported policy (``sd-gym export``) on a split of its env: its own graphs decide and answer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.learning.decisions import SplitDecisions
from torch import Tensor

from sd_gym.config import EnvConfig
from sd_gym.envs.core import BackboneCore
from sd_gym.envs.protocols import Outcome
from sd_gym.execution.split import BackboneSplit
from sd_gym.inference.onnx import DECIDED, OnnxModel
from sd_gym.switch import PassState


class ExportedCore(BackboneCore):
    """The core of an env in which the graphs of an export answer; its dense reference is the backbone in torch.

    The data set's own metric of dense (``metrics``) is that of the dense graph.

    Raises:
        ValueError: If the env's backbone is not the one that was exported, or its inputs are longer.
    """

    def __init__(self, config: EnvConfig, model: OnnxModel) -> None:
        self._graphs = _Graphs(model)
        super().__init__(config)
        if self.backbone.weights != model.manifest["backbone"]["weights"]:
            raise ValueError(
                f"the weights of {config.backbone.name} are not those of the backbone that {model.folder} was exported "
                "with; pass backbone=..."
            )
        longest = min(config.backbone.max_source_length, self.backbone.tokenizer.model_max_length)
        if longest > (limit := model.manifest["cut"]["length"]):
            raise ValueError(
                f"{model.folder} cuts inputs at {limit} tokens, the env at {longest}; pass max_source_length={limit}, "
                "or export a policy that was trained on longer inputs"
            )

    def split(self, name: str) -> BackboneSplit:
        """A split whose rows are run by the graphs, once torch has scored it densely."""
        split = super().split(name)
        if split.passes.bank is None:
            split.scoring.score_dense()
            split.passes.bank = self._graphs
        return split

    def score(
        self, split: BackboneSplit, rows: NDArray, decisions: NDArray, resume_from: PassState | None = None
    ) -> Outcome:
        """See ``Core.score``; a dense graph is run, too, since its answers may not be those of torch."""
        quality_ref = split.scoring.quality(rows, np.zeros_like(decisions))[1]
        return Outcome(split.scoring.run(rows, decisions), quality_ref, split.costs.flops_ratio(rows, decisions))


class ExportedPolicy:
    """An exported policy, as a ``SplitPolicy``."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model

    def decide_split(self, split: Any, rows: NDArray) -> SplitDecisions:
        """Its decisions on ``rows [n]``, and the FLOPs of deciding."""
        model, length = self._model, split.encoded.source_length[rows]
        masks, went_on = np.zeros((len(rows), len(split.backbone.board) + 1), np.int64), np.zeros(len(rows), bool)
        order = np.argsort(length, kind="stable")
        for part in np.split(order, range(DECIDED, len(order), DECIDED)):
            inputs = split.passes.inputs(rows[part])
            batch = {name: values.numpy() for name, values in inputs.items() if name != "labels"}
            number, seen = model.decide(batch)
            masks[part, :-1] = model.masks[number]
            for mask in np.unique(number) if model.has_answer_stage else ():
                own = number == mask
                chosen = {name: values[own] for name, values in batch.items()}
                went_on[part[own]] = model.run_judged(mask, chosen, seen[own])[1]
        decisions = np.pad(masks, ((0, 0), (0, int(model.has_answer_stage))))
        if model.has_answer_stage:
            decisions[:, -1] = went_on
        return SplitDecisions(decisions, model.own_flops(length))


class _Graphs:
    """The graphs of an export, with the interface of ``Bank``."""

    one_mask_per_pass = True  # no pass may have rows of several masks

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._number = {mask.tobytes(): number for number, mask in enumerate(model.masks)}

    def of(self, mask: NDArray) -> Any:
        """A function that runs the graph of a mask, bool ``[switches]``, and returns outputs like a model's."""
        number = self._number[mask.tobytes()]

        def run(**inputs: Tensor) -> SimpleNamespace:
            logits = torch.from_numpy(
                self._model.run(number, {name: value.numpy() for name, value in inputs.items()})[0]
            )
            return SimpleNamespace(logits=logits, start_logits=logits[:, 0], end_logits=logits[:, -1])

        return run
