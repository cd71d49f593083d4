"""An exported policy and its masks, run by ONNX Runtime: neither torch nor transformers is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from sd_gym.errors import DataError
from sd_gym.files import read_json, sha256
from sd_gym.inference.answer import Answer, Input, check_list, checked_texts

if TYPE_CHECKING:
    import onnxruntime

MANIFEST, TOKENIZER, DECIDE, WEIGHTS = "sd_gym_onnx.json", "tokenizer.json", "decide.onnx", "weights.bin"
DECIDED = 256  # inputs that are decided on at once
BATCH = 32  # inputs of one mask that run together, if no other number is given
NOWHERE = -1e9  # logit of a position where no answer may begin or end


def load(
    folder: str | Path,
    *,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    session_options: onnxruntime.SessionOptions | None = None,
) -> OnnxModel:
    """A policy that ``sd-gym export`` wrote, ready to be called on texts.

    Args:
        folder: What was exported.
        providers: Of ONNX Runtime, the first one that can run an operator runs it.
        session_options: Of ONNX Runtime, such as the number of threads; one object serves all graphs.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If a file is not the one that was exported; the message names it.

    Example:
        >>> model = load("sentiment-onnx")  # doctest: +SKIP
        >>> [answer.answer for answer in model(["a lovely film", "a waste of time"])]  # doctest: +SKIP
        ['positive', 'negative']
    """
    return OnnxModel(Path(folder), providers, session_options)


def own_hash(manifest: dict[str, Any]) -> str:
    """The hash of a manifest, but for this one, which stands among those of its files."""
    files = {name: hashed for name, hashed in manifest["files"].items() if name != MANIFEST}
    return hashlib.sha256(json.dumps({**manifest, "files": files}, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself; every file is compared with its hash.

    FileNotFoundError if a file is missing, ValueError if one was changed.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}; expected a folder that sd-gym export wrote")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or files.get(MANIFEST) != own_hash(manifest):
        raise ValueError(_changed(folder / MANIFEST))
    for name, hashed in files.items():
        if name != MANIFEST and not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; copy the folder again, with all its files")
        if name != MANIFEST and sha256(folder / name) != hashed:
            raise ValueError(_changed(folder / name))
    return manifest


def _changed(file: Path) -> str:
    return f"{file} is not the file that was exported: it was changed or damaged; copy the folder again, or export anew"


class OnnxModel:
    """An exported policy; arguments are those of ``load``.

    Attributes:
        manifest: What it is: ``policy``, ``env``, ``masks`` and more.
        masks: The masks that it decides among, bool ``[masks, switches]``; one of them is dense.
        fields: Names of an input's texts.
        reference: Name of the right answer in a row.
    """

    def __init__(
        self,
        folder: Path,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        self._providers, self._options = list(providers), session_options
        self.masks = np.array(self.manifest["masks"], dtype=bool)
        self.fields, self.reference = tuple(self.manifest["fields"]), self.manifest["reference"]
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.no_padding()
        cut = self.manifest["cut"]
        self._tokenizer.enable_truncation(cut["length"], strategy=cut["strategy"], direction=cut["direction"])
        self._session = lru_cache(None)(self._opened)  # graphs are read when they are first run

    def __call__(self, inputs: Sequence[Input], *, dense: bool = False, batch_size: int | None = None) -> list[Answer]:
        """Answer inputs, in their order; those with the same mask run together.

        Args:
            inputs: As of ``sd_gym.load(policy)``: texts, pairs of texts, or mappings with the names of ``fields``.
            dense: Whether everything runs, to compare.
            batch_size: Inputs that run together at most; ``None``: 32.

        Raises:
            ValueError: If an input is malformed; the message has its number. If the batch size is below 1.
        """
        return self.answers(inputs, dense=dense, batch_size=batch_size)

    def answers(self, inputs: Sequence[Input], *, dense: bool = False, batch_size: int | None = None) -> list[Answer]:
        """The same as a call."""
        check_list(inputs)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
        texts = [self._checked(number, given) for number, given in enumerate(inputs)]
        if not texts:
            return []
        rows = self._encoded(texts)
        length = np.array([len(row) for row in rows])
        number = np.full(len(rows), self.manifest["dense"]) if dense else self._decided(rows, length)
        answers = np.empty(len(rows), dtype=object)
        for mask in np.unique(number):
            for part in _parts(np.flatnonzero(number == mask), length, batch_size or BATCH):
                batch = self._batch([rows[row] for row in part])
                answers[part] = self._said([rows[row] for row in part], texts, part, self.run(mask, batch))
        ratio = self.flops_ratio(number, length, dense=dense)
        unknown = self.manifest["unknown_token"]
        return [
            Answer(answer, self.masks[mask], 0, float(share), 0 if unknown is None else row.ids.count(unknown))
            for answer, mask, share, row in zip(answers, number, ratio, rows, strict=True)
        ]

    def decide(self, batch: dict[str, NDArray]) -> NDArray:
        """The number of each row's mask, int64 ``[n]``, for the model's inputs ``[n, length]``."""
        return self._run(DECIDE, batch)

    def run(self, number: int, batch: dict[str, NDArray]) -> NDArray:
        """What the graph of a mask gives: logits ``[n, classes]``, or of starts and ends ``[n, 2, length]``."""
        return self._run(self.manifest["graphs"][number], batch)

    def flops_ratio(self, number: NDArray, length: NDArray, *, dense: bool = False) -> NDArray:
        """FLOPs of rows of so many tokens (each ``[n]``) over those of dense, with the policy's own unless dense."""
        flops, tokens = self.manifest["flops"], length[:, None]
        always = flops["per_sequence"] + flops["per_token"] * length
        switched = np.array(flops["per_query"]) * tokens + np.array(flops["per_pair"]) * tokens**2
        everything = always + switched.sum(axis=1)
        return (always + (switched * ~self.masks[number]).sum(axis=1)) / everything + (
            0 if dense else self.own_flops(length) / everything
        )

    def own_flops(self, length: NDArray) -> NDArray:
        """FLOPs of deciding on rows of so many tokens, ``[n]``."""
        own = self.manifest["flops"]
        return own["policy"] + own["policy_per_token"] * np.minimum(length, own["policy_longest"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what answers depend on."""
        files = self.manifest["files"]
        return {"policy": files[MANIFEST], "backbone": files[WEIGHTS]}

    @property
    def metric(self) -> str:
        """The metric by which an answer is compared with its references."""
        return self.manifest["metric"]

    def references(self, row: dict[str, Any]) -> list[str] | None:
        """The right answers of a row, in the form of ``answer``; ``None`` where it has none, or something else."""
        from sd_gym.tasks.family import TASKS

        right = row.get(self.reference)
        try:
            return (
                None if right is None else TASKS.find(self.manifest["task"]).right(right, dict(enumerate(self._names)))
            )
        except TypeError:
            return None

    def checked(self, given: Any) -> list[str]:
        """The texts of an input; ``ValueError`` if it is malformed."""
        return checked_texts(given, self.fields, optional=self.manifest["optional"])

    def _checked(self, number: int, given: Input) -> list[str]:
        try:
            return self.checked(given)
        except ValueError as error:
            raise ValueError(f"input {number}: {error}") from None

    @property
    def _names(self) -> list[str]:
        return self.manifest["names"]

    def _opened(self, name: str) -> Any:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("ONNX Runtime is not installed: pip install 'sd-gym[onnx]'") from error
        return onnxruntime.InferenceSession(self.folder / name, self._options, providers=self._providers)

    def _encoded(self, texts: list[list[str]]) -> list[Encoding]:
        """Tokens of the inputs, cut as in the env: of a question and its context only the context."""
        paired, cut = any(len(one) == 2 for one in texts), self.manifest["cut"]
        if cut["strategy"] == "only_second":
            self._check_questions([one[0] for one in texts], cut["length"])
        given = [(one[0], one[1] if len(one) == 2 else "") if paired else one[0] for one in texts]
        return self._tokenizer.encode_batch(given)

    def _check_questions(self, questions: list[str], limit: int) -> None:
        whole = Tokenizer.from_str(self._tokenizer.to_str())
        whole.no_truncation()
        for number, row in enumerate(whole.encode_batch([(question, "") for question in questions])):
            if len(row) >= limit:
                raise DataError(f"input {number}: the question alone has {len(row)} of {limit} tokens; shorten it")

    def _decided(self, rows: list[Encoding], length: NDArray) -> NDArray:
        number = np.empty(len(rows), dtype=np.int64)
        for part in _parts(np.arange(len(rows)), length, DECIDED):
            number[part] = self.decide(self._batch([rows[row] for row in part]))
        return number

    def _batch(self, rows: list[Encoding]) -> dict[str, NDArray]:
        """The model's inputs, padded at the right."""
        longest = max(len(row) for row in rows)
        shape = len(rows), longest
        batch = {"input_ids": np.full(shape, self.manifest["padding_token"], dtype=np.int64)}
        batch |= {name: np.zeros(shape, dtype=np.int64) for name in ("attention_mask", "token_type_ids")}
        for at, row in enumerate(rows):
            batch["input_ids"][at, : len(row)] = row.ids
            batch["attention_mask"][at, : len(row)] = 1
            batch["token_type_ids"][at, : len(row)] = row.type_ids
        return batch

    def _run(self, graph: str, batch: dict[str, NDArray]) -> NDArray:
        """The output of a graph on those of the inputs that it reads; types are zeros where there are none."""
        session, zeros = self._session(graph), np.zeros_like(batch["input_ids"])
        return session.run(None, {given.name: batch.get(given.name, zeros) for given in session.get_inputs()})[0]

    def _said(self, rows: list[Encoding], texts: list[list[str]], part: NDArray, values: NDArray) -> list[str]:
        """The answers of one pass in words."""
        kind = self.manifest["head"]
        if kind == "label":
            return [self._names[index] for index in values.argmax(axis=1)]
        if kind == "score":
            return [f"{value:.2f}" for value in values[:, 0]]
        inside = np.zeros((len(rows), values.shape[2]), dtype=bool)
        for at, row in enumerate(rows):
            inside[at, : len(row)] = [number == 1 for number in row.sequence_ids]
        inside[:, 0] = self.manifest["unanswerable"]
        spans = best_spans(np.where(inside[:, None], values, np.float32(NOWHERE)), self.manifest["longest_answer"])
        return [
            texts[number][1][row.offsets[first][0] : row.offsets[last][1]].strip() if first else ""
            for number, row, (first, last) in zip(part, rows, spans.tolist(), strict=True)
        ]


def best_spans(logits: NDArray, max_length: int) -> NDArray:
    """First and last token of the most probable span, int64 ``[n, 2]``, as the span head finds it.

    Logits are ``[n, 2, length]``; the first token stands for "no answer" and is a span of its own only.
    """
    start, end = logits[:, 0], logits[:, 1]
    longest = min(max_length, end.shape[1])
    ends = np.pad(end, ((0, 0), (0, longest - 1)), constant_values=NOWHERE)
    scores = start[:, :, None] + np.lib.stride_tricks.sliding_window_view(ends, longest, axis=1)
    scores[:, 0, 1:] = 2 * NOWHERE
    first, further = np.divmod(scores.reshape(len(scores), -1).argmax(axis=1), longest)
    return np.stack([first, first + further], axis=1)


def _parts(rows: NDArray, length: NDArray, size: int) -> Iterator[NDArray]:
    """Rows in parts of about the same length."""
    rows = rows[np.argsort(length[rows], kind="stable")]
    yield from np.split(rows, range(size, len(rows), size))
