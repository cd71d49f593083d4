"""Running a backbone on the instances of a split, in few and short passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray as Array

from sd_gym.backbones import Backbone
from sd_gym.backbones.heads.seq2seq import judged_text, padded_targets, until_end
from sd_gym.config import BackboneConfig
from sd_gym.data.encoded import Encoded, Targets
from sd_gym.data.instance import Instance
from sd_gym.execution.bank import MaskModels
from sd_gym.execution.mask_tree import MaskTree
from sd_gym.execution.stops import cut_at_stop, stopping
from sd_gym.switch import PassState, passes
from sd_gym.switch.stages import BETWEEN
from sd_gym.tasks.encoding import TOKENIZING
from sd_gym.tasks.token_dropping import TokenDropping

Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # a function of each row's logits and labels
PASS_TOKENS = 2**15  # padded tokens of a forward pass at most, which bounds its memory
SHARED_ROWS = 256  # most rows of a pass that many masks share


def columns(*values: Value) -> Value:
    """A function that returns several values of each row as columns, ``[batch, values]``."""
    return lambda logits, labels: torch.cat([value(logits, labels).reshape(len(logits), -1) for value in values], dim=1)


class Passes:
    """Forward passes and ``generate()`` of a backbone on rows of a split, under decisions ``[n, switches + 1]``."""

    most: int | None = None  # rows per pass; None: as many as memory allows
    bank: MaskModels | None = None  # runs passes whose rows all share a decision; None: the switchboard runs all
    watch: Callable[[Array, torch.Tensor | None], None] | None = None  # called with each pass's rows and logits

    def __init__(
        self,
        backbone: Backbone,
        instances: Sequence[Instance],
        encoded: Encoded,
        tokens: TokenDropping,
        settings: BackboneConfig,
    ) -> None:
        self.backbone = backbone
        self.head = backbone.head
        self.instances = instances
        self.encoded = encoded
        self.max_target_length = settings.max_target_length
        self._tokens = tokens
        self._num_beams = settings.num_beams
        self._stop = settings.stop
        self.generated = np.ones(len(encoded), dtype=np.int64)  # tokens of each row's last text, with its end
        self.first_generated = self.generated  # of the texts before rows went on
        self.finished = np.ones(len(encoded), dtype=np.bool_)  # whether that text ended by itself
        self.written: list[list[int]] = [[]] * len(encoded)  # that text's tokens, with its end

    def answers(self, rows: Array, decisions: Array, resume_from: PassState | None = None) -> list[str]:
        """The backbone's answers to rows under decisions: a text, a class's name, or a score.

        Passes resume from the state ``resume_from`` at a stage. In the middle of a stack, texts are generated anew.
        """
        if not self.head.judges_passes:
            return self._texts(rows, decisions, resume_from, judges=False)[0]
        values = self.in_passes(
            rows, decisions, lambda logits, _: self.head.best(logits, self.max_target_length), resume_from
        )
        return self.head.to_texts(self.instances, self.encoded, rows, values)

    def answers_and_judgement(
        self, rows: Array, decisions: Array, resume_from: PassState | None = None
    ) -> tuple[list[str], Array]:
        """``answers``, and the head's ``judgement`` of each, float64 ``[n, values]``, from the same passes."""
        if not self.head.judges_passes:
            return self._texts(rows, decisions, resume_from, judges=True)
        value = self._best_and(lambda logits, _: self.head.judge(logits))
        best, judged = np.split(
            self.in_passes(rows, decisions, value, resume_from), [-len(self.head.judgement)], axis=1
        )
        return self.head.to_texts(self.instances, self.encoded, rows, best), judged

    def answers_and_likelihood(self, rows: Array, decisions: Array, likelihood: Value) -> tuple[list[str], Array]:
        """``answers``, and the ``likelihood`` of the references, float64 ``[n]``."""
        if not self.head.judges_passes:
            return self.answers(rows, decisions), self.in_passes(rows, decisions, likelihood)
        values = self.in_passes(rows, decisions, self._best_and(likelihood))
        return self.head.to_texts(self.instances, self.encoded, rows, values[:, :-1]), values[:, -1]

    def answers_under_all(self, rows: Array, masks: Array, likelihood: Value) -> tuple[list[list[str]], Array]:
        """``answers_and_likelihood`` under every mask: a list of texts per mask, and float64 ``[n, masks]``."""
        if not self.head.judges_passes:
            likely = self.under_all(rows, masks, columns(likelihood))
            return self.generated_under_all(rows, masks), likely[..., 0]
        values, to_texts = self.under_all(rows, masks, self._best_and(likelihood)), self.head.to_texts
        bests = values[..., :-1].swapaxes(0, 1)
        return [to_texts(self.instances, self.encoded, rows, best) for best in bests], values[..., -1]

    def _best_and(self, more: Value) -> Value:
        """A function that returns the columns of ``Head.best``, then those of ``more``."""
        return columns(lambda logits, _: self.head.best(logits, self.max_target_length), more)

    def confidence(self, rows: Array, decisions: Array) -> Array:
        """Highest class probability of each row under decisions, float64 ``[n]``, of a backbone that classifies."""
        return self.in_passes(rows, decisions, lambda logits, labels: self._confidence(logits))

    @torch.inference_mode()
    def _texts(
        self, rows: Array, decisions: Array, resume_from: PassState | None, *, judges: bool
    ) -> tuple[list[str], Array]:
        """The texts of ``generate()``, and their judgement; zeros without ``judges``, which takes time."""
        texts, judged = np.empty(len(rows), dtype=object), np.empty((len(rows), len(self.head.judgement)))
        encoder_state = resume_from if resume_from is not None and resume_from.stage == BETWEEN else None
        for picked, inputs in self.planned(rows, decisions, self.max_target_length):
            if encoder_state is None:
                generated = self.generated_batch(rows[picked], decisions[picked], inputs, judges=judges)
            else:
                generated = self._generated_after(encoder_state, rows, decisions, picked, judges=judges)
            texts[picked], judged[picked] = generated
            if self.watch is not None:
                self.watch(rows[picked], None)
        return texts.tolist(), judged

    def generated_batch(
        self, rows: Array, decisions: Array, inputs: dict[str, torch.Tensor], *, judges: bool
    ) -> tuple[list[str], Array]:
        """The texts of one ``generate()`` on a batch of these rows, and their judgement (see ``_texts``)."""
        keep = self._tokens.kept(rows, decisions[:, -1])
        if keep is None and (model := self._model_of(decisions)) is not None:
            return self._generated(rows, inputs, nullcontext(), model, judges=judges)
        return self._generated(rows, inputs, self.backbone.board.decide(decisions[:, :-1], keep), judges=judges)

    def _generated_after(
        self, resume_from: PassState, rows: Array, decisions: Array, picked: Array, *, judges: bool
    ) -> tuple[list[str], Array]:
        """``generated_batch`` of the rows ``picked``, after the encoder has read all rows; the padding stays."""
        some, keep = torch.from_numpy(picked), self._tokens.kept(rows, decisions[:, -1])
        inputs = {name: tensor[some] for name, tensor in self.inputs(rows).items()}
        kept, state = None if keep is None else keep[picked], resume_from.rows(some.to(resume_from.hidden.device))
        deciding = self.backbone.board.decide(decisions[picked, :-1], kept, resume_from=state)
        return self._generated(rows[picked], inputs, deciding, judges=judges)

    @torch.inference_mode()
    def generated_under_all(self, rows: Array, masks: Array) -> list[list[str]]:
        """Generated ``answers`` under every mask, a list for each. Masks that agree on the encoder share it."""
        board = self.backbone.board
        start = board.decided_at([BETWEEN])[BETWEEN].start if BETWEEN in board.stages else 0
        groups = np.unique(masks[:, [*range(start), -1]], axis=0, return_inverse=True)[1].ravel()
        texts = np.empty((len(masks), len(rows)), dtype=object)
        for picked, inputs in self.planned(rows, np.tile(masks[0], (len(rows), 1)), self.max_target_length):
            for group in range(groups.max() + 1):
                numbers = np.flatnonzero(groups == group)
                tiled = np.tile(masks[numbers], (len(picked), 1, 1)).swapaxes(0, 1)  # [masks, rows, switches + 1]
                kept = self._tokens.kept(rows[picked], tiled[0, :, -1])
                encoder_state = self.state_at(BETWEEN, rows[picked], tiled[0]) if start else None
                for number, decisions in zip(numbers, tiled, strict=True):
                    deciding = board.decide(decisions[:, :-1], kept, resume_from=encoder_state)
                    texts[number, picked] = self._generated(rows[picked], inputs, deciding, judges=False)[0]
        return texts.tolist()

    def _generated(
        self,
        rows: Array,
        inputs: dict[str, torch.Tensor],
        deciding: AbstractContextManager[None],
        model: Any = None,
        *,
        judges: bool,
    ) -> tuple[list[str], Array]:
        """The texts of one ``generate()`` under a decision, by default of the backbone's model, and their judgement."""
        backbone = self.backbone
        inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        start = self.head.prompt_length(inputs["input_ids"])
        with deciding:
            generate: Any = (model or backbone.model).generate  # its type is that of any attribute of a module
            output = generate(
                **inputs,
                max_new_tokens=self.max_target_length,
                num_beams=self._num_beams,
                do_sample=False,
                **stopping(self._stop, self._ends, backbone.tokenizer, start),
                pad_token_id=backbone.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_scores=judges,
            )
        answers = output.sequences[:, start:].cpu()
        lengths, ended = until_end(answers, self._ends)
        lengths = torch.minimum(lengths, (answers >= 0).sum(dim=1))  # beams are filled with -1 if there is no end
        if self._stop is not None:
            cut_at_stop(self._stop, backbone.tokenizer, answers, lengths, ended)
        self.generated[rows], self.finished[rows] = lengths.numpy(), ended.numpy()
        for row, tokens, length in zip(rows, answers.tolist(), self.generated[rows], strict=True):
            self.written[row] = tokens[:length]
        whole = backbone.tokenizer.batch_decode([self.written[row] for row in rows], skip_special_tokens=True)
        texts = [(text if self._stop is None else text.partition(self._stop)[0]).strip() for text in whole]
        if not judges:
            return texts, np.zeros((len(texts), len(self.head.judgement)))
        return texts, judged_text(backbone.model, output, lengths).numpy()

    def written_targets(self, rows: Array) -> Targets:
        """The last texts of rows as targets: their own tokens, as a text encoded again may have others.

        They lack an end that ``generate()`` is forced to write where the text becomes too long.
        """
        tokens, cut = [self.written[row] for row in rows], ~self.finished[rows]
        if self.backbone.model.generation_config.forced_eos_token_id is not None:
            cut |= self.generated[rows] == self.max_target_length
            tokens = [own[: max(1, self.max_target_length - 1)] for own in tokens]
        return padded_targets(tokens, cut)

    @property
    def _ends(self) -> list[int]:
        """Tokens that end a text: the model's; with a stop, the tokenizer's and a token that is the stop, too."""
        own, tokenizer = self.backbone.model.generation_config.eos_token_id, self.backbone.tokenizer
        ends = [*own] if isinstance(own, list) else [own]
        if self._stop is not None:
            with TOKENIZING:
                stop = tokenizer(self._stop, add_special_tokens=False).input_ids
            ends += [tokenizer.eos_token_id, *(stop if len(stop) == 1 else [])]
        return list(dict.fromkeys(one for one in ends if one is not None))

    @torch.inference_mode()
    def in_passes(self, rows: Array, decisions: Array, value: Value, resume_from: PassState | None = None) -> Array:
        """A value, or several, of each row's logits and labels, float64 ``[n]`` or ``[n, values]``.

        With the state ``resume_from`` at a stage it is one pass, which resumes from there.
        """
        if resume_from is not None:
            return value(*self.resumed(resume_from, rows, decisions)).cpu().double().numpy()
        order, values = [], []
        for picked, logits, labels in self.logits(rows, decisions):
            order.append(picked)
            values.append(value(logits, labels).cpu().double().numpy())
            if self.watch is not None:
                self.watch(rows[picked], logits)
        return np.concatenate(values)[np.argsort(np.concatenate(order))]

    @torch.inference_mode()
    def under_all(self, rows: Array, masks: Array, value: Value) -> Array:
        """Values of each row's logits and labels under every mask, float64 ``[n, masks, values]``.

        Masks share the passes that they have in common (``MaskTree``).
        """
        length = self.encoded.source_length[rows] + self.encoded.target_length[rows]
        order = np.argsort(length, kind="stable")  # rows of similar length waste little on padding
        size = max(1, min(SHARED_ROWS, PASS_TOKENS // int(length.max())))
        parts = np.split(rows[order], range(size, len(rows), size))
        return np.concatenate([self._under_all(part, masks, value) for part in parts])[np.argsort(order)]

    def _under_all(self, rows: Array, masks: Array, value: Value) -> Array:
        inputs, values = self.inputs(rows), dict[int, Array]()  # by index of the mask

        def keep_value(number: int, logits: torch.Tensor) -> None:
            values[number] = value(logits, inputs["labels"]).cpu().double().numpy()

        for level in np.unique(masks[:, -1]):
            picked = np.flatnonzero(masks[:, -1] == level)
            keep = self._keep_of(rows, np.tile(masks[picked[0]], (len(rows), 1)), inputs)
            MaskTree(self.backbone, inputs, keep, masks[:, :-1], keep_value).run_masks(picked)
        return np.stack([values[number] for number in range(len(masks))], axis=1)

    def logits(self, rows: Array, decisions: Array) -> Iterator[tuple[Array, torch.Tensor, torch.Tensor]]:
        """Positions in ``rows``, logits and labels of each forward pass under decisions ``[n, switches + 1]``."""
        for picked, inputs in self.planned(rows, decisions):
            yield picked, self._pass(rows[picked], decisions[picked], inputs), inputs["labels"]

    def _pass(self, rows: Array, decisions: Array, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        keep, board = self._keep_of(rows, decisions, inputs), self.backbone.board
        if keep is None and (model := self._model_of(decisions)) is not None:
            return self.head.forward(board, inputs, model)
        with board.decide(decisions[:, :-1], keep):
            return self.backbone.logits(inputs)

    def _model_of(self, decisions: Array) -> Any:
        """The bank's model for rows ``[n, switches + 1]``; ``None`` without a bank, or if the rows disagree."""
        shared = decisions[0, :-1]
        if self.bank is None or self.backbone.board.is_deciding or (decisions[:, :-1] != shared).any():
            return None
        return self.bank.of(shared.astype(bool))

    def _keep_of(self, rows: Array, decisions: Array, inputs: dict[str, torch.Tensor]) -> Array | torch.Tensor | None:
        """The tokens that a pass of ``Backbone.logits`` keeps."""
        keep = self._tokens.kept(rows, decisions[:, -1])
        return None if keep is None else self.head.kept(inputs, keep)

    def logits_of_one(
        self, row: int, decide: Callable[[torch.Tensor, torch.Tensor], Array]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of one instance, decided on in its pass: the input is embedded once."""
        board, rows = self.backbone.board, np.array([row])
        inputs = self.inputs(rows)
        mask = inputs["attention_mask"]

        def choose(state: PassState) -> tuple[Array, Array | torch.Tensor | None]:
            decisions = decide(state.hidden[:, : mask.shape[1]], mask)  # after a prompt the answer follows
            return decisions[:, :-1], self._keep_of(rows, decisions, inputs)

        with board.decide_in_pass(choose):
            return self.backbone.logits(inputs), inputs["labels"]

    @torch.inference_mode()
    def state_at(self, stage: str, rows: Array, decisions: Array, resume_from: PassState | None = None) -> PassState:
        """The state of one pass of rows at a stage, where it ends; it may resume from an earlier stage's state.

        Decisions on switches from the stage on do not count.
        """
        board = self.backbone.board
        inputs = self.inputs(rows)
        skip = decisions[:, :-1]
        keep, mask = self._keep_of(rows, decisions, inputs), inputs["attention_mask"]
        return board.run_to(stage, lambda: self.backbone.logits(inputs), skip, keep, mask=mask, resume_from=resume_from)

    @torch.inference_mode()
    def resumed(self, resume_from: PassState, rows: Array, decisions: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of a pass that resumes from its state at a stage."""
        inputs = self.inputs(rows)
        with self.backbone.board.decide(
            decisions[:, :-1], self._keep_of(rows, decisions, inputs), resume_from=resume_from
        ):
            return self.backbone.logits(inputs), inputs["labels"]

    def confidence_at(self, resume_from: PassState, rows: Array, decisions: Array) -> Array:
        """Highest class probability of each row if all is skipped from a stage on, float64 ``[n]``.

        For a head that ``can_exit``; arguments as of ``resumed``.
        """
        exits = decisions.copy()
        exits[:, self.backbone.board.decided_at([resume_from.stage])[resume_from.stage].start : -1] = 1
        return self._confidence(self.resumed(resume_from, rows, exits)[0]).cpu().double().numpy()

    def _confidence(self, logits: torch.Tensor) -> torch.Tensor:
        confidence = self.head.confidence
        assert confidence is not None  # callers check it (``can_exit``)
        return confidence(logits)

    def planned(self, rows: Array, decisions: Array, steps: int = 0) -> Iterator[tuple[Array, dict[str, torch.Tensor]]]:
        """Positions in ``rows`` and inputs of each forward pass, or of each ``generate()`` of ``steps`` tokens."""
        kept = self._tokens.kept_length(rows, decisions[:, -1])[:, None]
        reads_input = np.array([switch.reads_input for switch in self.backbone.board.switches])
        _, decoded, _ = self.head.lengths(kept, self.encoded.target_length[rows][:, None], kept)
        length = np.where(reads_input, kept, decoded)
        width = self.backbone.model.config.hidden_size
        plain = self.bank is not None
        group = np.zeros(len(rows), int)
        if self.bank is not None and self.bank.one_mask_per_pass:
            group = np.unique(decisions, axis=0, return_inverse=True)[1].ravel()
        for own in (np.flatnonzero(group == number) for number in np.unique(group)):
            for part in passes(decisions[own, :-1], length[own], width, steps, self.most, plain=plain):
                picked = own[part]
                tokens = int(kept[picked].max() + self.encoded.target_length[rows[picked]].max())
                most = max(1, PASS_TOKENS // tokens)
                for fitting in np.split(picked, range(most, len(picked), most)):
                    yield fitting, self.inputs(rows[fitting])

    def inputs(self, rows: Array) -> dict[str, torch.Tensor]:
        """The backbone's inputs, with ``labels``, of a batch of these rows."""
        return self.head.batch(self.encoded, rows, self.backbone.model.device)
