"""A learned policy inside a Hugging Face model: every call decides for each of its rows, and skips for real."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from sd_gym.backbones.heads import head_of
from sd_gym.inference.decisions import Decisions
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.policy.rollout import StagedRollout
from sd_gym.switch import FlopsModel, PassState, Switchboard, first_layer_input
from sd_gym.switch.context import Block

READ = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # by a pass that a head judges
CACHES = ("cache", "past_key_values")  # what transformers calls them, by its version
COMPUTED = ("encoder_outputs", "inputs_embeds")  # parts of the pass that a caller may have run densely
Decided = tuple[NDArray, Tensor | None]  # what is skipped, bool [n, switches], and the tokens that stay, if any go


def attach(
    model: PreTrainedModel,
    policy: SkipPolicy | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_loss: float | None = None,
    max_flops: float | None = None,
    check_weights: bool = True,
) -> PreTrainedModel:
    """Have a model decide by a policy, inside ``model(...)`` and ``model.generate(...)``, what each input skips.

    Everything else about the model stays as it is, so that pipelines, streamers and beams go on working. In
    ``generate()`` it decides once, on the prompt (of several stages, while that is read). Decisions count in the
    calling thread or task alone. Inside a ``with board.decide(...)`` block of one's own, that one counts.

    Args:
        model: The model that the policy was trained on; it is changed in place, until ``detach``. Attached already, it
            gets the new policy.
        policy: The policy, or where ``SkipPolicy.from_pretrained`` finds it.
        tokenizer: Checked to be the policy's, where it is given.
        max_loss: How much quality may be lost at most, in the task's unit: see ``SkipPolicy.at``.
        max_flops: The share of the dense FLOPs to run at most, likewise.
        check_weights: Whether the model's weights have to be those that the policy was trained on. Other weights of the
            same layout (quantised, in half precision, tuned on) may do, or not.

    Returns:
        The model. ``model.decisions`` tells what its last call in this thread decided (``Decisions``).

    Raises:
        ValueError: If the model, its weights or the tokenizer are others than the policy's, or there is no such
            operating point.

    Example:
        >>> model = attach(model, "runs/ppo")  # doctest: +SKIP
        >>> model.generate(**tokenizer(texts, return_tensors="pt", padding=True))  # doctest: +SKIP
        >>> model.decisions.flops_ratio  # doctest: +SKIP
        array([0.41, 0.12, 0.33])
    """
    if not isinstance(policy, SkipPolicy):
        policy = SkipPolicy.from_pretrained(policy)
    policy = policy.at(max_loss=max_loss, max_flops=max_flops)
    policy.check_model(model, weights=check_weights)
    if tokenizer is not None:
        policy.check_tokenizer(tokenizer)
    attached = vars(model).get("_attached")
    if attached is None:
        Attached(model, policy)
    else:
        attached.policy = policy
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take a policy out of a model, which then is exactly what it was.

    Raises:
        ValueError: If none is attached.
        RuntimeError: If another thread is in the middle of a call.
    """
    attached = vars(model).get("_attached")
    if attached is None:
        raise ValueError("no policy is attached to this model")
    attached.leave()
    return model


