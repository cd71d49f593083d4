"""A picture of one decision, of one size for all, that a stranger to the env understands.

Colours are of the palette of Okabe and Ito (2008), which the colour-blind tell apart; what was skipped is also hatched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sd_gym.envs.render import LETTERS, NOTHING, Result, Scene, level_of, quality_of, reward_of
from sd_gym.tasks.marked_text import CUT, DROPPED, READ, MarkedText

WIDTH, HEIGHT = 960, 720  # even, as video codecs want
MARGIN = 24
LABELS = 190  # width of what stands in front of the switches' cells
CELL, LARGEST_CELL, GAP = 22, 48, 2  # height, largest width, between two
LEAST_FOR_LETTER = 12  # width of a cell
LARGEST_TEXT, SMALLEST_TEXT = 18, 11
MOST_CHARACTERS, LONGEST_WORD = 4000, 60  # of a text that are laid out at all
INK, FAINT, LINE, PAPER = (33, 33, 33), (117, 117, 117), (189, 189, 189), (255, 255, 255)
RAN, SKIPPED, HATCH, LOST = (0, 114, 178), (236, 236, 236), (158, 158, 158), (213, 94, 0)
COLOURS = {READ: INK, DROPPED: HATCH, CUT: HATCH}

Box = tuple[int, int, int, int]


class Fragment(NamedTuple):
    """A piece of a word on a line: where it begins, what it is and what became of it."""

    left: float
    text: str
    mark: int


def as_image(scene: Scene) -> NDArray:
    """The picture, uint8 ``[HEIGHT, WIDTH, 3]``."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    _title(draw, scene)
    top = HEIGHT - MARGIN - 104
    _figures(draw, scene.result, top)
    top -= 108
    _answers(draw, scene, top)
    top -= _switches_height(scene) + 16
    _switches(image, scene, top)
    _texts(draw, scene, (MARGIN, 70, WIDTH - MARGIN, top - 16))
    return np.asarray(image).copy()


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _title(draw: ImageDraw.ImageDraw, scene: Scene) -> None:
    draw.text((MARGIN, 16), scene.env, INK, font(20, bold=True))
    facts = f"instance {scene.instance}, {level_of(scene.difficulty)}"
    draw.text((WIDTH - MARGIN, 20), facts, FAINT, font(15), anchor="ra")
    draw.line((MARGIN, 52, WIDTH - MARGIN, 52), LINE)


def _heading(draw: ImageDraw.ImageDraw, top: int, text: str, rest: str = "") -> None:
    draw.text((MARGIN, top), text, INK, font(14, bold=True))
    draw.text((MARGIN + font(14, bold=True).getlength(f"{text}  "), top), rest, FAINT, font(14))


