"""A bank of masks: per mask a plain model without the skipped sublayers; all share the weights of one model."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from sd_gym.policy.artefact import switchboard_of
from sd_gym.switch import Stack, Switchboard
from sd_gym.switch.cache import cache_among
from sd_gym.switch.sublayer_patch import gathers_weights
from sd_gym.switch.twin import twin_at, twin_of

MODELS = 64  # most models that a bank keeps


def bank(model: PreTrainedModel, masks: Sequence[ArrayLike] | NDArray) -> list[PreTrainedModel]:
    """A plain model per mask, without its skipped sublayers; all share the weights of one model.

    Outputs equal those of the switched model under the mask, bit for bit. Nothing is copied: a change of a weight
    changes all. Forward passes and ``generate()`` are Hugging Face's own, so static caches, streamers and
    ``torch.compile`` work. ``sd_gym.bake`` makes a model that can be saved; these refuse it, as they lack weights.

    Args:
        model: A model of a supported architecture, attached or not; it is not changed.
        masks: Decisions, 1 = skip, each ``[switches]`` or, with token level 0 after it, ``[switches + 1]``.

    Raises:
        ValueError: If a mask has another shape, or drops tokens.
        NotImplementedError: If another tool has replaced ``forward`` of a module that holds skipped ones.

    Example:
        >>> import sd_gym
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> half, dense = sd_gym.bank(model, [[0, 1, 1, 0], [0, 0, 0, 0]])
        >>> half.bert.embeddings is model.bert.embeddings
        True
    """
    with switchboard_of(model) as board:
        _gather_outputs(model)
        return [without_skipped(board, checked_mask(mask, board)) for mask in masks]


def _gather_outputs(model: PreTrainedModel) -> None:
    """Install the hooks by which Hugging Face gathers ``output_hidden_states``, where they are not installed yet.

    Else each twin would install them again in the layers that all share.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in reversed(parts):  # the innermost first, as a part installs those of its own parts
        if not any(getattr(inner, "_output_capturing_hooks_installed", False) for inner in part.modules()):
            maybe_install_capturing_hooks(part)


class MaskModels(Protocol):
    """Models that run rows that share a mask."""

    one_mask_per_pass: bool  # whether no pass may have rows of several masks

    def of(self, mask: NDArray) -> Any:
        """The model of a mask, bool ``[switches]``."""
        ...


class Bank:
    """The models of a board's masks, made at their first use; the last 64 are kept.

    ``compiles``: each is compiled, once for single inputs and once for batches, of any length.
    """

    def __init__(self, board: Switchboard, *, compiles: bool = False) -> None:
        self._board = board
        self.one_mask_per_pass = compiles
        if compiles:  # all masks share the code of one class, which is compiled only 8 times by default
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * MODELS)
        self._of = lru_cache(MODELS)(self._make)

    def of(self, mask: NDArray) -> Any:
        """The model of a mask, bool ``[switches]``."""
        self._board.check_fresh()
        return self._of(mask.tobytes())

    def _make(self, mask: bytes) -> Any:
        model = without_skipped(self._board, np.frombuffer(mask, dtype=bool))
        return torch.compile(model.forward, dynamic=True) if self.one_mask_per_pass else model


def checked_mask(mask: ArrayLike, board: Switchboard) -> NDArray:
    """A user's mask, bool ``[switches]``; ValueError if it drops tokens, or has another shape."""
    array = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)
    if array.shape == (len(board) + 1,):
        if array[-1] != 0:
            raise ValueError(f"a mask that drops tokens (level {array[-1]}) cannot be a model; attach the policy")
        array = array[:-1]
    if array.shape != (len(board),) or not ((array == 0) | (array == 1)).all():
        expected = f"expected a mask of {len(board)} switches, each 0 or 1, and perhaps token level 0"
        raise ValueError(f"{expected}; got {list(array.shape)}")
    return array.astype(bool)


def without_skipped(board: Switchboard, mask: NDArray) -> PreTrainedModel:
    """A twin of a board's model without what a mask, bool ``[switches]``, skips."""
    twin = twin_of(board.model)
    if mask.any():
        vars(twin)["save_pretrained"] = _refuse_saving
        for stack in board.architecture.stacks:
            _remove(board, stack, mask, twin)
    return twin


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(
        "a model of a bank lacks the weights of what it skips; sd_gym.bake(model, mask) makes one without whole layers "
        "that can be saved"
    )


