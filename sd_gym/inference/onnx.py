"""An exported policy and its masks, run by ONNX Runtime: neither torch nor transformers is imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from sd_gym.errors import DataError, MissingExtraError, no_context, short
from sd_gym.going_on import going_on_flops
from sd_gym.inference.answer import Answer, TextModel
from sd_gym.inference.branches import STATES, hidden_output, resume_input, skip_input
from sd_gym.inference.manifest import ANSWER, DECIDE, MANIFEST, MODEL, TOKENIZER, WEIGHTS, read_manifest
from sd_gym.operating_points import OperatingPoint, margin_for

if TYPE_CHECKING:
    import onnxruntime

DENSE = 0  # index of the mask that skips nothing
DECIDED = 256  # inputs per run of the graph that decides
BATCH = 32  # default number of inputs of one mask that run together
WAITING = 2**15  # tokens whose states are kept, at most about so many
PASS = 16  # tokens of padding that take as long as the fixed part of a pass
NOWHERE = np.float32(-1e9)  # logit of a position where no answer may begin or end
Batch = dict[str, NDArray]


def load(
    folder: str | Path,
    *,
    max_loss: float | None = None,
    max_flops: float | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    session_options: onnxruntime.SessionOptions | None = None,
) -> OnnxModel:
    """A policy that ``sd-gym export`` wrote, ready to be called on texts.

    Args:
        folder: What was exported.
        max_loss: See ``sd_gym.operating_points.margin_for``: it chooses among the policy's operating points.
        max_flops: See there.
        providers: Execution providers of ONNX Runtime, the preferred one first.
        session_options: Options of ONNX Runtime for the model, such as the number of threads; it decides on one thread.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is not the one that was exported; the message names it. If no operating point fits.

    Example:
        >>> model = load("sentiment-onnx")  # doctest: +SKIP
        >>> [answer.answer for answer in model(["a lovely film", "a waste of time"])]  # doctest: +SKIP
        ['positive', 'negative']
    """
    return OnnxModel(
        Path(folder), max_loss=max_loss, max_flops=max_flops, providers=providers, session_options=session_options
    )


def _loaded(folder: Path, providers: list[Any], margin: np.float32) -> OnnxModel:
    model = OnnxModel(folder, providers=providers)
    model.margin = margin
    return model


def runtime() -> Any:
    """The module ``onnxruntime``; raises ``MissingExtraError`` if it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("ONNX Runtime is not installed: pip install 'sd-gym[onnx]'") from error
    return onnxruntime


def _place(number: int, inputs: Sequence[Any]) -> str:
    return "the input" if len(inputs) == 1 else f"input {number}"


def _known(providers: list[Any]) -> list[Any]:
    """The execution providers; ValueError if there is none, or ONNX Runtime has one of them not."""
    known = runtime().get_available_providers()
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]  # or with options
    wrong = [name for name in names if name not in known]
    if wrong or not providers:
        raise ValueError(f"providers: expected some of {', '.join(known)}; got {', '.join(wrong) or 'none'}")
    return providers


