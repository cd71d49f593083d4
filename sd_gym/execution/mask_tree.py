"""One batch under many masks: layers that they share run once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray as Array
from torch import Tensor

from sd_gym.backbones import Backbone
from sd_gym.switch import PassState
from sd_gym.switch.stages import EVERY_LAYER, StageReached


class MaskTree:
    """The tree of masks on one batch, depth first: masks that agree on their first switches share that part of a pass.

    A skipped sublayer leaves the hidden states as they are. So the tree can branch within a layer: all 4,096 masks of
    12 switches take 4,095 sublayers. It branches only between layers in three cases: with two stacks, with norms that
    run even if their sublayer is skipped (DistilBERT), and if tokens are dropped.

    Where the head reads the first position alone, the last feed-forward block runs on that position alone.

    Args:
        backbone: The backbone to run.
        inputs: Its inputs for the batch.
        keep: The tokens that the batch keeps, bool ``[n, length]``; ``None``: all.
        masks: ``[masks, switches]``, 1 = skip.
        on_logits: Called with the index of each mask and the batch's logits under it, in any order.
    """

    def __init__(
        self,
        backbone: Backbone,
        inputs: dict[str, Tensor],
        keep: Array | Tensor | None,
        masks: Array,
        on_logits: Callable[[int, Tensor], None],
    ) -> None:
        self._backbone = backbone
        self._board = backbone.board
        self._inputs = inputs
        self._keep = keep
        self._masks = masks
        self._on_logits = on_logits
        switches, stacks = self._board.switches, self._board.architecture.stacks
        self._by_sublayer = keep is None and len(stacks) == 1 and stacks[0].passes_through
        layers = self._board.decided_at([EVERY_LAYER]).items()
        self._layer_of = [layer for layer in layers for _ in switches[layer[1]]]  # per switch: stage and switches
        self._first_alone: bool | None = None
        self._is_pointwise = np.array([switch.sublayer.kind == "feed_forward" for switch in switches])

    def run_masks(self, picked: Array, done: int = 0, state: PassState | None = None) -> None:
        """Run the masks ``picked`` (indices), which agree on the first ``done`` switches, from the state after them."""
        first = self._masks[picked[0]]
        differ = np.flatnonzero((self._masks[picked] != first).any(axis=0))
        if not len(differ):
            return self._on_logits(int(picked[0]), self._logits(first, done, state))
        columns = self._layer_of[differ[0]][1]
        if self._by_sublayer:
            columns = slice(differ[0], differ[0] + 1)
        if columns.start > done:
            state = self._run(first, done, columns.start, state)
        _, group = np.unique(self._masks[picked][:, columns], axis=0, return_inverse=True)
        for choice in range(group.max() + 1):
            self.run_masks(picked[group.ravel() == choice], columns.start, state)

    def _run(self, mask: Array, done: int, end: int, state: PassState | None) -> PassState:
        """The state before switch ``end``, from ``state``, that before switch ``done``."""
        stage, columns = self._layer_of[end]
        if state is not None and self._by_sublayer and mask[done:end].all():
            return replace(state, stage=stage)
        skip = self._skip(np.where(np.arange(len(mask)) < end, mask, 1), done)
        if end > columns.start:
            return self._run_layer(stage, end, skip, state)
        inputs = self._inputs
        run, counted = lambda: self._backbone.logits(inputs), inputs["attention_mask"]
        return self._board.run_to(stage, run, skip, self._keep, mask=counted, resume_from=state)

    def _run_layer(self, stage: str, end: int, skip: Array, state: PassState | None) -> PassState:
        """The state before switch ``end`` in the middle of a layer: what the layer gives if it skips the rest."""

        def stop(module: object, args: object, output: Any) -> NoReturn:
            hidden = output if isinstance(output, Tensor) else output[0]
            raise StageReached(PassState(stage, hidden, self._inputs["attention_mask"]))

        handle = self._board.switches[end].layer.register_forward_hook(stop)
        try:
            with self._board.decide(skip, resume_from=state):
                self._backbone.logits(self._inputs)
        except StageReached as reached:
            return reached.state
        finally:
            handle.remove()
        raise RuntimeError(f"the forward pass ended without reaching the end of the layer at {stage!r}")

    def _logits(self, mask: Array, done: int, state: PassState | None) -> Tensor:
        """Logits under a mask, from the state before switch ``done``."""
        inputs, skip = self._inputs, self._skip(mask, done)
        is_pointwise = self._by_sublayer and self._is_pointwise[done:][mask[done:] == 0].all()
        if state is not None and is_pointwise and self._reads_first(state):
            inputs = {name: values if values.ndim == 1 else values[:, :1] for name, values in inputs.items()}
            state = replace(state, hidden=state.hidden[:, :1], mask=state.mask[:, :1])
        with self._board.decide(skip, self._keep, resume_from=state):
            return self._backbone.logits(inputs)

    def _reads_first(self, state: PassState) -> bool:
        """Whether logits depend on the first position alone; tried once, by setting all others to zero."""
        if self._first_alone is None:
            others = state.hidden.clone()
            others[:, 1:] = 0
            states, nothing = (state, replace(state, hidden=others)), np.ones_like(self._masks[:1])
            given = []
            for state in states:
                with self._board.decide(nothing, resume_from=state):
                    given.append(self._backbone.logits(self._inputs))
            self._first_alone = torch.equal(*given)
        return self._first_alone

    def _skip(self, mask: Array, done: int) -> Array:
        """Decisions under which only switches from ``done`` on run, as in the mask: ``[1 or rows, switches]``."""
        skip = np.where(np.arange(len(mask)) < done, 1, mask)
        return np.tile(skip, (1 if self._keep is None else len(self._keep), 1))
