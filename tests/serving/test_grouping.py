"""Which rows run together, without a clock or a queue."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_gym.serving.grouping import Paces, PassCost, Row, best_group
from sd_gym.serving.limits import Limits

ROWS = st.lists(
    st.builds(
        Row,
        length=st.integers(1, 40),
        masks=st.tuples(st.integers(0, 2), st.integers(0, 2)),
        kind=st.integers(0, 1),
        content=st.none(),
    ),
    min_size=1,
    max_size=20,
)
COSTS = st.builds(PassCost, st.floats(0, 50), st.sampled_from([math.inf, 0.0, 20.0]), st.floats(0, 5))
LIMITS = st.builds(Limits, rows=st.integers(1, 8), tokens=st.integers(1, 200))


@given(ROWS, st.integers(0, 1), COSTS, LIMITS, st.data())
def test_a_group_is_of_one_kind_within_the_limits_and_of_one_mask_where_mixing_is_impossible(
    rows, point, cost, limits, data
):
    first = data.draw(st.none() | st.integers(0, len(rows) - 1))
    group = best_group(rows, point, first, limits, cost)
    assert len(set(group)) == len(group) <= limits.rows
    assert first is None or first in group
    assert len({rows[index].kind for index in group}) == 1
    lengths = [rows[index].length for index in group]
    assert len(group) == 1 or len(group) * max(lengths) <= limits.tokens
    if math.isinf(cost.mixed):
        assert len({rows[index].masks[point] for index in group}) == 1


def test_the_most_frequent_mask_runs_first_and_one_that_waited_too_long_before_it():
    rows = [Row(5, [mask], 0, None) for mask in (0, 1, 1)]
    assert best_group(rows, 0, None, Limits(), PassCost(8.0)) == [1, 2]
    assert best_group(rows, 0, 0, Limits(), PassCost(8.0)) == [0]


def test_a_pace_counts_the_overhead_and_is_forgotten_while_rows_are_refused():
    paces, group = Paces(PassCost(10.0)), [Row(5, [0], 0, None)] * 2
    assert paces.expected_seconds(group, 0) == 0
    paces.ran(group, 0, 2.0)  # 0.1 seconds for each of 2 * 5 + 10 tokens
    assert paces.expected_seconds(group, 0) == pytest.approx(2.0)
    assert paces.expected_seconds(group[:1], 0) == pytest.approx(1.5)
    paces.refused(group, 0)
    assert paces.expected_seconds(group, 0) == pytest.approx(1.98)
