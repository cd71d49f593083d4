"""Requests are answered, each with its own answer, in groups within the limits; the clock is simulated."""

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_gym.serving.batcher import Batcher, ClosedError, LateError, QueueFullError, ServerDial
from sd_gym.serving.grouping import PassCost
from sd_gym.serving.limits import Limits
from tests.serving.conftest import CountingEngine, simulate

LIMITS = Limits(rows=4, tokens=60, queued_rows=12, queued_tokens=200, max_wait=2.0)
ALWAYS, COST = ServerDial(), PassCost(10)
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "at": st.floats(0, 20),
            "rows": st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70)), min_size=1, max_size=5),
            "timeout": st.floats(0.05, 30),
            "cancelled": st.none() | st.floats(0, 5),
            "breaks": st.sampled_from([None, None, None, "prepare", "run"]),
        }
    ),
    max_size=25,
)


async def send(batcher, number, request):
    """Send a request at its time; its outcome, and when."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(request["at"])
    inputs = [((number, row), *mask_and_length) for row, mask_and_length in enumerate(request["rows"])]
    answering = asyncio.ensure_future(batcher.answer(inputs, request["timeout"]))
    if request["cancelled"] is not None:
        loop.call_later(request["cancelled"], answering.cancel)
    try:
        return await answering, loop.time()
    except (Exception, asyncio.CancelledError) as error:
        return error, loop.time()


async def play(requests, engine, limits=LIMITS, dial=ALWAYS, close_at=None, cost=COST):
    """Send all requests; their outcomes, and the groups that were reported."""
    reported = []

    def report(group):
        assert 0 <= batcher.queued <= limits.queued_rows
        reported.append(group)

    batcher = Batcher(engine.prepare, engine.run, limits, cost, dial, report)
    working = asyncio.create_task(batcher.work())
    if close_at is not None:
        asyncio.get_running_loop().call_later(close_at, batcher.close)
    outcomes = await asyncio.gather(*(send(batcher, number, request) for number, request in enumerate(requests)))
    batcher.close()
    await working
    assert batcher.queued == 0
    return outcomes, reported


@settings(max_examples=80, deadline=None)
@given(requests=REQUESTS, close_at=st.none() | st.floats(0, 20), mixed=st.sampled_from([math.inf, 15.0]))
def test_every_request_gets_its_own_answers_or_its_own_error(requests, close_at, mixed):
    broken = {
        (request["breaks"], (number, 0)) for number, request in enumerate(requests) if request["breaks"] is not None
    }
    engine = CountingEngine(broken)
    outcomes, reported = simulate(play(requests, engine, close_at=close_at, cost=PassCost(10, mixed)))
    for number, (request, (outcome, at)) in enumerate(zip(requests, outcomes, strict=True)):
        if isinstance(outcome, list):
            assert outcome == [f"answer to {(number, row)} at 0" for row in range(len(request["rows"]))]
            assert request["breaks"] is None
        elif isinstance(outcome, asyncio.CancelledError):
            assert request["cancelled"] is not None
        elif isinstance(outcome, ClosedError):
            assert close_at is not None
            assert at >= close_at - 1e-6
        elif isinstance(outcome, QueueFullError):
            assert 1 <= outcome.retry_after <= 61
        elif not isinstance(outcome, LateError):
            assert request["breaks"] is not None, outcome
        assert at <= request["at"] + request["timeout"] + 1e-9
    answered = [row.content for rows, _ in engine.groups for row in rows]
    assert len(answered) == len(set(answered))
    for rows, _ in engine.groups:
        assert len({row.masks[0] for row in rows}) == 1 or math.isfinite(mixed)
        assert len(rows) <= LIMITS.rows
        assert len(rows) == 1 or len(rows) * max(row.length for row in rows) <= LIMITS.tokens
    assert sum(len(group.rows) for group in reported) >= len(answered)


def requests_of(*rows, at=0.0, timeout=100.0):
    return [{"at": at, "rows": [(mask, length)], "timeout": timeout, "cancelled": None} for mask, length in rows]


def names(engine):
    return [[row.content[0] for row in rows] for rows, _ in engine.groups]


def test_the_largest_group_goes_first_but_nobody_is_passed_over_for_long():
    engine = CountingEngine()
    common = [request for wave in range(12) for request in requests_of((1, 9), (1, 9), at=wave / 2)]
    outcomes, _ = simulate(play([*common, *requests_of((2, 9), at=0.5)], engine))
    started = names(engine).index([24])
    assert 1 <= started <= 3  # larger groups were preferred for two seconds
    assert outcomes[24][1] <= 0.5 + LIMITS.max_wait + 2 * 1.4 + 0.1


def test_the_oldest_deadline_goes_first_if_all_have_waited():
    engine, limits = CountingEngine(), Limits(rows=1, max_wait=0.0)
    requests = [
        {"at": 0.0, "rows": [(0, 5)], "timeout": timeout, "cancelled": None} for timeout in (50, 30, 90, 10, 70)
    ]
    simulate(play(requests, engine, limits))
    assert names(engine) == [[3], [1], [0], [4], [2]]


def test_long_rows_do_not_pad_short_ones():
    engine = CountingEngine()
    simulate(play(requests_of((0, 5), (0, 30), (0, 6), (0, 28)), engine))
    assert sorted(map(sorted, names(engine))) == [[0, 2], [1, 3]]


def test_masks_run_together_where_that_is_cheaper():
    requests = requests_of((0, 5), (0, 5), (0, 5), (1, 5), (2, 5))
    for mixed, expected in ((29, [3, 1, 1]), (9, [4, 1]), (math.inf, [3, 1, 1])):
        engine = CountingEngine()
        simulate(play(requests, engine, cost=PassCost(10, mixed, 0.0)))
        assert [len(rows) for rows, _ in engine.groups] == expected
    engine = CountingEngine()
    simulate(play(requests, engine, cost=PassCost(10, 9, 2.0)))  # each row of such a pass takes longer
    assert [len(rows) for rows, _ in engine.groups] == [3, 2]


def test_what_was_hung_up_on_never_runs():
    engine = CountingEngine()
    requests = requests_of((0, 5), *[(1, 5)] * 3)
    requests[0]["cancelled"] = 0.5  # while the larger group runs
    outcomes, _ = simulate(play(requests, engine))
    assert names(engine) == [[1, 2, 3]]
    assert all(isinstance(answers, list) for answers, _ in outcomes[1:])


def test_a_full_queue_refuses_by_rows_and_by_tokens():
    engine = CountingEngine()
    outcomes, _ = simulate(play(requests_of(*[(0, 5)] * 20), engine))
    full = [isinstance(outcome, QueueFullError) for outcome, _ in outcomes]
    assert full == [False] * 12 + [True] * 8
    assert all(at == 0 for (_, at), refused in zip(outcomes, full, strict=True) if refused)
    outcomes, _ = simulate(play(requests_of(*[(0, 50)] * 8), engine))
    assert [isinstance(outcome, QueueFullError) for outcome, _ in outcomes] == [False] * 4 + [True] * 4


def test_a_request_of_more_rows_than_the_queue_has_is_answered_when_nobody_waits():
    async def main():
        engine = CountingEngine()
        batcher = Batcher(engine.prepare, engine.run, Limits(queued_rows=4), PassCost(8.0))
        work = asyncio.create_task(batcher.work())
        answers = await batcher.answer([(f"row {row}", 0, 5) for row in range(6)], 30)
        batcher.close()
        await work
        return answers

    assert len(simulate(main())) == 6


def test_a_closed_batcher_answers_what_it_took():
    engine = CountingEngine()
    requests = [*requests_of(*[(0, 5), (1, 5)] * 5), *requests_of((0, 5), at=0.6)]
    outcomes, _ = simulate(play(requests, engine, close_at=0.5))
    assert all(isinstance(outcome, list) for outcome, _ in outcomes[:10])
    assert isinstance(outcomes[10][0], ClosedError)


def test_the_dial_is_asked_before_each_group_and_told_after_it():
    class Busy:
        window = 1.0

        def __init__(self):
            self.asked, self.told = [], []

        def choose(self, queue_length, oldest_wait, arrival_rate):
            self.asked.append((queue_length, oldest_wait, arrival_rate))
            return int(queue_length > 2)

        def answered(self, point, rows):
            self.told.append((point, rows))

    class Choosy(CountingEngine):
        async def prepare(self, inputs):
            return [row._replace(is_dialled=row.masks[0] != 2) for row in await super().prepare(inputs)]

    engine, dial = Choosy(), Busy()
    outcomes, reported = simulate(play(requests_of((0, 5), (1, 5), (2, 5), (3, 5)), engine, dial=dial))
    assert [(sorted(row.content[0] for row in rows), point) for rows, point in engine.groups] == [
        ([0, 2], 1),  # under the second point masks 0 and 2 are one
        ([1], 0),
        ([3], 0),
    ]
    assert outcomes[0][0] == ["answer to (0, 0) at 1"]
    assert [group.point for group in reported] == [1, 0, 0]
    assert [length for length, *_ in dial.asked] == [4, 2, 1]
    assert dial.asked[1][1] == pytest.approx(1.21)
    assert dial.told == [(1, 1), (0, 1), (0, 1)]  # the request of mask 2 chose its point
    assert [rate for *_, rate in dial.asked] == [4, 0, 0]  # all arrived at the start; a group takes over a second


def test_more_requests_than_can_be_answered_do_not_make_all_of_them_late():
    """A full group takes 1.4 seconds: 100 of 190 requests can be answered, in the order of their deadlines."""
    engine = CountingEngine()
    requests = [one for wave in range(38) for one in requests_of(*[(0, 5)] * 5, at=float(wave), timeout=4.0)]
    outcomes, _ = simulate(play(requests, engine, Limits(rows=4), cost=PassCost(50)))
    answered = [isinstance(outcome, list) for outcome, _ in outcomes]
    assert sum(answered) >= 100
    assert sum(answered) == sum(len(rows) for rows, _ in engine.groups)  # nothing ran in vain


def test_requests_that_keep_coming_do_not_hold_up_the_first_ones():
    """There is a new request whenever a decision, which takes 0.01 seconds, has been made."""
    requests = [one for number in range(1000) for one in requests_of((0, 5), at=number / 200)]
    outcomes, _ = simulate(play(requests, CountingEngine(), Limits()))
    assert outcomes[0][1] < 1.2


def test_a_group_that_took_long_is_forgotten():
    engine = CountingEngine(seconds=60.0)
    requests = [one for at in range(80, 600) for one in requests_of((0, 5), at=float(at), timeout=1.0)]

    async def sped_up():
        asyncio.get_running_loop().call_later(70, setattr, engine, "seconds", 0.5)
        return await play([*requests_of((0, 5)), *requests], engine)

    outcomes, _ = simulate(sped_up())
    assert isinstance(outcomes[1][0], LateError)
    assert all(isinstance(outcome, list) for outcome, _ in outcomes[-50:])


def test_what_cannot_be_in_time_is_dropped_before_it_runs():
    """A group takes a second and a tenth for each row, which the first group has shown."""
    engine = CountingEngine()
    requests = [
        *requests_of((0, 5), (0, 5), timeout=1.0),  # nothing is measured yet, so they run
        *requests_of((0, 5), (0, 5), at=5.0, timeout=1.0),
        *requests_of((0, 5), (0, 5), at=5.0, timeout=2.0),
        *requests_of((1, 5), at=9.0, timeout=0.5),  # another mask, which may be quicker
        *requests_of(*[(0, 5)] * 4, at=12.0, timeout=1.5),  # twice as many rows do not take twice as long
    ]
    outcomes, _ = simulate(play(requests, engine, cost=PassCost(50)))  # a token takes 0.02 seconds
    assert list(map(sorted, names(engine))) == [[0, 1], [4, 5], [6], [7, 8, 9, 10]]
    expected = [LateError] * 4 + [list] * 2 + [LateError] + [list] * 4
    assert [type(outcome) for outcome, _ in outcomes] == expected
    assert all(at < 5.1 for _, at in outcomes[2:4])


@pytest.mark.parametrize("breaks", [False, True])
def test_a_request_that_failed_runs_no_further(breaks):
    """One of its rows is late, because a group of this mask takes a second; or one cannot be answered."""
    engine = CountingEngine({("run", (1, 0))} if breaks else ())
    requests = requests_of((0, 5)) + requests_of((0, 5), at=5.0, timeout=9.0 if breaks else 0.5)
    requests[1]["rows"] += [(1, 5), (2, 5)]
    outcomes, _ = simulate(play(requests, engine, Limits(max_wait=0.0), cost=PassCost(50)))
    assert names(engine) == [[0]]
    assert isinstance(outcomes[1][0], RuntimeError if breaks else LateError)
