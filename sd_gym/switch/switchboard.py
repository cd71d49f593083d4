"""Real skipping inside an unmodified Hugging Face model.

A switch stands in front of one sublayer. For each batch it selects the rows that run the sublayer, calls it on those
rows alone, and scatters the result back; with no row left the sublayer is never called. The model's modules, parameter
names and outputs stay as they are: only ``forward`` of the switched modules is shadowed, on the instance, while a
decision is in force by which some row skips them; whatever all rows run is the untouched model and costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from sd_gym.switch.architectures import Sublayer, architecture_of
from sd_gym.switch.cache import KeptRows, kept_rows
from sd_gym.switch.tokens import DroppedTokens


class _Place(NamedTuple):
    """Where a module stands in its sublayer's chain."""

    first: bool
    last: bool
    attention: bool


class _Call(NamedTuple):
    """What a sublayer's first module leaves to the others of the same forward pass."""

    hidden: Tensor  # the branch's input, all rows
    rows: Tensor | None  # that run; None: all


@dataclass
class Switch:
    """The place where one candidate is skipped or run.

    Attributes:
        name: ``stack.layer.kind``, such as ``decoder.3.cross_attention``.
        stack: Name of the stack that it is in.
        index: Index of its layer in the stack.
        layer: The layer module that it is in.
        sublayer: What it switches.
        reads_input: Whether its stack is the one that reads the input, whose tokens can be dropped.
        modules: The switched modules, in execution order.
        rows: Indices of the rows that run it, int64 ``[kept]`` on the model's device; ``None``: all of them.
        tokens: The tokens that are dropped, where it is an attention over the input; ``None``: none.
    """

    name: str
    stack: str
    index: int
    layer: nn.Module
    sublayer: Sublayer
    reads_input: bool
    modules: list[nn.Module] = field(init=False, repr=False)
    rows: Tensor | None = field(default=None, repr=False)
    tokens: DroppedTokens | None = field(default=None, repr=False)
    _call: _Call | None = field(default=None, repr=False)
    _source: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _shadowed: list[Callable | None] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.modules = [self.layer.get_submodule(path) for path in self.sublayer.modules]

    def shadow(self, run: Callable) -> None:
        """Have ``run(place, forward, *args, **kwargs)`` called in the place of each module's ``forward``."""
        last = len(self.modules) - 1
        for position, (path, module) in enumerate(zip(self.sublayer.modules, self.modules, strict=True)):
            place = _Place(position == 0, position == last, path == self.sublayer.attention)
            self._shadowed.append(vars(module).get("forward"))
            vars(module)["forward"] = partial(run, place, module.forward)

    def restore(self) -> None:
        """Take the shadows away."""
        for module, forward in zip(self.modules, self._shadowed, strict=False):  # none where nothing is shadowed
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward
        self._shadowed = []
        self._call = self._source = None


@dataclass
class _Plan:
    """Decisions in force: rows by switch, by how often each row of the decisions stands in the batch (beams)."""

    batch: int
    rows: dict[int, list[Tensor | None]]
    tokens: DroppedTokens | None

    def rows_of(self, number: int, total: int) -> Tensor | None:
        """Rows of a batch of ``total`` that run switch ``number``.

        Raises:
            ValueError: If ``total`` is no multiple of the decisions' batch.
        """
        repeats, rest = divmod(total, self.batch)
        if rest or not repeats:
            raise ValueError(f"decisions are in force for {self.batch} rows, but the model got {total}")
        if repeats not in self.rows:
            self.rows[repeats] = [_repeated(rows, repeats) for rows in self.rows[1]]
        return self.rows[repeats][number]


