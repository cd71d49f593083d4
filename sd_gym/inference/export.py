"""Export a policy as ONNX graphs, which share a file of weights: one answers under any of its masks, others decide."""

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

from sd_gym.data.instance import Instance
from sd_gym.errors import MissingExtraError
from sd_gym.execution.bank import without_skipped
from sd_gym.files import as_json, sha256, write_json, write_text
from sd_gym.folders import check_empty, contents, locked
from sd_gym.going_on import resumed_from
from sd_gym.inference.branches import branched
from sd_gym.inference.choices import choices_of, decided_masks, masks_of
from sd_gym.inference.graphs import INPUTS, AnswerDecider, Decider, Graph, Switched, logits_of
from sd_gym.inference.manifest import ANSWER, DECIDE, FORMAT, MANIFEST, MODEL, TOKENIZER, WEIGHTS, own_hash
from sd_gym.inference.onnx import OnnxModel
from sd_gym.inference.texts import SkippingModel
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.version import __version__

CARD = "README.md"
TEMPORARY = "export.tmp"  # folder of the files until all are written
INLINE = 1024  # smaller weights, in bytes, stay in their graphs
ALIGNED = 4096  # weights begin at multiples of this in their file, so that it can be mapped into memory
INSTEAD = "use it with sd_gym.load or sd_gym.attach"  # instead of an export
LENGTH = 7  # tokens of the example that graphs are traced with
TOLERANCE = 1e-3  # largest difference of logits between a graph and its model


