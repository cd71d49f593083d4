"""A policy as ONNX graphs: one that decides, and one for each of its few masks, on one file of shared weights."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from sd_gym.backbones.heads import SpanHead
from sd_gym.data.instance import Instance
from sd_gym.execution.bank import path_of_layers, without_skipped
from sd_gym.files import as_json, sha256, write_json, write_text
from sd_gym.folders import contents, locked
from sd_gym.inference.onnx import DECIDE, MANIFEST, TOKENIZER, WEIGHTS, OnnxModel, own_hash
from sd_gym.inference.texts import SkippingModel
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.features import pooled_features, standardised
from sd_gym.policy.table_export import TablePolicy
from sd_gym.projection import OBSERVATION_LIMIT, Projection
from sd_gym.switch import Switchboard
from sd_gym.switch.twin import twin_at
from sd_gym.version import __version__

INLINE = 1024  # bytes of a weight that stays in its graph
ALIGNED = 4096  # where weights begin in their file, so that it can be mapped into memory
INSTEAD = "use it by sd_gym.load or sd_gym.attach"  # what to do with a policy that is not exported
TOLERANCE = 1e-3  # of logits, between a graph and the model that it was made of


def export(
    policy: SkipPolicy | str | Path,
    folder: str | Path,
    *,
    masks: int = 8,
    int8: bool = False,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Write a policy as ONNX graphs, which ``sd_gym.onnx.load`` answers texts with, without torch.

    Args:
        policy: A policy, the folder of a run or of ``save_pretrained``, or an id of the Hugging Face hub. Of its
            operating points the one in force is written (``SkipPolicy.at``).
        folder: Where to: a graph that decides, one for each mask, their weights, the tokenizer, a manifest, a card.
        masks: The most masks that it may decide among. A policy of more is refused: ``sd-gym reduce`` reduces it.
        int8: Whether the masks' matrix products are of 8-bit integers. Decisions stay in float32.
        backbone: Where the backbone is, if not where it was in training.

    Returns:
        The manifest.

    Raises:
        FileExistsError: If the folder holds anything.
        ValueError: If the policy cannot be exported; the message says what is in the way, and what to do.
        ModuleNotFoundError: If ``onnx`` is not installed.
    """
    if find_spec("onnx") is None:
        raise ModuleNotFoundError("onnx is not installed: pip install 'sd-gym[onnx]'")
    folder, policy = Path(folder), policy if isinstance(policy, SkipPolicy) else SkipPolicy.from_pretrained(policy)
    _check_policy(policy)
    decided = policy.network.few_decisions
    if decided is None or not few_masks(policy, masks):
        raise _refused(
            f"it decides among more than {masks} masks, for each of which a graph is written",
            f"sd-gym reduce RUN --codebook {masks} --output REDUCED makes it decide among few; export that",
        )
    model = SkippingModel(policy, backbone)
    _check_model(model)
    with locked(folder):
        if contents(folder):
            raise FileExistsError(f"{folder} is not empty; choose another --output")
        temporary = folder / "export.tmp"
        temporary.mkdir()
        try:
            manifest = _Writer(temporary, policy, model, decided, int8).written()
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == MANIFEST):  # which comes last
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def few_masks(policy: SkipPolicy, most: int) -> bool:
    """Whether a policy decides among at most so many masks."""
    decided = policy.network.few_decisions
    return decided is not None and len(np.unique(decided, axis=0)) <= most


def _refused(why: str, remedy: str) -> ValueError:
    return ValueError(f"this policy cannot be exported to ONNX: {why}; {remedy}")


def _check_policy(policy: SkipPolicy) -> None:
    """Raise ValueError if a policy has no export."""
    inner = policy.network.network if isinstance(policy.network, TablePolicy) else policy.network
    if policy.is_staged:
        raise _refused(f"it decides in the pass, at {', '.join(inner.stages)}", INSTEAD)
    if inner.noise != "none" or inner.blind:
        raise _refused("it is a control, which sees nothing or draws its decisions", "export one that has learned")
    decided = policy.network.few_decisions
    if len(policy.token_shares) > 1 if decided is None else decided[:, -1].any():
        raise _refused("it drops tokens", f"learn one with token_shares=[0.0], or {INSTEAD}")


