"""A warm start of several stages from a policy of one: what later stages see less is taught what it said."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.learning.decisions import seen_together
from torch.nn import functional as F

from sd_gym.envs.protocols import Core, Split
from sd_gym.policy import DecisionPolicy

STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 1000, 128, 1e-3, 1e-2  # of each stage


def in_stages(start: DecisionPolicy, staged: DecisionPolicy, core: Core, split: Split, rows: NDArray) -> DecisionPolicy:
    """Have a policy of several stages decide as one that decides before the first layer.

    At the first stage it is the same network. A later stage no longer sees what that saw, so its own hidden layers
    learn the logits that were said of its switches from what the pass shows there, under the decisions before it.

    Args:
        start: Decides at the first stage, on pooled states.
        staged: Untrained, ``per_stage``; it is changed.
        core: The env's core.
        split: Where the instances are that the later stages learn on.
        rows: Their rows, ``[n]``.
    """
    first, shown = staged.body.of_stage[0], len(staged.stages) + 1  # numbers in front of what the stage shows
    seen = slice(shown, shown + start.observation_size)
    with torch.no_grad():
        first.load_state_dict({**start.body.state_dict(), "0.weight": first[0].weight})
        first[0].weight.zero_()
        first[0].weight[:, seen] = start.body[0].weight
        staged.head.load_state_dict(start.head.state_dict())
    observations: list[list[torch.Tensor]] = [[] for _ in staged.stages]
    said = []
    for part in seen_together(core, rows):
        said.append(_walked(start, core, split, part, seen, observations))
    wanted = torch.cat(said)
    later = zip(staged.body.of_stage[1:], observations[1:], core.steps.components[1:], strict=True)
    for layers, looked, components in later:
        own = np.isin(np.repeat(np.arange(len(core.nvec)), core.nvec), components)
        inputs, chosen = torch.cat(looked), torch.from_numpy(own)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(STEPS):
            picked = torch.randint(len(inputs), (BATCH,))
            logits = staged.head(layers(inputs[picked]))[:, chosen]
            optimizer.zero_grad()
            F.mse_loss(logits, wanted[picked][:, chosen]).backward()
            optimizer.step()
    return staged.eval()


@torch.no_grad()
def with_token_encoder(start: DecisionPolicy, staged: DecisionPolicy) -> DecisionPolicy:
    """Have a policy of several stages decide just as one that decides at once on tokens, which all stages show.

    Args:
        start: Decides before the first layer, on tokens.
        staged: Untrained, ``per_stage``, with as many channels; it is changed.
    """
    staged.token_encoder.load_state_dict(start.token_encoder.state_dict())
    staged.head.load_state_dict(start.head.state_dict())
    for layers in staged.body.of_stage:
        layers.load_state_dict({**start.body.state_dict(), "0.weight": layers[0].weight})
        layers[0].weight.zero_()
        layers[0].weight[:, staged.observation_size :] = start.body[0].weight  # what it makes of tokens comes last
    return staged.eval()


@torch.no_grad()
def _walked(
    start: DecisionPolicy,
    core: Core,
    split: Split,
    rows: NDArray,
    seen: slice,
    observations: list[list[torch.Tensor]],
) -> torch.Tensor:
    """The logits ``[n, logits]`` of ``start`` on rows; what each stage shows under its decisions is added to a list."""
    said, stage = [], iter(observations)

    def decide(observed: NDArray) -> NDArray:
        next(stage).append(torch.from_numpy(observed))
        if not said:
            said.append(start(torch.from_numpy(observed[:, seen])))
        return start.choose(said[0]).numpy()

    core.rollout(split, rows, decide)
    return said[0]
