"""Real skipping inside an unmodified Hugging Face model.

Each sublayer has a switch. For each batch the switch selects the rows that run the sublayer, calls it on only those
rows, and scatters the result back. If no row runs it, the sublayer is not called. The model's modules, parameter names
and outputs do not change: only ``forward`` of the switched modules is patched, on the instance, while a decision in
force makes a row skip them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from sd_gym.switch.architectures import Stack, Switch, UnsupportedArchitectureError, architecture_of
from sd_gym.switch.cache import restore_layers
from sd_gym.switch.context import Block, Scope, StaleBoardError
from sd_gym.switch.decision import Decision, PendingDecision, Plan, refuse_compiled
from sd_gym.switch.patches import Patches
from sd_gym.switch.stages import PassState, Stage, StageReached, stages_named, stages_of
from sd_gym.switch.tokens import DroppedTokens

Values = Tensor | np.ndarray
PLANS = 64  # kept at most, for decisions that are repeated


class Switchboard:
    """All switches of one backbone, in execution order; it puts decisions in force.

    Args:
        model: A model of a supported architecture, switched in place until ``remove()``. It may be wrapped, as by PEFT.

    Attributes:
        model: The Hugging Face model.
        architecture: The entry of its architecture.
        switches: The switches, in the order of the skip vector.

    Raises:
        UnsupportedArchitectureError: If the architecture has no entry, or the model lacks a stack that it names, or has
            a cross-attention that it does not name, or a layer twice.
        RuntimeError: If the model already carries a switchboard.
        TypeError: If the model contains no Hugging Face model, or is from ``sentence_transformers``, which sorts rows.

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

    def __init__(self, model: PreTrainedModel | nn.Module) -> None:
        model, carried = _unwrapped(model), board_on(model)
        if carried is not None:
            if not carried._scope.is_copy:
                raise RuntimeError("this model already carries a Switchboard; call its remove() first")
            carried.remove()  # it was copied or loaded together with the model
        self.model = model
        self.architecture = architecture_of(model.config.model_type)
        stacks = self.architecture.stacks
        _check_stacks(model, stacks)
        is_decoder = self.architecture.causal or getattr(model.config, "is_decoder", False)  # BERT may decode
        self._causal = is_decoder  # whether positions of a single stack attend only to earlier positions
        self.switches = [
            Switch(
                f"{stack.name}.{index}.{sublayer.kind}",
                stack.name,
                index,
                layer,
                sublayer,
                reads_input=stack is stacks[0],
                decodes=is_decoder or stack.name == "decoder",
            )
            for stack in stacks
            for index, layer in enumerate(stack.layers_in(model))
            for sublayer in stack.sublayers
        ]
        self._stages = stages_of(self.switches)
        self._scope = Scope()
        self._modules = self._modules_on_paths()
        self._patches = Patches(model, self.architecture, self.switches, self._scope)
        self._known_stages: dict[str | tuple[str, ...], tuple[Stage, ...]] = {}
        self._dense = np.zeros((1, len(self)), dtype=bool)
        self._undecided = Plan.of(self._dense, frozenset(), (), torch.device("cpu"))
        self._plans: dict[tuple[bytes, int, bool, int | None, torch.device], Plan] = {}
        self.has_policy = False  # whether a policy is attached, to the model or to a wrapper
        vars(model)["_switchboard"] = self

    def _modules_on_paths(self) -> dict[str, tuple[dict[str, nn.Module | None], str, nn.Module | None]]:
        """Modules on the paths to switched modules, by path: the modules beside each of them, its name, and itself."""
        switched = [f"{self.path_of(switch)}.{path}" for switch in self.switches for path in switch.sublayer.modules]
        found = {}
        for path in sorted({prefix for full in switched for prefix in accumulate(full.split("."), "{}.{}".format)}):
            parent, _, name = path.rpartition(".")
            siblings = self.model.get_submodule(parent)._modules
            found[path] = siblings, name, siblings[name]
        return found

    def __len__(self) -> int:
        return len(self.switches)

    @property
    def names(self) -> list[str]:
        """The switches' names, in the order of the skip vector."""
        return [switch.name for switch in self.switches]

    @property
    def stages(self) -> list[str]:
        """Names of all stages, in execution order.

        ``first`` is before the first layer, ``encoder.3`` (or ``decoder.3``) before a later layer, and ``decoder``
        between encoder and decoder.
        """
        return [stage.name for stage in self._stages]

    def decided_at(self, stages: Sequence[str]) -> dict[str, slice]:
        """The switches that are decided at each of the given stages: those up to the next given stage.

        Args:
            stages: Names; ``every_layer`` means all stages, ``middle`` the middle layer of the first stack.

        Raises:
            ValueError: If there is no stage of that name, or the list is empty.
        """
        return {stage.name: stage.switches for stage in self._named(stages)}

    def decide(self, skip: Values, keep: Values | None = None, *, resume_from: PassState | None = None) -> Block:
        """Put decisions in force for the forward passes and ``generate()`` calls inside the ``with`` block.

        They apply only to the calling thread, task or generator. A call of ``generate()`` keeps the decision that was
        in force at its start. CPU tensors or arrays are cheapest; nothing synchronises inside the forward pass.

        Args:
            skip: Integers or booleans ``[batch, len(board)]``; 1 = the row skips the sublayer. A single row stands for
                all rows of any batch. Inside ``generate()`` a row also stands for its beams or samples.
            keep: Integers or booleans ``[batch, length]``; 0 = the input's token is physically dropped before the first
                layer (``sd_gym.switch.keep_tokens`` chooses tokens). Padding may be kept or dropped. The model returns
                zeros as the hidden states of dropped positions; encoder-decoder models return the encoder's output
                without them. ``None``: all tokens are kept.
            resume_from: The state where a pass was stopped (``run_to``). Forward passes of the same inputs and ``keep``
                continue there; only embeddings are looked up again. Decisions on earlier switches are ignored. Hidden
                states of earlier layers are not available, and a cache cannot be continued. A ``generate()`` of a
                decoder-only model resumes a state of another one on the same prompts, and only densely: the prompts
                from there on, and what is generated in all layers.

        Raises:
            ValueError: If a shape or a value is wrong, or a row keeps no token. Inside the block, the model raises it
                if its input has another number of rows or another length than the decisions, or cannot be resumed.
            StaleBoardError: If the board was removed, or the model's modules were replaced since it was made.
        """
        self.check_fresh()
        return Block(self._scope, self._decision(skip, keep, resume_from=resume_from))

    def decide_in_pass(
        self,
        choose: Callable[[PassState], tuple[Values, Values | None]],
        stages: Sequence[str] = ("first",),
        mask: Tensor | None = None,
    ) -> Block:
        """Decide during the first forward pass inside the ``with`` block, stage by stage, from what it has computed.

        So an input is embedded only once. A decision stays in force until the end of the block, as with ``decide``. A
        call of ``generate()`` decides while it reads the prompt (or in and after the encoder). Compiled models cannot.

        Args:
            choose: Called once per stage. Maps the pass's state to ``skip`` and ``keep`` as for ``decide``. ``skip``
                has only the columns ``decided_at(stages)[state.stage]``; ``keep`` must be ``None`` except at ``first``.
                In ``generate()`` it decides one row per input, whatever the number of beams or samples.
            stages: Names of stages. All switches before the first of them run.
            mask: Mask of the input's tokens, ``[batch, length]``, 0 at padding; ``None``: ones. It may be narrower than
                a decoder's input where an answer follows the prompt.

        Raises:
            ValueError, StaleBoardError: See ``decide``; ``ValueError`` also if there is no stage of that name.
        """
        self.check_fresh()
        return self._pending_block(self._named(stages), choose, mask, self._dense)

    def run_to(
        self,
        stage: str,
        run: Callable[[], Any],
        skip: Values | None = None,
        keep: Values | None = None,
        *,
        mask: Tensor | None = None,
        resume_from: PassState | None = None,
    ) -> PassState:
        """Run a forward pass up to a stage; ``decide(..., resume_from=state)`` continues there.

        Args:
            stage: Name of the stage.
            run: Runs the pass, such as ``lambda: model(**inputs)``; an exception ends it.
            skip: See ``decide``; switches from the stage on are ignored. ``None``: all sublayers run.
            keep: See ``decide``.
            mask: See ``decide_in_pass``.
            resume_from: The state at an earlier stage; see ``decide``.

        Raises:
            ValueError, StaleBoardError: See ``decide``; ``ValueError`` also if there is no stage of that name.
            RuntimeError: If the pass ends without reaching the stage.
        """
        self.check_fresh()

        def stop(state: PassState) -> NoReturn:
            raise StageReached(state)

        stages = self._named([stage])
        skip = self._dense if skip is None else self._checked(skip, len(self), "switch").copy()
        skip[:, stages[0].switches.start :] = False
        with self._pending_block(stages, stop, mask, skip, keep, resume_from):
            try:
                run()
            except StageReached as reached:
                return reached.state
        raise RuntimeError(f"the forward pass ended without reaching the stage {stage!r}")

    def _named(self, names: Sequence[str]) -> tuple[Stage, ...]:
        """Stages by their names; results are kept."""
        key = names if isinstance(names, str) else tuple(names)
        if key not in self._known_stages:
            self._known_stages[key] = stages_named(self._stages, names)
        return self._known_stages[key]

    def _pending_block(
        self,
        stages: tuple[Stage, ...],
        choose: Callable[[PassState], tuple[Values, Values | None]],
        mask: Tensor | None,
        skip: np.ndarray,
        keep: Values | None = None,
        resume_from: PassState | None = None,
    ) -> Block:
        """A block in which ``choose`` decides at ``stages``, and ``skip`` before them."""
        layers = [self._patches.of_layer[stage.place] for stage in stages if not stage.is_between]
        needs = (*layers, *self._patches.for_stacks, *self._patches.for_generating)
        pending = PendingDecision(stages, choose, mask, skip, self._settle, needs)
        if stages[0].switches.start == 0 and resume_from is None:
            return Block(self._scope, Decision(self._undecided, None, pending))
        return Block(self._scope, self._decision(skip, keep, pending, resume_from))

    def _settle(self, decision: Decision, hidden: Tensor, cache: Cache | None) -> Decision | None:
        """Decide at the next stage, by the layer's input or the encoder's output, and put that decision in force."""
        refuse_compiled()
        pending = decision.pending
        assert pending is not None
        stage = pending.stages[0]
        skip, keep = pending.choose(pending.state(decision, hidden, cache))
        if keep is not None and stage.name != "first":
            raise ValueError(f"tokens are dropped only before the first layer; at {stage.name!r} keep must be None")
        skip = pending.merged(self._checked(skip, stage.switches.stop - stage.switches.start, "switch"))
        tokens = decision.tokens if keep is None else self._tokens(keep, len(skip))
        pending = replace(pending, stages=pending.stages[1:], skip=skip) if len(pending.stages) > 1 else None
        if pending is None:
            decision.state.encoded = None
        settled = None
        if pending is not None or tokens is not None or skip.any():
            settled = decision.after_stage(self._plan(skip, tokens is not None, device=hidden.device), tokens, pending)
        elif cache is not None:
            restore_layers(cache)
        self._scope.settle(settled)
        return settled

    def _decision(
        self,
        skip: Values,
        keep: Values | None,
        pending: PendingDecision | None = None,
        resume_from: PassState | None = None,
    ) -> Decision | None:
        """The arguments of ``decide`` as a decision; ``None`` if nothing is skipped, pending or resumed."""
        skip = self._checked(skip, len(self), "switch")
        tokens = None if keep is None else self._tokens(keep, len(skip))
        if resume_from is not None:
            stage = self._named([resume_from.stage])[0]
            skip = skip.copy()
            skip[:, : stage.switches.start] = True
            plan = self._plan(skip, tokens is not None, stage.switches.start)
            return Decision(plan, tokens, pending, resume_from, None if stage.is_between else stage.place)
        if tokens is None and pending is None and not skip.any():
            return None
        return Decision(self._plan(skip, tokens is not None), tokens, pending)

    def _tokens(self, keep: Values, rows: int) -> DroppedTokens | None:
        """The tokens that ``rows`` rows drop; ``None`` if they keep all."""
        keep = self._checked(keep, None, "token")
        if len(keep) != rows:
            raise ValueError(f"keep is for {len(keep)} rows and skip for {rows}; they must agree")
        if not keep.any(axis=1).all():
            raise ValueError("keep leaves a row without any token; keep at least one per row")
        return None if keep.all() else DroppedTokens(keep, self._causal, self._device)

    @property
    def _device(self) -> torch.device:
        """Where the model's first weights are; the CPU if they are offloaded until a pass needs them."""
        device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    def path_of_layers(self, stack: Stack) -> str:
        """Path of a stack's layers in the model."""
        base = "" if self.model.base_model is self.model else f"{self.model.base_model_prefix}."
        return base + stack.layers

    def path_of(self, switch: Switch) -> str:
        """Path of a switch's layer in the model."""
        stack = next(stack for stack in self.architecture.stacks if stack.name == switch.stack)
        return f"{self.path_of_layers(stack)}.{switch.index}"

    @property
    def is_deciding(self) -> bool:
        """Whether a decision is in force here, including one under which everything runs."""
        return self._scope.entry() is not None

    @property
    def is_in_use(self) -> bool:
        """Whether a decision that skips, or is still to be made, is in force in any thread or task."""
        return bool(self._scope.family.needs)

    def remove(self) -> None:
        """Remove all switches: the model is unpatched, and the board can no longer decide."""
        self._scope.family.leave(self._scope)
        for patch in self._scope.patches:
            patch.uninstall()
        if vars(self.model).get("_switchboard") is self:
            del vars(self.model)["_switchboard"]

    def _plan(
        self, skip: np.ndarray, drops: bool, resumes: int | None = None, device: torch.device | None = None
    ) -> Plan:
        """The plan of ``skip``, bool ``[batch, switches]``; for ``drops`` and ``resumes`` see ``Patches.needs``."""
        device = self._device if device is None else device  # slow, as the model searches its parameters
        key = skip.tobytes(), len(skip), drops, resumes, device
        plan = self._plans.get(key)
        if plan is None:
            idle = self._patches.idle(np.asarray(skip.all(axis=0)), resumes)
            plan = Plan.of(skip, idle, self._patches.needs(np.asarray(skip.any(axis=0)), idle, drops, resumes), device)
            if len(self._plans) >= PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def check_fresh(self) -> None:
        """Raise ``StaleBoardError`` unless the model's modules are those that the board was made for."""
        if vars(self.model).get("_switchboard") is not self:
            raise StaleBoardError("this switchboard was removed from its model; make a new Switchboard(model)")
        replaced = [path for path, (siblings, name, child) in self._modules.items() if siblings.get(name) is not child]
        replaced += [
            f"{patch.name}() of a {type(patch.target).__name__}" for patch in self._scope.patches if patch.is_lost
        ]
        if replaced:
            raise StaleBoardError(
                f"{replaced[0]} was replaced since the switchboard was made (by an adapter, quantisation or another "
                "tool), so decisions would be ignored there; call remove() and make a new Switchboard(model)"
            )

    def _checked(self, values: Values, columns: int | None, column: str) -> np.ndarray:
        name = "keep" if columns is None else "skip"
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if array.ndim != 2 or columns not in (None, array.shape[1]):
            raise ValueError(
                f"{name} must have shape [batch, {columns or 'length'}], 1 column per {column}; got {list(array.shape)}"
            )
        if array.dtype == bool:
            return array
        if not ((array == 0) | (array == 1)).all():
            raise ValueError(f"{name} must hold only 0 and 1")
        return array.astype(bool)


