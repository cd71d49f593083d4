"""All patches of a model's methods, and which of them a decision needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from sd_gym.switch.architectures import Architecture
from sd_gym.switch.context import MethodPatch, Scope
from sd_gym.switch.model_patches import GeneratePatch, LayerPatch, run_decoder, run_encoder
from sd_gym.switch.sublayer_patch import Place, SublayerPatch
from sd_gym.switch.switch import Switch

At = tuple[str, int]  # stack and index of a layer


class _Numbers(NamedTuple):
    """Numbers of the patches that a switch needs."""

    modules: list[int]  # where some row skips it
    layer: list[int]  # where its layer is passed by
    signing: list[int]  # where all rows run it
    attends_input: bool  # then its modules are needed where tokens are dropped, too


class Patches:
    """A board's patches, known by their numbers in its scope, which is filled with them."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, switches: list[Switch], scope: Scope
    ) -> None:
        self._model, self._architecture, self._switches = model, architecture, switches
        patches = [MethodPatch(target, name, scope, run) for target, name, run in self._methods(scope)]
        scope.fill(patches)
        self._places: list[At] = [(switch.stack, switch.index) for switch in switches]
        whole = {stack.name for stack in architecture.stacks if stack.whole or stack.norms}
        self._whole = frozenset(place for place in self._places if place[0] in whole)
        biased = {(switch.stack, switch.index) for switch in switches if switch.sublayer.position_bias is not None}
        self._lean = frozenset(self._places) - biased  # layers that return hidden states alone
        self.of_layer: dict[At, int] = {}  # number of each layer's patch
        self.for_stacks: list[int] = []  # numbers of the encoder's and the decoder's, where there are both
        self.for_generating: list[int] = []  # numbers of those of ``generate()``
        self._for_tokens: list[int] = []
        self._number(patches)

    def idle(self, skipped: np.ndarray, resumes: int | None) -> frozenset[At]:
        """The layers that can be skipped as a whole, as no row runs any of their sublayers.

        ``skipped``: whether all rows skip a switch, bool ``[switches]``; ``resumes``: number of the first switch that
        may run, where a pass is resumed.
        """
        runs = {place for place, skips in zip(self._places, skipped.tolist(), strict=True) if not skips}
        return (self._whole - runs) | self._lean.intersection(self._places[: resumes or 0])

    def needs(self, skipped: np.ndarray, idle: frozenset[At], drops: bool, resumes: int | None) -> tuple[int, ...]:
        """Numbers of the patches that decisions need.

        ``skipped``: whether any row skips a switch, bool ``[switches]``; ``drops``: whether tokens are dropped.
        """
        needs: list[int] = []
        skips = skipped.tolist()
        for number, (place, own) in enumerate(zip(self._places, self._numbers, strict=True)):
            if place in idle:
                needs += own.layer
            elif skips[number] or (drops and own.attends_input):
                needs += own.modules
            else:
                needs += own.signing
        if drops:
            needs += self._for_tokens
        if resumes is not None:
            needs += [self.of_layer[self._places[resumes]], *self.for_stacks]
        return tuple(dict.fromkeys((*needs, *self.for_generating)))

    def _methods(self, scope: Scope) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        """What can be patched: the object, the name of its method, and what runs in its place."""
        model, stacks = self._model, self._architecture.stacks
        of_switches = [SublayerPatch(number, switch, model) for number, switch in enumerate(self._switches)]
        for sublayer_patch in of_switches:
            switch, last = sublayer_patch.switch, len(sublayer_patch.switch.modules) - 1
            for position, (path, module) in enumerate(zip(switch.sublayer.modules, switch.modules, strict=True)):
                module_place = Place(position == 0, position == last, path == switch.sublayer.attention)
                yield module, "forward", partial(sublayer_patch.run, module_place)
        for stack in stacks:
            layers = stack.layers_in(model)
            for index, layer in enumerate(layers):
                inside = [patch for patch in of_switches if patch.switch.layer is layer]
                attentions = [patch for patch in inside if patch.switch.sublayer.attention]
                restores = len(stacks) == 1 and index == len(layers) - 1
                norms = [layer.get_submodule(path) for path in stack.norms]
                place = (stack.name, index)
                whole = LayerPatch(model, layer, place, attentions, norms, stack is stacks[0], restores)
                yield layer, "forward", whole.run
        if len(stacks) > 1:
            yield model.base_model.get_submodule("encoder"), "forward", run_encoder
            yield model.base_model.get_submodule("decoder"), "forward", run_decoder
        if hasattr(model, "generate"):
            generate = GeneratePatch(scope)
            yield model, "generate", generate.run
            yield model, "_expand_inputs_for_generation", generate.expand

    def _number(self, patches: list[MethodPatch]) -> None:
        """Note which patches are for what."""
        begin = sum(len(switch.modules) for switch in self._switches)
        for number, patch in enumerate(patches[begin:], start=begin):
            layer = getattr(patch.run, "__self__", None)
            if isinstance(layer, LayerPatch):
                self.of_layer[layer.place] = number
                self._for_tokens += [number] * layer.reads_input
            else:
                (self.for_stacks if patch.name == "forward" else self.for_generating).append(number)
        self._for_tokens += self.for_stacks
        self._numbers, begin = [], 0
        for switch in self._switches:
            modules = list(range(begin, begin := begin + len(switch.modules)))
            attention = switch.sublayer.attention
            self._numbers.append(
                _Numbers(
                    modules,
                    [self.of_layer[switch.stack, switch.index]],
                    [modules[switch.sublayer.modules.index(attention)]] if switch.tags_cache else [],
                    switch.reads_input and attention is not None,
                )
            )
