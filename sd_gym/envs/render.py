"""What an env shows of a decision: what was read, what ran, what was answered, and what that was worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sd_gym.envs.protocols import Core
from sd_gym.tasks.marked_text import CUT, DROPPED, MarkedText

if TYPE_CHECKING:  # an env of a table needs no torch
    from sd_gym.execution.split import BackboneSplit

LETTERS = {"attention": "a", "cross_attention": "c", "feed_forward": "f"}
BAR = 40  # characters
NOTHING = "(nothing)"


class Shown(NamedTuple):
    """What there is to show of ``n`` envs; kept by the env, and only looked into when it is asked to render."""

    split: BackboneSplit  # where the instances are
    rows: NDArray  # which they are, ``[n]``
    decided: NDArray  # which envs have decided and not been reset since, bool ``[n]``; the others only have their text
    infos: dict[str, NDArray]  # of the step, a row an env; empty where none has decided
    rewards: NDArray  # ``[n]``, or ``[n, 2]`` where rewards are vectors


@dataclass(frozen=True)
class Result:
    """What came of a decision."""

    decision: NDArray  # ``[switches + 1]``
    answer: str  # what the backbone said under it
    quality: float  # of this answer
    quality_ref: float  # of the dense backbone's
    kept: bool  # whether no more than epsilon was lost
    flops_ratio: float  # FLOPs over dense FLOPs
    reward: float | NDArray  # what the agent got, one number or two


@dataclass(frozen=True)
class Scene:
    """All that is shown of one instance."""

    env: str  # the env's id
    instance: str  # id of the instance
    difficulty: int  # its level; 0 where it is not known
    texts: list[MarkedText]  # what the backbone was given, with what became of each character
    reference: str  # the right answer
    switches: list[str]  # names of the switches, as ``encoder.0.attention``
    token_shares: tuple[float, ...]  # share of the tokens that each token level drops
    result: Result | None  # what came of the decision; ``None`` before it

    @property
    def skip(self) -> NDArray:
        """1 for each switch that was skipped, 0 for the others (all, before a decision), ``[switches]``."""
        return np.zeros(len(self.switches)) if self.result is None else self.result.decision[:-1]


def scenes(core: Core, shown: Shown) -> list[Scene]:
    """What to show of each env; only here the backbone is asked for its answers."""
    results, split = _results(shown) if shown.decided.any() else {}, shown.split
    return [
        Scene(
            env=core.config.id,
            instance=split.instances[row].id,
            difficulty=split.instances[row].difficulty,
            texts=split.marked_texts(row, int(results[env].decision[-1]) if env in results else 0),
            reference=split.reference(row),
            switches=core.backbone.board.names,
            token_shares=core.config.tokens.shares,
            result=results.get(env),
        )
        for env, row in enumerate(shown.rows)
    ]


def _results(shown: Shown) -> dict[int, Result]:
    """What came of the decisions, by env."""
    envs, infos = np.flatnonzero(shown.decided), shown.infos
    goes_on = infos.get("goes_on", np.zeros(len(shown.rows), dtype=bool))[envs]
    answered = np.where(goes_on[:, None], 0, infos["decision"][envs])  # where it goes on, the answer is the dense one
    answers = shown.split.passes.answers(shown.rows[envs], answered)
    return {
        env: Result(
            decision=infos["decision"][env],
            answer=answer,
            quality=infos["quality"][env],
            quality_ref=infos["quality_ref"][env],
            kept=infos["is_success"][env],
            flops_ratio=infos["flops_ratio"][env],
            reward=shown.rewards[env],
        )
        for env, answer in zip(envs.tolist(), answers, strict=True)
    }


def as_line(names: list[str], skip: NDArray) -> str:
    """One line: for each layer the letters of the sublayers that ran (a, c, f), a dot for each that was skipped.

    ``encoder af af .. | decoder acf a.f ...``
    """
    stacks: dict[str, dict[str, str]] = {}
    for name, skipped in zip(names, skip, strict=True):
        stack, layer, kind = name.split(".")
        layers = stacks.setdefault(stack, {})
        layers[layer] = layers.get(layer, "") + ("." if skipped else LETTERS[kind])
    return " | ".join(f"{stack} {' '.join(layers.values())}" for stack, layers in stacks.items())


def as_lines(scene: Scene) -> str:
    """Lines for a terminal: ``as_line``, then the instance, its text, and what came of the decision.

    Tokens that were dropped stand in ``[-  -]``, what was cut off as too long in ``[cut: ]``.
    """
    lines = [
        as_line(scene.switches, scene.skip),
        f"instance:  {scene.instance} of {scene.env}, {level_of(scene.difficulty)}",
        *(f"text:      {_marked(text)}" for text in scene.texts),
    ]
    result = scene.result
    if result is None:
        return "\n".join([*lines, f"reference: {scene.reference or NOTHING}", "no decision yet"])
    bar = "#" * round(BAR * min(1.0, result.flops_ratio))
    lines += [
        f"answer:    {result.answer or NOTHING}",
        f"reference: {scene.reference or NOTHING}",
        f"quality:   {quality_of(result)}",
        f"FLOPs:     {result.flops_ratio:.1%} of dense |{bar:.<{BAR}}|",
        f"reward:    {reward_of(result)}",
    ]
    return "\n".join(lines)


def level_of(difficulty: int) -> str:
    """A level of difficulty in words."""
    return f"difficulty {difficulty}" if difficulty else "difficulty not known"


def quality_of(result: Result) -> str:
    """What the answer was worth in words."""
    verdict = "kept" if result.kept else "lost"
    return f"{result.quality:.2f} (dense: {result.quality_ref:.2f}), {verdict}"


def reward_of(result: Result) -> str:
    """The reward in figures."""
    return ", ".join(f"{value:+.3f}" for value in np.atleast_1d(result.reward))


def _marked(text: MarkedText) -> str:
    signs = {DROPPED: "[-{}-]", CUT: "[cut: {}]"}
    marked = "".join(signs.get(mark, "{}").format(piece) for piece, mark in text.runs())
    return " ".join(marked.split())
