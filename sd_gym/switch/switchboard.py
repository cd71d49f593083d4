"""Real skipping inside an unmodified Hugging Face model.

A switch stands in front of one sublayer. For each batch it selects the rows that run the sublayer, calls it on those
rows alone, and scatters the result back; with no row left the sublayer is never called. The model's modules, parameter
names and outputs stay as they are: only ``forward`` of the switched modules is shadowed, on the instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sd_gym.switch.architectures import Sublayer, architecture_of


@dataclass
class Switch:
    """The place where one candidate is skipped or run.

    Attributes:
        name: ``stack.layer.kind``, such as ``decoder.3.cross_attention``.
        stack: Name of the stack that it is in.
        layer: The layer module that it is in.
        sublayer: What it switches.
        rows: Indices of the rows that run it, int64 ``[kept]`` on the model's device; ``None``: all of them.
    """

    name: str
    stack: str
    layer: nn.Module
    sublayer: Sublayer
    rows: Tensor | None = field(default=None, repr=False)

    @property
    def modules(self) -> list[nn.Module]:
        """The switched modules, in execution order."""
        return [self.layer.get_submodule(path) for path in self.sublayer.modules]


class Switchboard:
    """All switches of one backbone, in execution order; it holds the decisions in force.

    Args:
        model: A model of a supported architecture; it is switched in place until ``remove()``.

    Raises:
        UnsupportedArchitectureError: If the architecture has no entry.
        RuntimeError: If the model already carries a switchboard.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ... )
        >>> model = BertForSequenceClassification(config).eval()
        >>> board = Switchboard(model)
        >>> board.names
        ['encoder.0.attention', 'encoder.0.feed_forward', 'encoder.1.attention', 'encoder.1.feed_forward']
        >>> skip = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])  # the second row runs one attention only
        >>> with torch.inference_mode(), board.decide(skip):
        ...     logits = model(torch.ones(2, 5, dtype=torch.long)).logits
        >>> logits.shape
        torch.Size([2, 2])
        >>> board.remove()
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if getattr(model, "_switchboard", None) is not None:
            raise RuntimeError("this model already carries a Switchboard; call its remove() first")
        self.model = model
        self.architecture = architecture_of(model.config.model_type)
        self.switches = [
            Switch(f"{stack.name}.{index}.{sublayer.kind}", stack.name, layer, sublayer)
            for stack in self.architecture.stacks
            for index, layer in enumerate(model.base_model.get_submodule(stack.layers))
            for sublayer in stack.sublayers
        ]
        self._batch: int | None = None
        for switch in self.switches:
            self._install(switch)
        self._guard = model.register_forward_pre_hook(self._refuse_filled_cache, with_kwargs=True)
        model._switchboard = self

    def __len__(self) -> int:
        return len(self.switches)

    @property
    def names(self) -> list[str]:
        """The switches' names, in the order of the skip vector."""
        return [switch.name for switch in self.switches]

    @contextmanager
    def decide(self, skip: Tensor | np.ndarray) -> Iterator[None]:
        """Put decisions in force for the forward passes inside the ``with`` block.

        Args:
            skip: Integers or booleans ``[batch, len(board)]``; 1 = the row skips the sublayer. The plan is made on
                the host, so a CPU tensor or an array is the cheapest; nothing synchronises inside the forward pass.

        Raises:
            ValueError: If the shape or a value is wrong.
        """
        skip = self._checked(skip)
        outer = (self._batch, [switch.rows for switch in self.switches])
        self._batch = len(skip)
        for switch, rows in zip(self.switches, self._plan(skip), strict=True):
            switch.rows = rows
        try:
            yield
        finally:
            self._batch = outer[0]
            for switch, rows in zip(self.switches, outer[1], strict=True):
                switch.rows = rows

    def remove(self) -> None:
        """Take all switches out; the model is then exactly what it was."""
        for switch in self.switches:
            for module in switch.modules:
                del module.forward
        self._guard.remove()
        del self.model._switchboard

    def _checked(self, skip: Tensor | np.ndarray) -> np.ndarray:
        array = skip.detach().cpu().numpy() if isinstance(skip, Tensor) else np.asarray(skip)
        if array.ndim != 2 or array.shape[1] != len(self):
            raise ValueError(f"skip must have shape [batch, {len(self)}], one column a switch; got {list(array.shape)}")
        if not ((array == 0) | (array == 1)).all():
            raise ValueError("skip must hold only 0 (run) and 1 (skip)")
        return array.astype(bool)

    def _plan(self, skip: np.ndarray) -> list[Tensor | None]:
        """The rows that run, a switch: one transfer to the device for the whole plan."""
        runs = ~skip.T
        counts = runs.sum(axis=1)
        rows = torch.from_numpy(np.nonzero(runs)[1]).to(self.model.device).split(counts.tolist())
        return [None if count == len(skip) else kept for count, kept in zip(counts, rows, strict=True)]

    def _install(self, switch: Switch) -> None:
        modules = switch.modules
        if len(modules) == 1:
            modules[0].forward = partial(self._whole, switch, modules[0].forward)
        else:
            modules[0].forward = partial(self._first, switch, modules[0].forward)
            modules[1].forward = partial(self._last, switch, modules[1].forward)

    def _whole(self, switch: Switch, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """A sublayer that is one module: select, run, scatter."""
        rows = switch.rows
        if rows is None:
            return inner(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        self._check_batch(hidden)
        base = hidden if switch.sublayer.adds_residual else torch.zeros_like(hidden)
        if len(rows) == 0:
            return base, None
        selected = [self._select(value, rows) for value in args]
        output = inner(*selected, **{key: self._select(value, rows) for key, value in kwargs.items()})
        attended = output[1]
        if isinstance(attended, Tensor):
            attended = attended.new_zeros(len(hidden), *attended.shape[1:]).index_copy(0, rows, attended)
        return base.index_copy(0, rows, output[0]), attended, *output[2:]

    def _first(self, switch: Switch, inner: Callable, hidden: Tensor) -> Tensor:
        """The first module of a sublayer that the layer spells out: from here on, only the kept rows exist."""
        rows = switch.rows
        if rows is None:
            return inner(hidden)
        self._check_batch(hidden)
        if len(rows) == 0:
            return hidden.new_empty(0, *hidden.shape[1:])
        return inner(hidden.index_select(0, rows))

    def _last(self, switch: Switch, inner: Callable, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """The last module of such a sublayer: all rows exist again."""
        rows = switch.rows
        inputs = (hidden,) if residual is None else (hidden, residual)
        if rows is None:
            return inner(*inputs)
        if len(rows) == 0:
            # The width is that of the layer's input, which ``_first`` passed on.
            return residual if residual is not None else hidden.new_zeros(self._batch, *hidden.shape[1:])
        if residual is None:
            output = inner(hidden)
            base = output.new_zeros(self._batch, *output.shape[1:])
        else:
            output = inner(hidden, residual.index_select(0, rows))
            base = residual
        return base.index_copy(0, rows, output)

    def _select(self, value: Any, rows: Tensor) -> Any:
        """Rows of a tensor whose first dimension is the batch; anything else as it is.

        One-dimensional tensors (positions) never count a batch.
        """
        if isinstance(value, Tensor) and value.ndim >= 2 and len(value) == self._batch:
            return value.index_select(0, rows)
        return value

    def _check_batch(self, hidden: Tensor) -> None:
        if len(hidden) != self._batch:
            raise ValueError(f"decisions are in force for {self._batch} rows, but the model got {len(hidden)}")

    def _refuse_filled_cache(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Decoding step by step over a cache is not possible yet: fail instead of giving wrong tokens."""
        if all(switch.rows is None for switch in self.switches):
            return
        for value in kwargs.values():
            layers = getattr(getattr(value, "self_attention_cache", value), "layers", None)
            if layers is not None and any(getattr(layer, "is_initialized", False) for layer in layers):
                raise NotImplementedError(
                    "decoding with a key-value cache under skip decisions is not supported yet; pass use_cache=False"
                )
