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
from torch.nn import functional as F

from sd_gym.data.instance import Instance
from sd_gym.execution.bank import path_of_layers, without_skipped
from sd_gym.files import as_json, sha256, write_json, write_text
from sd_gym.folders import contents, locked
from sd_gym.going_on import resumed_from
from sd_gym.inference.choices import choices_of, decided_masks, few_masks, learned_network, masks_of
from sd_gym.inference.onnx import (
    ANSWER,
    DECIDE,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    OnnxModel,
    mask_file,
    own_hash,
    rest_file,
)
from sd_gym.inference.texts import SkippingModel
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.features import pooled_features, standardised
from sd_gym.policy.table_export import TablePolicy
from sd_gym.policy.token_encoder import TokenEncoder
from sd_gym.projection import OBSERVATION_LIMIT, Projection
from sd_gym.switch import Switchboard
from sd_gym.switch.twin import twin_at
from sd_gym.version import __version__

INLINE = 1024  # bytes of a weight that stays in its graph
ALIGNED = 4096  # where weights begin in their file, so that it can be mapped into memory
INSTEAD = "use it by sd_gym.load or sd_gym.attach"  # what to do with a policy that is not exported
EMBEDDINGS = "embeddings", "embeddings_project"  # modules of an encoder in front of its layers
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
        policy: A policy, the folder of a run or of ``save_pretrained``, or an id of the Hugging Face hub. All of its
            operating points are written.
        folder: Where to: a graph that decides, one for each mask, their weights, the tokenizer, a manifest, a card. If
            the policy looks at the answer, also a graph that judges it, and one per layer from which rows go on.
        masks: The most masks that it may decide among. A policy of more is refused: ``sd-gym reduce`` reduces it.
        int8: Whether the masks' matrix products are of 8-bit integers. Decisions stay in float32.
        backbone: Where the backbone is, if not where it was in training.

    Returns:
        The manifest.

    Raises:
        FileExistsError: If the folder holds anything.
        ValueError: If the policy cannot be exported; the message gives the reason, and what to do.
        ModuleNotFoundError: If ``onnx`` is not installed.
    """
    if find_spec("onnx") is None:
        raise ModuleNotFoundError("onnx is not installed: pip install 'sd-gym[onnx]'")
    folder, policy = Path(folder), policy if isinstance(policy, SkipPolicy) else SkipPolicy.from_pretrained(policy)
    _check_policy(policy)
    if not few_masks(policy, masks):
        raise _refused(
            f"it decides among more than {masks} masks, for each of which a graph is written",
            f"sd-gym reduce RUN --codebook {masks} --output REDUCED makes it decide among few; export that",
        )
    model = SkippingModel(policy, backbone, dtype="float32")
    _check_model(model)
    with locked(folder):
        if contents(folder):
            raise FileExistsError(f"{folder} is not empty; choose another --output")
        temporary = folder / "export.tmp"
        temporary.mkdir()
        try:
            manifest = _Writer(temporary, policy, model, int8).written()
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == MANIFEST):  # which comes last
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _refused(why: str, remedy: str) -> ValueError:
    return ValueError(f"this policy cannot be exported to ONNX: {why}; {remedy}")


def _check_policy(policy: SkipPolicy) -> None:
    """Raise ValueError if a policy has no export."""
    network = learned_network(policy)
    if later := [name for name in policy.stages_of_pass if name != "first"]:
        raise _refused(f"it decides in the middle of the pass, at {', '.join(later)}", INSTEAD)
    if network.noise != "none" or network.blind:
        raise _refused("it is a control, which sees nothing or draws its decisions", "export one that has learned")
    masks = decided_masks(policy)
    if len(policy.token_shares) > 1 if masks is None else masks[:, -1].any():
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

    def __init__(self, folder: Path, policy: SkipPolicy, model: SkippingModel, int8: bool) -> None:
        self._folder, self._policy, self._model, self._int8 = folder, policy, model, int8
        self._board, self._head = model._backbone.board, model._backbone.head
        self._choices: Any = choices_of(policy)
        masks = masks_of(policy, self._choices)[:, :-1].astype(bool)
        with_dense = np.concatenate([np.zeros_like(masks[:1]), masks])
        self._masks, number = np.unique(with_dense, axis=0, return_inverse=True)  # they are sorted: dense is the first
        self._mask_of_choice = number.ravel()[1:]
        levels = np.zeros((len(self._masks), 1), dtype=np.int64)
        points = self._head.resume_points(self._board)
        self._resumed = resumed_from(np.concatenate([self._masks, levels], axis=1), points).tolist()
        types = "token_type_ids" in model.tokenizer.model_input_names
        ids = torch.full((2, 7), 1)
        self._inputs = {"input_ids": ids, "attention_mask": ids.clone()}
        self._inputs |= {"token_type_ids": torch.zeros_like(ids)} if types else {}
        self._inputs["attention_mask"][1, 5:] = 0

    def written(self) -> dict[str, Any]:
        """Write all; the manifest."""
        graphs: dict[str, Any] = {DECIDE: _Decider(self._board, self._policy, self._choices)}
        looks = self._policy.sees_answer
        if looks:
            graphs[ANSWER] = _AnswerDecider(self._policy, graphs[DECIDE].size, len(self._head.judgement))
        for number, (mask, first) in enumerate(zip(self._masks, self._resumed, strict=True)):
            resumed = 0 < first < len(self._board) and looks
            graphs[mask_file(number)] = _Masked(self._board, mask, first if resumed else None)
            if resumed:
                graphs[rest_file(first)] = _Rest(self._board, first)
        with (self._folder / WEIGHTS).open("wb") as file:
            weights = _Weights(file)
            for name, module in graphs.items():
                in_int8 = self._int8 and isinstance(module, _Masked | _Rest)
                weights.write(self._traced(module, in_int8), self._folder / name)
        backend: Any = self._model.tokenizer
        tokenizer = deepcopy(backend.backend_tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        write_text(self._folder / TOKENIZER, tokenizer.to_str())
        manifest = self._described()
        write_text(self._folder / "README.md", _card(manifest))
        names = [*graphs, WEIGHTS, TOKENIZER, "README.md"]
        manifest["files"] = {name: sha256(self._folder / name) for name in names}
        manifest["files"][MANIFEST] = own_hash(manifest)
        write_json(self._folder / MANIFEST, manifest)
        if not self._int8:
            self._compare(graphs)
        return manifest

    def _traced(self, module: _Graph, in_int8: bool) -> Any:
        """The graph of a module, for any number of rows and tokens."""
        import onnx

        given = module.inputs(self._inputs)
        axes = {name: {0: "batch", 1: "length"} if value.shape[:2] == (2, 7) else {0: "batch"} for name, value in given}
        axes |= {name: {0: "batch"} for name in module.outputs}
        names = {"input_names": [name for name, _ in given], "output_names": list(module.outputs)}
        with TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of each shape that Python reads, and of itself
            file, options = Path(folder, "traced.onnx"), {"dynamic_axes": axes, "opset_version": 17, **names}
            # The newer exporter (dynamo) takes ten times as long, and its graphs run no faster.
            torch.onnx.export(module.eval(), tuple(value for _, value in given), file, dynamo=False, **options)
            graph = onnx.load(file)
        return _in_int8(graph) if in_int8 else graph

    def _described(self) -> dict[str, Any]:
        policy, model, backbone = self._policy, self._model, self._model._backbone
        config, tokenizer, card = model._config, model.tokenizer, self._policy.card
        _, instance = _probe(model)
        limit = min(config.backbone.max_source_length, tokenizer.model_max_length)
        always, switched = backbone.flops.costs(np.arange(3))  # a parabola of the tokens
        bend = (switched[2] - 2 * switched[1] + switched[0]) // 2
        special = (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        values = {
            "format": 2,
            "sd_gym": __version__,
            "head": self._head.name,
            "names": [model.names[index] for index in sorted(model.names)],
            "task": model.task,
            "metric": model.metric,
            "fields": list(model.fields),
            "optional": model.optional,
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
            "resumed_from": self._resumed,
            "switches": self._board.names,
            "choices": {
                "mask": self._mask_of_choice.tolist(),
                "cautious": (self._choices == 0).sum(axis=1).tolist(),  # components that a margin adds to
            },
            "looks_at_answer": policy.sees_answer,
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
            **{key: card[key] for key in ("env", "backbone", "result", "run")},
        }
        return json.loads(as_json(values))

    def _compare(self, graphs: dict[str, nn.Module]) -> None:
        """Raise RuntimeError if a graph gives something else than its model, on shapes that it was not traced with."""
        model, random = OnnxModel(self._folder), np.random.default_rng(0)
        longest = self._model._config.backbone.max_source_length
        for rows, length in ((1, 1), (3, min(11, longest)), (1, min(24, longest))):
            ids = random.integers(self._model.model.config.vocab_size, size=(rows, length))
            batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            batch["attention_mask"][1:, length // 2 :] = 0
            dense = model.run(0, batch)[0]
            for number in range(len(self._masks)):
                came, *hidden = model.run(number, batch)
                with torch.inference_mode():
                    wanted = graphs[mask_file(number)](*map(torch.from_numpy, batch.values()))
                wanted = (wanted[0] if hidden else wanted).numpy()
                went_on = model.run_rest(number, batch, hidden)
                for values, expected in ((came, wanted), (went_on, dense)):
                    if not np.allclose(values, expected, atol=TOLERANCE, rtol=TOLERANCE):
                        raise RuntimeError(
                            f"the graph of mask {number} gives other logits than its model; nothing was kept"
                        )


class _Graph(nn.Module):
    """A module that is written as a graph."""

    outputs: tuple[str, ...]

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Names and examples of the arguments of ``forward``, from those of the model's inputs."""
        return list(of_model.items())


