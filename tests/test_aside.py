"""A thread for one job at a time: results, errors, waiting, the end."""

from __future__ import annotations

import threading

import pytest

from filtrun.aside import Aside


def threads(name):
    return [t for t in threading.enumerate() if t.name.startswith(name)]


def test_a_job_runs_beside_its_caller_and_gives_its_result_once():
    aside, go = Aside("beside"), threading.Event()
    assert aside.wait() is None and threads("beside") == []
    aside.start(lambda a, b: go.wait(60) and a + b, 2, 3)
    assert not go.is_set()  # the caller goes on: the job waits for it
    go.set()
    assert aside.wait() == 5 and aside.wait() is None
    aside.close()
    assert threads("beside") == []


def test_one_job_at_a_time_in_order():
    aside, under_way, most, done = Aside("one"), [], [], []

    def job(number):
        under_way.append(number)
        most.append(len(under_way))
        done.append(number)
        under_way.remove(number)

    for number in range(50):
        aside.start(job, number)
    aside.close()
    assert done == list(range(50)) and max(most) == 1


def test_what_goes_wrong_is_raised_once_at_the_next_start_or_the_end():
    aside, done = Aside("wrong"), []
    aside.start(int, "x")
    with pytest.raises(ValueError, match="'x'"):
        aside.start(done.append, 1)
    assert aside.wait() is None and done == []
    aside.start(done.append, 2)
    aside.start(int, "y")
    with pytest.raises(ValueError, match="'y'"):
        aside.close()
    assert done == [2] and threads("wrong") == []
    aside.close()
    aside.start(done.append, 3)  # it can be used again
    aside.close()
    assert done == [2, 3]
