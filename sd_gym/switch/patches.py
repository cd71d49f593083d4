"""All patches of a model's methods, and which of them a decision needs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from sd_gym.switch.architectures import Architecture, Switch
from sd_gym.switch.context import MethodPatch, Scope
from sd_gym.switch.model_patches import (
    LayerPatch,
    expand_inputs,
    refuse_batching,
    run_decoder,
    run_encoder,
    run_generate,
)
from sd_gym.switch.sublayer_patch import Place, SublayerPatch

At = tuple[str, int]  # stack and index of a layer


class _Needs(NamedTuple):
    """Indices of the patches that a switch needs."""

    modules: list[int]  # where some row skips it
    tagging: list[int]  # where all rows run it
    attends_input: bool  # whether it needs ``modules`` also where tokens are dropped


class Patches:
    """A board's patches. They are known by their index in the scope's list."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, switches: list[Switch], scope: Scope
    ) -> None:
        self._scope = scope
        self._patches: list[MethodPatch] = []
        self._places: list[At] = [(switch.stack, switch.index) for switch in switches]
        skippable = {stack.name for stack in architecture.stacks if stack.norms is not None}
        self._skippable = frozenset(place for place in self._places if place[0] in skippable)
        biased = {(switch.stack, switch.index) for switch in switches if switch.sublayer.position_bias is not None}
        self._unbiased = frozenset(self._places) - biased  # layers that return nothing but hidden states
        of_switches = [SublayerPatch(number, switch, model) for number, switch in enumerate(switches)]
        self._needs = [self._add_modules(patch) for patch in of_switches]
        self.of_layer: dict[At, int] = {}  # index of each layer's patch
        self.for_stacks: list[int] = []  # indices of the patches of encoder and decoder, where there are both
        self.for_generating: list[int] = []  # indices of the patches of ``generate()``
        single = len(architecture.stacks) == 1
        for stack in architecture.stacks:
            layers, reads_input = stack.layers_in(model), stack is architecture.stacks[0]
            for index, layer in enumerate(layers):
                place, restores = (stack.name, index), single and index == len(layers) - 1
                first = self._places.index(place)
                attentions = [
                    patch for patch in of_switches if patch.switch.layer is layer and patch.switch.sublayer.attention
                ]
                norms = [layer.get_submodule(path) for path in stack.norms or ()]
                patch = LayerPatch(scope, model, layer, place, first, attentions, norms, reads_input, restores)
                self.of_layer[place] = self._add(layer, "forward", patch.run)
        if not single:
            for name, run in (("encoder", partial(run_encoder, scope)), ("decoder", run_decoder)):
                self.for_stacks.append(self._add(model.base_model.get_submodule(name), "forward", run))
        if hasattr(model, "generate"):
            generating: dict[str, Callable[..., Any]] = {
                "generate": partial(run_generate, scope),
                "_expand_inputs_for_generation": expand_inputs,
                "init_continuous_batching": refuse_batching,
            }
            self.for_generating += [self._add(model, name, run) for name, run in generating.items()]
        first_stack = architecture.stacks[0].name
        self._for_tokens = [number for (stack, _), number in self.of_layer.items() if stack == first_stack]
        self._for_tokens += self.for_stacks
        scope.fill(self._patches)

    def idle(self, skipped: np.ndarray, resumes: int | None) -> frozenset[At]:
        """Layers that can be skipped as a whole, as no row runs any of their sublayers.

        ``skipped``: whether all rows skip a switch, bool ``[switches]``; ``resumes``: index of the first switch that
        may run, where a pass is resumed.
        """
        runs = {place for place, skips in zip(self._places, skipped.tolist(), strict=True) if not skips}
        return (self._skippable - runs) | self._unbiased.intersection(self._places[: resumes or 0])

    def needs(self, skipped: np.ndarray, idle: frozenset[At], drops: bool, resumes: int | None) -> tuple[int, ...]:
        """Indices of the patches that decisions need.

        ``skipped``: whether any row skips a switch, bool ``[switches]``; ``drops``: whether tokens are dropped.
        """
        needs: list[int] = []
        for place, skips, switch in zip(self._places, skipped.tolist(), self._needs, strict=True):
            if place in idle:
                needs.append(self.of_layer[place])
            elif skips or (drops and switch.attends_input):
                needs += switch.modules
            else:
                needs += switch.tagging
        if drops:
            needs += self._for_tokens
        if resumes is not None:
            needs += [self.of_layer[self._places[resumes]], *self.for_stacks]
        return tuple(dict.fromkeys((*needs, *self.for_generating)))

    def _add(self, target: Any, name: str, run: Callable[..., Any]) -> int:
        """Add the patch of an object's method; returns the patch's index."""
        self._patches.append(MethodPatch(target, name, self._scope, run))
        return len(self._patches) - 1

    def _add_modules(self, patch: SublayerPatch) -> _Needs:
        switch = patch.switch
        paths = patch.switch.sublayer.modules
        attention = patch.switch.sublayer.attention
        indices = [
            self._add(
                module, "forward", partial(patch.run, Place(path == paths[0], path == paths[-1], path == attention))
            )
            for path, module in zip(paths, switch.modules, strict=True)
        ]
        tagging = [indices[paths.index(attention)]] if attention is not None and switch.tags_cache else []
        return _Needs(indices, tagging, switch.reads_input and attention is not None)