class Attached:
    """Stands in the place of ``forward`` and ``generate`` of one model.

    Args:
        model: The model.
        policy: What decides.

    Attributes:
        policy: Likewise; it may be replaced by another one of the same model.
    """

    def __init__(self, model: PreTrainedModel, policy: SkipPolicy) -> None:
        self.model = model
        self.policy = policy
        self._head = head_of(model)
        self._own_board = vars(model).get("_switchboard") is None
        self.board = Switchboard(model) if self._own_board else model._switchboard
        self._replaced = {name: vars(model).get(name) for name in ("forward", "generate") if hasattr(model, name)}
        self._inner = {name: getattr(model, name) for name in self._replaced}
        self._put = {
            name: wraps(inner)(self._standing_in(name, getattr(self, f"_{name}")))
            for name, inner in self._inner.items()
        }
        self._decided: WeakKeyDictionary[Cache, Decided] = WeakKeyDictionary()
        self._flops = FlopsModel(self.board)
        vars(model).update(self._put, _attached=self, decisions=Decisions(self._head, self._flops))

    def leave(self) -> None:
        """Give the places back."""
        places = vars(self.model)
        if any(places.get(name) is not put for name, put in self._put.items()):
            raise RuntimeError(
                "something else stands in the place of forward() or generate(): a call in another thread, or another "
                "tool that came later; let it end, or take it out first"
            )
        for name, replaced in self._replaced.items():
            if replaced is None:
                del places[name]
            else:
                places[name] = replaced
        del places["_attached"], places["decisions"]
        if self._own_board:
            self.board.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        raise TypeError("a model with a policy attached cannot be copied or pickled; call sd_gym.detach(model) first")

    __reduce__ = __deepcopy__

    def _standing_in(self, name: str, decided: Callable[..., Any]) -> Callable[..., Any]:
        inner, signature = self._inner[name], inspect.signature(self._inner[name])

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.board.is_deciding:
                return inner(*args, **kwargs)
            given = kwargs
            if args:
                bound = signature.bind_partial(*args, **kwargs).arguments
                given = {**bound, **bound.get("kwargs", {})}
            return decided(given, *args, **kwargs)

        call.is_attached = True  # it passes on what is asked while decisions are in force
        return call

    def _forward(self, given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        if cache is not None and cache.get_seq_length() > 0:
            return self._continued(cache, *args, **kwargs)
        looked = self._looked_at(given, given.get("input_ids"))

        def run() -> Any:
            return self._inner["forward"](*args, **kwargs)

        output, decided = self._under_decisions(run, looked, given, in_pass=looked.is_as_given)
        target = given.get("decoder_input_ids") if given.get("decoder_input_ids") is not None else given.get("labels")
        if len(self.board.architecture.stacks) > 1 and target is not None and target.ndim > 1:
            self.model.decisions.note_target(target.shape[1])
        if isinstance(filled := getattr(output, "cache", None), Cache):
            self._decided[filled] = decided
        return output

    def _under_decisions(
        self, run: Callable[[], Any], looked: _Looked, given: dict[str, Any], *, in_pass: bool
    ) -> tuple[Any, Decided]:
        """What a call gives under what is decided for it, and that.

        Args:
            run: The call.
            looked: What is decided on.
            given: The call's arguments.
            in_pass: Whether the pass itself embeds what a policy of one stage looks at.
        """
        if self.policy.is_staged:
            rollout = self._rollout(looked, given)
            with self.board.decide_in_pass(rollout.choose, self.policy.network.stages, looked.as_given):
                output = run()
            return output, self._noted(looked, rollout.decisions, rollout.keep)
        block, decided = self._deciding(looked, in_pass=in_pass)
        with block:
            output = run()
        return output, decided[0]

    def _deciding(self, looked: _Looked, *, in_pass: bool) -> tuple[Block, list[Decided]]:
        """What decides before the first layer, and where it will have put what it decides."""
        decided: list[Decided] = []

        def choose(seen: PassState) -> Decided:
            decisions = self.policy.decide_on(seen.hidden.detach(), seen.mask, whole=looked.is_whole)
            decided.append(self._noted(looked, decisions, self._kept(looked, decisions[:, -1])))
            return decided[0]

        if in_pass:
            return self.board.decide_in_pass(choose, mask=looked.as_given), decided
        decisions = self.policy.decide(self.board, looked.inputs)
        decided.append(self._noted(looked, decisions, self._kept(looked, decisions[:, -1])))
        return self.board.decide(*decided[0]), decided

    def _rollout(self, looked: _Looked, given: dict[str, Any]) -> StagedRollout:
        """What decides at the stages of a pass."""
        read = {name: given[name] for name in READ if given.get(name) is not None}
        first, length = None, looked.as_given.sum(dim=1)
        if not looked.is_as_given and "first" in self.policy.network.stages:
            first = first_layer_input(self.board, looked.inputs).detach(), looked.inputs["attention_mask"]

        def keeps(level: NDArray) -> tuple[Tensor | None, NDArray]:
            keep = self._kept(looked, level)
            return keep, looked.staying(keep, length).cpu().numpy()

        def judge() -> Tensor:
            return self._inner["forward"](**read).logits

        return StagedRollout(
            self.policy, self.board, self._head, self._flops, length.cpu().numpy(), keeps, judge, first
        )

    def _kept(self, looked: _Looked, level: NDArray) -> Tensor | None:
        """The tokens that stay at the token levels ``[n]``, where they were given; ``None``: all."""
        keep = self.policy.kept(self.board, looked.inputs, level)
        if keep is None or looked.order is None:
            return keep
        return torch.empty_like(keep).scatter_(1, looked.order, keep)

    def _noted(self, looked: _Looked, decisions: NDArray, keep: Tensor | None) -> Decided:
        """Decisions ``[n, switches + 1]`` and the tokens that stay, as ``model.decisions`` will tell them."""
        skip, ranked = decisions[:, :-1].astype(bool), keep is not None and self.policy.ranking_costs_flops
        length = looked.as_given.sum(dim=1)
        self.model.decisions.note(skip, decisions[:, -1], (length, looked.staying(keep, length)), ranked)
        return skip, keep

    def _continued(self, cache: Cache, *args: Any, **kwargs: Any) -> Any:
        """A step of a decoding loop of one's own: it goes on under what was decided on the prompt."""
        if cache not in self._decided:
            raise ValueError(
                "this cache was not filled by the attached model, so nothing was decided for it; begin with an empty "
                "one, or call model.generate()"
            )
        with self.board.decide(*self._decided[cache]):
            return self._inner["forward"](*args, **kwargs)

    def _generate(self, given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
        if given.get("attention_mask") is None and ids is not None:
            given = {**given, "attention_mask": self._inferred_mask(ids, given)}
        looked = self._looked_at(given, ids)
        encodes = len(self.board.architecture.stacks) > 1

        def run() -> Any:
            return self.model.generate(*args, **kwargs)  # the switchboard's own stands in front of it now

        output, _ = self._under_decisions(run, looked, given, in_pass=looked.is_as_given and encodes)
        tokens = output if isinstance(output, Tensor) else output.sequences
        self.model.decisions.note_target(max(1, tokens.shape[1] - self._head.prompt_length(ids)))
        return output

    def _inferred_mask(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        """The mask that ``generate()`` infers where it is given none: padding is told by its id, unless that ends."""
        config = given.get("generation_config") or self.model.generation_config
        pad, end = (given.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, list) else [end]
        return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()

    def _looked_at(self, given: dict[str, Any], ids: Tensor | None) -> _Looked:
        """What of the given inputs is decided on, padded at the right as in the env."""
        computed = [name for name in COMPUTED if given.get(name) is not None]
        if computed or not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError(
                "an attached model decides by its input_ids, a tensor [n, length], and runs the whole pass; got "
                f"{computed[0] if computed else 'no input_ids'}. Where a part of the pass was computed elsewhere "
                f"({', '.join(COMPUTED)}), put decisions in force with Switchboard.decide"
            )
        mask = given.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise ValueError(f"expected an attention_mask of shape {list(ids.shape)}, got {list(mask.shape)}")
        inputs, types = {"input_ids": ids, "attention_mask": mask}, given.get("token_type_ids")
        if types is not None and self.policy.reads_types:
            inputs["token_type_ids"] = types
        places = given.get("position_ids") is None and (types is None or self.policy.reads_types)
        whole = bool(mask.all())
        if whole or bool((mask[:, 1:] <= mask[:, :-1]).all()):
            return _Looked(inputs, None, places, mask, is_whole=whole)
        order = (mask == 0).int().argsort(dim=1, stable=True)
        return _Looked({name: value.gather(1, order) for name, value in inputs.items()}, order, False, mask)


class _Looked(NamedTuple):
    """What a decision is made on.

    Attributes:
        inputs: The model's inputs, padded at the right.
        order: Where each of their tokens stands in what was given, ``[n, length]``; ``None``: in the same place.
        is_as_given: Whether the model's own pass embeds them just so.
        as_given: The attention mask as it was given.
        is_whole: Whether none of them is padding.
    """

    inputs: dict[str, Tensor]
    order: Tensor | None
    is_as_given: bool
    as_given: Tensor
    is_whole: bool = False

    def staying(self, keep: Tensor | None, length: Tensor) -> Tensor:
        """How many tokens stay, of so many, ``[n]``."""
        return length if keep is None else (keep & self.as_given.bool()).sum(dim=1)