def _remove(board: Switchboard, stack: Stack, mask: NDArray, twin: PreTrainedModel) -> None:
    """Replace the sublayers of a stack that a mask skips by modules that do nothing."""
    number = {(s.index, s.sublayer.kind): at for at, s in enumerate(board.switches) if s.stack == stack.name}
    layers, original = twin_at(twin, board.path_of_layers(stack)), stack.layers_in(board.model)
    counting = _counting_layers(board.model.config, len(original)) if stack.name == "decoder" else set()
    for index, layer in enumerate(original):
        skipped = [sublayer for sublayer in stack.sublayers if mask[number[index, sublayer.kind]]]
        counts = index if index in counting else None
        if len(skipped) == len(stack.sublayers) and stack.norms is not None:
            passed = _PassedLayer([layer.get_submodule(norm) for norm in stack.norms], counts)
            hooks = {name: own.copy() for name, own in vars(layer).items() if name.startswith("_forward_hooks")}
            vars(passed).update(hooks)  # such as those that gather hidden states
            layers._modules[str(index)] = passed
        elif skipped:
            own = twin_at(layers, str(index))
            for sublayer in skipped:
                for module in sublayer.modules:
                    nothing = not sublayer.adds_residual and sublayer.kind == "feed_forward"
                    stand_in: nn.Module = _StandIn(nothing)
                    if module == sublayer.attention:
                        counted = counts if sublayer.kind == "attention" else None
                        stand_in = _NoAttention(sublayer.adds_residual, sublayer.position_bias is not None, counted)
                    parent, _, name = module.rpartition(".")
                    twin_at(own, parent)._modules[name] = stand_in
    for sublayer in stack.sublayers:
        runs = [index for index in range(len(original)) if not mask[number[index, sublayer.kind]]]
        if sublayer.position_bias is not None and runs and runs[0] > 0:
            first: Any = original[0].get_submodule(sublayer.position_bias)
            if first.has_relative_attention_bias:  # all layers share its bias, which the first that runs has to make
                attention = twin_at(layers, f"{runs[0]}.{sublayer.position_bias}")
                attention.has_relative_attention_bias = True
                attention._modules["relative_attention_bias"] = first.relative_attention_bias


def _counting_layers(config: Any, layers: int) -> set[int]:
    """The layers of a decoder whose places in a cache have to count positions, even if their attention is skipped.

    A cache reads its length from the first layer of each type, and crops all layers with a sliding window, which
    cannot be empty then.
    """
    if getattr(config, "sliding_window", None) is not None:
        return set(range(layers))
    types = getattr(config, "layer_types", None) or [None]
    return {types.index(kind) for kind in set(types)}


def _count_positions(layer: int | None, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
    """Store one zero per position in a layer of the cache, if there is one, so that its length is right.

    Raises ``NotImplementedError`` if attention weights are gathered: the next layer's would take the place of this
    one's.
    """
    if not torch.compiler.is_compiling() and gathers_weights():
        raise NotImplementedError("a skipped attention has no attention weights; leave output_attentions out")
    cache = cache_among(args, kwargs)
    if layer is not None and cache is not None:
        own: Cache = getattr(cache, "self_attention_cache", cache)
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        own.update(nothing, nothing, layer)


class _StandIn(nn.Module):
    """Replaces a module: returns its input, or a zero, which the layer adds to the hidden states."""

    def __init__(self, is_zero: bool) -> None:
        super().__init__()
        self._is_zero = is_zero

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.new_zeros(()) if self._is_zero else hidden_states


class _NoAttention(nn.Module):
    """Replaces an attention: returns its input if it adds the residual itself, else a zero."""

    def __init__(self, adds_residual: bool, passes_bias: bool, counts: int | None) -> None:
        super().__init__()
        self._adds_residual = adds_residual
        self._passes_bias = passes_bias
        self._counts = counts

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple:
        _count_positions(self._counts, hidden_states, args, kwargs)
        output = hidden_states if self._adds_residual else hidden_states.new_zeros(())
        return (output, kwargs.get("position_bias"), None) if self._passes_bias else (output, None)


class _PassedLayer(nn.Module):
    """Replaces a layer of which only the norms run."""

    def __init__(self, norms: list[nn.Module], counts: int | None) -> None:
        super().__init__()
        self._norms = nn.ModuleList(norms)
        self._counts = counts

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _count_positions(self._counts, hidden_states, args, kwargs)
        for norm in self._norms:
            hidden_states = norm(hidden_states)
        return hidden_states
