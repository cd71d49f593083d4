"""Imitation at several stages: the policy with the least expected cost, given the outcomes of all decisions.

Each stage decides a part of a path of masks, and has a few choices ("ways"), each skipping one more candidate. All
training instances run under all combinations of ways, or under many of them, so that their FLOPs and losses are known.
Lost instances are rare and partly chance. So boosted trees (Friedman 2001) predict the loss of a combination from the
last observation, for each instance by trees that have not learned on it. The policy minimises FLOPs plus the price of
the predicted loss, in expectation over its own decisions at all stages: a sum over combinations, without any sampling.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sd_gym.agents.baselines.search import OnRound
from sd_gym.agents.learning.decisions import BATCH
from torch import Tensor

from sd_gym.envs.protocols import Core
from sd_gym.execution.passes import PASS_TOKENS
from sd_gym.going_on import stages_of_pass
from sd_gym.policy import DecisionPolicy, blinded
from sd_gym.policy.observations import to_tensors
from sd_gym.switch import PassState

COMBINATIONS = 64  # at most
TREES, RATE = 100, 0.05  # of boosting
FOLDS = 5
LOG_PROB_WEIGHT = 1e-2  # price of squared log-probabilities, so that a way that seems bad at first can still be learned


class Stage(NamedTuple):
    """A stage, and its part of each combination."""

    ways: Tensor  # int64 [ways, components], dense first; -1 for components of other stages
    earlier: NDArray  # the different decisions at earlier stages, int64 [earlier, components]
    before: NDArray  # index of each combination's decisions in ``earlier``, int64 [combinations]
    way: NDArray  # index of each combination's way in ``ways``, int64 [combinations]


class Outcomes(NamedTuple):
    """Outcomes of instances under all combinations."""

    seen: list[Tensor]  # observations at each stage, without tokens: float32 [n, earlier, size]
    lost: Tensor  # quality, float32 [n, combinations]; negative: gained
    flops: Tensor  # ratios, float32 [n, combinations]
    going_on: Tensor  # what going on adds, float32 [n, combinations]; 0 without an answer stage


def ways_of_stages(core: Core, path: NDArray) -> list[NDArray]:
    """For each stage that skips, the parts of masks ``[masks, components]`` that it decides.

    Each is int64 ``[ways, components]``, in the order of the masks, and 0 in components of other stages. Repetitions
    are left out if they follow each other, as on a path, where the dense one is first.
    """
    parts = []
    for components in core.stage_actions.components[: len(stages_of_pass(core.stages))]:
        ways = np.zeros_like(path)
        ways[:, components] = path[:, components]
        parts.append(ways[np.append(True, (ways[1:] != ways[:-1]).any(axis=1))])
    return parts


def combinations_of(sizes: Sequence[int], random: np.random.Generator) -> NDArray:
    """Indices of ways, one per stage, int64 ``[combinations, stages]``: all, or dense and random ones if too many."""
    if np.prod(sizes, dtype=float) <= COMBINATIONS:
        return np.array(list(product(*map(range, sizes))))
    drawn = random.integers(sizes, size=(COMBINATIONS - 1, len(sizes)))
    return np.unique(np.concatenate([np.zeros((1, len(sizes)), dtype=np.int64), drawn]), axis=0)


@dataclass(eq=False)
class Combinations:
    """Combinations of the ways of a path, their outcomes on training instances, and the predicted losses."""

    core: Core
    rows: NDArray  # of the training split, int64 [n]
    path: NDArray  # masks from dense to all skipped, int64 [masks, components]
    blind: bool  # whether the agent observes the stage alone
    embedded: Callable[[NDArray], Any] | None  # token observations of rows; None: none are observed
    on_scored: OnRound  # called with the decisions scored so far
    seed: int

    def __post_init__(self) -> None:
        self._split = self.core.split("train")
        self.decisions, self.stages = self._combine()  # int64 [combinations, components]
        self.outcomes = self._run()
        self.risk = self._risk()  # float32 [n, combinations]

    @property
    def codebook(self) -> Tensor | None:
        """The ways of all stages, int64 ``[ways, components]``; ``None`` if each stage has a single component."""
        if all(len(components) == 1 for components in self.core.stage_actions.components):
            return None
        return torch.cat([stage.ways for stage in self.stages])

    def objective(self, policy: DecisionPolicy, chosen: NDArray | slice, price: float) -> Tensor:
        """The loss of a policy on instances, at the price of a lost instance: mean ``costs`` and a regulariser.

        The regulariser is ``LOG_PROB_WEIGHT`` times the squared log-probabilities. Without it, ways that seem bad at
        first lose their probability, and so their gradient, before the policy can tell for which inputs they are good.
        """
        log_probs = self.log_probs(policy, chosen)
        return self.costs(log_probs, chosen, price).mean() + LOG_PROB_WEIGHT * sum(
            log_prob.square().mean() for log_prob in log_probs
        )

    @torch.no_grad()
    def best_mask(self, policy: DecisionPolicy, price: float) -> NDArray:
        """The decision ``[components]`` that costs least on average if it is made for all inputs.

        The policy's preference says which inputs go on; each decision has the threshold that is best for it. Costs are
        FLOPs plus ``price`` per lost instance.
        """
        parts = np.split(np.arange(len(self.rows)), range(BATCH, len(self.rows), BATCH))
        preferred = torch.cat([self.log_probs(policy, part)[-1] for part in parts])
        surest = (preferred[..., 1] - preferred[..., 0]).argsort(dim=0)
        saved = (self.outcomes.going_on - price * self.outcomes.lost).gather(0, surest).cumsum(dim=0).amax(dim=0)
        cost = (self.outcomes.flops + self.outcomes.going_on).sum(dim=0) - saved
        return self.decisions[int(cost.argmin())]

    def log_probs(self, policy: DecisionPolicy, chosen: NDArray | slice) -> list[Tensor]:
        """Log-probabilities of the ways of each stage, after each of its earlier decisions, ``[n, earlier, ways]``."""
        tokens, log_probs = None if self.embedded is None else self.embedded(self.rows[chosen]), list[Tensor]()
        for stage, seen in zip(self.stages, self.outcomes.seen, strict=True):
            flat = seen[chosen].flatten(0, 1)
            logits = policy(flat if tokens is None else {**tokens, "stage": flat})
            log_prob = policy.log_likelihood(logits, stage.ways).log_softmax(dim=1)
            log_probs.append(log_prob.unflatten(0, (-1, seen.shape[1])))
        return log_probs

    def costs(self, log_probs: list[Tensor], chosen: NDArray | slice, price: float) -> Tensor:
        """Expected FLOPs ratio plus price of the predicted loss, a mean over instances, float32 ``[stages]``.

        From each stage on, a policy with these ``log_probs`` decides; earlier decisions are drawn evenly. So the first
        value is the cost of the policy. The others teach a stage in states that the policy never reaches now.
        Combinations that did not run count as never chosen.
        """
        outcomes = self.outcomes
        risk = self.risk[chosen]
        parts = list[Tensor]()
        answer, skipping = price * risk, list(zip(self.stages, log_probs, strict=True))
        if self.core.has_answer_stage:
            accepted = skipping.pop()[1][..., 0].exp()
            answer = accepted * answer + (1 - accepted) * outcomes.going_on[chosen]
            parts.append(torch.zeros_like(risk))  # all combinations are drawn evenly
        parts += [log_prob[:, stage.before, stage.way] for stage, log_prob in reversed(skipping)]
        taken = torch.stack(parts).cumsum(dim=0).flip(0).softmax(dim=2)  # from each stage on
        return (taken * (outcomes.flops[chosen] + answer)).sum(dim=2).mean(dim=1)

    def _combine(self) -> tuple[NDArray, list[Stage]]:
        core, ways = self.core, ways_of_stages(self.core, self.path)
        numbers = combinations_of([len(of_stage) for of_stage in ways], np.random.default_rng(self.seed))
        stages, decided = list[Stage](), np.zeros((len(numbers), len(core.nvec)), dtype=np.int64)
        for components, of_stage, way in zip(core.stage_actions.components, ways, numbers.T, strict=False):
            own = np.full_like(of_stage, -1)
            own[:, components] = of_stage[:, components]
            earlier, before = np.unique(decided, axis=0, return_inverse=True)
            stages.append(Stage(torch.from_numpy(own), earlier, before.reshape(-1), way))
            decided = decided + of_stage[way]
        if core.has_answer_stage:
            both, every = np.full((2, len(core.nvec)), -1), np.arange(len(decided))
            both[:, -1] = 0, 1  # accept, and go on
            stages.append(Stage(torch.from_numpy(both), decided, every, np.zeros_like(every)))
        return decided, stages

    def _run(self) -> Outcomes:
        """Run all instances under all combinations, in batches of about the same length."""
        results, scored = list[tuple[list[Tensor], Tensor]](), 0
        size = max(1, PASS_TOKENS // self.core.config.backbone.max_source_length)
        order = np.argsort(self._split.encoded.source_length[self.rows], kind="stable")
        for part in np.split(order, range(size, len(order), size)):
            seen: list[dict[int, Tensor]] = [{} for _ in self.stages]
            outcomes = dict(self._walk(self.rows[part], seen, 0, np.arange(len(self.decisions)), None))
            stacked = [torch.stack([of_stage[number] for number in sorted(of_stage)], dim=1) for of_stage in seen]
            results.append((stacked, torch.stack([outcomes[number] for number in sorted(outcomes)], dim=1)))
            scored += len(part) * len(outcomes)
            self.on_scored(scored)
        back = torch.from_numpy(np.argsort(order))
        seen_in, outcomes_in = zip(*results, strict=True)
        observed = [torch.cat(of_stage)[back] for of_stage in zip(*seen_in, strict=True)]
        return Outcomes(observed, *torch.cat(outcomes_in)[back].unbind(dim=2))

    def _walk(
        self, rows: NDArray, seen: list[dict[int, Tensor]], number: int, some: NDArray, state: PassState | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Run rows under ``some`` combinations, which agree at all stages before the one with index ``number``.

        Yields each combination's index, and its loss, FLOPs ratio and what going on adds, float32 ``[n, 3]``.
        Observations are added to ``seen``. The pass goes on from ``state``.
        """
        if number == len(self.stages):
            yield int(some[0]), self._outcome(rows, self.decisions[some[0]], state)
            return
        stage, core = self.stages[number], self.core
        before = int(stage.before[some[0]])
        decided = np.tile(stage.earlier[before], (len(rows), 1))
        observed, state = core.stage_observer.observe(self._split, rows, number, decided, state)
        flat = to_tensors(observed["stage"] if isinstance(observed, dict) else observed)
        seen[number][before] = blinded(flat, core.stages) if self.blind else flat
        for way in np.unique(stage.way[some]):
            yield from self._walk(rows, seen, number + 1, some[stage.way[some] == way], state)

    def _outcome(self, rows: NDArray, decision: NDArray, state: PassState | None) -> Tensor:
        decisions = np.tile(decision, (len(rows), 1))
        outcome, added = self.core.score(self._split, rows, decisions, state), np.zeros(len(rows))
        if self.core.has_answer_stage:
            decisions[:, -1] = 1
            added = self._split.costs.flops_ratio(rows, decisions) - outcome.flops_ratio
        columns = [outcome.cost, outcome.flops_ratio, added]
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))

    def _risk(self) -> Tensor:
        """The predicted loss of each instance under each combination; dense loses none.

        With tokens, which trees do not read, or with a single instance, the true loss.
        """
        if self.embedded is not None or len(self.rows) < 2:
            return self.outcomes.lost
        from sklearn.ensemble import HistGradientBoostingRegressor  # it takes a second to import
        from sklearn.model_selection import PredefinedSplit, cross_val_predict

        (n, count), lost = self.outcomes.lost.shape, self.outcomes.lost.numpy()
        decided = np.tile(self.decisions.astype(np.float32), (n, 1, 1))  # so that the features stay float32
        known = [self.outcomes.seen[-1].numpy()[:, self.stages[-1].before], decided]
        features = np.concatenate(known, axis=2)
        folds = np.random.default_rng(self.seed).permutation(n) % FOLDS  # all of an instance are in one
        trees = HistGradientBoostingRegressor(
            max_iter=TREES,
            learning_rate=RATE,
            early_stopping=False,  # pyright: ignore[reportArgumentType]
        )
        parts = PredefinedSplit(np.repeat(folds, count))
        risk = cross_val_predict(trees, features.reshape(n * count, -1), lost.ravel(), cv=parts)
        risk = np.asarray(risk, dtype=np.float32).reshape(n, count)
        risk[:, ~self.decisions.any(axis=1)] = 0
        return torch.from_numpy(risk)