def _texts(draw: ImageDraw.ImageDraw, scene: Scene, box: Box) -> None:
    """What the backbone was given, as large as it fits."""
    left, top, right, bottom = box
    _heading(draw, top, "Input", _of_input(scene))
    top += 24
    size, lines = _sized(scene.texts, right - left, lambda size: (bottom - top) // round(size * 1.35))
    step = round(size * 1.35)
    room = (bottom - top) // step
    for line in lines[:room]:
        _draw_line(draw, line, left, top, size)
        top += step
    if len(lines) > room:
        rest = " … and more, which does not fit here "
        place = (right - font(size).getlength(rest), top - step)
        draw.rectangle((*place, right, top), PAPER)
        draw.text(place, rest, FAINT, font(size))


def _of_input(scene: Scene) -> str:
    share = scene.token_shares[0 if scene.result is None else scene.result.decision[-1]]
    notes = [f"{share:.0%} of the tokens dropped (struck through)"] if share else []
    if any((text.marks == CUT).any() for text in scene.texts):
        notes.append("grey: too long, cut off")
    return ", ".join(notes)


def _sized(texts: list[MarkedText], width: int, room: Callable[[int], int]) -> tuple[int, list[list[Fragment]]]:
    """The largest size at which texts fit, or else the smallest, and their lines; ``room`` has so many lines."""
    size = LARGEST_TEXT
    while True:
        lines = [line for text in texts for line in _laid_out(text, font(size), width)]
        if len(lines) <= room(size) or size == SMALLEST_TEXT:
            return size, lines
        size -= 1


def _laid_out(text: MarkedText, face: ImageFont.FreeTypeFont, width: int) -> list[list[Fragment]]:
    """Lines of a text, wrapped between words."""
    lines, line, left = [], [], 0.0
    space = face.getlength(" ")
    for word in _words(text):
        length = sum(face.getlength(piece) for piece, _ in word)
        if line and left + length > width:
            lines.append(line)
            line, left = [], 0.0
        for piece, mark in word:
            line.append(Fragment(left, piece, mark))
            left += face.getlength(piece)
        left += space
    return [*lines, line]


def _words(text: MarkedText) -> list[list[tuple[str, int]]]:
    """The words of a text, each in pieces of one mark; a very long one in several words."""
    words: list[list[tuple[str, int]]] = [[]]
    for piece, mark in MarkedText(text.text[:MOST_CHARACTERS], text.marks[:MOST_CHARACTERS]).runs():
        first, *others = "".join(" " if character.isspace() else character for character in piece).split(" ")
        for number, part in enumerate([first, *others]):
            if number:
                words.append([])
            words[-1] += [(part[i : i + LONGEST_WORD], mark) for i in range(0, len(part), LONGEST_WORD)]
    return [word for word in words if word]


def _draw_line(draw: ImageDraw.ImageDraw, line: list[Fragment], left: int, top: int, size: int) -> None:
    for offset, text, mark in line:
        place = left + offset
        draw.text((place, top), text, COLOURS[mark], font(size))
        if mark == DROPPED:
            middle = top + round(size * 0.65)
            draw.line((place, middle, place + font(size).getlength(text), middle), LOST, 2)


def _stacks(scene: Scene) -> dict[str, dict[str, dict[int, int]]]:
    """Number of each switch, by stack, kind and layer."""
    stacks: dict[str, dict[str, dict[int, int]]] = {}
    for number, name in enumerate(scene.switches):
        stack, layer, kind = name.split(".")
        stacks.setdefault(stack, {}).setdefault(kind, {})[int(layer)] = number
    return stacks


def _switches_height(scene: Scene) -> int:
    stacks = _stacks(scene)
    rows = sum(len(kinds) for kinds in stacks.values()) + (len(scene.token_shares) > 1)
    return 28 + 18 * len(stacks) + rows * (CELL + GAP) + 6


def _switches(image: Image.Image, scene: Scene, top: int) -> None:
    """A cell a switch: a column a layer, a row a kind, one stack below the other; then the token levels."""
    draw = ImageDraw.Draw(image)
    _heading(draw, top, "What ran")
    _legend(image, top)
    top += 28
    left = MARGIN + LABELS
    skip = None if scene.result is None else scene.skip
    for stack, kinds in _stacks(scene).items():
        layers = 1 + max(max(numbers) for numbers in kinds.values())
        width = min(LARGEST_CELL, (WIDTH - MARGIN - left) // layers)
        every = 1 + int(font(11).getlength(f"{layers} ")) // width  # so that numbers do not touch
        draw.text((MARGIN, top), f"{stack}, layer", FAINT, font(12))
        for layer in range(0, layers, every):
            draw.text((left + layer * width + width // 2, top + 2), str(layer), FAINT, font(11), anchor="ma")
        top += 18
        for kind in sorted(kinds, key=list(LETTERS).index):
            draw.text((MARGIN + 12, top + 2), kind.replace("_", " "), INK, font(14))
            for layer, number in kinds[kind].items():
                box = (left + layer * width, top, left + (layer + 1) * width - GAP, top + CELL)
                _cell(image, box, LETTERS[kind], None if skip is None else bool(skip[number]))
            top += CELL + GAP
    if len(scene.token_shares) > 1:
        _token_levels(draw, scene, top + 4)


def _cell(image: Image.Image, box: Box, letter: str, skipped: bool | None) -> None:
    """What ran is filled and has its letter, what was skipped is hatched, what is not decided yet is an outline."""
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box
    if skipped:
        image.paste(_hatching(right - left + 1, bottom - top + 1), (left, top))
        return
    draw.rectangle(box, PAPER if skipped is None else RAN, LINE if skipped is None else RAN)
    if right - left >= LEAST_FOR_LETTER:
        colour = LINE if skipped is None else PAPER
        draw.text(((left + right) / 2, (top + bottom) / 2), letter, colour, font(14, bold=True), anchor="mm")


@lru_cache
def _hatching(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), SKIPPED)
    draw = ImageDraw.Draw(image)
    for start in range(-height, width, 6):
        draw.line((start, height, start + height, 0), HATCH)
    draw.rectangle((0, 0, width - 1, height - 1), outline=HATCH)
    return image


def _legend(image: Image.Image, top: int) -> None:
    draw = ImageDraw.Draw(image)
    left = MARGIN + LABELS
    for skipped, text in ((False, "ran"), (True, "skipped, not computed")):
        _cell(image, (left, top, left + 20, top + 17), "", skipped)
        draw.text((left + 28, top), text, INK, font(14))
        left += 44 + int(font(14).getlength(text))


def _token_levels(draw: ImageDraw.ImageDraw, scene: Scene, top: int) -> None:
    """The shares of tokens that may be dropped, the one that was decided filled."""
    draw.text((MARGIN, top + 2), "tokens dropped", INK, font(14))
    left = MARGIN + LABELS
    for level, share in enumerate(scene.token_shares):
        decided = scene.result is not None and scene.result.decision[-1] == level
        box = (left, top, left + 2 * CELL + 8, top + CELL)
        draw.rectangle(box, INK if decided else PAPER, INK if decided else LINE)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(middle, f"{share:.0%}", PAPER if decided else FAINT, font(13, bold=decided), anchor="mm")
        left = box[2] + GAP


def _answers(draw: ImageDraw.ImageDraw, scene: Scene, top: int) -> None:
    """The answer under the decision above the right one."""
    result = scene.result
    answer = "no decision yet" if result is None else result.answer or NOTHING
    for label, text, colour in (
        ("Answer", answer, FAINT if result is None else INK),
        ("Right answer", scene.reference or NOTHING, INK),
    ):
        _heading(draw, top, label)
        _fitted(draw, text, (MARGIN + LABELS, top - 2, WIDTH - MARGIN, top + 42), colour)
        top += 50


def _fitted(draw: ImageDraw.ImageDraw, text: str, box: Box, colour: tuple[int, int, int]) -> None:
    """A text in a box, smaller where it is long."""
    left, top, right, bottom = box
    marked = MarkedText(text, np.full(len(text), READ, dtype=np.int8))
    size, fragments = _sized([marked], right - left, lambda size: int((bottom - top) // (size * 1.2)))
    lines = [" ".join(fragment.text for fragment in line) for line in fragments]
    room = int((bottom - top) // (size * 1.2))
    if len(lines) > room:
        lines = [*lines[: room - 1], f"{lines[room - 1][:-2]} …"]
    for number, line in enumerate(lines):
        draw.text((left, top + number * size * 1.2), line, colour, font(size))


def _figures(draw: ImageDraw.ImageDraw, result: Result | None, top: int) -> None:
    """FLOPs as a bar, quality, and reward."""
    draw.line((MARGIN, top - 12, WIDTH - MARGIN, top - 12), LINE)
    left, right = MARGIN + LABELS, WIDTH - MARGIN
    _heading(draw, top + 3, "FLOPs")
    draw.rectangle((left, top, right, top + 24), SKIPPED)
    share, colour = "no decision yet", FAINT
    if result is not None:
        draw.rectangle((left, top, left + round((right - left) * min(1.0, result.flops_ratio)), top + 24), RAN)
        share, colour = f"{result.flops_ratio:.1%} of the dense backbone's", INK
    draw.text((left, top + 29), share, colour, font(14))
    top += 58
    _heading(draw, top, "Quality")
    if result is None:
        draw.text((left, top), "no decision yet", FAINT, font(16))
        return
    colour = RAN if result.kept else LOST
    draw.text((left, top - 1), quality_of(result), colour, font(16, bold=True))
    reward, face = reward_of(result), font(16, bold=True)
    draw.text((right, top - 1), reward, colour, face, anchor="ra")
    draw.text((right - face.getlength(reward) - 20, top), "Reward", INK, font(14, bold=True), anchor="ra")