def _repeated(rows: Tensor | None, repeats: int) -> Tensor | None:
    if rows is None:
        return None
    return (rows[:, None] * repeats + torch.arange(repeats, device=rows.device)).flatten()


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
            Switch(
                f"{stack.name}.{index}.{sublayer.kind}",
                stack.name,
                index,
                layer,
                sublayer,
                stack is self.architecture.stacks[0],
            )
            for stack in self.architecture.stacks
            for index, layer in enumerate(model.base_model.get_submodule(stack.layers))
            for sublayer in stack.sublayers
        ]
        self._plan: _Plan | None = None
        model._switchboard = self

    def __len__(self) -> int:
        return len(self.switches)

    @property
    def names(self) -> list[str]:
        """The switches' names, in the order of the skip vector."""
        return [switch.name for switch in self.switches]

    @contextmanager
    def decide(self, skip: Tensor | np.ndarray, keep: Tensor | np.ndarray | None = None) -> Iterator[None]:
        """Put decisions in force for the forward passes and ``generate()`` calls inside the ``with`` block.

        The plan is made on the host, so CPU tensors or arrays are the cheapest; nothing synchronises inside the forward
        pass. A batch may be a multiple of the decisions': each row then stands for its beams or samples, one after
        the other, as ``generate()`` arranges them.

        Args:
            skip: Integers or booleans ``[batch, len(board)]``; 1 = the row skips the sublayer.
            keep: Integers or booleans ``[batch, length]``; 0 = the input's token is dropped, physically, in front of
                the first layer (``sd_gym.switch.keep_tokens`` ranks). Padding may be kept or not. The model returns
                zeros as the hidden states of dropped positions; encoder-decoder models return the encoder's output
                without them. ``None``: all tokens stay.

        Raises:
            ValueError: If a shape or a value is wrong, or a row keeps no token.
        """
        skip = self._checked(skip, len(self), "switch")
        tokens = None
        if keep is not None:
            keep = self._checked(keep, None, "token")
            if len(keep) != len(skip):
                raise ValueError(f"keep is for {len(keep)} rows and skip for {len(skip)}; they must agree")
            if not keep.any(axis=1).all():
                raise ValueError("keep leaves a row without any token; protect at least one")
            if not keep.all():
                tokens = DroppedTokens(keep, self.model.device)
        outer = self._plan
        self._enforce(_Plan(len(skip), {1: self._rows(skip)}, tokens))
        hooks = tokens.install(self.model, self.architecture) if tokens is not None else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._enforce(outer)

    def remove(self) -> None:
        """Take all switches out; the model is then exactly what it was."""
        self._enforce(None)
        del self.model._switchboard

    def _enforce(self, plan: _Plan | None) -> None:
        self._plan = plan
        all_rows = plan.rows[1] if plan else [None] * len(self)
        for number, (switch, rows) in enumerate(zip(self.switches, all_rows, strict=True)):
            switch.restore()
            attends = switch.reads_input and switch.sublayer.output is not None
            switch.tokens = plan.tokens if plan and attends else None
            switch.rows = rows
            if rows is not None or switch.tokens is not None:
                switch.shadow(partial(self._run, number, switch))

    def _checked(self, values: Tensor | np.ndarray, columns: int | None, column: str) -> np.ndarray:
        name = "keep" if columns is None else "skip"
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.ndim != 2 or columns not in (None, array.shape[1]):
            raise ValueError(
                f"{name} must have shape [batch, {columns or 'length'}], one column a {column}; got {list(array.shape)}"
            )
        if not ((array == 0) | (array == 1)).all():
            raise ValueError(f"{name} must hold only 0 and 1")
        return array.astype(bool)

    def _rows(self, skip: np.ndarray) -> list[Tensor | None]:
        """The rows that run, a switch: one transfer to the device for the whole plan."""
        runs = ~skip.T
        counts = runs.sum(axis=1)
        rows = torch.from_numpy(np.nonzero(runs)[1]).to(self.model.device).split(counts.tolist())
        return [None if count == len(skip) else kept for count, kept in zip(counts, rows, strict=True)]

    def _run(self, number: int, switch: Switch, place: _Place, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """One module of a sublayer: the first selects the rows, the last scatters them back."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if place.first:
            switch._call = _Call(hidden, self._plan.rows_of(number, len(hidden)))
        call = switch._call
        if place.last:
            switch._call = None  # holds no memory between passes
        if place.attention:
            return self._run_attention(switch, place, call, inner, args, kwargs)
        if call.rows is not None and len(call.rows) == 0:
            return self._skipped(switch, call) if place.last else hidden[:0]
        output = inner(*self._selected(args, switch, call), **self._selected(kwargs, switch, call))
        return self._scattered(switch, call, output) if place.last else output

    def _run_attention(
        self, switch: Switch, place: _Place, call: _Call, inner: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> tuple:
        """The attention proper of a sublayer: its other arguments, its cache and its position bias follow the rows."""
        hidden = args[0] if args else kwargs["hidden_states"]
        query_length = hidden.shape[1] if switch.tokens is None else switch.tokens.query_length
        layer = self._cache_layer(switch, call, (*args, *kwargs.values()))
        shared = ()
        if switch.sublayer.position_bias is not None:
            if kwargs.get("position_bias") is None:
                past = layer.length if layer is not None else 0
                kwargs["position_bias"] = self._position_bias(switch, query_length, past, len(call.hidden))
            shared = (kwargs["position_bias"],)
        if call.rows is not None and len(call.rows) == 0:
            output = (self._skipped(switch, call) if place.last else hidden[:0], *shared, None)
        else:
            output = inner(*self._selected(args, switch, call), **self._selected(kwargs, switch, call))
            weights = [self._padded(value, call) for value in output[1 + len(shared) :]]
            if shared == (None,):  # the next layers take it instead of making it again
                shared = output[1:2]
            output = (self._scattered(switch, call, output[0]) if place.last else output[0], *shared, *weights)
        if layer is not None and switch.sublayer.kind == "attention":
            layer.advance(query_length)
        return output

    def _cache_layer(self, switch: Switch, call: _Call, values: tuple) -> KeptRows | None:
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if cache is None:
            return None
        across, whole = switch.sublayer.kind == "cross_attention", switch.tokens is not None
        return kept_rows(cache, switch.index, across=across, rows=call.rows, batch=len(call.hidden), whole=whole)

    def _position_bias(self, switch: Switch, query_length: int, past: int, total: int) -> Tensor | None:
        """What the first layer shares with all others, whether or not any row runs it."""
        module = switch.layer.get_submodule(switch.sublayer.position_bias)
        if not module.has_relative_attention_bias:
            return None
        device = self.model.device
        bias = module.compute_bias(query_length, past + query_length, device=device, past_seen_tokens=past)
        return bias if switch.tokens is None else switch.tokens.gather_square(bias, total)

    def _selected(self, values: Any, switch: Switch, call: _Call) -> Any:
        """The rows that run, of every tensor whose first dimension is the batch; anything else as it is.

        One-dimensional tensors (positions) never count a batch, and what an earlier module of the sublayer has selected
        already is shorter than the batch.
        """
        if call.rows is None:
            return values
        if isinstance(values, Tensor):
            whole = values.ndim >= 2 and len(values) == len(call.hidden)
            return self._taken(values, switch, call) if whole else values
        if isinstance(values, tuple):
            return tuple(self._selected(value, switch, call) for value in values)
        if type(values) is dict:
            return {name: self._selected(value, switch, call) for name, value in values.items()}
        return values

    def _taken(self, values: Tensor, switch: Switch, call: _Call) -> Tensor:
        """The rows that run; of the encoder's output, the same at every step of decoding, they are taken once."""
        source = switch.sublayer.kind == "cross_attention" and values.ndim == 3 and values is not call.hidden
        if not source or torch.is_grad_enabled():  # what was taken without gradients must not be used with them
            return values.index_select(0, call.rows)
        if switch._source is None or switch._source[0] is not values:
            switch._source = (values, values.index_select(0, call.rows))
        return switch._source[1]

    def _skipped(self, switch: Switch, call: _Call) -> Tensor:
        """The output of a sublayer that no row runs."""
        return call.hidden if switch.sublayer.adds_residual else torch.zeros_like(call.hidden)

    def _scattered(self, switch: Switch, call: _Call, output: Tensor) -> Tensor:
        """The output of a sublayer for all rows, from that of the rows that ran it."""
        if call.rows is None:
            return output
        if switch.sublayer.adds_residual:
            return call.hidden.to(output.dtype).index_copy(0, call.rows, output)
        return self._padded(output, call)

    def _padded(self, output: Tensor | None, call: _Call) -> Tensor | None:
        """Zeros for the rows that did not run."""
        if call.rows is None or output is None:
            return output
        return output.new_zeros(len(call.hidden), *output.shape[1:]).index_copy_(0, call.rows, output)
