"""Jobs on several processes: what fails or is killed costs its own result, and nothing starts after the deadline."""

import math
import os
import time

import pytest

from benchmarks.spread import Spread


@pytest.fixture
def spread():
    made = Spread(2)
    yield made
    made.close()


def test_a_process_that_ends_costs_its_own_job(spread):
    found = {}
    for name, function, value in (("root", math.sqrt, 4.0), ("gone", os._exit, 3), ("wrong", math.sqrt, -1.0), ("later", math.sqrt, 9.0)):
        spread.submit(function, value, then=lambda *outcome, name=name: found.update({name: outcome}))
    assert spread.drain() == 0
    assert found["root"] == (2.0, None) and found["later"] == (3.0, None)
    assert found["gone"] == (None, "the process ended with 3")
    assert found["wrong"][0] is None and found["wrong"][1].startswith("ValueError")


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_starts_after_the_deadline(workers):
    seen, made = [], Spread(workers, deadline=time.monotonic() + 1)
    made.submit(time.sleep, 1.5, then=lambda *outcome: [seen.append(outcome), made.submit(abs, -1, then=lambda *more: seen.append(more))])
    assert made.drain() == 1 and seen == [(None, None)]
    made.close()


def test_a_result_may_ask_for_more_and_turns_are_kept():
    seen, made = [], Spread()

    def then(result, error):
        seen.append(result)
        if result == 1:
            made.submit(abs, -2, then=then)

    for value, turn in ((-3, 1), (-4, 2), (-1, 0)):
        made.submit(abs, value, then=then, turn=turn)
    made.drain()
    assert seen == [1, 2, 3, 4]
