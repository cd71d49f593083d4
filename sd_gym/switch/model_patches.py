"""What runs in the place of whole layers, of the decoder and of ``generate()`` while a decision is in force."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from threading import current_thread, main_thread
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sd_gym.switch.cache import cache_among
from sd_gym.switch.context import Scope
from sd_gym.switch.decision import Decision, InForce
from sd_gym.switch.sublayer_patch import SublayerPatch, is_showing
from sd_gym.switch.tokens import DroppedTokens, TokenPass


@dataclass(eq=False)
class LayerPatch:
    """A layer: it loses the tokens that are dropped, and is skipped as a whole where no row runs any of it.

    A stage in front of it is decided here, and a pass that is resumed here takes up its hidden states.
    """

    model: PreTrainedModel
    layer: nn.Module
    place: tuple[str, int]  # name of its stack, and its index there
    attentions: list[SublayerPatch]  # the patches of its attentions
    norms: list[nn.Module]  # the norms that run where no row runs any sublayer
    reads_input: bool  # whether its stack is the one that reads the input
    restores: bool  # whether it is the last layer of a lone stack, after which all positions exist again

    def __post_init__(self) -> None:
        self.first = self.reads_input and self.place[1] == 0

    def run(self, decision: InForce, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """The layer."""
        if not isinstance(decision, Decision):
            return inner(*args, **kwargs)
        if decision.resume_from is not None and decision.resumes == self.place:
            args, kwargs = _with_hidden(decision.resumed(_hidden(args, kwargs)), args, kwargs)
        if decision.pending is not None and decision.is_at(self.place):
            decision = decision.settled(_hidden(args, kwargs), cache_among(args, kwargs))
            if decision is None:
                return inner(*args, **kwargs)
        tokens = None
        if self.reads_input and decision.tokens is not None:
            if self.first:
                self._begin(decision, decision.tokens, args, kwargs)
            tokens = decision.token_pass
            args, kwargs = tokens.before_layer(self.layer, self.first, args, kwargs)
        idle = self.place in decision.plan.idle
        output = self._passed_by(decision, args, kwargs) if idle else inner(*args, **kwargs)
        return tokens.after_last_layer(output) if tokens is not None and self.restores else output

    def _begin(self, decision: Decision, tokens: DroppedTokens, args: tuple, kwargs: dict[str, Any]) -> None:
        """Read the shapes of a pass that drops tokens."""
        decision.refuse_tracing()
        decision.repeats_in(len(_hidden(args, kwargs)))
        additive = self.model.config._attn_implementation == "eager"  # it adds its mask to the scores
        decision.state.tokens = TokenPass(tokens, args, kwargs, additive=additive, generating=decision.generating)

    def _passed_by(self, decision: Decision, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states, at most normed, where no row runs any sublayer; a cache counts their positions."""
        hidden = _hidden(args, kwargs)
        decision.check(hidden.shape[0])  # not len(), which an export would take for a constant
        cache = cache_among(args, kwargs)
        if cache is not None or is_showing():
            for attention in self.attentions:
                attention.pass_by(decision, hidden, cache)
        for norm in self.norms:
            hidden = norm(hidden)
        return hidden


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A layer's arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def run_encoder(decision: InForce, inner: Callable, *args: Any, **kwargs: Any) -> Any:
    """The encoder of an encoder-decoder: its output tells which tokens it lost; a pass may resume after it."""
    if not isinstance(decision, Decision):
        return inner(*args, **kwargs)
    if decision.resume_from is not None and decision.resume_from.encoded is not None:
        output = BaseModelOutput(last_hidden_state=decision.resume_from.encoded)
    else:
        output = inner(*args, **kwargs)
    if decision.tokens is not None:
        decision.tokens.sign(output[0])
    return output


def run_decoder(decision: InForce, inner: Callable, *args: Any, **kwargs: Any) -> Any:
    """The decoder of an encoder-decoder: the encoder's output may have lost tokens, and a stage may be here."""
    if isinstance(decision, Decision) and decision.pending is not None:
        if not decision.pending.stages[0].follows_encoder:
            raise ValueError(
                f"the stage {decision.pending.stages[0].name!r} was to be decided in the encoder, but this pass has no "
                "encoder; use decide(), or stages from 'decoder' on"
            )
        decision.state.encoded = encoded = kwargs["encoder_hidden_states"]
        if decision.is_at(("decoder", 0), between=True):
            decision = decision.settled(encoded, cache_among(args, kwargs))
    if isinstance(decision, Decision) and decision.tokens is not None:
        kwargs = decision.tokens.before_decoder(kwargs)
    return inner(*args, **kwargs)


@dataclass(eq=False)
class GeneratePatch:
    """``generate()``: it runs to its end under the decision that it began under, and repeats rows for beams."""

    scope: Scope

    def run(self, decision: InForce, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``."""
        streamer = kwargs.get("streamer")
        if not isinstance(decision, Decision):
            if streamer is not None and current_thread() is not main_thread():
                warnings.warn(
                    "this thread generates densely, while a decision is in force in another one. If it was meant for "
                    "this thread, start it with target=contextvars.copy_context().run, args=(model.generate,)",
                    stacklevel=3,
                )
            return inner(*args, **kwargs)
        with self.scope.put(decision.for_generating()):
            try:
                return inner(*args, **kwargs)
            except BaseException:
                if streamer is not None:  # whoever reads from it must not wait for ever
                    streamer.end()
                raise

    @staticmethod
    def expand(decision: InForce, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """``model._expand_inputs_for_generation``, which says how often each row is repeated."""
        if isinstance(decision, Decision) and decision.generating:
            decision.repeats = args[0] if args else kwargs.get("expand_size", 1)
        return inner(*args, **kwargs)
