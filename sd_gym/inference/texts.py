"""A backbone with its policy, called on texts: tokenised, decided on, grouped and answered as in the env."""

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_gym.backbones.heads import Head
from sd_gym.backbones.load import load_own_backbone
from sd_gym.config import dotted
from sd_gym.data.instance import Instance
from sd_gym.execution.bank import MODELS, Bank
from sd_gym.execution.config import checked_config
from sd_gym.execution.costs import Costs
from sd_gym.execution.split import BackboneSplit
from sd_gym.inference.answer import Answer, TextModel
from sd_gym.inference.attach import attach
from sd_gym.inference.choices import decided_masks
from sd_gym.inference.staged_passes import StagedPasses
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.switch import first_layer_input
from sd_gym.switch.first_layer import FirstLayerInput
from sd_gym.tasks.data import Instances
from sd_gym.tasks.family import TASKS
from sd_gym.tasks.metrics import METRICS

BATCH = 256  # inputs that are decided on at once
DTYPES = "float32", "bfloat16", "float16"
NOT_NEEDED = ("data", "reward", "action", "codebook")  # parts of the config that answering does not need


class SkippingModel(TextModel):
    """A backbone and its policy; arguments are those of ``sd_gym.load``.

    Attributes:
        policy: The policy.
        config: The config of its env, without what answering does not need.
        backbone: The backbone.
        model: The Hugging Face model, with the policy attached.
        tokenizer: Its tokenizer.
        board: The switchboard of the model.
        gives: The kind of its answers: ``label``, ``score``, ``span`` or ``text``.
        max_target_length: Largest number of tokens of a generated answer.
    """

    def __init__(
        self,
        policy: SkipPolicy,
        backbone: str | None = None,
        device: str = "cpu",
        *,
        check_weights: bool = True,
        compile: bool = False,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        if backbone is None:
            policy.check_reachable()
        env = policy.card["env"]
        values = dotted({key: value for key, value in env.items() if key not in NOT_NEEDED}, "the policy")
        values |= {"data.dataset": "none", "data.unanswerable": env["data"]["unanswerable"], "backbone.device": device}
        if env["quality"]["kind"] == "agreement":  # a split of that kind runs everything densely first
            values["quality.kind"] = "exact_match"
        values |= {"backbone.name": backbone} if backbone else {}
        self.policy = policy
        self.config = checked_config(values, "the policy")
        loads, self._float32_input = partial(load_own_backbone, self.config.backbone.name, device), None
        chosen = None if dtype is None else _checked_dtype(dtype)
        self.backbone = loads()
        if chosen is not None:  # the weights are checked, and the embeddings copied, as they are stored
            policy.check_model(self.backbone.model, weights=check_weights)
            self._float32_input = deepcopy(FirstLayerInput(self.backbone.board)).float()
            self.backbone = loads(chosen)
        if compile:
            _check_compiles(policy, self.backbone.head)
        self._compiles = compile
        self._bank = Bank(self.backbone.board, compiles=compile)
        self.tokenizer = self.backbone.tokenizer
        checks = check_weights and chosen is None
        self.model = attach(self.backbone.model, policy, self.tokenizer, check_weights=checks)
        if checks:  # they were hashed just now, which takes seconds
            vars(self.backbone)["weights"] = policy.card["backbone"]["weights"]
        self.board, head = self.backbone.board, self.backbone.head
        self.head = head.name
        self.gives = "text" if head.gives == "text" else head.name
        self.max_target_length = self.config.backbone.max_target_length
        self.task = self.config.task
        self._task = TASKS.find(self.config.task)
        self.fields = self._task.inputs
        self.reference = self._task.reference
        self.optional, metric = self._task.optional is not None, self.config.quality.metric
        self.metric = metric if METRICS.find(metric).of_text is not None else "exact_match"
        self.label_range = self.config.quality.label_range
        self.names = {int(number): str(name) for number, name in (self.model.config.id2label or {}).items()}

    def _answers(self, texts: list[list[str]], dense: bool, batch_size: int | None) -> list[Answer]:
        split = self.split(texts)
        split.passes.most = batch_size
        if dense:
            return self.answered(split, None)
        if self.policy.is_staged and len(texts) == 1 and not self._compiles:  # in the pass: nothing to group
            return self.answered(split, self._no_skips(split), known=False)
        return self.answered(split, self.decided_at([self.policy], split)[0])

    def _no_skips(self, split: BackboneSplit) -> NDArray:
        """Dense decisions, int64 ``[n, switches + 1]``."""
        return np.zeros((len(split), len(self.board) + 1), dtype=np.int64)

    def split(self, texts: list[list[str]]) -> BackboneSplit:
        """At least one input that is ``checked``, tokenised; DataError if one cannot be."""
        names = ["the input"] if len(texts) == 1 else [f"input {number}" for number in range(len(texts))]
        instances = Instances(self.instance(name, own) for name, own in zip(names, texts, strict=True))
        data: Any = {"inputs": instances}  # in place of Splits, of which only this one is read
        split = BackboneSplit(self.config, "inputs", data, self.backbone)
        split.passes.bank = self._bank
        if self.policy.rarity is not None:
            split.rarity = self.policy.rarity
        return split

    def decided_at(self, policies: Sequence[SkipPolicy], split: BackboneSplit) -> NDArray:
        """Decisions of versions of the policy (``with_margin``), int64 ``[policies, n, switches + 1]``.

        They are zeros if it decides in the pass.
        """
        decisions = np.stack([self._no_skips(split) for _ in policies])
        by_length = np.argsort(split.encoded.source_length, kind="stable")  # for little padding
        for part in np.split(by_length, range(BATCH, len(split), BATCH)) if self.policy.decides_first else ():
            inputs = split.encoded.inputs(part, self.model.device)
            first = self._first_input(inputs), inputs["attention_mask"]
            if self.policy.is_staged:
                observed = StagedPasses(split, self.policy).observe_first(part, *first)
            else:
                observed = self.policy.observed(*first)
            for own, policy in zip(decisions, policies, strict=True):
                own[part] = policy.network.decide(observed)[:, : own.shape[1]]
        return decisions

    def answered(self, split: BackboneSplit, decided: NDArray | None, *, known: bool = True) -> list[Answer]:
        """The answers to a split's inputs under decisions ``[n, switches + 1]``; ``None``: everything runs.

        Where the policy decides in the pass, or they are not ``known``, decisions are zeros.
        """
        rows = np.arange(len(split))
        decisions = self._no_skips(split) if decided is None else decided
        went_on = np.zeros(len(split), dtype=np.bool_)
        if decided is None or not self.policy.is_staged:
            answers = split.passes.answers(rows, decisions)
            costs = first_costs = self.costs(split)
        elif self._compiles:
            answers, went_on = self._compiled_answers(split, decisions)
            costs = first_costs = self.costs(split)
        else:
            known = known and self.policy.decides_first
            passes = StagedPasses(split, self.policy, self._float32_input, known=known)
            answers = passes.answers(rows, decisions)
            decisions, went_on = passes.masks, passes.went_on
            split.passes.first_generated = passes.first_generated
            costs, first_costs = self.costs(split), self.costs(split, passes.first_generated)
        going_on = costs.dense_flops(rows) if self._compiles else costs.going_on(rows, decisions)
        flops = first_costs.flops(rows, decisions) + went_on * going_on
        if decided is not None:
            flops = flops + self.own_flops(split)
        ratio, unknown_id = flops / costs.dense_flops(rows), -1 if self.unknown_token is None else self.unknown_token
        unknown = (split.encoded.input_ids.numpy() == unknown_id).sum(axis=1)
        return [
            Answer(answer, row[:-1].astype(bool), int(row[-1]), float(share), int(count), bool(dense_too))
            for answer, row, share, count, dense_too in zip(answers, decisions, ratio, unknown, went_on, strict=True)
        ]

    def _compiled_answers(self, split: BackboneSplit, masks: NDArray) -> tuple[list[str], NDArray]:
        """The answers under masks ``[n, switches + 1]``, and which rows went on, bool ``[n]``.

        Compiled models give no states to go on from, so these rows run densely from the start.
        """
        rows = np.arange(len(split))
        answers, judged = split.passes.answers_and_judgement(rows, masks)
        went_on, staged = np.zeros(len(rows), dtype=np.bool_), StagedPasses(split, self.policy)
        for part in np.split(rows, range(BATCH, len(rows), BATCH)):
            inputs = split.encoded.inputs(part, self.model.device)
            first = self._first_input(inputs), inputs["attention_mask"]
            went_on[part] = staged.rejected(part, masks[part], judged[part], *first)
        again = np.flatnonzero(went_on)
        dense = split.passes.answers(again, np.zeros_like(masks[again])) if len(again) else []
        for row, answer in zip(again.tolist(), dense, strict=True):
            answers[row] = answer
        return answers, went_on

    @torch.inference_mode()
    def _first_input(self, inputs: dict[str, Tensor]) -> Tensor:
        """The input of the first layer, ``[n, length, width]``, in float32 if the backbone computes in less."""
        own = self._float32_input
        return first_layer_input(self.board, inputs) if own is None else own(**inputs)

    def costs(self, split: BackboneSplit, generated: NDArray | None = None) -> Costs:
        """A split's costs if its texts have ``generated`` tokens ``[n]``; ``None``: as many as those generated last."""
        if split.head.judges_passes:
            return split.costs
        lengths = split.passes.generated if generated is None else generated
        encoded = replace(split.encoded, target_length=lengths)
        return Costs(self.backbone, encoded, split.tokens, split.reading.num_beams)

    def own_flops(self, split: BackboneSplit) -> NDArray:
        """FLOPs of the policy itself on each input, ``[n]``."""
        tokens = np.minimum(split.encoded.source_length, self.policy.max_source_length)
        judged = sum(name != "first" for name in self.policy.stages_of_pass) if split.head.can_exit(self.board) else 0
        network = self.policy.network
        return network.flops + network.flops_per_token * tokens + judged * split.costs.head_flops(np.arange(len(split)))

    @property
    def unknown_token(self) -> int | None:
        """The id of the token for what the tokenizer does not know; ``None`` if it knows all, as those of bytes do."""
        tokenizer: Any = self.tokenizer  # transformers annotates ids as lists and texts, too
        unknown = tokenizer.unk_token_id
        return None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) else unknown

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what answers depend on: the ``policy`` at its operating point, and the ``backbone``'s weights."""
        digest = hashlib.sha256()
        with TemporaryDirectory() as name:
            self.policy.save_pretrained(name)
            for file in sorted(Path(name).iterdir()):
                digest.update(file.read_bytes())
        return {"policy": digest.hexdigest(), "backbone": self.backbone.weights}

    def instance(self, name: str, texts: list[str]) -> Instance:
        """The instance that the task makes of an input's texts; ``name`` is for messages."""
        row = dict(zip(self.fields, texts, strict=False)) | {self._task.reference: self._task.unknown}
        return self._task.instance(row, name.split()[-1], name)