def board_on(model: nn.Module) -> Switchboard | None:
    """The switchboard that a model, or the one inside of a wrapper, carries; raises as ``Switchboard``."""
    return vars(_unwrapped(model)).get("_switchboard")


def _check_stacks(model: PreTrainedModel, stacks: Sequence[Stack]) -> None:
    """Raise UnsupportedArchitectureError if the stacks do not name a cross-attention, or hold a layer twice."""
    kinds = {sublayer.kind for stack in stacks for sublayer in stack.sublayers}
    if getattr(model.config, "add_cross_attention", False) and "cross_attention" not in kinds:
        raise UnsupportedArchitectureError(
            f"the cross-attention of a {type(model).__name__} (config.add_cross_attention) has no switch; use a "
            "model without it, or an encoder-decoder such as bart or t5"
        )
    for stack in stacks:
        layers = [id(layer) for layer in stack.layers_in(model)]
        if len(set(layers)) < len(layers):
            raise UnsupportedArchitectureError(
                f"a layer of the {stack.name} stands twice in it, so a switch could not tell its places apart; put "
                "copy.deepcopy(layer) in one of them"
            )


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, or the one inside of a wrapper."""
    if isinstance(model, PreTrainedModel):
        return model
    if type(model).__module__.startswith("sentence_transformers."):
        raise TypeError(
            f"{type(model).__name__} sorts its texts by length, so decisions would apply to the wrong rows; pass its "
            "transformer, Switchboard(model[0].auto_model), and decide with a single row, which stands for all"
        )
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(part, PreTrainedModel):
            return part
    raise TypeError(f"a switchboard needs a Hugging Face model, a PreTrainedModel; got a {type(model).__name__}")