def _check_model(model: SkippingModel) -> None:
    """Raise ValueError if a policy's backbone, tokenizer or task has no export."""
    architecture, head = model._backbone.board.architecture, model._backbone.head
    if head.gives == "text" or len(architecture.stacks) > 1 or architecture.causal:
        kind = model.model.config.model_type
        raise _refused(f"its backbone, a {kind}, is no encoder that classifies, scores or extracts", INSTEAD)
    if not model.tokenizer.is_fast:
        raise _refused(f"{type(model.tokenizer).__name__} is no fast tokenizer", INSTEAD)
    texts, instance = _probe(model)
    if [instance.source, *([] if instance.source_pair is None else [instance.source_pair])] != texts:
        raise _refused(f"the task {model._config.task} changes its texts before they are read", INSTEAD)


def _probe(model: SkippingModel) -> tuple[list[str], Instance]:
    """Texts for all fields of a task, and the instance that it makes of them."""
    texts = [f"text {number}" for number in range(len(model.fields))]
    return texts, model._instance(0, texts)


class _Writer:
    """Writes all files of an export into a folder."""

    def __init__(self, folder: Path, policy: SkipPolicy, model: SkippingModel, decided: Any, int8: bool) -> None:
        self._folder, self._policy, self._model, self._int8 = folder, policy, model, int8
        self._board, self._head = model._backbone.board, model._backbone.head
        masks, self._of_number = np.unique(decided[:, :-1].astype(bool), axis=0, return_inverse=True)
        self._of_number = self._of_number.ravel()
        self._masks = masks
        if masks[0].any():  # they are sorted: dense would be the first
            self._masks, self._of_number = np.concatenate([np.zeros_like(masks[:1]), masks]), self._of_number + 1
        types = "token_type_ids" in model.tokenizer.model_input_names
        self._inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]

    def written(self) -> dict[str, Any]:
        """Write all; the manifest."""
        graphs = [f"mask-{number}.onnx" for number in range(len(self._masks))]
        with (self._folder / WEIGHTS).open("wb") as file:
            weights = _Weights(file)
            decider = _Decider(self._board, self._policy, self._of_number)
            weights.write(self._traced(decider, "number"), self._folder / DECIDE)
            plain = [without_skipped(self._board, mask) for mask in self._masks]
            for name, model in zip(graphs, plain, strict=True):
                graph = self._traced(_Logits(model, isinstance(self._head, SpanHead)), "logits")
                weights.write(_in_int8(graph) if self._int8 else graph, self._folder / name)
        backend: Any = self._model.tokenizer
        tokenizer = deepcopy(backend.backend_tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        write_text(self._folder / TOKENIZER, tokenizer.to_str())
        manifest = self._described(graphs)
        write_text(self._folder / "README.md", _card(manifest))
        names = [DECIDE, *graphs, WEIGHTS, TOKENIZER, "README.md"]
        manifest["files"] = {name: sha256(self._folder / name) for name in names}
        manifest["files"][MANIFEST] = own_hash(manifest)
        write_json(self._folder / MANIFEST, manifest)
        self._compare(plain)
        return manifest

    def _traced(self, module: nn.Module, output: str) -> Any:
        """The graph of a module, for any number of rows and tokens."""
        import onnx

        ids = torch.full((2, 7), 1)
        given = dict.fromkeys(self._inputs, torch.zeros_like(ids)) | {"input_ids": ids, "attention_mask": ids.clone()}
        given["attention_mask"][1, 5:] = 0
        axes = {name: {0: "batch", 1: "length"} for name in self._inputs} | {output: {0: "batch"}}
        options = {"input_names": self._inputs, "output_names": [output], "dynamic_axes": axes, "opset_version": 17}
        with TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of each shape that Python reads, and of itself
            file = Path(folder, "traced.onnx")
            # The newer exporter (dynamo) takes ten times as long, and its graphs run no faster.
            torch.onnx.export(module.eval(), tuple(given.values()), file, dynamo=False, **options)
            return onnx.load(file)

    def _described(self, graphs: list[str]) -> dict[str, Any]:
        policy, model, backbone = self._policy, self._model, self._model._backbone
        config, tokenizer, card = model._config, model.tokenizer, self._policy.card
        _, instance = _probe(model)
        limit = min(config.backbone.max_source_length, tokenizer.model_max_length)
        always, switched = backbone.flops.costs(np.arange(3))  # a parabola of the tokens
        bend = (switched[2] - 2 * switched[1] + switched[0]) // 2
        names = {int(index): str(name) for index, name in (backbone.model.config.id2label or {}).items()}
        special = (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        values = {
            "format": 1,
            "sd_gym": __version__,
            "head": self._head.name,
            "names": [names[index] for index in sorted(names)],
            "task": config.task,
            "metric": model.metric,
            "fields": list(model.fields),
            "optional": model._task.optional is not None,
            "reference": model.reference,
            "unanswerable": config.data.unanswerable,
            "longest_answer": config.backbone.max_target_length,
            "padding_token": tokenizer.pad_token_id,
            "unknown_token": None if tokenizer.unk_token_id in special else tokenizer.unk_token_id,
            "cut": {
                "length": limit,
                "strategy": "only_second" if instance.source_pair and instance.protected else "longest_first",
                "direction": tokenizer.truncation_side,
            },
            "masks": self._masks.astype(int).tolist(),
            "switches": self._board.names,
            "graphs": graphs,
            "dense": 0,
            "int8": self._int8,
            "flops": {
                "per_sequence": int(always[0]),
                "per_token": int(always[1] - always[0]),
                "per_query": (switched[1] - switched[0] - bend).tolist(),
                "per_pair": bend.tolist(),
                "policy": policy.network.flops,
                "policy_per_token": policy.network.flops_per_token,
                "policy_longest": policy.longest,
            },
            "operating_points": [point._asdict() for point in policy.operating_points],
            "left_out": ["all operating points but the one with margin 0"] if len(policy.operating_points) > 1 else [],
            **{key: card[key] for key in ("env", "backbone", "result", "run")},
        }
        return json.loads(as_json(values))

    def _compare(self, plain: list[PreTrainedModel]) -> None:
        """Raise RuntimeError if a graph gives something else than its model, on shapes that it was not traced with."""
        model, random = OnnxModel(self._folder), np.random.default_rng(0)
        longest = self._model._config.backbone.max_source_length
        for rows, length in ((1, 1), (3, min(11, longest)), (1, min(24, longest))):
            ids = random.integers(self._model.model.config.vocab_size, size=(rows, length))
            batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            batch["attention_mask"][1:, length // 2 :] = 0
            for number, one in enumerate([] if self._int8 else plain):
                logits = _Logits(one, isinstance(self._head, SpanHead)).eval()
                with torch.inference_mode():
                    wanted = logits(*map(torch.from_numpy, batch.values())).numpy()
                if not np.allclose(model.run(number, batch), wanted, atol=TOLERANCE, rtol=TOLERANCE):
                    raise RuntimeError(
                        f"the graph of mask {number} gives other logits than its model; nothing was kept"
                    )


class _Logits(nn.Module):
    """The logits of a model; of starts and ends together, where it extracts."""

    def __init__(self, model: nn.Module, extracts: bool) -> None:
        super().__init__()
        self.model, self.extracts = model, extracts

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        return torch.stack([output.start_logits, output.end_logits], dim=1) if self.extracts else output.logits


class _Decider(nn.Module):
    """The number of the mask for each input: what enters the first layer, observed and decided on."""

    mean: Tensor
    deviation: Tensor
    chosen: Tensor

    def __init__(self, board: Switchboard, policy: SkipPolicy, of_number: NDArray) -> None:
        super().__init__()
        self.model, self.seen, network = without_skipped(board, np.zeros(len(board), bool)), _Seen(), policy.network
        layers = twin_at(self.model, path_of_layers(board, board.architecture.stacks[0]))
        layers._modules = {"0": self.seen}
        table, self.longest = isinstance(network, TablePolicy), policy.longest
        self.projection: Projection | None = network.projection if isinstance(network, TablePolicy) else None
        self.network: Any = deepcopy(network.network if isinstance(network, TablePolicy) else network)
        self.encoder: Any = self.network.token_encoder if not table and network.channels is not None else None
        self.network.channels, self.network.token_encoder = None, nn.Identity()
        numbers = self.network.few_decisions
        assert numbers is not None  # else it is not exported
        self.of_number = torch.from_numpy(of_number)
        likelihood = self.network._log_likelihood(torch.eye(sum(self.network.nvec)), torch.from_numpy(numbers))
        self.register_buffer("chosen", likelihood)
        self.register_buffer("mean", torch.from_numpy(policy.mean))
        self.register_buffer("deviation", torch.from_numpy(policy.deviation))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        observed = self._observed(self.seen.hidden, attention_mask)
        return self.of_number[(self.network(observed) @ self.chosen).argmax(dim=1)]

    def _observed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.encoder is not None:
            hidden, mask = hidden[:, : self.longest], mask[:, : self.longest]
            tokens = standardised(hidden.float(), self.mean, self.deviation) * mask[:, :, None]
            return (self.encoder.read(tokens, mask) - self.encoder.mean) / self.encoder.deviation
        observed = standardised(pooled_features(hidden, mask).float(), self.mean, self.deviation)
        if self.projection is None:
            return observed
        mean, components = (torch.from_numpy(values).double() for values in self.projection[:2])
        reduced = (observed.double() - mean) @ components.T
        return reduced.clip(-OBSERVATION_LIMIT, OBSERVATION_LIMIT).half().float()


class _Seen(nn.Module):
    """Stands in for all layers, and keeps what enters them."""

    hidden: Tensor

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.hidden = hidden_states
        return hidden_states


class _Weights:
    """One file of weights, each of which is written once, however many graphs have it."""

    def __init__(self, file: Any) -> None:
        self._file, self._places = file, dict[bytes, int]()

    def write(self, graph: Any, path: Path) -> None:
        """Write a graph, and those of its weights that are new."""
        import onnx

        for tensor in graph.graph.initializer:
            content = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(content) >= INLINE:
                place = {"location": WEIGHTS, "offset": self._place_of(content), "length": len(content)}
                kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
                kept.data_location = onnx.TensorProto.EXTERNAL
                kept.external_data.extend(
                    onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()
                )
                tensor.CopyFrom(kept)
        self._file.flush()
        path.write_bytes(graph.SerializeToString())

    def _place_of(self, content: bytes) -> int:
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNED))
            self._places[key] = self._file.tell()
            self._file.write(content)
        return self._places[key]


def _in_int8(graph: Any) -> Any:
    """A graph whose matrix products with weights are of 8-bit integers."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        written = Path(folder, "int8.onnx")
        options = {"weight_type": QuantType.QInt8, "op_types_to_quantize": ["MatMul", "Gemm"]}
        logging.disable(logging.WARNING)  # it recommends another tool
        try:
            quantize_dynamic(graph, written, **options)
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(written)


def _card(manifest: dict[str, Any]) -> str:
    """Markdown: what it is, and how it is used."""
    result, backbone = manifest["result"], manifest["backbone"]
    kind = "8-bit integers" if manifest["int8"] else "float32"
    left_out = "".join(f"\nLeft out: {what}.\n" for what in manifest["left_out"])
    return f"""---
library_name: sd_gym
tags: [sd_gym, onnx, skipping]
---

# A skipping policy for {backbone["name"]}, as ONNX graphs

`{DECIDE}` chooses one of {len(manifest["masks"])} masks for each input, `mask-N.onnx` answers under it, in {kind}. All
graphs have their weights in `{WEIGHTS}`; `{MANIFEST}` has the hash of every file.

On the {result["split"]} split, before it was exported: quality {result["quality"]:.4f}, dense
{result["quality_ref"]:.4f}, {result["flops_ratio_with_policy"]:.1%} of the FLOPs; verdict: {result["verdict"]}.
`sd-gym evaluate THIS_FOLDER` judges these graphs.
{left_out}
```python
import sd_gym

model = sd_gym.onnx.load("THIS FOLDER")
model(["a text", "another one"])
```
"""
