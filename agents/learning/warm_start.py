"""Warm starts: a policy that learning begins with; one of a single stage is converted to several stages."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.learning.decisions import DENSE_MARGIN, row_batches
from sd_gym.agents.runs.folder import read_result
from torch import Tensor, nn
from torch.nn import functional as F

from sd_gym.envs.protocols import Core, Observations, Split
from sd_gym.policy import DecisionPolicy
from sd_gym.tasks.ranking import STATISTICS_SIZE

STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 1000, 128, 1e-3, 1e-2  # of each stage
FIELDS = ("stages", "observation_size", "channels", "token_width", "nvec", "switches", "network", "hidden")
FIELDS_ONCE = ("nvec", "switches", "network", "hidden", "channels")  # of a start that decides once, for several stages


def read_start(folder: Path, core: Core, *, blind: bool) -> DecisionPolicy:
    """The policy of a run to start from; ``ValueError`` if a policy that is ``blind`` or not cannot learn from it."""
    start = DecisionPolicy.load(folder)
    if (folder / "result.json").is_file() and read_result(folder).get("margin") == DENSE_MARGIN:
        start = start.with_margin(-DENSE_MARGIN)  # dense was selected; nothing could be learned from that
    if start.codebook is not None and (start.noise != "none" or (start.stages == ["first"] and core.is_staged)):
        raise ValueError(
            f"the policy in {folder} cannot be a start here: it decides only among a few masks. Take a run of "
            "static rather than of hull, and one that was not reduced"
        )
    if start.blind and not blind and start.head.weight.any():
        raise ValueError(
            f"the policy in {folder} cannot be a start here: it was trained blind, and this agent is not. Take a "
            "run of an agent that is not blind, or train a blind one"
        )
    return start


def check_start(start: DecisionPolicy, expected: DecisionPolicy, folder: Path, names: tuple[str, ...] = FIELDS) -> None:
    """Raise ``ValueError`` if one of these attributes of a start is not the expected one."""
    for name in names:
        has, needs = getattr(start, name), getattr(expected, name)
        if has != needs:
            hints = {
                "channels": "; both observe tokens (observation=tokens), or neither",
                "hidden": "; take the run of an agent that learns: a cascade is no start",
            }
            raise ValueError(
                f"the policy in {folder} cannot be a start here: its {name} is {has}, expected {needs}"
                f"{hints.get(name, '')}"
            )


def staged_start(start: DecisionPolicy, staged: DecisionPolicy, core: Core, folder: Path, seed: int) -> DecisionPolicy:
    """``staged`` for all stages, made to decide as nearly as possible like ``start``, which decides once.

    ``staged`` is untrained. Raises ValueError if ``start``, from ``folder``, observes anything else.
    """
    check_start(start, staged, folder, FIELDS_ONCE)
    before = len(staged.stages) + 1  # numbers in front of the first stage's features
    expected = staged.token_width or staged.observation_size - before - core.stage_observer.judges
    if start.observation_size != expected:
        raise ValueError(
            f"the policy in {folder} cannot be a start here: it observes {start.observation_size} features, "
            f"expected {expected}, of pooled states or of a token"
        )
    if start.channels is not None:
        return staged_from_tokens(start, staged)
    split = core.split("train")
    rows = np.arange(min(len(split), STATISTICS_SIZE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return staged_from_single(start, staged, core, split, rows)


def staged_from_single(
    start: DecisionPolicy, staged: DecisionPolicy, core: Core, split: Split, rows: NDArray
) -> DecisionPolicy:
    """Make a policy of several stages decide like ``start``, which decides before the first layer on pooled states.

    At the first stage it is the same network. Later stages have other observations. Their hidden layers are trained to
    give the logits of ``start`` for their own switches, on ``rows [n]`` of a split and after its earlier decisions.
    ``staged`` is changed; it is untrained and ``per_stage``.
    """
    first, *later = _layers_of_stages(staged)
    before = len(staged.stages) + 1  # numbers in front of the pooled states
    pooled = slice(before, before + start.observation_size)
    _copy_layers(start, first, pooled)
    with torch.no_grad():
        staged.head.load_state_dict(start.head.state_dict())
    observed: list[list[Tensor]] = [[] for _ in staged.stages]
    targets = torch.cat([_rollout(start, core, split, part, pooled, observed) for part in row_batches(core, rows)])
    component = np.repeat(np.arange(len(core.nvec)), core.nvec)  # of each logit
    for layers, of_stage, components in zip(later, observed[1:], core.stage_actions.components[1:], strict=True):
        inputs, own = torch.cat(of_stage), torch.from_numpy(np.isin(component, components))
        optimizer = torch.optim.AdamW(layers.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(STEPS):
            picked = torch.randint(len(inputs), (BATCH,))
            logits = staged.head(layers(inputs[picked]))[:, own]
            optimizer.zero_grad()
            F.mse_loss(logits, targets[picked][:, own]).backward()
            optimizer.step()
    return staged.eval()


def staged_from_tokens(start: DecisionPolicy, staged: DecisionPolicy) -> DecisionPolicy:
    """Make a policy of several stages decide exactly like ``start``, which decides once, on tokens.

    All stages observe tokens. ``staged`` is changed; it is untrained, ``per_stage``, and has as many channels.
    """
    staged.token_encoder.load_state_dict(start.token_encoder.state_dict())
    staged.head.load_state_dict(start.head.state_dict())
    for layers in _layers_of_stages(staged):
        _copy_layers(start, layers, slice(staged.observation_size, None))  # features of tokens come last
    return staged.eval()


def _layers_of_stages(staged: DecisionPolicy) -> list[nn.Module]:
    return list(staged.body.get_submodule("of_stage").children())


@torch.no_grad()
def _copy_layers(start: DecisionPolicy, layers: nn.Module, columns: slice) -> None:
    """Give a stage the hidden layers of ``start``, which observes these ``columns`` of the stage's observation."""
    weight = layers.get_parameter("0.weight")
    layers.load_state_dict({**start.body.state_dict(), "0.weight": weight})
    weight.zero_()
    weight[:, columns] = start.body.get_parameter("0.weight")


@torch.no_grad()
def _rollout(
    start: DecisionPolicy, core: Core, split: Split, rows: NDArray, pooled: slice, observed: list[list[Tensor]]
) -> Tensor:
    """Logits ``[n, logits]`` of ``start`` on rows; observations under its decisions are appended to ``observed``."""
    logits, stage = torch.zeros(0), iter(observed)

    def decide(observations: Observations) -> NDArray:
        nonlocal logits
        assert not isinstance(observations, dict)  # pooled states are flat
        of_stage = torch.from_numpy(observations)
        next(stage).append(of_stage)
        if not len(logits):
            logits = start(of_stage[:, pooled])
        return start.choose(logits).numpy()

    core.rollout(split, rows, decide)
    return logits
