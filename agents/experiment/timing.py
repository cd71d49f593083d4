"""Time of a policy's decisions and passes over the dense backbone's."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.experiment.export import export
from sd_gym.agents.learning.decisions import PolicyLike

from sd_gym.backbones import Backbone
from sd_gym.envs.core import BackboneCore
from sd_gym.execution.passes import Passes
from sd_gym.execution.split import BackboneSplit
from sd_gym.inference.staged_passes import StagedPasses
from sd_gym.policy import DecisionPolicy
from sd_gym.policy.artefact import SkipPolicy
from sd_gym.switch import first_layer_input

WARM_UP, LEAST_TIMED = 2, 3  # queues before timing; fewest timed queues
TIMED_ROWS = 64  # rows from which batches of several rows are taken
TIMED_BULK_ROWS = 256  # rows that run in bulk, where no text is generated
TIMED_SECONDS = 30.0  # after which no further queue is timed: three queues of a large backbone take minutes


@torch.inference_mode()
def time_ratio(
    core: BackboneCore, policy: PolicyLike, split_name: str, batch_size: int | None, batches: int = 12
) -> dict[str, float | None]:
    """Time of deciding and of the switched backbone, over the time of the dense one, end to end.

    Rows run from tokenised texts to logits: single rows (``batch_size=1``), queues of ``TIMED_ROWS`` random rows in
    passes of at most ``batch_size``, or ``TIMED_BULK_ROWS`` rows in passes of any size (``None``: in bulk; of generated
    texts ``TIMED_ROWS``).

    The dense backbone takes rows as they come, each pass padded to its longest row; in bulk, by length. With the
    policy, a queue is observed and decided on. It then runs in the passes of the env: by decision, and by length where
    that pays. Tokens are ranked if some are dropped.

    Passes by length and shorter inputs save time without any decision, so both are timed as controls, except in bulk.
    Each queue times everything, after a warm-up. There are as many queues as give ``batches`` passes, in bulk three,
    and fewer on large backbones.

    Returns:
        Medians over queues of times over the dense one: ``time_ratio``; ``dense_by_length``, the dense backbone in
        passes by length alone; ``dense_shortened``, the dense backbone on inputs that are all cut to the share of
        tokens that the policy keeps (``None`` if the env drops none).
    """
    split = core.split(split_name)
    # A policy with several stages runs like an artefact: in passes by length, then the rest for rows that go on. Others
    # run as in the env.
    artefact = None
    if core.is_staged and isinstance(policy, DecisionPolicy):
        artefact = export(core, policy, (), {})
    random, ratios = np.random.default_rng(0), list[dict[str, float]]()
    warm_up, least = (WARM_UP, LEAST_TIMED) if batch_size else (1, 1)
    rows_of = 1 if batch_size == 1 else TIMED_BULK_ROWS if batch_size is None and not _generates(core) else TIMED_ROWS
    count = min(rows_of, len(split))
    started, queues = time.perf_counter(), max(LEAST_TIMED, batches * (batch_size or 0) // count)
    for number in range(queues + warm_up):
        if len(ratios) >= least and time.perf_counter() - started > TIMED_SECONDS:
            break
        rows = random.integers(len(split), size=count)
        dense, runs = _Queue(core, policy, artefact, split, rows, batch_size).runs()
        dense_seconds = _seconds(dense, core.backbone)
        seconds = {name: _seconds(run, core.backbone) for name, run in runs.items()}
        if number >= warm_up:
            ratios.append({name: value / dense_seconds for name, value in seconds.items()})
    medians = {name: statistics.median(ratio[name] for ratio in ratios) for name in ratios[0]}
    return dict.fromkeys(("time_ratio", "dense_by_length", "dense_shortened")) | medians


Runs = dict[str, Callable[[], object]]


@dataclass
class _Queue:
    """Rows that are timed together, in passes of at most ``size`` rows; each way to run them is a method.

    If the policy judges generated texts, all ways but ``shortened`` generate them.
    """

    core: BackboneCore
    policy: PolicyLike
    artefact: SkipPolicy | None
    split: BackboneSplit
    rows: NDArray
    size: int | None

    def __post_init__(self) -> None:
        count = len(self.rows)
        self.everything = np.arange(count)
        self.skip_none = np.zeros((count, len(self.core.mask_nvec)), dtype=np.int64)
        self.parts = np.split(self.rows, range(self.size or count, count, self.size or count))
        self.unseen, self.again = self.split.uncached(self.rows), self.split.uncached(self.rows)
        self.unseen.passes.most = self.again.passes.most = self.size
        self.generates = _generates(self.core)
        self.share = 1.0
        if len(self.core.config.tokens.shares) > 1:
            level = self.core.to_masks(self.core.rollout(self.split, self.rows, self.policy.decide)[0])[:, -1]
            kept = self.split.tokens.kept_length(self.rows, level)
            self.share = kept.sum() / self.split.encoded.source_length[self.rows].sum()

    def runs(self) -> tuple[Callable[[], object], Runs]:
        """The dense reference to time, and what is compared with it, by its key in ``time_ratio``.

        In bulk the reference runs by length, so only the policy is compared.
        """
        if self.size is None:
            return self.dense_by_length, {"time_ratio": self.decided}
        runs: Runs = {"time_ratio": self.decided, "dense_by_length": self.dense_by_length}
        if len(self.core.config.tokens.shares) > 1:
            runs["dense_shortened"] = self.shortened
        return self.dense, runs

    def dense(self) -> None:
        """The dense backbone, on rows as they come."""
        for part in self.parts:
            inputs, none = self.split.passes.inputs(part), self.skip_none[: len(part)]
            if self.generates:
                self.split.passes.generated_batch(part, none, inputs, judges=False)
            else:
                self.core.backbone.logits(inputs)

    def dense_by_length(self) -> None:
        """The dense backbone, in passes by length."""
        self._run(self.again.passes, self.skip_none)

    def decided(self) -> None:
        """The policy's decisions, and the backbone under them."""
        if self.artefact is None:
            list(self.core.decided_logits(self.unseen, self.everything, self.policy.decide))
            return
        known = self.artefact.decides_first and len(self.rows) > 1  # a single text is decided on in its pass
        passes, decisions = StagedPasses(self.unseen, self.artefact, known=known), self.skip_none
        if known:
            backbone = self.core.backbone
            inputs = self.unseen.encoded.inputs(self.everything, backbone.model.device)
            first = first_layer_input(backbone.board, inputs), inputs["attention_mask"]
            observed = passes.observe_first(self.everything, *first)
            decisions = self.artefact.network.decide(observed)[:, : self.skip_none.shape[1]]
        self._run(passes, decisions)

    def shortened(self) -> None:
        """The dense backbone, on inputs cut to the share of tokens that the policy keeps."""
        backbone = self.core.backbone
        for inputs in map(self.split.passes.inputs, self.parts):
            length = max(1, round(self.share * inputs["input_ids"].shape[1]))
            columns = slice(-length, None) if backbone.head.padding_side == "left" else slice(length)
            backbone.logits({name: value if name == "labels" else value[:, columns] for name, value in inputs.items()})

    def _run(self, passes: Passes, decisions: NDArray) -> None:
        if self.generates:
            passes.answers(self.everything, decisions)
        else:
            list(passes.logits(self.everything, decisions))


def _generates(core: BackboneCore) -> bool:
    """Whether texts are generated to be timed: the policy judges them."""
    return core.has_answer_stage and not core.backbone.head.judges_passes


def _seconds(run: Callable[[], object], backbone: Backbone) -> float:
    """Seconds of a run, which is dense unless it makes decisions of its own."""
    board = backbone.board
    wait = torch.zeros((), device=backbone.model.device).item  # a device runs all that came before, then gives a value
    with board.decide(np.zeros((1, len(board)), dtype=bool)):  # ignore a policy attached to the model
        wait()
        started = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - started
