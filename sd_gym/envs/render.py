"""What an env shows of a decision: the input, what ran, the answer, its quality and the reward."""

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
    """What ``n`` envs can show. An env keeps it, and uses it only when it is asked to render."""

    split: BackboneSplit
    rows: NDArray  # of the instances in the split, ``[n]``
    decided: NDArray  # envs that have decided since their reset, bool ``[n]``; the others show their text alone
    infos: dict[str, NDArray]  # of the step, one row per env; empty where no env has decided
    rewards: NDArray  # ``[n]``, or ``[n, 2]`` where rewards are vectors


@dataclass(frozen=True)
class Result:
    """The outcome of a decision."""

    decision: NDArray  # ``[switches + 1]``
    answer: str  # the backbone's, under the decision
    quality: float  # of this answer
    quality_ref: float  # of the dense backbone's answer
    kept: bool  # whether at most epsilon was lost
    flops_ratio: float  # FLOPs over dense FLOPs
    reward: float | NDArray  # one number or two
    went_on: bool = False  # whether what was skipped ran after all, after the answer


@dataclass(frozen=True)
class Scene:
    """What is shown of one instance."""

    env: str  # the env's id
    instance: str  # id of the instance
    difficulty: int  # its level; 0 if unknown
    texts: list[MarkedText]  # the backbone's input, with a mark for each character
    reference: str  # the right answer
    switches: list[str]  # names of the switches, as ``encoder.0.attention``
    token_shares: tuple[float, ...]  # share of the tokens that each token level drops
    result: Result | None  # ``None``: the last stage has not decided yet

    @property
    def skip(self) -> NDArray:
        """1 for each switch that was skipped, 0 for the others (for all, if nothing is decided), ``[switches]``."""
        return np.zeros(len(self.switches)) if self.result is None else self.result.decision[:-1]


def scenes(core: Core, shown: Shown) -> list[Scene]:
    """The scene of each env; this runs the backbone for its answers."""
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
    envs, infos = np.flatnonzero(shown.decided), shown.infos
    goes_on = infos.get("goes_on", np.zeros(len(shown.rows), dtype=bool))[envs]
    answered = np.where(goes_on[:, None], 0, infos["decision"][envs])  # a row that goes on has the dense answer
    answers = shown.split.passes.answers(shown.rows[envs], answered)
    return {
        env: Result(
            answer=answer,
            kept=infos["is_success"][env],
            reward=shown.rewards[env],
            went_on=bool(again and infos["decision"][env].any()),
            **{key: infos[key][env] for key in ("decision", "quality", "quality_ref", "flops_ratio")},
        )
        for env, answer, again in zip(envs.tolist(), answers, goes_on, strict=True)
    }


def as_lines(scene: Scene) -> str:
    """Lines for a terminal: the sublayers of each layer, then the instance, its text and the outcome.

    The first line is such as ``encoder .f af | decoder acf a.f``: a letter for each sublayer that ran, a dot for each
    that was skipped. Dropped tokens stand in ``[-  -]``, text that was cut off in ``[cut: ]``.
    """
    result, reference = scene.result, f"reference: {scene.reference or NOTHING}"
    lines = [
        _sublayers(scene),
        f"instance:  {scene.instance} of {scene.env}, {level_of(scene.difficulty)}",
        *(f"text:      {_marked(text)}" for text in scene.texts),
    ]
    if result is None:
        return "\n".join([*lines, reference, "no answer yet"])
    bar = "#" * round(BAR * min(1.0, result.flops_ratio))
    lines += [
        f"answer:    {result.answer or NOTHING}",
        reference,
        f"quality:   {quality_of(result)}",
        f"FLOPs:     {result.flops_ratio:.1%} of dense |{bar:.<{BAR}}|{went_on(result)}",
        f"reward:    {reward_of(result)}",
    ]
    return "\n".join(lines)


def level_of(difficulty: int) -> str:
    """A level of difficulty in words."""
    return f"difficulty {difficulty}" if difficulty else "difficulty not known"


def quality_of(result: Result) -> str:
    """The quality in words."""
    return f"{result.quality:.2f} (dense: {result.quality_ref:.2f}), {'kept' if result.kept else 'lost'}"


def went_on(result: Result) -> str:
    """In words, whether what was skipped ran after all."""
    return ", went on densely after the answer" if result.went_on else ""


def reward_of(result: Result) -> str:
    """The reward in figures."""
    return ", ".join(f"{value:+.3f}" for value in np.atleast_1d(result.reward))


def _sublayers(scene: Scene) -> str:
    stacks: dict[str, dict[str, str]] = {}
    for name, skipped in zip(scene.switches, scene.skip, strict=True):
        stack, layer, kind = name.split(".")
        layers = stacks.setdefault(stack, {})
        layers[layer] = layers.get(layer, "") + ("." if skipped else LETTERS[kind])
    return " | ".join(f"{stack} {' '.join(layers.values())}" for stack, layers in stacks.items())


def _marked(text: MarkedText) -> str:
    signs = {DROPPED: "[-{}-]", CUT: "[cut: {}]"}
    marked = "".join(signs.get(mark, "{}").format(piece) for piece, mark in text.runs())
    return " ".join(marked.split())
