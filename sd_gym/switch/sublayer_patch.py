"""Running one sublayer on the rows that do not skip it: gather, run, scatter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import output_capturing

from sd_gym.switch.architectures import Switch
from sd_gym.switch.cache import RowSubsetLayer, cache_among, hidden_states, row_subset_layer
from sd_gym.switch.decision import Call, Decision

_NESTED = Tensor, tuple, dict  # arguments of a module that may hold rows of the batch
# Attentions whose masks name each pair of positions. Others, such as flash attention, assume positions without gaps.
_FOLLOW_TOKENS = "eager", "sdpa"


class Place(NamedTuple):
    """Position of a module in its sublayer's chain."""

    is_first: bool
    is_last: bool
    is_attention: bool  # whether it is the attention proper


class SublayerPatch:
    """Replaces the modules of switch ``number`` of a model while a decision is in force."""

    def __init__(self, number: int, switch: Switch, model: PreTrainedModel) -> None:
        self.number = number
        self.switch = switch
        self.model = model
        self._attends_input = switch.reads_input and switch.sublayer.output is not None
        self._tags_cache = switch.tags_cache

    def run(self, place: Place, decision: Decision | None, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run one module of the sublayer: the first selects the rows, the last scatters them back."""
        if decision is None:
            return inner(*args, **kwargs)
        hidden = hidden_states(args, kwargs)
        if decision.plan.rows[self.number] is None and not self._drops(decision):
            # All rows run. The patch is here for the cache, or for a decision of another thread, which may install or
            # remove it in the middle of a sublayer.
            decision.refuse_tracing()
            if not (place.is_attention and self._tags_cache):
                return inner(*args, **kwargs)
            call = Call(hidden, None, False)
            layer = self._cache_layer(decision, call, cache_among(args, kwargs))
            return self._with_cache(decision, call, layer, inner, args, kwargs)
        calls = decision.state.calls
        if place.is_first:
            decision.check(hidden.shape[0])
            calls[self.number] = self._call(decision, hidden)
        call = calls.pop(self.number) if place.is_last else calls[self.number]  # frees the memory after the pass
        if self.number in decision.plan.empty:
            return self._skip(decision, place, call, hidden, args, kwargs)
        if call.rows is None and not (place.is_attention and call.drops):
            return inner(*args, **kwargs)
        if place.is_attention:
            return self._run_attention(decision, place, call, inner, args, kwargs)
        output = inner(*self._selected(decision, args, call), **self._selected(decision, kwargs, call))
        return self._scattered(call, output) if place.is_last else output

    def skip_layer(self, decision: Decision, hidden: Tensor, cache: Cache | None) -> None:
        """Let an attention's cache count the positions of a skipped layer, whose input is ``hidden``."""
        call = self._call(decision, hidden)
        self._count(decision, call, self._skipped_cache_layer(decision, call, cache))

    def _skip(
        self, decision: Decision, place: Place, call: Call, hidden: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        """The output of one module of a sublayer that no row runs."""
        output = hidden[:0]
        if place.is_last:
            output = call.hidden if self.switch.sublayer.adds_residual else torch.zeros_like(call.hidden)
        if not place.is_attention:
            return output
        layer = self._skipped_cache_layer(decision, call, cache_among(args, kwargs))
        shared = self._shared_bias(decision, call, layer, kwargs)
        self._count(decision, call, layer)
        return (output, *shared, None)

    def _run_attention(
        self, decision: Decision, place: Place, call: Call, inner: Callable, args: tuple, kwargs: dict
    ) -> tuple:
        """Run the attention proper: its other arguments, its cache and its position bias follow the rows."""
        self._check_masks(call)
        layer = self._cache_layer(decision, call, cache_among(args, kwargs))
        shared = self._shared_bias(decision, call, layer, kwargs)
        args, kwargs = self._selected(decision, args, call), self._selected(decision, kwargs, call)
        gathered = _gathered_weights(self.switch.sublayer.kind)
        before = len(gathered or ())
        output = self._with_cache(decision, call, layer, inner, args, kwargs)
        if gathered is not None and len(gathered) > before:  # an inner module added the weights of its rows
            gathered[-1] = self._padded(gathered[-1], call)
        weights = [None if value is None else self._padded(value, call) for value in output[1 + len(shared) :]]
        if shared == (None,):  # the attention has made the bias, which is passed on to the next layers
            shared = output[1:2]
        return (self._scattered(call, output[0]) if place.is_last else output[0], *shared, *weights)

    def _check_masks(self, call: Call) -> None:
        """Raise ``NotImplementedError`` if the attention's masks cannot follow the rows or tokens that are skipped."""
        name = self.model.config._attn_implementation
        if name in _FOLLOW_TOKENS or (name != "flex_attention" and not call.drops):
            return
        what = "rows and tokens that are skipped" if name == "flex_attention" else "tokens that are dropped"
        raise NotImplementedError(
            f"the masks of {name!r} cannot follow {what}; call model.set_attn_implementation('sdpa')"
        )

    def _call(self, decision: Decision, hidden: Tensor) -> Call:
        return Call(hidden, decision.rows_of(self.number, hidden), self._drops(decision))

    def _drops(self, decision: Decision) -> bool:
        """Whether it attends to an input from which tokens are dropped."""
        return self._attends_input and decision.tokens is not None

    def _with_cache(
        self, decision: Decision, call: Call, layer: RowSubsetLayer | None, inner: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """Run the attention with its cache layer open; the layer then counts the positions."""
        if layer is None:
            return inner(*args, **kwargs)
        layer.is_open = True
        try:
            output = inner(*args, **kwargs)
        finally:
            layer.is_open = False
        self._count(decision, call, layer)
        return output

    def _count(self, decision: Decision, call: Call, layer: RowSubsetLayer | None) -> None:
        """Let a cache layer count the positions of this pass."""
        if layer is not None and self.switch.sublayer.kind == "attention":
            layer.advance(_query_length(decision, call))

    def _skipped_cache_layer(self, decision: Decision, call: Call, cache: Cache | None) -> RowSubsetLayer | None:
        gathers = _gathered_weights(self.switch.sublayer.kind) is not None
        if gathers and self.model.config._attn_implementation == "eager":
            raise NotImplementedError(
                f"no row runs {self.switch.name}, so it has no attention weights, and those of the next layer would "
                "take their place; leave output_attentions out, or have a row run it"
            )
        return self._cache_layer(decision, call, cache)

    def _cache_layer(self, decision: Decision, call: Call, cache: Cache | None) -> RowSubsetLayer | None:
        if cache is None:
            return None
        across, batch = self.switch.sublayer.kind == "cross_attention", call.hidden.shape[0]
        return row_subset_layer(
            cache, self.switch.index, across=across, rows=call.rows, batch=batch, whole=call.drops, tag=decision.tag
        )

    def _shared_bias(
        self, decision: Decision, call: Call, layer: RowSubsetLayer | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, ...]:
        """The position bias that this attention takes and passes on, put into its arguments; ``()``: it has none."""
        path = self.switch.sublayer.position_bias
        if path is None:
            return ()
        if kwargs.get("position_bias") is None:
            module: Any = self.switch.layer.get_submodule(path)
            bias = None
            if module.has_relative_attention_bias:
                length, past = _query_length(decision, call), layer.length if layer is not None else 0
                bias = module.compute_bias(length, past + length, device=call.hidden.device, past_seen_tokens=past)
                if call.drops:
                    bias = decision.state.tokens.gather_square(bias, call.hidden)
            kwargs["position_bias"] = bias
        return (kwargs["position_bias"],)

    def _selected(self, decision: Decision, values: Any, call: Call) -> Any:
        """The rows that run, of every tensor whose first dimension is the batch; other values are unchanged.

        One-dimensional tensors (positions) have no batch dimension. What an earlier module of the sublayer has already
        selected is shorter than the batch.
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
                name: self._selected(decision, value, call) if isinstance(value, _NESTED) else value
                for name, value in values.items()
            }
        return values

    def _taken(self, decision: Decision, values: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """The rows that run; in ``generate()`` the encoder's output is the same at every step: it is selected once."""
        encoded = self.switch.sublayer.kind == "cross_attention" and values.ndim == 3 and values is not hidden
        # Rows selected without gradients must not be used with them; elsewhere a tensor may be filled again.
        if not encoded or torch.is_grad_enabled() or not decision.generating:
            return values.index_select(0, rows)
        known = decision.state.sources.get(self.number)
        if known is None or known[0] is not values or known[1] is not rows:
            known = decision.state.sources[self.number] = (values, rows, values.index_select(0, rows))
        return known[2]

    def _scattered(self, call: Call, output: Tensor) -> Tensor:
        """The output of a sublayer for all rows, from that of the rows that ran it."""
        if call.rows is not None and self.switch.sublayer.adds_residual:
            return call.hidden.to(output.dtype).index_copy(0, call.rows, output)
        return self._padded(output, call)

    def _padded(self, output: Tensor, call: Call) -> Tensor:
        """The output with zeros for the rows that did not run."""
        if call.rows is None:
            return output
        return output.new_zeros(call.hidden.shape[0], *output.shape[1:]).index_copy_(0, call.rows, output)


def _query_length(decision: Decision, call: Call) -> int:
    """Positions of the pass, dropped tokens included."""
    return decision.state.tokens.query_length if call.drops else call.hidden.shape[1]


def is_gathering() -> bool:
    """Whether Hugging Face gathers outputs of the modules that run, such as their attention weights."""
    return bool(output_capturing._active_collector.get())


def gathers_weights() -> bool:
    """Whether Hugging Face gathers attention weights (``output_attentions``)."""
    return any(_gathered_weights(kind) is not None for kind in ("attention", "cross_attention"))


def _gathered_weights(kind: str) -> list[Tensor] | None:
    """The list in which Hugging Face gathers ``output_attentions``; ``None`` if they were not requested."""
    gathered = output_capturing._active_collector.get()
    return gathered.get("cross_attentions" if kind == "cross_attention" else "attentions") if gathered else None