def export(
    policy: SkipPolicy | str | Path,
    folder: str | Path,
    *,
    masks: int = 8,
    int8: bool = False,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Write a policy as ONNX graphs, so that ``sd_gym.onnx.load`` answers texts without torch.

    Args:
        policy: A policy, the folder of a run or of ``save_pretrained``, or an id of the Hugging Face hub. All its
            operating points are written.
        folder: A new folder: a graph that answers, its weights, the tokenizer, a manifest, a card. If the policy reads
            its input, also a graph that decides; if it judges the answer, also a graph for that.
        masks: Largest number of masks that the policy may decide among, since only rows of the same mask run together;
            ``sd-gym reduce`` reduces a policy of more.
        int8: Whether the masks' matrix products use 8-bit integers. Decisions stay in float32.
        backbone: Where the backbone is, if not where it was in training.

    Returns:
        The manifest.

    Raises:
        FileExistsError: If the folder holds anything.
        ValueError: If the policy cannot be exported; the message gives the reason, and what to do.
        MissingExtraError: If ``onnx`` or ``onnxruntime`` is not installed.
    """
    if masks < 1:
        raise ValueError(f"masks: expected at least 1, got {masks}")
    folder, policy = Path(folder), policy if isinstance(policy, SkipPolicy) else SkipPolicy.from_pretrained(policy)
    with locked(folder):
        model, among = check_exportable(policy, folder, backbone), decided_masks(policy)
        if len(policy.token_shares) > 1 if among is None else among[:, -1].any():
            raise _refused("it drops tokens", f"learn one with token_shares=[0.0], or {INSTEAD}")
        if among is None or len(among) > masks:
            remedy = f"sd-gym reduce RUN --codebook {masks} --output REDUCED makes it decide among few; export that"
            raise _refused(f"it decides among more than {masks} masks, so few inputs would run together", remedy)
        temporary = folder / TEMPORARY
        shutil.rmtree(temporary, ignore_errors=True)  # left by an export that was killed
        temporary.mkdir()
        try:
            manifest = _Writer(temporary, policy, model, int8).write()
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == MANIFEST):  # the manifest is last
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def check_exportable(policy: SkipPolicy, folder: Path, backbone: str | None = None) -> SkippingModel:
    """The policy on its backbone; raises what ``export`` raises, whatever masks the policy decides among."""
    if lacking := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        raise MissingExtraError(f"an export needs {' and '.join(lacking)}: pip install 'sd-gym[onnx]'")
    files = set(contents(folder)) if (folder / TEMPORARY).exists() else set()
    if files and files <= {MODEL, DECIDE, ANSWER, WEIGHTS, TOKENIZER, CARD}:  # the manifest would be last
        raise FileExistsError(f"{folder} holds an export that was cut off; delete it, or choose another --output")
    check_empty(folder)
    network = policy.learned
    if later := [name for name in policy.stages_of_pass if name != "first"]:
        raise _refused(f"it decides in the middle of the pass, at {', '.join(later)}", INSTEAD)
    if network.noise != "none" or network.blind:
        raise _refused("it is a control, which sees nothing or draws its decisions", "export one that has learned")
    model = SkippingModel(policy, backbone, dtype="float32")
    _check_model(model)
    return model


def _refused(why: str, remedy: str) -> ValueError:
    return ValueError(f"this policy cannot be exported to ONNX: {why}; {remedy}")


def _check_model(model: SkippingModel) -> None:
    """Raise ValueError if a policy's backbone, tokenizer or task has no export."""
    architecture, head = model.backbone.board.architecture, model.backbone.head
    if head.gives == "text" or len(architecture.stacks) > 1 or architecture.causal:
        kind = model.model.config.model_type
        raise _refused(f"its backbone, a {kind}, is no encoder that classifies, scores or extracts", INSTEAD)
    if not model.tokenizer.is_fast:
        raise _refused(f"{type(model.tokenizer).__name__} is no fast tokenizer", INSTEAD)
    texts, instance = _probe(model)
    if [text for text in (instance.source, instance.source_pair) if text is not None] != texts:
        raise _refused(f"the task {model.config.task} changes its texts before they are read", INSTEAD)


def _probe(model: SkippingModel) -> tuple[list[str], Instance]:
    """Texts, one per field, that a task may normalise in several ways, and the instance that it makes of them."""
    texts = [f"  Text\u00a0\uff10 \u00c9\n{number}! " for number in range(len(model.fields))]
    return texts, model.instance("the example", texts)


class _Writer:
    """Writes all files of an export into a folder."""

    def __init__(self, folder: Path, policy: SkipPolicy, model: SkippingModel, int8: bool) -> None:
        self._folder = folder
        self._policy = policy
        self._model = model
        self._int8 = int8
        self._board = model.backbone.board
        self._head = model.backbone.head
        self._choices: Any = choices_of(policy)
        masks = masks_of(policy, self._choices)[:, :-1].astype(bool)
        with_dense = np.concatenate([np.zeros_like(masks[:1]), masks])
        self._masks, number = np.unique(with_dense, axis=0, return_inverse=True)  # they are sorted: dense is the first
        self._mask_of_choice = number.ravel()[1:]
        levels = np.zeros((len(self._masks), 1), dtype=np.int64)
        points = self._head.resume_points(self._board)
        self._resumed = resumed_from(np.concatenate([self._masks, levels], axis=1), points).tolist()
        self._inputs = {name: torch.ones(2, LENGTH, dtype=torch.int64) for name in INPUTS}
        self._inputs["attention_mask"][1, LENGTH - 2 :] = 0
        self._inputs["token_type_ids"][:] = 0
        if "token_type_ids" not in model.tokenizer.model_input_names:
            del self._inputs["token_type_ids"]

    def write(self) -> dict[str, Any]:
        """Write all files; returns the manifest."""
        policy, board = self._policy, self._board
        resumed = (
            sorted({first for first in self._resumed if 0 < first < len(board)}) if policy.has_answer_stage else []
        )
        branches = self._branches(resumed)
        switched = Switched(board, branches, resumed, self._inputs)
        first, graphs = Decider(board, policy, self._choices), dict[str, Graph]({MODEL: switched})
        if first.constant is None:
            graphs[DECIDE] = first
        if policy.has_answer_stage:
            graphs[ANSWER] = AnswerDecider(policy, self._head, first, switched.logits)
        with (self._folder / WEIGHTS).open("wb") as file:
            weights = _Weights(file)
            for name, module in graphs.items():
                in_int8 = self._int8 and isinstance(module, Switched)
                weights.write(self._traced(module, in_int8), self._folder / name)
        backend: Any = self._model.tokenizer
        tokenizer = deepcopy(backend.backend_tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        write_text(self._folder / TOKENIZER, tokenizer.to_str())
        manifest = {**self._described(), "branches": [number for number, *_ in branches]}
        manifest["choices"]["scores"] = None if first.constant is None else first.constant.tolist()
        write_text(self._folder / CARD, _card(manifest))
        hashed = (*graphs, WEIGHTS, TOKENIZER, CARD)
        manifest["files"] = {name: sha256(self._folder / name) for name in hashed}
        manifest["files"][MANIFEST] = own_hash(manifest)
        write_json(self._folder / MANIFEST, manifest)
        if not self._int8:
            self._compare()
        return manifest

    def _branches(self, resumed: list[int]) -> list[list[int]]:
        """Indices of skipped switches, grouped where all masks agree, since each branch takes time.

        Rows that go on from a switch of ``resumed`` skip all before it.
        """
        branches, numbers = list[list[int]](), np.arange(len(self._board))
        masks = np.concatenate([self._masks, numbers < np.array(resumed, dtype=np.int64)[:, None]])
        for number in np.flatnonzero(masks.any(axis=0)).tolist():
            pair = self._board.switches[number - 1 : number + 1]
            follows = branches and branches[-1][-1] == number - 1
            passes_through = follows and all(switch.sublayer.adds_residual for switch in pair)
            if passes_through and (masks[:, number - 1] == masks[:, number]).all():
                branches[-1].append(number)
            else:
                branches.append([number])
        return branches

    def _traced(self, module: Graph, in_int8: bool) -> Any:
        """The graph of a module, for any number of rows and tokens."""
        import onnx

        given = module.inputs(self._inputs)
        axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in [*dict(given), *module.outputs]}
        for name, value in given:  # a fixed size that equals LENGTH becomes a variable one, too, which does no harm
            axes[name] |= {at: "length" for at, size in enumerate(value.shape) if size == LENGTH}
        names = {"input_names": [name for name, _ in given], "output_names": list(module.outputs)}
        with TemporaryDirectory(dir=self._folder) as folder, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns about each shape that Python reads, and about itself
            file, options = Path(folder, "traced.onnx"), {"dynamic_axes": axes, "opset_version": 17, **names}
            # The newer exporter (dynamo) takes ten times as long, and its graphs run no faster.
            torch.onnx.export(module.eval(), tuple(value for _, value in given), file, dynamo=False, **options)
            graph = onnx.load(file)
        if isinstance(module, Switched):
            graph = branched(graph, module.sides, module.hidden)
        return _in_int8(graph, self._folder) if in_int8 else graph

    def _described(self) -> dict[str, Any]:
        policy, model = self._policy, self._model
        config = model.config
        tokenizer = model.tokenizer
        card = policy.card
        _, instance = _probe(model)
        always, switched = model.backbone.flops.costs(np.arange(3))  # a parabola in the number of tokens
        bend = (switched[2] - 2 * switched[1] + switched[0]) // 2
        accepted = np.pad(self._choices, ((0, 0), (0, int(policy.has_answer_stage))), constant_values=-1)
        added = torch.from_numpy(policy.learned.per_margin).float()[None]
        [per_margin] = policy.learned.log_likelihood(added, torch.from_numpy(accepted))
        values = {
            "format": FORMAT,
            "sd_gym": __version__,
            "head": self._head.name,
            "names": [name for _, name in sorted(model.names.items())],
            **{key: getattr(model, key) for key in ("task", "metric", "fields", "optional", "reference")},
            "unanswerable": config.data.unanswerable,
            "longest_answer": config.backbone.max_target_length,
            "padding_token": tokenizer.pad_token_id,
            "unknown_token": model.unknown_token,
            "splits_special_tokens": tokenizer.split_special_tokens,
            "cut": {
                "length": min(config.backbone.max_source_length, tokenizer.model_max_length),
                "strategy": "only_second" if instance.source_pair and instance.protected else "longest_first",
                "direction": tokenizer.truncation_side,
            },
            "masks": self._masks.astype(int).tolist(),
            "resumed_from": self._resumed,
            "switches": self._board.names,
            "choices": {
                "mask": self._mask_of_choice.tolist(),
                "cautious": per_margin.tolist(),  # what a margin of 1 adds to the scores
            },
            "looks_at_answer": policy.has_answer_stage,
            "int8": self._int8,
            "flops": {
                "per_sequence": int(always[0]),
                "per_token": int(always[1] - always[0]),
                "per_query": (switched[1] - switched[0] - bend).tolist(),
                "per_pair": bend.tolist(),
                "policy": policy.network.flops,
                "policy_per_token": policy.network.flops_per_token,
                "policy_longest": policy.max_source_length,
            },
            "operating_points": [point._asdict() for point in policy.operating_points],
            **{key: card[key] for key in ("env", "backbone", "result", "run")},
        }
        return json.loads(as_json(values))

    def _compare(self) -> None:
        """Raise RuntimeError if a graph and its model disagree, on shapes that it was not traced with."""
        model, random = OnnxModel(self._folder), np.random.default_rng(0)
        longest = self._model.config.backbone.max_source_length
        plain = [without_skipped(self._board, mask) for mask in self._masks]
        for rows, length in ((1, 1), (3, min(11, longest)), (1, min(24, longest))):
            ids = random.integers(self._model.model.config.vocab_size, size=(rows, length))
            batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            batch["attention_mask"][1:, length // 2 :] = 0
            given = {name: torch.from_numpy(values) for name, values in batch.items()}
            with torch.inference_mode():
                expected = [logits_of(model_of_mask(**given)).numpy() for model_of_mask in plain]
            for number in range(len(self._masks)):
                logits, *hidden = model.run(number, batch)
                states = hidden[0] if hidden else np.zeros(0)
                pairs = (logits, expected[number]), (model.run_rest(number, batch, states), expected[0])
                if not all(np.allclose(*pair, atol=TOLERANCE, rtol=TOLERANCE) for pair in pairs):
                    raise RuntimeError(f"the graphs and the model disagree under mask {number}; nothing was kept")


class _Weights:
    """One file with the weights of all graphs; equal weights are written once."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._offsets = dict[bytes, int]()

    def write(self, graph: Any, path: Path) -> None:
        """Write a graph, and those of its weights that are new."""
        from onnx.external_data_helper import set_external_data

        for tensor in graph.graph.initializer:
            content = tensor.raw_data
            if len(content) >= INLINE:
                set_external_data(tensor, WEIGHTS, self._offset_of(content), len(content))
                tensor.ClearField("raw_data")
        self._file.flush()
        path.write_bytes(graph.SerializeToString())

    def _offset_of(self, content: bytes) -> int:
        key = hashlib.sha256(content).digest()
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNED))
            self._offsets[key] = self._file.tell()
            self._file.write(content)
        return self._offsets[key]


def _in_int8(graph: Any, folder: Path) -> Any:
    """A graph whose matrix products with weights use 8-bit integers; ``folder`` is for a temporary file."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory(dir=folder) as temporary:
        file = Path(temporary, "int8.onnx")
        logging.disable(logging.WARNING)  # it recommends another tool
        try:
            quantize_dynamic(
                graph,
                file,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
                extra_options={"EnableSubgraph": True},
            )
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(file)


def _card(manifest: dict[str, Any]) -> str:
    """The README of an export, in Markdown."""
    result, backbone = manifest["result"], manifest["backbone"]
    kind = "8-bit integers" if manifest["int8"] else "float32"
    return f"""---
library_name: sd_gym
tags: [sd_gym, onnx, skipping]
---

# A skipping policy for {backbone["name"]}, as ONNX graphs

`{MODEL}` answers each input under one of {len(manifest["masks"])} masks, in {kind}. The weights of all graphs are in
`{WEIGHTS}`; `{MANIFEST}` has the hash of every file.

On the {result["split"]} split, before it was exported: quality {result["quality"]:.4f}, dense
{result["quality_ref"]:.4f}, {result["flops_ratio_with_policy"]:.1%} of the FLOPs; verdict: {result["verdict"]}.
`sd-gym evaluate THIS_FOLDER` evaluates these graphs. `max_loss=` or `max_flops=` choose among the
{len(manifest["operating_points"])} operating points.

```python
import sd_gym

model = sd_gym.onnx.load("THIS FOLDER")
model(["a text", "another one"])
```
"""