class _Masked(_Graph):
    """The logits of a model under a mask.

    Also the hidden states in front of the layer that has switch ``first``, if one is given.
    """

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

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits = _logits(self.model(input_ids=input_ids, attention_mask=attention_mask, **types))
        return (logits, *self._hidden) if self._hidden else logits


class _Rest(_Graph):
    """The dense logits, from the hidden states in front of the layer that has switch ``first``."""

    outputs = ("logits",)

    def __init__(self, board: Switchboard, first: int) -> None:
        super().__init__()
        self.model, self.before = without_skipped(board, np.zeros(len(board), bool)), _StandIn()
        parts = twin_at(self.model, self.model.base_model_prefix)._modules
        parts.update({name: self.before for name in EMBEDDINGS if name in parts})
        layers = _layers(board, self.model)
        layers._modules = dict(list(layers._modules.items())[board.switches[first].index :])

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        mask = of_model["attention_mask"]
        return [("hidden", torch.zeros(*mask.shape, self.model.config.hidden_size)), ("attention_mask", mask)]

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        self.before.given = hidden
        return _logits(self.model(inputs_embeds=hidden, attention_mask=attention_mask))


def _logits(output: Any) -> Tensor:
    """Logits; of starts and ends together, where answers are extracted."""
    return torch.stack([output.start_logits, output.end_logits], dim=1) if "start_logits" in output else output.logits


