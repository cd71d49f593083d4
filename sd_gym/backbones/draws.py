"""Random decisions for preparing a backbone: four ways to draw them, and which layers matter least."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from sd_gym.backbones.heads import head_of
from sd_gym.switch import Switchboard

NOISE = 3.0  # ranks: how far the layers that ``whole_layers`` draws stray from the least important ones
LOWEST_SHARE = 1 / 3  # lowest number of layers that a row skips, as a share of the highest
MEASURED_ROWS = 32  # rows of a batch that importance is measured on, at most
TRIED = 4  # candidates for the next layer to skip
BOLDNESS = (-1.0, 2.0)  # range of the shift of a policy's log-odds of skipping
LOWEST_PROBABILITY = 0.02  # lowest probability of skipping a switch, and of running it
RANDOM_SHARE = 0.3  # share of the rows under random decisions, where a policy decides on the others

Drawing = Callable[[int, torch.Generator], Tensor]  # draws decisions of so many rows, int64 ``[rows, switches]``
Draw = Callable[[int, Tensor, float, torch.Generator, Tensor | None], Tensor]


def layers_of(board: Switchboard) -> Tensor:
    """Number of the layer that each switch is in, through all stacks in execution order, int64 ``[switches]``."""
    numbers: dict[tuple[str, int], int] = {}
    return torch.tensor([numbers.setdefault((switch.stack, switch.index), len(numbers)) for switch in board.switches])


@torch.inference_mode()
def layer_importance(board: Switchboard, batch: dict[str, Tensor], max_rate: float, accelerator: Accelerator) -> Tensor:
    """Ranks of the layers in the order in which they are best skipped, int64 ``[layers]`` on the CPU; 0: the first.

    A greedy search skips a share ``max_rate`` of them one by one. Its candidates are the few layers that raise the
    distillation loss least alone; it takes the candidate that raises it least together with the layers skipped so far,
    as layers that hardly matter alone may matter together. The other layers are ordered by their loss alone. Losses are
    measured on the first rows of ``batch`` (see ``sandwich_loss``) and averaged over the processes.
    """
    model = board.model
    head = head_of(board.model)
    layers = layers_of(board)
    names = batch.keys() - {"keep", "skip_logits"}
    inputs = {name: batch[name][:MEASURED_ROWS].to(model.device) for name in names}
    was_training = model.training
    model.eval()

    def logits(skipped: list[int]) -> Tensor:
        skip = torch.isin(layers, torch.tensor(skipped, dtype=layers.dtype)).long()
        with board.decide(skip.expand(len(inputs["labels"]), -1)), accelerator.autocast():
            return head.forward(board, inputs).float()

    dense = logits([])

    def losses(candidates: list[int], skipped: list[int]) -> Tensor:
        each = [head.distillation(logits([*skipped, layer]), dense, inputs["labels"]) for layer in candidates]
        return accelerator.reduce(torch.stack(each), "mean")  # pyright: ignore[reportReturnType]  (any structure)

    running = losses(layers.unique().tolist(), []).argsort().tolist()
    skipped: list[int] = []
    for _ in range(round(max_rate * len(running))):
        candidates = running[:TRIED]
        best = candidates[int(losses(candidates, skipped).argmin())]
        running.remove(best)
        skipped.append(best)
    model.train(was_training)
    return torch.tensor([*skipped, *running]).argsort()


def least_important(importance: Tensor, rate: float, layers: Tensor) -> Tensor:
    """The skip vector of a share of all layers, the least important ones, int64 ``[switches]``; see ``layers_of``."""
    return (importance < round(rate * len(importance)))[layers].long()


def even(rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, _: Tensor | None = None) -> Tensor:
    """Each row draws its own rate from ``[0, max_rate]``, then each switch by that rate: int64 ``[rows, switches]``.

    ``layers`` is from ``layers_of``. All draws take ranks (of ``layer_importance``); ``whole_layers`` uses them.
    """
    rates = torch.rand(rows, 1, generator=generator) * max_rate
    return (torch.rand(rows, len(layers), generator=generator) < rates).long()


def deeper(rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, _: Tensor | None = None) -> Tensor:
    """Like ``even``, but a row's rate grows with depth: from zero at the first layer to twice its mean at the last.

    Fewer layers follow a deep one to make up for what it skips (Fan et al. 2020, progressive rates).
    """
    depth = (2 * layers + 1) / (layers.max() + 1)  # 1 on average over layers
    rates = torch.rand(rows, 1, generator=generator) * max_rate * depth
    return (torch.rand(rows, len(layers), generator=generator) < rates).long()


def staged(rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, _: Tensor | None = None) -> Tensor:
    """Like staged policies: layers run up to a random one; after it, half of the rows skip all, half draw ``even``."""
    skip = even(rows, layers, max_rate, generator)
    stage = torch.randint(0, int(layers.max()) + 2, (rows, 1), generator=generator)
    exits = torch.rand(rows, 1, generator=generator) < 0.5
    return torch.where(layers < stage, 0, torch.where(exits, 1, skip))


def whole_layers(
    rows: int, layers: Tensor, max_rate: float, generator: torch.Generator, importance: Tensor | None
) -> Tensor:
    """Each row skips whole layers, mostly the least important: from a third of ``max_rate`` of all layers up to it.

    Ranks by ``importance`` get Gumbel noise, so a row draws layers one by one, with odds that fall with the rank.
    """
    assert importance is not None  # measured before it is drawn
    count = len(importance)
    most = max_rate * count * (LOWEST_SHARE + (1 - LOWEST_SHARE) * torch.rand(rows, 1, generator=generator))
    noise = -torch.empty(rows, count).exponential_(generator=generator).log()  # from a Gumbel distribution
    order = (importance - NOISE * noise).argsort(dim=1).argsort(dim=1)
    return (order < most.round())[:, layers].long()


DRAWS: dict[str, Draw] = {"even": even, "deeper": deeper, "staged": staged, "layers": whole_layers}


def decisions_around(skip_logits: Tensor, random: Tensor, generator: torch.Generator) -> Tensor:
    """Skip vectors around those of a policy, some that skip more and some less, int64 ``[rows, switches]`` on the CPU.

    ``skip_logits`` are the policy's log-odds of skipping each switch. A share of the rows takes the decisions of
    ``random`` instead, so that the backbone is robust to more than this one policy.
    """
    rows = len(skip_logits)
    lowest, highest = BOLDNESS
    shifted = skip_logits + lowest + (highest - lowest) * torch.rand(rows, 1, generator=generator)
    probability = shifted.sigmoid().clamp(LOWEST_PROBABILITY, 1 - LOWEST_PROBABILITY)
    drawn = (torch.rand(probability.shape, generator=generator) < probability).long()
    return torch.where(torch.rand(rows, 1, generator=generator) < RANDOM_SHARE, random, drawn)