class OnnxModel(TextModel):
    """An exported policy; arguments are those of ``load``.

    Attributes:
        manifest: The content of the manifest: ``env``, ``masks``, ``operating_points`` and more.
        masks: The masks that it decides among, bool ``[masks, switches]``; the first one is dense.
        margin: The margin of its operating point, float32; it may be changed between two calls.
        has_answer_stage: Whether it judges the answers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_loss: float | None = None,
        max_flops: float | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        self.folder = folder = folder.resolve()  # graphs are opened later
        self.manifest = manifest = read_manifest(folder)
        self._providers = _known([providers] if isinstance(providers, str) else list(providers))
        self._options = session_options
        points = [OperatingPoint(**point) for point in manifest["operating_points"]]
        self.margin = np.float32(margin_for(points, max_loss=max_loss, max_flops=max_flops))
        self.masks, choices = np.array(manifest["masks"], dtype=bool), manifest["choices"]
        self._mask_of_choice = np.array(choices["mask"])
        self._cautious = np.array(choices["cautious"], np.float32)
        same = choices["scores"]  # of all inputs, if the policy does not read them
        self._scores = None if same is None else np.array([same], np.float32)
        self._resumed_from, switches = np.array(manifest["resumed_from"]), len(manifest["switches"])
        self._count_flops(np.arange(manifest["cut"]["length"] + 1))
        self.has_answer_stage: bool = manifest["looks_at_answer"]
        resumable = {first for first in self._resumed_from if self.has_answer_stage and 0 < first < switches}
        hidden = [[hidden_output(first)] if first in resumable else [] for first in self._resumed_from]
        self._outputs = [["logits", *names] for names in hidden]

        def flags(skipped: NDArray, resumed: int) -> Batch:
            skips = {skip_input(first): np.array(skipped[first]) for first in manifest["branches"]}
            return skips | {resume_input(first): np.array(first == resumed) for first in resumable}

        self._skips = [flags(mask, 0) | {STATES: np.zeros((0, 0, 0), np.float32)} for mask in self.masks]
        self._resumes = [flags(np.arange(switches) < first, first) for first in self._resumed_from]
        self.task, self.metric, self.reference = (manifest[key] for key in ("task", "metric", "reference"))
        self.fields = tuple(manifest["fields"])
        self.names = dict(enumerate(manifest["names"]))
        self.optional = manifest["optional"]
        self.head = manifest["head"]
        self.label_range = manifest["env"]["quality"]["label_range"]
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        cut = manifest["cut"]
        self._whole = deepcopy(self._tokenizer) if cut["strategy"] == "only_second" else None  # it measures questions
        for tokenizer in (self._tokenizer, self._whole):
            if tokenizer is not None:  # neither its file nor a copy says so
                tokenizer.encode_special_tokens = manifest["splits_special_tokens"]
        self._tokenizer.enable_truncation(cut["length"], strategy=cut["strategy"], direction=cut["direction"])
        self._session = lru_cache(None)(self._opened)  # graphs are read when they are first run

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the policy at its operating point, and of the backbone."""
        hashes = self.manifest["files"]
        return {"policy": f"{hashes[MANIFEST]}, margin {self.margin}", "backbone": hashes[WEIGHTS]}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy reads the folder again, in this process or another; ``TypeError`` if it has ``session_options``."""
        if self._options is not None:
            raise TypeError("session_options cannot be copied; call sd_gym.onnx.load in each process")
        return _loaded, (self.folder, self._providers, self.margin)

    def _answers(self, texts: list[list[str]], dense: bool, batch_size: int | None) -> list[Answer]:
        rows = self.encoded(texts)
        length = np.array([len(row) for row in rows])
        number, seen = (np.zeros(len(rows), dtype=np.int64), None) if dense else self._decided(rows, length)
        answers, went_on = np.empty(len(rows), dtype=object), np.zeros(len(rows), dtype=bool)
        for mask in sorted({*number.tolist()}):
            own_rows = (number == mask).nonzero()[0]
            for part, values, resumed in self._passes(mask, rows, own_rows, seen, batch_size or BATCH):
                answers[part] = self.in_words([rows[row] for row in part], [texts[row] for row in part], values)
                went_on[part] = resumed
        own = np.zeros(len(rows)) if dense else self.own_flops(length)
        return self.answers_of(rows, answers.tolist(), number, went_on, own)

    def _decided(self, rows: list[Encoding], length: NDArray) -> tuple[NDArray, NDArray | None]:
        """As ``decide``, for any number of rows."""
        number, seen = np.zeros(len(rows), dtype=np.int64), None
        for part in _parts(np.arange(len(rows)), length, DECIDED):
            number[part], shown = self.decide(self.batch([rows[row] for row in part]))
            seen = np.zeros((len(rows), shown.shape[1]), np.float32) if seen is None else seen
            seen[part] = shown
        return number, seen

    def _passes(
        self, mask: int, rows: list[Encoding], own_rows: NDArray, seen: NDArray | None, size: int
    ) -> Iterator[tuple[NDArray, NDArray, bool]]:
        """Which of a mask's ``own_rows`` a pass answered, their logits, and whether they went on after their answer."""
        length = np.array([len(row) for row in rows])
        waiting = dict[int, NDArray]()  # the states of rows that go on: few of a pass, so they wait for others

        def finish() -> Iterator[tuple[NDArray, NDArray, bool]]:
            for part in _parts(np.array([*waiting], dtype=np.int64), length, size):
                batch = self.batch([rows[row] for row in part])
                yield part, self.run_rest(mask, batch, _padded([waiting[row] for row in part.tolist()], batch)), True
            waiting.clear()

        for part in _parts(own_rows, length, size):
            batch = self.batch([rows[row] for row in part])
            values, goes_on, states = self.run_judged(mask, batch, None if seen is None else seen[part])
            if not goes_on.all():
                yield part[~goes_on], values[~goes_on], False
            waiting |= zip(part[goes_on].tolist(), states, strict=True)
            if sum(map(len, waiting.values())) > WAITING:
                yield from finish()
        yield from finish()

    def answers_of(
        self, rows: list[Encoding], words: list[str], number: NDArray, went_on: NDArray, own: NDArray
    ) -> list[Answer]:
        """The answers, in ``words``, of rows that ran under masks; ``own`` are the FLOPs of deciding, ``[n]``."""
        length, unknown = np.array([len(row) for row in rows]), self.manifest["unknown_token"]
        ratio = self.flops_ratio(number, length, went_on) + own / self.dense_flops(length)
        unknowns = [0 if unknown is None else row.ids.count(unknown) for row in rows]
        columns = words, self.masks[number], [0] * len(rows), ratio.tolist(), unknowns, went_on.tolist()
        return [Answer(*values) for values in zip(*columns, strict=True)]

    def decide(self, batch: Batch) -> tuple[NDArray, NDArray]:
        """Decide before the first layer, on the model's inputs ``[n, length]``.

        Returns:
            The index of each row's mask, int64 ``[n]``; and the features with which the policy judges the answer,
            float32 ``[n, features]``: none if it does not, or if it does not read the input.
        """
        numbers, seen = self.decide_at(np.array([self.margin]), batch)
        return numbers[:, 0], seen

    def decide_at(self, margins: NDArray, batch: Batch) -> tuple[NDArray, NDArray]:
        """As ``decide``, at the margins of several operating points: indices of masks ``[n, margins]``."""
        if self._scores is None:
            share = self._least[batch["attention_mask"].sum(axis=1)]
            scores, *seen = self._run(DECIDE, batch | {"share": share})
        else:
            scores, seen = self._scores.repeat(len(batch["input_ids"]), axis=0), []
        choice = (scores[:, None] + margins[:, None] * self._cautious).argmax(axis=2)
        return self._mask_of_choice[choice], seen[0] if seen else scores[:, :0]

    def run_policy(self, number: int, batch: Batch, seen: NDArray | None) -> tuple[NDArray, NDArray]:
        """Logits of a batch that shares a mask, and which rows went on after the answer, bool ``[n]``.

        Arguments are those of ``run_judged``.
        """
        values, goes_on, states = self.run_judged(number, batch, seen)
        if goes_on.any():
            values[goes_on] = self.run_rest(number, {name: value[goes_on] for name, value in batch.items()}, states)
        return values, goes_on

    def run_judged(self, number: int, batch: Batch, seen: NDArray | None) -> tuple[NDArray, NDArray, NDArray]:
        """Logits of a batch that shares a mask, which rows should go on, bool ``[n]``, and the states of these there.

        Args:
            number: Index of the mask.
            batch: The model's inputs; where an answer is a span, with ``context_mask``: where it may begin and end.
            seen: The features from ``decide``; ``None``: the answer is not judged.
        """
        values, *hidden = self.run(number, batch)
        goes_on = np.zeros(len(values), dtype=bool)
        if seen is not None and self.has_answer_stage and number != DENSE:
            share = self.flops_ratio(number, batch["attention_mask"].sum(axis=1))
            shown = {"seen": seen, "logits": values, "share": share.astype(np.float32)}
            goes_on = self._run(ANSWER, shown)[0] + self.margin > 0
        states = hidden[0][goes_on] if hidden else np.zeros((goes_on.sum(), 0, 0), dtype=np.float32)
        return values, goes_on, states

    def run(self, number: int, batch: Batch) -> list[NDArray]:
        """Logits under a mask, ``[n, classes]``, or of starts and ends ``[n, 2, length]``.

        With them, if rows can go on from the middle, the hidden states there, ``[n, length, width]``.
        """
        values, *hidden = self._run(MODEL, batch | self._skips[number], self._outputs[number])
        return [self._in_context(values, batch), *hidden]

    def run_rest(self, number: int, batch: Batch, states: NDArray) -> NDArray:
        """Dense logits, continued from the ``states [n, length, width]`` of ``run_judged`` under a mask.

        From the beginning if they are empty: the mask is dense, or skips something of the first layer.
        """
        if not states.size:
            return self.run(DENSE, batch)[0]
        resumed = batch | self._resumes[number] | {STATES: states}
        return self._in_context(self._run(MODEL, resumed, ["logits"])[0], batch)

    def own_flops(self, length: NDArray) -> NDArray:
        """FLOPs of deciding on rows of so many tokens, ``[n]``."""
        return self._own[length]

    def dense_flops(self, length: NDArray) -> NDArray:
        """FLOPs of the dense backbone on rows of so many tokens, int64 ``[n]``."""
        return self._dense[length]

    def flops_ratio(self, number: NDArray | int, length: NDArray, went_on: NDArray | bool = False) -> NDArray:
        """FLOPs under masks over dense FLOPs, for rows of ``length [n]`` tokens, without the policy's own."""
        return self._ratio[1 * went_on, number, length]

    def _count_flops(self, length: NDArray) -> None:
        """Count FLOPs by length, ``[lengths]``: the policy's, dense; ratios: by going on or not, mask and length."""
        flops, tokens = self.manifest["flops"], length[:, None]
        self._own = flops["policy"] + flops["policy_per_token"] * np.minimum(length, flops["policy_longest"])
        always = flops["per_sequence"] + flops["per_token"] * length
        switched = np.array(flops["per_query"]) * tokens + np.array(flops["per_pair"]) * tokens**2
        self._dense = np.maximum(always + switched.sum(axis=1), 1)
        self._least = (always / self._dense).astype(np.float32)  # share of the FLOPs if all is skipped
        ran = np.stack([always + switched[:, ~mask].sum(axis=1) for mask in self.masks])
        first = self._resumed_from[:, None].repeat(len(length), axis=1)
        again = np.stack([going_on_flops(always, switched, of_mask) for of_mask in first])
        self._ratio = np.stack([ran, ran + again]) / self._dense

    def _opened(self, name: str) -> tuple[Any, list[str]]:
        """The session of a graph, and the names of its inputs."""
        options = self._options
        if name in (DECIDE, ANSWER):  # too small for threads, which would wait actively beside those of the model
            options = runtime().SessionOptions()
            options.intra_op_num_threads = 1
        session = runtime().InferenceSession(self.folder / name, options, providers=self._providers)
        return session, [value.name for value in session.get_inputs()]

    def encoded(self, texts: list[list[str]]) -> list[Encoding]:
        """Tokens of the inputs, cut as in the env: questions are not cut, only their contexts."""
        if self._whole is not None:
            self._check_questions(self._whole, [fields[0] for fields in texts])
        encode = self._tokenizer.encode_batch
        if self.head != "span":
            encode = self._tokenizer.encode_batch_fast  # without the places of tokens in their text
        rows = encode([fields[0] if len(fields) == 1 else (fields[0], fields[1]) for fields in texts])
        for number in [number for number, row in enumerate(rows) if not len(row)]:
            raise DataError(f"{_place(number, rows)}: the tokenizer has no token for {short(texts[number][0])}")
        if self.head == "span" and not self.manifest["unanswerable"]:
            for number in [number for number, row in enumerate(rows) if 1 not in row.sequence_ids]:
                raise DataError(f"{_place(number, rows)}: {no_context(texts[number][1])}")
        return rows

    def _check_questions(self, whole: Tokenizer, questions: list[str]) -> None:
        limit = self.manifest["cut"]["length"]
        for number, row in enumerate(whole.encode_batch([(question, "") for question in questions])):
            if len(row) >= limit:
                name = _place(number, questions)
                raise DataError(f"{name}: the question alone has {len(row)} of {limit} tokens; shorten it")

    def batch(self, rows: list[Encoding]) -> Batch:
        """The model's inputs, padded at the right, and for spans where an answer may begin and end."""
        shape = len(rows), max(len(row) for row in rows)
        batch = {"input_ids": np.full(shape, self.manifest["padding_token"], dtype=np.int64)}
        batch |= {name: np.zeros(shape, dtype=np.int64) for name in ("attention_mask", "token_type_ids")}
        for at, row in enumerate(rows):
            batch["input_ids"][at, : len(row)] = row.ids
            batch["attention_mask"][at, : len(row)] = 1
            batch["token_type_ids"][at, : len(row)] = row.type_ids
        if self.head == "span":
            # The second text is the context. Type ids cannot tell it: some tokenizers give 0 to all tokens.
            inside = [[number == 1 for number in row.sequence_ids] + [False] * (shape[1] - len(row)) for row in rows]
            batch["context_mask"] = np.array(inside)
            batch["context_mask"][:, 0] = self.manifest["unanswerable"]
        return batch

    def _run(self, graph: str, batch: Batch, outputs: list[str] | None = None) -> list[NDArray]:
        """The named outputs of a graph, or all, on the inputs that it reads; missing token types are zeros."""
        session, names = self._session(graph)
        if "token_type_ids" in names and "token_type_ids" not in batch:
            batch = batch | {"token_type_ids": np.zeros_like(batch["input_ids"])}
        return session.run(outputs, {name: batch[name] for name in names})

    def _in_context(self, values: NDArray, batch: Batch) -> NDArray:
        """Logits; those of spans only inside the context."""
        inside = batch.get("context_mask")
        return values if inside is None else np.where(inside[:, None], values, NOWHERE)

    def in_words(self, rows: list[Encoding], texts: list[list[str]], values: NDArray) -> list[str]:
        """The answers of one pass in words."""
        if self.head == "label":
            return [self.names[index] for index in values.argmax(axis=1)]
        if self.head == "score":
            return [f"{value:.4g}" for value in values[:, 0]]
        spans = best_spans(values, self.manifest["longest_answer"])
        return [
            context[row.offsets[first][0] : row.offsets[last][1]].strip() if first else ""
            for (_, context), row, (first, last) in zip(texts, rows, spans.tolist(), strict=True)
        ]


