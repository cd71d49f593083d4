"""A picture of one decision: always of one size, and readable without knowledge of the env.

The colours are from the palette of Okabe and Ito (2008), for colour-blind readers; skipped cells are also hatched.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sd_gym.envs.render import LETTERS, NOTHING, Result, Scene, level_of, quality_of, reward_of, went_on
from sd_gym.tasks.marked_text import CUT, DROPPED, READ, MarkedText

WIDTH, HEIGHT = 960, 720  # even, as video codecs require
MARGIN = 24
LABELS = 190  # width of the labels to the left of the cells
CELL, LARGEST_CELL, GAP = 22, 48, 2  # height, largest width, distance between cells
LEAST_FOR_LETTER = 12  # width of a cell that has a letter
LARGEST_TEXT, SMALLEST_TEXT, LINE_HEIGHT = 18, 11, 1.25
MOST_CHARACTERS, LONGEST_WORD = 4000, 60  # longer texts are cut, longer words are broken
INK, FAINT, LINE, PAPER = (33, 33, 33), (117, 117, 117), (189, 189, 189), (255, 255, 255)
RAN, SKIPPED, HATCH, LOST = (0, 114, 178), (236, 236, 236), (158, 158, 158), (213, 94, 0)

Box = tuple[int, int, int, int]  # left, top, right, bottom


def as_image(scene: Scene) -> NDArray:
    """The picture, uint8 ``[HEIGHT, WIDTH, 3]``."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    _title(draw, scene)
    top = HEIGHT - MARGIN - 104
    _figures(draw, scene.result, top)
    top -= 108
    _answers(draw, scene, top)
    stacks = _stacks(scene)
    rows = sum(len(kinds) for kinds in stacks.values()) + (len(scene.token_shares) > 1)
    top -= 50 + 18 * len(stacks) + rows * (CELL + GAP)
    _switches(image, scene, stacks, top)
    _heading(draw, 70, "Input", _notes(scene))
    _paragraphs(draw, scene.texts, (MARGIN, 94, WIDTH - MARGIN, top - 16))
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


def _notes(scene: Scene) -> str:
    share = scene.token_shares[0 if scene.result is None else scene.result.decision[-1]]
    notes = [f"{share:.0%} of the tokens dropped (struck through)"] if share else []
    if any((text.marks == CUT).any() for text in scene.texts):
        notes.append("grey: too long, cut off")
    return ", ".join(notes)


def _paragraphs(
    draw: ImageDraw.ImageDraw, texts: Sequence[MarkedText], box: Box, colour: tuple[int, int, int] = INK
) -> None:
    """Texts in a box, in the largest size at which they fit; in the smallest size, what does not fit is cut."""
    left, top, right, bottom = box
    size = LARGEST_TEXT
    lines = _wrapped(texts, font(size), right - left)
    while len(lines) > (bottom - top) // round(size * LINE_HEIGHT) and size > SMALLEST_TEXT:
        size -= 1
        lines = _wrapped(texts, font(size), right - left)
    face, step = font(size), round(size * LINE_HEIGHT)
    room = (bottom - top) // step
    for number, line in enumerate(lines[:room]):
        _marked_line(draw, line, left, top + number * step, size, colour)
    if len(lines) > room:
        place = right - face.getlength(" … "), top + (room - 1) * step
        draw.rectangle((*place, right, top + room * step), PAPER)
        draw.text(place, " … ", FAINT, face)


def _wrapped(texts: Sequence[MarkedText], face: ImageFont.FreeTypeFont, width: int) -> list[MarkedText]:
    """The lines of texts, wrapped between words."""
    lines = []
    for text, marks in texts:
        plain = re.sub(r"\s", " ", text[:MOST_CHARACTERS])
        start = end = 0
        for word in re.finditer(rf"\S{{1,{LONGEST_WORD}}}", plain):
            if end > start and face.getlength(plain[start : word.end()]) > width:
                lines.append(MarkedText(plain[start:end], marks[start:end]))
                start = word.start()
            end = word.end()
        lines.append(MarkedText(plain[start:end], marks[start:end]))
    return lines


def _marked_line(
    draw: ImageDraw.ImageDraw, line: MarkedText, left: float, top: int, size: int, colour: tuple[int, int, int]
) -> None:
    for piece, mark in line.runs():
        right = left + font(size).getlength(piece)
        draw.text((left, top), piece, colour if mark == READ else HATCH, font(size))
        if mark == DROPPED:
            middle = top + round(size * 0.65)
            draw.line((left, middle, right, middle), LOST, 2)
        left = right


def _stacks(scene: Scene) -> dict[str, dict[str, dict[int, int]]]:
    stacks: dict[str, dict[str, dict[int, int]]] = {}
    for number, name in enumerate(scene.switches):
        stack, layer, kind = name.split(".")
        stacks.setdefault(stack, {}).setdefault(kind, {})[int(layer)] = number
    return stacks


def _switches(image: Image.Image, scene: Scene, stacks: dict[str, dict[str, dict[int, int]]], top: int) -> None:
    """A cell per switch: a column per layer, a row per kind, the stacks one below the other; then the token levels."""
    draw = ImageDraw.Draw(image)
    _heading(draw, top, "What ran")
    _legend(image, top)
    top += 28
    left = MARGIN + LABELS
    skip = None if scene.result is None else scene.skip
    for stack, kinds in stacks.items():
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
    """A cell: filled with a letter if it ran, hatched if it was skipped, an outline if not decided yet (``None``)."""
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
    """A cell for each share of tokens that can be dropped; the decided one is filled."""
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
    result = scene.result
    answer = ("no answer yet", FAINT) if result is None else (result.answer or NOTHING, INK)
    for label, (text, colour) in (("Answer", answer), ("Right answer", (scene.reference or NOTHING, INK))):
        _heading(draw, top, label)
        marked = MarkedText(text, np.full(len(text), READ, dtype=np.int8))
        _paragraphs(draw, [marked], (MARGIN + LABELS, top - 2, WIDTH - MARGIN, top + 42), colour)
        top += 50


def _figures(draw: ImageDraw.ImageDraw, result: Result | None, top: int) -> None:
    draw.line((MARGIN, top - 12, WIDTH - MARGIN, top - 12), LINE)
    left, right = MARGIN + LABELS, WIDTH - MARGIN
    _heading(draw, top + 3, "FLOPs")
    draw.rectangle((left, top, right, top + 24), SKIPPED)
    _heading(draw, top + 58, "Quality")
    if result is None:
        draw.text((left, top + 29), "no answer yet", FAINT, font(14))
        draw.text((left, top + 58), "no answer yet", FAINT, font(16))
        return
    draw.rectangle((left, top, left + round((right - left) * min(1.0, result.flops_ratio)), top + 24), RAN)
    draw.text((left, top + 29), f"{result.flops_ratio:.1%} of the dense backbone's{went_on(result)}", INK, font(14))
    face = font(16, bold=True)
    draw.text((left, top + 57), quality_of(result), RAN if result.kept else LOST, face)
    reward = reward_of(result)
    draw.text((right, top + 57), reward, INK, face, anchor="ra")
    draw.text((right - face.getlength(reward) - 20, top + 58), "Reward", INK, font(14, bold=True), anchor="ra")