def load(
    policy: SkipPolicy | str | Path,
    backbone: str | None = None,
    *,
    device: str = "cpu",
    max_loss: float | None = None,
    max_flops: float | None = None,
    check_weights: bool = True,
    compile: bool = False,
    dtype: str | torch.dtype | None = None,
) -> SkippingModel:
    """A trained policy and its backbone, ready to be called on texts, without data set or env.

    The backbone is loaded anew, so that nothing else in the process runs under the policy.

    Args:
        policy: A policy, the folder of a training run or of ``save_pretrained``, or an id of the Hugging Face hub.
        backbone: Where the backbone is, if not where it was in training.
        device: Where it runs.
        max_loss: See ``attach``.
        max_flops: See ``attach``.
        check_weights: See ``attach``.
        compile: Whether ``torch.compile`` compiles the model of each mask, when it is first run (tens of seconds): once
            for single inputs, once for batches, of any length. For a policy that decides among few masks before the
            first layer, and gives no texts. Rows that go on after their answer run densely from the start.
        dtype: What the backbone computes in: ``float32``, ``bfloat16`` or ``float16``; ``None``: what it is stored in.
            Before the first layer the policy decides in float32, on a copy of the embeddings. To measure quality in
            ``dtype``, save the backbone in it, and pass that folder as ``backbone=`` to ``sd_gym.evaluate``.

    Raises:
        FileNotFoundError, ValueError: See ``SkipPolicy.from_pretrained`` and ``attach``; or the backbone cannot be
            loaded, or ``compile`` is asked for and impossible.

    Example:
        >>> model = sd_gym.load("runs/reviews")  # doctest: +SKIP
        >>> [answer.answer for answer in model(["a lovely film", "a waste of time"])]  # doctest: +SKIP
        ['positive', 'negative']
    """
    if not isinstance(policy, SkipPolicy):
        policy = SkipPolicy.from_pretrained(policy)
    chosen = policy.at(max_loss=max_loss, max_flops=max_flops)
    return SkippingModel(chosen, backbone, device, check_weights=check_weights, compile=compile, dtype=dtype)


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The type of that name; ``ValueError`` if a backbone cannot compute in it."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}")
    return getattr(torch, name)


def _check_compiles(policy: SkipPolicy, head: Head) -> None:
    """Raise ``ValueError`` if a policy decides in the pass, has too many masks to compile each, or generates."""
    if head.gives == "text":
        remedy = 'compile the models of sd_gym.bank(model, masks), with cache_implementation="static"'
        raise ValueError(f"compile=True is for backbones that classify, score or extract; for generate(), {remedy}")
    if not policy.decides_first:
        stages = ", ".join(policy.stages_of_pass)
        raise ValueError(f"compile=True is for policies that decide at 'first'; this decides at {stages}: leave it out")
    masks = decided_masks(policy)
    if masks is None or len(masks) > MODELS or masks[:, -1].any():
        expected = f"compile=True is for a choice of at most {MODELS} masks that drop no tokens"
        raise ValueError(f"{expected}, and this policy decides otherwise; sd-gym reduce makes one of few masks")
