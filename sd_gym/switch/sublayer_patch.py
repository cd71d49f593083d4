"""Running one sublayer on the rows that do not skip it: gather, run, scatter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import output_capturing

from sd_gym.switch.cache import RowSubsetLayer, cache_among, row_subset_layer
from sd_gym.switch.decision import Call, Decision, InForce
from sd_gym.switch.switch import Switch

_HOLDING = Tensor, tuple, dict  # what may hold rows of the batch, among the arguments of a module


class Place(NamedTuple):
    """Where a module stands in its sublayer's chain."""

    first: bool
    last: bool
    attention: bool


class SublayerPatch:
    """Runs in the place of the modules of switch ``number`` of a model while a decision is in force."""

    def __init__(self, number: int, switch: Switch, model: PreTrainedModel) -> None:
        self.number, self.switch, self.model = number, switch, model
        self._attends_input = switch.reads_input and switch.sublayer.output is not None
        self._tags_cache = switch.tags_cache

    def run(self, place: Place, decision: InForce, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """One module of the sublayer: the first selects the rows, the last scatters them back."""
        if decision is None:
            return inner(*args, **kwargs)
        if self.number in decision.plan.empty:
            return self._run_by_none(place, decision, args, kwargs)
        drops = self._drops(decision)
        if decision.plan.rows[1][self.number] is None and not drops:
            # This decision needs no patch here; those of another thread's may come and go in the middle of a sublayer.
            decision.refuse_tracing()
            return self._run_tagged(decision, inner, args, kwargs) if place.attention else inner(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        calls = decision.state.calls
        if place.first:
            decision.check(hidden.shape[0])
            calls[self.number] = Call(hidden, decision.rows_of(self.number, hidden.shape[0]))
        call = calls.pop(self.number) if place.last else calls[self.number]  # holds no memory between passes
        if call.rows is None and not (place.attention and drops):
            return inner(*args, **kwargs)
        if place.attention:
            return self._run_attention(decision, drops, place, call, inner, args, kwargs)
        output = inner(*self._selected(decision, args, call), **self._selected(decision, kwargs, call))
        return self._scattered(call, output) if place.last else output

    def _run_by_none(self, place: Place, decision: Decision, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One module of a sublayer that no row runs, the quickest way to its end."""
        calls, hidden = decision.state.calls, args[0] if args else kwargs["hidden_states"]
        if place.first:
            decision.check(hidden.shape[0])
            calls[self.number] = Call(hidden, decision.plan.rows[1][self.number])
        call = calls.pop(self.number) if place.last else calls[self.number]
        output = self._skipped(call) if place.last else hidden[:0]
        if not place.attention:
            return output
        cache, drops = cache_among(args, kwargs), self._drops(decision)
        layer = self._passed_layer(decision, drops, call, cache)
        shared = self._shared_bias(decision, drops, call, layer, kwargs)
        self._count(decision, drops, layer, call.hidden)
        return (output, *shared, None)

    def pass_by(self, decision: Decision, hidden: Tensor, cache: Cache | None) -> None:
        """Have the cache of an attention count positions, in a layer that no row runs; ``hidden`` enters the layer."""
        call = Call(hidden, decision.rows_of(self.number, hidden.shape[0]))
        drops = self._drops(decision)
        self._count(decision, drops, self._passed_layer(decision, drops, call, cache), hidden)

    def _passed_layer(self, decision: Decision, drops: bool, call: Call, cache: Cache | None) -> RowSubsetLayer | None:
        """The layer of the cache of an attention that no row runs."""
        if _shown_weights(self.switch.sublayer.kind) is not None and self.model.config._attn_implementation == "eager":
            raise NotImplementedError(
                f"no row runs {self.switch.name}, so it has no attention weights, and those of the next layer would "
                "take their place; leave output_attentions out, or have a row run it"
            )
        return None if cache is None else self._cache_layer(decision, drops, call, cache)

    def _drops(self, decision: Decision) -> bool:
        """Whether it attends to an input that has lost tokens."""
        return self._attends_input and decision.tokens is not None

    def _run_tagged(self, decision: Decision, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """An attention that all rows run: the first one of a cache still tells under which decision it is filled."""
        hidden = args[0] if args else kwargs["hidden_states"]
        layer = None
        if self._tags_cache:
            layer = self._cache_layer(decision, False, Call(hidden, None), cache_among(args, kwargs))
        output = _with_cache(layer, inner, args, kwargs)
        self._count(decision, False, layer, hidden)
        return output

    def _count(self, decision: Decision, drops: bool, layer: RowSubsetLayer | None, hidden: Tensor) -> None:
        """Have a layer of the cache count the positions of this pass."""
        if layer is not None and self.switch.sublayer.kind == "attention":
            layer.advance(decision.token_pass.query_length if drops else hidden.shape[1])

    def _run_attention(
        self, decision: Decision, drops: bool, place: Place, call: Call, inner: Callable, args: tuple, kwargs: dict
    ) -> tuple:
        """The attention proper of a sublayer: its other arguments, its cache and its position bias follow the rows."""
        if self.model.config._attn_implementation == "flex_attention":
            raise NotImplementedError(
                "flex_attention's masks cannot follow rows and tokens that are skipped; call "
                "model.set_attn_implementation('sdpa')"
            )
        layer = self._cache_layer(decision, drops, call, cache_among(args, kwargs))
        shared = self._shared_bias(decision, drops, call, layer, kwargs)
        selected = self._selected(decision, args, call), self._selected(decision, kwargs, call)
        shown = _shown_weights(self.switch.sublayer.kind)
        before = len(shown or ())
        output = _with_cache(layer, inner, *selected)
        if shown is not None and len(shown) > before:  # a part of the attention showed those of its rows
            shown[-1] = self._padded(shown[-1], call)
        weights = [None if value is None else self._padded(value, call) for value in output[1 + len(shared) :]]
        if shared == (None,):  # the next layers take it instead of making it again
            shared = output[1:2]
        self._count(decision, drops, layer, call.hidden)
        return (self._scattered(call, output[0]) if place.last else output[0], *shared, *weights)

    def _cache_layer(self, decision: Decision, drops: bool, call: Call, cache: Cache | None) -> RowSubsetLayer | None:
        if cache is None:
            return None
        across, batch = self.switch.sublayer.kind == "cross_attention", call.hidden.shape[0]
        return row_subset_layer(
            cache, self.switch.index, across=across, rows=call.rows, batch=batch, whole=drops, tag=decision.tag
        )

    def _shared_bias(
        self, decision: Decision, drops: bool, call: Call, layer: RowSubsetLayer | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, ...]:
        """The position bias that this attention takes and passes on, put into its arguments; ``()``: it has none."""
        if self.switch.sublayer.position_bias is None:
            return ()
        if kwargs.get("position_bias") is None:
            query_length = decision.token_pass.query_length if drops else call.hidden.shape[1]
            bias = self._position_bias(query_length, layer.length if layer is not None else 0)
            if bias is not None and drops:
                bias = decision.token_pass.gather_square(bias, len(call.hidden))
            kwargs["position_bias"] = bias
        return (kwargs["position_bias"],)

    def _position_bias(self, query_length: int, past: int) -> Tensor | None:
        """What the first layer shares with all others, whether or not any row runs it."""
        path = self.switch.sublayer.position_bias
        assert path is not None  # asked where there is one
        module: Any = self.switch.layer.get_submodule(path)
        if not module.has_relative_attention_bias:
            return None
        return module.compute_bias(query_length, past + query_length, device=self.model.device, past_seen_tokens=past)

    def _selected(self, decision: Decision, values: Any, call: Call) -> Any:
        """The rows that run, of every tensor whose first dimension is the batch; anything else as it is.

        One-dimensional tensors (positions) never count a batch, and what an earlier module of the sublayer has selected
        already is shorter than the batch.
        """
        rows = call.rows
        if rows is None:
            return values
        if isinstance(values, Tensor):
            whole = values.ndim >= 2 and values.shape[0] == call.hidden.shape[0]  # len() takes longer
            return self._taken(decision, values, call.hidden, rows) if whole else values
        if isinstance(values, tuple):
            return tuple([self._selected(decision, value, call) for value in values]) if values else values
        if type(values) is dict:
            return {
                name: self._selected(decision, value, call) if isinstance(value, _HOLDING) else value
                for name, value in values.items()
            }
        return values

    def _taken(self, decision: Decision, values: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """The rows that run; of the encoder's output, the same at every step of decoding, they are taken once."""
        source = self.switch.sublayer.kind == "cross_attention" and values.ndim == 3 and values is not hidden
        if not source or torch.is_grad_enabled():  # what was taken without gradients must not be used with them
            return values.index_select(0, rows)
        known = decision.state.sources.get(self.number)
        if known is None or known[0] is not values or known[1] is not rows:
            known = decision.state.sources[self.number] = (values, rows, values.index_select(0, rows))
        return known[2]

    def _skipped(self, call: Call) -> Tensor:
        """The output of a sublayer that no row runs."""
        return call.hidden if self.switch.sublayer.adds_residual else torch.zeros_like(call.hidden)

    def _scattered(self, call: Call, output: Tensor) -> Tensor:
        """The output of a sublayer for all rows, from that of the rows that ran it."""
        if call.rows is None:
            return output
        if self.switch.sublayer.adds_residual:
            return call.hidden.to(output.dtype).index_copy(0, call.rows, output)
        return self._padded(output, call)

    def _padded(self, output: Tensor, call: Call) -> Tensor:
        """Zeros for the rows that did not run."""
        if call.rows is None:
            return output
        return output.new_zeros(call.hidden.shape[0], *output.shape[1:]).index_copy_(0, call.rows, output)


def is_showing() -> bool:
    """Whether Hugging Face gathers anything of the modules that run, such as their attention weights."""
    return bool(output_capturing._active_collector.get())


def _shown_weights(kind: str) -> list[Tensor] | None:
    """The list of ``output_attentions`` of a stack, as Hugging Face gathers it; ``None``: it was not asked for."""
    gathered = output_capturing._active_collector.get()
    return gathered.get("cross_attentions" if kind == "cross_attention" else "attentions") if gathered else None


def _with_cache(layer: RowSubsetLayer | None, inner: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run with the layer of the cache open."""
    if layer is None:
        return inner(*args, **kwargs)
    layer.is_open = True
    try:
        return inner(*args, **kwargs)
    finally:
        layer.is_open = False
