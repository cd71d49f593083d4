"""The picture of a decision."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_gym.envs.picture import CELL, HEIGHT, LARGEST_CELL, LOST, RAN, WIDTH, as_image
from sd_gym.tasks.marked_text import DROPPED, READ
from tests.envs.conftest import pixels_of, scene_of


@settings(deadline=None, max_examples=20)
@given(
    text=st.text(max_size=300) | st.text(alphabet="ab ", min_size=3000, max_size=6000),
    seed=st.integers(0, 1000),
    layers=st.sampled_from([1, 6, 24, 100]),
    decided=st.booleans(),
)
def test_every_picture_has_the_same_size(text, seed, layers, decided):
    random = np.random.default_rng(seed)
    marks = random.integers(3, size=len(text)).astype(np.int8)
    skipped = np.flatnonzero(random.random(2 * layers) < 0.5)
    scene = scene_of(text, layers, skipped, level=int(random.integers(2)), marks=marks, reference=text)
    image = as_image(scene if decided else replace(scene, result=None))
    assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)


def test_each_switch_has_a_cell_of_its_own():
    dense = as_image(scene_of())
    cells = []
    for switch in range(6):
        skipped = as_image(scene_of(skipped=[switch]))
        rows, columns = np.nonzero((skipped != dense).any(axis=2))
        cells.append((rows.min(), columns.min(), rows.max(), columns.max()))
        assert rows.max() - rows.min() <= CELL
        assert columns.max() - columns.min() <= LARGEST_CELL
        assert pixels_of(skipped, RAN) < pixels_of(dense, RAN)
    for number, (top, left, *_) in enumerate(cells):
        for other_top, other_left, other_bottom, other_right in cells[number + 1 :]:
            assert not (other_top <= top <= other_bottom and other_left <= left <= other_right)


def test_what_was_lost_or_dropped_is_marked_and_more_flops_are_a_longer_bar():
    scene = scene_of()
    assert pixels_of(as_image(scene), LOST) == 0
    assert pixels_of(as_image(scene_of(marks=np.repeat([READ, DROPPED], [4, 13]), level=1)), LOST) > 0
    assert pixels_of(as_image(replace(scene, result=replace(scene.result, kept=False))), LOST) > 0
    more = as_image(replace(scene, result=replace(scene.result, flops_ratio=0.9)))
    assert pixels_of(more, RAN) > pixels_of(as_image(scene), RAN)
    before = as_image(replace(scene, result=None))
    assert pixels_of(before, RAN) < pixels_of(as_image(scene), RAN)