class _Decider(_Graph):
    """The score of each choice for each input, by what enters the first layer; and that, if the answer is judged."""

    def __init__(self, board: Switchboard, policy: SkipPolicy, choices: NDArray) -> None:
        super().__init__()
        self.model, self.layers = without_skipped(board, np.zeros(len(board), bool)), _StandIn()
        _layers(board, self.model)._modules = {"0": self.layers}
        network, self.longest = learned_network(policy), policy.longest
        self.encoder = deepcopy(network.token_encoder) if isinstance(network.token_encoder, TokenEncoder) else None
        self.of_tokens = [torch.from_numpy(one) for one in policy.of_tokens or (policy.mean, policy.deviation)]
        self.size = 2 * board.model.config.hidden_size + 2
        self.network, self.answers = _Network(policy, 0, self.size), policy.sees_answer
        padded = np.pad(choices, ((0, 0), (0, int(self.answers))), constant_values=-1)
        likelihood = network._log_likelihood(torch.eye(sum(network.nvec)), torch.from_numpy(padded))
        self.register_buffer("chosen", likelihood)
        self.outputs = ("scores", "seen") if self.answers else ("scores",)

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        return [("share", torch.zeros(2)), *of_model.items()]

    def forward(
        self, share: Tensor, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        hidden = self.layers.seen
        pooled = pooled_features(hidden, attention_mask).float()
        read = pooled[:, :0]
        if self.encoder is not None:
            hidden, mask = hidden[:, : self.longest], attention_mask[:, : self.longest]
            tokens = standardised(hidden.float(), *self.of_tokens) * mask[:, :, None]
            read = (self.encoder.read(tokens, mask) - self.encoder.mean) / self.encoder.deviation
        judged = torch.zeros_like(pooled[:, : self.network.judged])
        scores = self.network(pooled, read, share, judged) @ self.chosen
        return (scores, torch.cat([pooled, read], dim=1)) if self.answers else scores


class _AnswerDecider(_Graph):
    """By how much the policy prefers going on to accepting an answer, in log-odds."""

    outputs = ("preference",)

    def __init__(self, policy: SkipPolicy, pooled: int, judged: int) -> None:
        super().__init__()
        self.network, self.pooled, self.size = _Network(policy, 1, pooled), pooled, pooled
        self.judged, self.others = judged, self.network.judged - judged
        if isinstance(encoder := learned_network(policy).token_encoder, TokenEncoder):
            self.size += len(encoder.mean)

    def inputs(self, of_model: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        shown = {"seen": self.size, "judged": self.judged}
        return [("share", torch.zeros(2)), *((name, torch.zeros(2, size)) for name, size in shown.items())]

    def forward(self, share: Tensor, seen: Tensor, judged: Tensor) -> Tensor:
        judged = F.pad(judged, (self.others, 0))
        logits = self.network(seen[:, : self.pooled], seen[:, self.pooled :], share, judged)
        return logits[:, -1] - logits[:, -2]


class _Network(nn.Module):
    """The logits of a policy at one of its stages, of what it sees there, which is not standardised."""

    def __init__(self, policy: SkipPolicy, number: int, pooled: int) -> None:
        super().__init__()
        table, self.network = policy.network, deepcopy(learned_network(policy))
        self.projection: Projection | None = table.projection if isinstance(table, TablePolicy) else None
        self.sees_pooled = policy.is_staged or self.network.channels is None
        self.network.channels, self.network.token_encoder = None, nn.Identity()
        if self.network.per_stage:
            self.network.body, self.network.per_stage = self.network.body.of_stage[number], False
        of_stage = number if policy.is_staged else slice(None)
        self.mean, self.deviation = (torch.from_numpy(one[of_stage]) for one in (policy.mean, policy.deviation))
        self.judged = 0
        self.stage: Tensor | None = None
        if policy.is_staged:
            self.stage = torch.eye(len(self.network.stages))[number]
            self.judged = len(self.mean) - pooled

    def forward(self, pooled: Tensor, read: Tensor, share: Tensor, judged: Tensor) -> Tensor:
        observed = read
        if self.sees_pooled:
            observed = standardised(torch.cat([pooled, judged], dim=1), self.mean, self.deviation)
        if self.stage is not None:
            stage = torch.zeros_like(share)[:, None] + self.stage  # a length would be that of the traced example
            observed = torch.cat([stage, share[:, None], observed], dim=1)
        if self.projection is not None:
            mean, components = (torch.from_numpy(values).double() for values in self.projection[:2])
            reduced = (observed.double() - mean) @ components.T
            observed = reduced.clip(-OBSERVATION_LIMIT, OBSERVATION_LIMIT).half().float()
        if self.stage is not None:
            observed = torch.cat([observed, read], dim=1)
        return self.network(observed)


class _StandIn(nn.Module):
    """Stands in for layers or embeddings: gives what is ``given``, or else keeps what enters it and passes it on."""

    seen: Any  # Tensor
    given: Tensor | None = None

    def forward(self, hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Tensor | None:
        if self.given is not None:
            return self.given
        self.seen = hidden_states
        return hidden_states


def _layers(board: Switchboard, twin: nn.Module) -> nn.Module:
    """The layers of an encoder's twin."""
    return twin_at(twin, path_of_layers(board, board.architecture.stacks[0]))


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
    return f"""---
library_name: sd_gym
tags: [sd_gym, onnx, skipping]
---

# A skipping policy for {backbone["name"]}, as ONNX graphs

`{DECIDE}` chooses one of {len(manifest["masks"])} masks for each input, `mask-N.onnx` answers under it, in {kind}. All
graphs have their weights in `{WEIGHTS}`; `{MANIFEST}` has the hash of every file.

On the {result["split"]} split, before it was exported: quality {result["quality"]:.4f}, dense
{result["quality_ref"]:.4f}, {result["flops_ratio_with_policy"]:.1%} of the FLOPs; verdict: {result["verdict"]}.
`sd-gym evaluate THIS_FOLDER` judges these graphs. Of its {len(manifest["operating_points"])} operating points
`max_loss=` or `max_flops=` choose another one.

```python
import sd_gym

model = sd_gym.onnx.load("THIS FOLDER")
model(["a text", "another one"])
```
"""
