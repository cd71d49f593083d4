"""A learned policy inside a Hugging Face model: each call decides per row, and skipped sublayers do not run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from sd_gym.backbones.heads import head_of
from sd_gym.going_on import resumed_from
from sd_gym.inference.decisions import Decisions
from sd_gym.inference.policy_input import PolicyInput, policy_input
from sd_gym.inference.rollout import Keep, StagedRollout
from sd_gym.inference.second_answers import (
    CACHES,
    final_output,
    final_texts,
    generate_arguments,
    pass_arguments,
    setting,
)
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.switch import FlopsModel, PassState, Switchboard, first_layer_input
from sd_gym.switch.model_patches import CONTINUOUS, ending
from sd_gym.switch.switchboard import board_on

PASS_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # inputs of a pass that a head judges
InForce = tuple[NDArray, Keep]  # which switches are skipped, bool [n, switches], and which tokens stay


def attach(
    model: PreTrainedModel,
    policy: SkipPolicy | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_loss: float | None = None,
    max_flops: float | None = None,
    check_weights: bool = True,
) -> PreTrainedModel:
    """Let a policy decide, inside ``model(...)`` and ``model.generate(...)``, which sublayers each input skips.

    Nothing else about the model changes: pipelines, streamers and beams work; ``torch.compile`` has no effect on it. In
    ``generate()`` the policy decides once, on the prompt (at several stages, while the prompt is read). Decisions are
    those of the calling thread or task. A ``with board.decide(...)`` block of your own takes precedence.

    Args:
        model: The model that the policy was trained on; it is changed in place, until ``detach``. If a policy is
            attached already, it is replaced.
        policy: The policy, or the argument of ``SkipPolicy.from_pretrained``.
        tokenizer: If it is given, it is compared with the policy's.
        max_loss: How much quality may be lost at most, in the task's unit: see ``SkipPolicy.at``.
        max_flops: The share of the dense FLOPs to run at most, without the policy's own.
        check_weights: Whether the weights have to be those that the policy was trained on; with others of the same
            layout (quantised, in half precision, fine-tuned) the quality is not known.

    Returns:
        The model, with the ``Decisions`` of its last call in this thread as ``model.decisions``.

    Raises:
        TypeError: If the model is wrapped or compiled; by PEFT it may be.
        ValueError: If model, weights or tokenizer are not the policy's, or there is no such operating point.
        RuntimeError: If a decision is in force on the model, as in another thread, or a policy is attached to its
            wrapper or to the model inside.

    Example:
        >>> model = attach(model, "runs/ppo")  # doctest: +SKIP
        >>> model.generate(**tokenizer(texts, return_tensors="pt", padding=True))  # doctest: +SKIP
        >>> model.decisions.flops_ratio  # doctest: +SKIP
        array([0.41, 0.12, 0.33])
    """
    if not isinstance(model, PreTrainedModel) and not type(model).__module__.startswith("peft."):
        raise TypeError(
            f"attach needs the Hugging Face model itself, got a {type(model).__name__}; attach first, then wrap or "
            "compile it"
        )
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
    """Remove the policy from a model, which is then exactly what it was.

    Raises:
        ValueError: If there is no policy.
        RuntimeError: If a call is running, as in another thread, or another tool has replaced a method.
    """
    attached = vars(model).get("_attached")
    if attached is None:
        raise ValueError("no policy is attached to this model")
    attached.detach()
    return model


class Attached:
    """Replaces ``forward`` and ``generate`` of one model; ``policy`` may be replaced by another policy for it."""

    def __init__(self, model: PreTrainedModel, policy: SkipPolicy) -> None:
        self.model = model
        self.policy = policy
        self._head = head_of(model)
        existing = board_on(model)
        if existing is not None and existing.is_in_use:
            raise RuntimeError("a call or decide() block is still running on this model; end that, then attach")
        if existing is not None and existing.has_policy:
            raise RuntimeError(
                "a policy is attached to a wrapper of this model or to the model inside; detach it first"
            )
        self._owns_board = existing is None
        self.board = existing or Switchboard(model)
        self._flops = FlopsModel(self.board)
        self._decisions = Decisions(self._head, self._flops)
        methods = {
            "forward": self._forward,
            "generate": self._generate,
            "init_continuous_batching": self._refuse_batching,
        }
        self._replaced = {name: vars(model).get(name) for name in methods if hasattr(model, name)}
        compiled = {name: getattr(model, name) for name in self._replaced}  # if model.forward = torch.compile(...)
        self._inner = {name: getattr(now, "_torchdynamo_orig_callable", now) for name, now in compiled.items()}
        self._wrappers = {name: self._wrapper(inner, methods[name]) for name, inner in self._inner.items()}
        self._of_cache: WeakKeyDictionary[Cache, InForce] = WeakKeyDictionary()
        # ``_attached`` comes first: it refuses to be pickled, with a message that helps.
        vars(model).update(_attached=self, **self._wrappers, decisions=self._decisions)
        self.board.has_policy = True

    def detach(self) -> None:
        """Restore the methods."""
        places = vars(self.model)
        now = {name: getattr(places.get(name), "__func__", places.get(name)) for name in self._wrappers}
        if now != self._wrappers or (self._owns_board and self.board.is_in_use):
            raise RuntimeError(
                "a call or decide() block is still running, or another tool replaced forward() or generate(); end that"
            )
        for name in (*self._wrappers, "_attached", "decisions"):
            del places[name]
        places.update({name: method for name, method in self._replaced.items() if method is not None})
        self.board.has_policy = False
        if self._owns_board:
            self.board.remove()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a model with a policy attached cannot be copied or pickled; call sd_gym.detach(model) first")

    def _wrapper(self, inner: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
        """Calls a method of this class, with all arguments by name first, unless a decision is in force already."""
        signature = inspect.signature(inner)

        def call(*args: Any, **kwargs: Any) -> Any:
            if args and args[0] is self.model:  # accelerate's unwrap_model() has made this a method
                args = args[1:]
            if self.board.is_deciding:
                return inner(*args, **kwargs)
            given = kwargs
            if args:
                given = signature.bind_partial(*args, **kwargs).arguments
                given |= given.pop("kwargs", {})
            return method(given, *args, **kwargs)

        vars(call)["is_attached"] = True  # it only passes calls on while decisions are in force
        # Each new decision would be compiled anew, so torch.compile runs the model as it is.
        return torch.compiler.disable(wraps(inner)(call))

    def _forward(self, given: dict[str, Any], /, *args: Any, **kwargs: Any) -> Any:
        cache = _first_given(given, CACHES)
        if cache is not None and cache.get_seq_length() > 0:
            return self._continued(cache, *args, **kwargs)
        shown = policy_input(given, given.get("input_ids"))
        if self.policy.has_answer_stage:
            return self._forward_with_answer_stage(given, shown)
        run = partial(self._inner["forward"], *args, **kwargs)
        output, in_force = self._under_decisions(run, shown, given, in_pass=shown.is_as_given)
        target = _first_given(given, ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        if len(self.board.architecture.stacks) > 1 and target is not None and target.ndim > 1:
            self._decisions.record_target(target.shape[1])
        kept = given.get("logits_to_keep", 0)  # a number, or positions
        if self._head.gives == "text":
            self._decisions.logits_to_keep = len(kept) if isinstance(kept, Tensor) else kept
        for filled in output if isinstance(output, tuple) else [getattr(output, "cache", None)]:
            if isinstance(filled, Cache):
                self._of_cache[filled] = in_force
        return output

    def _under_decisions(
        self, run: Callable[[], Any], shown: PolicyInput, given: dict[str, Any], *, in_pass: bool
    ) -> tuple[Any, InForce]:
        """The result of a call, and its decisions; ``in_pass``: whether the pass itself embeds the inputs ``shown``."""
        if self.policy.is_staged:
            rollout = self._rollout(shown, given)
            with rollout.deciding(shown.mask):
                output = run()
            return output, self._record(shown, rollout.decisions, rollout.keep)
        in_force: list[InForce] = []

        def decide(decisions: NDArray) -> InForce:
            in_force.append(self._record(shown, decisions, self._kept(shown, decisions[:, -1])))
            return in_force[0]

        def choose(state: PassState) -> InForce:
            return decide(self.policy.decide_on(state.hidden.detach(), state.mask, unpadded=shown.is_unpadded))

        if in_pass:
            block = self.board.decide_in_pass(choose, mask=shown.mask)
        else:
            block = self.board.decide(*decide(self.policy.decide(self.board, shown.inputs)))
        with block:
            return run(), in_force[0]

    def _forward_with_answer_stage(self, given: dict[str, Any], shown: PolicyInput) -> Any:
        """The output of a pass under a policy with an answer stage."""
        architecture, run = self.board.architecture, self._inner["forward"]
        caches = architecture.causal or len(architecture.stacks) > 1
        arguments, rollout = pass_arguments(self._head, given, caches=caches), self._rollout(shown, given)
        with rollout.deciding(shown.mask):
            output = run(**arguments)
        judged = self._head.judge(self._judged_logits(output, shown, rollout.keep))
        output = final_output(output, judged, rollout, arguments, run)
        self._record(shown, rollout.decisions, rollout.keep, rollout.went_on)
        as_dict = given.get("return_dict")
        return output if (self.model.config.return_dict if as_dict is None else as_dict) else output.to_tuple()

    def _judged_logits(self, output: Any, shown: PolicyInput, keep: Keep) -> Tensor:
        batch = {}
        if self._head.gives == "span":
            context = shown.as_given(self.policy.context_of(shown.inputs))
            batch = {"context_mask": context if keep is None else context & torch.as_tensor(keep)}
        return self._head.forward(self.board, batch, lambda **_: output)

    def _generate_with_answer_stage(self, given: dict[str, Any], shown: PolicyInput) -> Tensor:
        """The texts of ``generate()`` under a policy with an answer stage."""
        arguments, rollout = generate_arguments(self.model, given), self._rollout(shown, given)
        with rollout.deciding(shown.mask):
            output = self._generate_here(**arguments)
        sequences, longest = final_texts(output, rollout, arguments, self._generate_here, self.model)
        self._record(shown, rollout.decisions, rollout.keep, rollout.went_on)
        before = self._head.prompt_length(shown.inputs["input_ids"])
        lengths = (max(1, length - before) for length in (output.sequences.shape[1], longest))
        self._decisions.record_target(*lengths, beams=self._beams(arguments))
        return sequences

    def _beams(self, given: dict[str, Any]) -> int:
        """How many texts ``generate()`` generates at once for each input."""
        return max(setting(self.model, given, name) or 1 for name in ("num_beams", "num_return_sequences"))

    def _rollout(self, shown: PolicyInput, given: dict[str, Any]) -> StagedRollout:
        """Decides at the stages of a pass."""
        inputs = {name: given[name] for name in PASS_INPUTS if given.get(name) is not None}
        first, length = None, shown.mask.sum(dim=1)
        if not shown.is_as_given and "first" in self.policy.network.stages:
            first = first_layer_input(self.board, shown.inputs).detach(), shown.inputs["attention_mask"]

        def keeps(level: NDArray) -> tuple[Tensor | None, NDArray]:
            keep = self._kept(shown, level)
            return keep, shown.kept_length(keep, length).cpu().numpy()

        model = (self.board, self._head, self._flops)
        lengths = length.cpu().numpy()
        run = self._inner["forward"]
        return StagedRollout(self.policy, *model, lengths, keeps, lambda: run(**inputs).logits, first)

    def _kept(self, shown: PolicyInput, level: NDArray) -> Tensor | None:
        """Which of the given tokens stay at the token levels ``[n]``; ``None``: all."""
        keep = self.policy.kept(self.board, shown.inputs, level)
        return keep if keep is None else shown.as_given(keep)

    def _record(self, shown: PolicyInput, decisions: NDArray, keep: Keep, went_on: NDArray | None = None) -> InForce:
        """Put decisions ``[n, switches + 1]`` and the tokens that stay into ``model.decisions``."""
        skip, length = decisions[:, :-1].astype(bool), shown.mask.sum(dim=1)
        lengths = length, shown.kept_length(keep, length)
        self._decisions.record(skip, decisions[:, -1], lengths, self.policy.ranking_flops)
        if went_on is not None:
            points = self._head.resume_points(self.board)
            self._decisions.went_on = went_on
            self._decisions.resumed = resumed_from(decisions, points)
        return skip, keep

    def _continued(self, cache: Cache, /, *args: Any, **kwargs: Any) -> Any:
        """A step of the caller's own decoding loop, under the decisions made for the prompt."""
        if cache not in self._of_cache:
            raise ValueError(
                "this cache was not filled by the attached model, or is a copy; begin with an empty one, or generate()"
            )
        with self.board.decide(*self._of_cache[cache]):
            return self._inner["forward"](*args, **kwargs)

    def _refuse_batching(self, given: dict[str, Any], /, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{CONTINUOUS}; call generate(), or sd_gym.detach(model) to generate densely")

    def _generate(self, given: dict[str, Any], /, *args: Any, **kwargs: Any) -> Any:
        with ending(given.get("streamer")):
            return self._decided_and_generated(given, *args, **kwargs)

    def _decided_and_generated(self, given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if (cache := _first_given(given, CACHES)) is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "an attached model decides on a whole prompt, so generate() begins with an empty cache; leave "
                "past_key_values out, or continue by forward() calls of your own"
            )
        ids = _first_given(given, ("inputs", "input_ids"))
        if given.get("attention_mask") is None and ids is not None:
            given = {**given, "attention_mask": self._inferred_mask(ids, given)}
        shown = policy_input(given, ids)
        if self.policy.has_answer_stage:
            return self._generate_with_answer_stage(given, shown)
        in_pass = shown.is_as_given and len(self.board.architecture.stacks) > 1
        run = partial(self._generate_here, *args, **kwargs)
        output, in_force = self._under_decisions(run, shown, given, in_pass=in_pass)
        tokens = output if isinstance(output, Tensor) else output.sequences
        for filled in (cache, getattr(output, "past_key_values", None)):
            if isinstance(filled, Cache):
                self._of_cache[filled] = in_force
        length = max(1, tokens.shape[1] - self._head.prompt_length(shown.inputs["input_ids"]))
        self._decisions.record_target(length, beams=self._beams(given))
        return output

    def _generate_here(self, *args: Any, **kwargs: Any) -> Any:
        """``generate()`` as the switchboard has replaced it while a decision is in force."""
        return vars(self.model)["generate"](*args, **kwargs)

    def _inferred_mask(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        """The mask that ``generate()`` infers: 0 at tokens with the padding id, unless that id also ends texts."""
        pad, end = (setting(self.model, given, name) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, list) else [end]
        return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def _first_given(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((given[name] for name in names if given.get(name) is not None), None)