def best_spans(logits: NDArray, max_length: int) -> NDArray:
    """First and last token of the most probable span, int64 ``[n, 2]``, as the span head finds it.

    Logits are ``[n, 2, length]``; the first token stands for "no answer" and is a span only by itself.
    """
    start, end = logits[:, 0], logits[:, 1]
    longest = min(max_length, end.shape[1])
    ends = np.pad(end, ((0, 0), (0, longest - 1)), constant_values=NOWHERE)
    scores = start[:, :, None] + np.lib.stride_tricks.sliding_window_view(ends, longest, axis=1)
    scores[:, 0, 1:] = 2 * NOWHERE
    first, further = np.divmod(scores.reshape(len(scores), -1).argmax(axis=1), longest)
    return np.stack([first, first + further], axis=1)


def _padded(states: list[NDArray], batch: Batch) -> NDArray:
    """States of rows, each ``[length, width]``, as those of a batch, ``[n, length, width]``."""
    rows, length = batch["input_ids"].shape
    padded = np.zeros((rows, length, states[0].shape[1]), dtype=np.float32)
    for number, state in enumerate(states):
        padded[number, : len(state)] = state[:length]
    return padded


def _parts(rows: NDArray, length: NDArray, size: int) -> Iterator[NDArray]:
    """Rows in parts of at most ``size``, of about the same length: a part ends where a pass costs less than padding."""
    if len(rows) == 1:  # the usual case of a server
        yield rows
        return
    rows, start = rows[np.argsort(length[rows], kind="stable")], 0
    grows = np.diff(length[rows], append=0).tolist()
    for end, more in enumerate(grows, start=1):
        if end == len(rows) or end - start == size or (end - start) * more > PASS:
            yield rows[start:end]
            start = end
