"""Patches of layers, of encoder and decoder, and of ``generate()`` while a decision is in force."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import current_thread, main_thread
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from sd_gym.switch.cache import cache_among, fill_layers, hidden_states
from sd_gym.switch.context import Block, Scope
from sd_gym.switch.decision import Decision, Pass
from sd_gym.switch.sublayer_patch import SublayerPatch, is_gathering
from sd_gym.switch.tokens import DroppedTokens, TokenPass

CONTINUOUS = "continuous batching, as in generate_batch(), runs in a thread of its own, without decisions"


@dataclass(eq=False)
class LayerPatch:
    """Patches a layer: tokens are dropped before it, and it is skipped as a whole if no row runs any sublayer.

    A stage right before the layer is decided here, and a pass that is resumed here gets its hidden states.
    """

    scope: Scope
    model: PreTrainedModel
    layer: nn.Module
    place: tuple[str, int]  # name of its stack, and its index there
    first: int  # index of its first switch
    attentions: list[SublayerPatch]
    norms: list[nn.Module]  # norms that run where no row runs any sublayer
    reads_input: bool  # whether its stack reads the input
    restores: bool  # whether it is the last layer of a single stack, after which dropped positions are zeros

    def __post_init__(self) -> None:
        self.is_first = self.reads_input and self.place[1] == 0
        self.config = self.model.config.get_text_config()

    def run(self, decision: Decision | None, inner: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        if decision is None:
            return inner(*args, **kwargs)
        if decision.resume_from is not None and decision.resumes == self.place:
            hidden = decision.resumed(hidden_states(args, kwargs))
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            encodes = self.reads_input and self.model.config.is_encoder_decoder  # once, before generate() begins
            if decision.generating and decision.pending is None and not encodes:
                self._generate_densely(decision, hidden, cache_among(args, kwargs))
                return inner(*args, **kwargs)
        if decision.pending is not None and decision.pending.is_at(self.place):
            decision = decision.pending.settle(decision, hidden_states(args, kwargs), cache_among(args, kwargs))
            if decision is None:
                return inner(*args, **kwargs)
        tokens = None
        if self.reads_input and decision.tokens is not None:
            if self.is_first:
                self._begin(decision, decision.tokens, args, kwargs)
            tokens = decision.state.tokens
            args, kwargs = tokens.before_layer(self.layer, self.is_first, args, kwargs)
        idle = self.place in decision.plan.idle
        output = self._skipped(decision, args, kwargs) if idle else inner(*args, **kwargs)
        return tokens.after_last_layer(output) if tokens is not None and self.restores else output

    def _generate_densely(self, decision: Decision, hidden: Tensor, cache: Cache | None) -> None:
        """Let all layers run on what is generated, after the prompt's pass was resumed here with ``hidden`` states."""
        state = decision.resume_from
        assert state is not None  # only called for a resumed pass
        if decision.tokens is not None or any(rows is not None for rows in decision.plan.rows[self.first :]):
            raise ValueError(f"generate() resumes at {state.stage!r} only densely; skip and drop nothing there")
        if cache is not None:
            if state.keys is None:
                wanted = "generate() needs one of a decoder-only model's generate() with a cache"
                raise ValueError(f"the state at {state.stage!r} has no keys of earlier layers; {wanted}")
            rows = torch.arange(len(state.hidden), device=hidden.device).repeat_interleave(decision.repeats)
            fill_layers(cache, state.keys, rows, hidden.shape[1])
        self.scope.settle(None)

    def _begin(self, decision: Decision, tokens: DroppedTokens, args: tuple, kwargs: dict[str, Any]) -> None:
        decision.refuse_tracing()
        if is_gathering():
            reason = "layers have no outputs for dropped tokens"
            raise NotImplementedError(f"{reason}; leave output_hidden_states and output_attentions out, or drop none")
        decision.repeats_in(len(hidden_states(args, kwargs)))
        additive = self.model.config._attn_implementation == "eager"  # adds its mask to the scores
        has_prompt = decision.generating and hasattr(decision.state, "tokens")
        # A decoder-only model may attend in both directions, by its configuration or by an argument of this call.
        causal = tokens.causal and getattr(self.config, "is_causal", True)
        decision.state.tokens = TokenPass(tokens, args, kwargs, additive=additive, causal=causal, has_prompt=has_prompt)

    def _skipped(self, decision: Decision, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The layer's output where no row runs any sublayer; the cache counts its positions."""
        hidden = hidden_states(args, kwargs)
        decision.check(hidden.shape[0])  # not len(), which an export makes a constant
        cache = cache_among(args, kwargs)
        if cache is not None or is_gathering():
            for attention in self.attentions:
                attention.skip_layer(decision, hidden, cache)
        for norm in self.norms:
            hidden = norm(hidden)
        return hidden


def run_encoder(scope: Scope, decision: Decision | None, inner: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run the encoder of an encoder-decoder, whose output is marked with the dropped tokens; or resume after it."""
    if decision is None:
        return inner(*args, **kwargs)
    if decision.resume_from is not None and decision.resume_from.encoded is not None:
        output = BaseModelOutput(last_hidden_state=decision.resume_from.encoded)
    else:
        output = inner(*args, **kwargs)
        decision = scope.current()  # which may have been made in this pass
    if decision is not None and decision.tokens is not None:
        decision.tokens.mark(output[0])
    return output


def run_decoder(decision: Decision | None, inner: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run the decoder of an encoder-decoder; a stage may be right before it."""
    if decision is not None and decision.pending is not None:
        stage = decision.pending.stages[0]
        if not stage.follows_encoder:
            raise ValueError(
                f"the stage {stage.name!r} is in the encoder, which this pass does not run (encoder_outputs are given, "
                "or LayerDrop left a layer out in training); use decide(), or stages from 'decoder' on"
            )
        decision.state.encoded = encoded = kwargs["encoder_hidden_states"]
        if stage.is_between:
            decision = decision.pending.settle(decision, encoded, cache_among(args, kwargs))
    if decision is not None and decision.tokens is not None:
        kwargs = decision.tokens.before_decoder(kwargs, generating=decision.generating)
    return inner(*args, **kwargs)


def run_generate(scope: Scope, decision: Decision | None, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``model.generate`` under the decision that was in force at its start."""
    streamer = kwargs.get("streamer")
    if decision is None:
        attached = getattr(inner.__self__.replaced, "is_attached", False)  # whose policy is about to decide
        alone = not attached and scope.entry() is None and current_thread() is not main_thread()
        if streamer is not None and alone:
            warnings.warn(
                "this thread generates densely, but a decision is in force in another thread. To use that decision "
                "here, start this thread with target=contextvars.copy_context().run, args=(model.generate,)",
                stacklevel=3,
            )
        return inner(*args, **kwargs)
    with Block(scope, replace(decision, generating=True, repeats=1, state=Pass(), tag_cell=[])), ending(streamer):
        if decision.pending is not None:
            _refuse_chunks(inner.__self__.target, *args, **kwargs)
        return inner(*args, **kwargs)


def _refuse_chunks(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Raise ``ValueError`` if ``generate()`` would show only a part of the prompt to what decides while it is read."""
    name, config = "prefill_chunk_size", args[1] if len(args) > 1 else kwargs.get("generation_config")
    configured = getattr(config, name, None) or getattr(model.generation_config, name, None)
    chunk = kwargs.get(name, configured)
    if chunk is not None and not model.config.is_encoder_decoder:  # whose encoder reads the prompt as a whole
        raise ValueError(
            "decisions are made while the prompt is read, so generate() has to read it as a whole; leave "
            f"{name}={chunk} out"
        )


def refuse_batching(decision: Decision | None, inner: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run ``model.init_continuous_batching``; ``NotImplementedError`` under a decision."""
    if decision is not None:
        raise NotImplementedError(f"{CONTINUOUS}; call generate(), or leave the block to generate densely")
    return inner(*args, **kwargs)


@contextmanager
def ending(streamer: Any) -> Iterator[None]:
    """End a streamer, once, if there is an error; otherwise its reader waits forever."""
    try:
        yield
    except BaseException as error:
        if streamer is not None and not getattr(error, "has_ended_streamer", False):
            vars(error)["has_ended_streamer"] = True
            streamer.end()
        raise


def expand_inputs(decision: Decision | None, inner: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run ``model._expand_inputs_for_generation``, whose argument is how often each row is repeated for its beams."""
    if decision is not None and decision.generating:
        decision.repeats = args[0] if args else kwargs.get("expand_size", 1)
        if decision.tokens is not None and kwargs.get("encoder_outputs") is not None:
            decision.tokens.check(kwargs["encoder_outputs"][0])
    return inner(*args, **kwargs)
