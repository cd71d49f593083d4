"""Which decisions a backbone meets while it is prepared: four ways to draw them, and which layers matter least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from sd_gym.backbones.heads import head_of
from sd_gym.switch import Switchboard

NOISE = 3.0  # ranks: how far the layers that ``whole_layers`` draws stray from the least important ones
FEWEST = 1 / 3  # of the most layers that a row may draw
MEASURED_ROWS = 8  # of a batch, that importance is measured on
BOLDNESS = (-1.0, 2.0)  # between what a policy's log-odds of skipping are shifted
RARE = 0.02  # the least probability of skipping, and of not skipping, a switch
RANDOM_SHARE = 0.3  # of the rows, beside those that a policy decides on

Drawing = Callable[[int, torch.Generator], Tensor]  # draws decisions of so many rows, int64 ``[rows, switches]``
Draw = Callable[[int, Tensor, float, torch.Generator, Tensor | None], Tensor]


def layers_of(board: Switchboard) -> Tensor:
    """Number of the layer that each switch is in, through all stacks in execution order, int64 ``[switches]``."""
    numbers: dict[tuple[str, int], int] = {}
    return torch.tensor([numbers.setdefault((switch.stack, switch.index), len(numbers)) for switch in board.switches])


@torch.inference_mode()
def layer_importance(board: Switchboard, batch: dict[str, Tensor], accelerator: Accelerator) -> Tensor:
    """How much each layer matters: the distillation loss if it alone is skipped, float32 ``[layers]`` on the CPU.

    ``batch``: see ``sandwich_loss``; its first rows are taken, and the mean over the processes.
    """
    model, head, layers = board.model, head_of(board.model), layers_of(board)
    named = {name: value[:MEASURED_ROWS] for name, value in batch.items() if name not in ("keep", "skip_logits")}
    inputs = {name: value.to(model.device) for name, value in named.items()}
    learns = model.training
    model.eval()

    def logits(skip: Tensor) -> Tensor:
        with board.decide(skip.long().expand(len(inputs["labels"]), -1)), accelerator.autocast():
            return head.forward(board, inputs).float()

    dense = logits(torch.zeros_like(layers))
    each = [logits(layers == layer) for layer in layers.unique()]
    losses = torch.stack([head.distillation(skipped, dense, inputs["labels"]) for skipped in each])
    model.train(learns)
    return accelerator.reduce(losses, "mean").cpu()  # pyright: ignore[reportAttributeAccessIssue]  (any structure)


def least_important(importance: Tensor, rate: float, layers: Tensor) -> Tensor:
    """The skip vector of a share of all layers, the least important ones, int64 ``[switches]``; see ``layers_of``."""
    return (importance.argsort().argsort() < round(rate * len(importance)))[layers].long()


def even(
    rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, importance: Tensor | None = None
) -> Tensor:
    """Each row draws its own rate from ``[0, max_rate]``, then each switch by that rate: int64 ``[rows, switches]``.

    ``layers``: from ``layers_of``; ``importance``: from ``layer_importance``, for ``whole_layers`` alone.
    """
    rates = torch.rand(rows, 1, generator=generator) * max_rate
    return (torch.rand(rows, len(layers), generator=generator) < rates).long()


def deeper(
    rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, importance: Tensor | None = None
) -> Tensor:
    """Like ``even``, but a row's rate grows with depth: from nothing before the first layer to twice after the last.

    What is skipped deep down has fewer layers after it that must make up for it (Fan et al. 2020, progressive rates).
    """
    depth = (2 * layers + 1) / (layers.max() + 1)  # 1 on average over layers
    rates = torch.rand(rows, 1, generator=generator) * max_rate * depth
    return (torch.rand(rows, len(layers), generator=generator) < rates).long()


def staged(
    rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, importance: Tensor | None = None
) -> Tensor:
    """As staged policies decide: layers run up to a random one; after it, half of the rows skip all, half ``even``."""
    skip = even(rows, layers, max_rate, generator)
    look = torch.randint(0, int(layers.max()) + 2, (rows, 1), generator=generator)
    leaves = torch.rand(rows, 1, generator=generator) < 0.5
    return torch.where(layers < look, 0, torch.where(leaves, 1, skip))


def whole_layers(
    rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, importance: Tensor | None
) -> Tensor:
    """Each row skips whole layers: between a third of ``max_rate`` of all and that, the least important ones mostly.

    Ranks by ``importance`` get Gumbel noise, so that a row draws layers one by one by odds that fall with the rank.
    """
    assert importance is not None  # measured before it is drawn
    count = len(importance)
    most = max_rate * count * (FEWEST + (1 - FEWEST) * torch.rand(rows, 1, generator=generator))
    noise = -torch.empty(rows, count).exponential_(generator=generator).log()  # of a Gumbel distribution
    order = (importance.argsort().argsort() - NOISE * noise).argsort(dim=1).argsort(dim=1)
    return (order < most.round())[:, layers].long()


DRAWS: dict[str, Draw] = {"even": even, "deeper": deeper, "staged": staged, "layers": whole_layers}


def decisions_around(
    skip_logits: Tensor, random: Tensor, generator: torch.Generator, random_share: float = RANDOM_SHARE
) -> Tensor:
    """Skip vectors around those of a policy, some bolder and some more cautious, int64 ``[rows, switches]`` on the CPU.

    ``skip_logits`` are its log-odds of skipping each switch. A share of the rows takes those of ``random``, so that the
    backbone is robust to more than this one policy.
    """
    rows = len(skip_logits)
    lowest, highest = BOLDNESS
    shifted = skip_logits + lowest + (highest - lowest) * torch.rand(rows, 1, generator=generator)
    probability = shifted.sigmoid().clamp(RARE, 1 - RARE)
    drawn = (torch.rand(probability.shape, generator=generator) < probability).long()
    return torch.where(torch.rand(rows, 1, generator=generator) < random_share, random, drawn)
