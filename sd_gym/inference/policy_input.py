"""The inputs of an attached model's call, as its policy reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_gym.inference.rollout import Keep
from sd_gym.switch.decision import refuse_compiled

COMPUTED = ("encoder_outputs", "inputs_embeds")  # arguments that replace what the policy has to see


class PolicyInput(NamedTuple):
    """The inputs of a call as the policy reads them: padded at the right, as in the env."""

    inputs: dict[str, Tensor]  # the model's inputs, padded at the right
    order: Tensor | None  # position of each token in the given inputs, [n, length]; None: the same
    is_as_given: bool  # whether the model's own pass embeds exactly these inputs
    mask: Tensor  # the given attention mask
    is_unpadded: bool = False

    def as_given(self, of_tokens: Tensor) -> Tensor:
        """Values ``[n, length]`` of tokens, moved to the positions of the given inputs."""
        return of_tokens if self.order is None else torch.empty_like(of_tokens).scatter_(1, self.order, of_tokens)

    def kept_length(self, keep: Keep, length: Tensor) -> Tensor:
        """How many tokens stay, of ``length``, ``[n]``."""
        return length if keep is None else (torch.as_tensor(keep) & self.mask.bool()).sum(dim=1)


def policy_input(given: dict[str, Any], ids: Tensor | None) -> PolicyInput:
    """The inputs of a call with these arguments; ``ids``: its tokens.

    Raises:
        ValueError: If the policy cannot see the tokens, or the attention mask has another shape.
    """
    refuse_compiled()
    computed = [name for name in COMPUTED if given.get(name) is not None]
    if computed or not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError(
            "an attached model decides by its input_ids, a tensor [n, length], and runs the whole pass; got "
            f"{computed[0] if computed else 'no input_ids'}. Use Switchboard.decide with {', '.join(COMPUTED)}"
        )
    mask = torch.ones_like(ids) if given.get("attention_mask") is None else given["attention_mask"]
    if mask.shape != ids.shape:
        raise ValueError(f"expected an attention_mask of shape {list(ids.shape)}, got {list(mask.shape)}")
    inputs, types = {"input_ids": ids, "attention_mask": mask}, given.get("token_type_ids")
    if types is not None:
        inputs["token_type_ids"] = types
    is_as_given = given.get("position_ids") is None
    unpadded = bool(mask.all())
    if unpadded or bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return PolicyInput(inputs, None, is_as_given, mask, unpadded)
    order = (mask == 0).int().argsort(dim=1, stable=True)
    return PolicyInput({name: value.gather(1, order) for name, value in inputs.items()}, order, False, mask)
