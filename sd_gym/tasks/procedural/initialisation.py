"""Structured initial weights for the bundled backbone, so that it begins with the ability to look facts up.

From random weights a model of this size and training time does not find out how to answer ``who pays finn ?``: the
right subject is the token whose *next two* tokens equal the *last two* tokens of the question, and nothing rewards half
of that circuit. In the spirit of mimetic initialisation (Trockman and Kolter 2023) it is laid out here:

* tokens and positions live in different halves of the embedding, and positions are nearly orthogonal sinusoids,
* the first encoder layer's heads look at the neighbours at -1, -2, +2 and +1 and copy them into four subspaces,
* one head of the second layer compares the two neighbours before a token with the two after every other token.

Everything is trained afterwards like any other weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import MBartForConditionalGeneration
from transformers.models.mbart.modeling_mbart import MBartAttention

BRANCH_SCALE = 0.3  # of the output of every residual branch: keeps what the first two layers write readable
TOKEN_SCALE = (0.1, 1.4)  # of the token embeddings, in the half of the positions and in their own
POSITION_AMPLITUDE = 0.15
NEIGHBOUR_SHARPNESS = 0.17
GAIN = 3.0  # of what the first two layers write, over the embedding
NEIGHBOURS = (-1, -2, 2, 1)  # what each head of the first encoder layer looks at


@torch.no_grad()
def lay_out_look_up(model: MBartForConditionalGeneration) -> None:
    """Give the model the structured initial weights, in place."""
    width = model.config.d_model
    half, head = width // 2, width // model.config.encoder_attention_heads
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            parameter.mul_(BRANCH_SCALE)
    for module in model.modules():
        if isinstance(module, MBartAttention):
            module.k_proj.weight.copy_(module.q_proj.weight)  # equal tokens attend to each other
    _separate_tokens_and_positions(model, half)
    first, second = (layer.self_attn for layer in model.model.encoder.layers[:2])
    subspaces = _orthogonal(width, width)
    reads = {neighbour: subspaces[:, head * h : head * (h + 1)].T for h, neighbour in enumerate(NEIGHBOURS)}
    copies = {distance: _on_tokens(head, width) for distance in (1, 2)}
    for h, neighbour in enumerate(NEIGHBOURS):
        rows = slice(head * h, head * (h + 1))
        query = torch.zeros(head, width)
        query[:, :half] = torch.randn(head, half) * NEIGHBOUR_SHARPNESS
        first.q_proj.weight[rows] = query
        first.k_proj.weight[rows] = query @ _shift(-neighbour, width, half)
        # The object stands 1 before the question's end and 2 after the subject, the verb 2 before and 1 after.
        first.v_proj.weight[rows] = copies[1 if neighbour in (-1, 2) else 2]
        first.out_proj.weight[:, rows] = GAIN * subspaces[:, rows]
    rows = slice(0, head)
    mix_object, mix_verb = _orthogonal(head, head), _orthogonal(head, head)
    second.q_proj.weight[rows] = mix_object @ reads[-1] + mix_verb @ reads[-2]
    second.k_proj.weight[rows] = mix_object @ reads[2] + mix_verb @ reads[1]
    second.v_proj.weight[rows] = GAIN * _on_tokens(head, width)
    second.out_proj.weight[:, rows] = GAIN * _orthogonal(width, head)


def _separate_tokens_and_positions(model: MBartForConditionalGeneration, half: int) -> None:
    tokens = model.model.shared.weight
    tokens[:, :half] *= TOKEN_SCALE[0]
    tokens[:, half:] *= TOKEN_SCALE[1]
    for stack in (model.model.encoder, model.model.decoder):
        weight = stack.embed_positions.weight
        angles = torch.arange(weight.shape[0])[:, None] * _frequencies(half)
        weight.zero_()
        weight[:, 0:half:2] = POSITION_AMPLITUDE * torch.sin(angles)
        weight[:, 1:half:2] = POSITION_AMPLITUDE * torch.cos(angles)


def _frequencies(half: int) -> Tensor:
    """Evenly spaced over (0, pi), which makes different positions nearly orthogonal."""
    return math.pi * (torch.arange(half // 2) + 0.5) / (half // 2)


def _shift(distance: int, width: int, half: int) -> Tensor:
    """The linear map ``[width, width]`` from the embedding of position p to that of p + distance."""
    matrix = torch.zeros(width, width)
    sine, cosine = torch.arange(0, half, 2), torch.arange(1, half, 2)
    angle = _frequencies(half) * distance
    matrix[sine, sine] = matrix[cosine, cosine] = torch.cos(angle)
    matrix[sine, cosine] = torch.sin(angle)
    matrix[cosine, sine] = -torch.sin(angle)
    return matrix


def _on_tokens(rows: int, width: int) -> Tensor:
    """A random map ``[rows, width]`` that reads the tokens' half only and keeps their scale."""
    half = width // 2
    weight = torch.zeros(rows, width)
    weight[:, half:] = torch.randn(rows, half) / math.sqrt(half)
    return weight


def _orthogonal(size: int, columns: int) -> Tensor:
    """Random orthonormal columns ``[size, columns]``."""
    return torch.linalg.qr(torch.randn(size, size))[0][:, :columns]
