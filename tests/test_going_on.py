"""Going on: where a pass is taken up again, and what that costs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sd_gym.going_on import answer_masks, going_on_flops, masks_and_goes_on, resumed_from

SWITCHES = 6
POINTS = [0, 2, 4]
masks = st.lists(st.lists(st.integers(0, 1), min_size=SWITCHES, max_size=SWITCHES), min_size=1, max_size=8)


@given(masks, st.integers(0, 2), st.data())
def test_what_is_run_again_is_what_was_skipped_and_all_after_its_point(skips, level, data):
    decisions = np.array([[*skip, level] for skip in skips])
    costs = np.array(data.draw(st.lists(st.integers(1, 9), min_size=SWITCHES, max_size=SWITCHES)))
    switched, always = np.tile(costs, (len(skips), 1)), np.full(len(skips), 5)
    resumed = resumed_from(decisions, POINTS)
    flops = going_on_flops(always, switched, resumed)
    for skip, start, spent in zip(skips, resumed, flops, strict=True):
        if level:
            assert (start, spent) == (0, 5 + costs.sum())  # dropped tokens come back in front of the first layer
        elif not any(skip):
            assert (start, spent) == (SWITCHES, 0)  # the answer is the dense one already
        else:
            assert not any(skip[:start])
            assert start in POINTS
            assert not any(start < point <= skip.index(1) for point in POINTS)
            assert spent == 5 + costs[start:].sum()


def test_what_has_run_on_a_prompt_runs_again_on_the_text_after_it():
    always, switched, read = np.full(4, 5), np.tile([10, 20, 30], (4, 1)), np.tile([4, 5, 6], (4, 1))
    flops = going_on_flops(always, switched, np.arange(4), read)
    assert flops.tolist() == [65, 61, 56, 0]
    assert going_on_flops(always, switched, np.arange(4)).tolist() == [65, 55, 35, 0]


def test_decisions_have_one_component_more_where_they_may_go_on():
    decisions = np.array([[1, 0, 2, 0], [1, 0, 2, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    seen, goes_on = masks_and_goes_on(decisions, 3)
    assert seen.tolist() == decisions[:, :3].tolist()
    assert goes_on.tolist() == [False, True, True, False]  # where nothing was skipped, nothing is left to run
    assert answer_masks(decisions, 3).tolist() == [[1, 0, 2], *[[0, 0, 0]] * 3]
    assert answer_masks(seen, 3).tolist() == seen.tolist()
