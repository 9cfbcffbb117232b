import time

import pytest

from bd3lm_scale.runtime.stragglers import OwnWork, find_stragglers

NODES = ["a", "a", "b", "b", "c", "c"]


def test_slow_rank_is_named():
    spread = find_stragglers([1.0, 1.1, 1.0, 2.0, 0.9, 1.0], NODES, factor=1.5)
    assert (spread.slow_ranks, spread.slow_nodes) == ((3,), ())
    assert (spread.slowest_rank, spread.slowest_node) == (3, "b")
    assert "rank 3 (b)" in spread.message()
    assert "2.0 times" in spread.message()


def test_slow_node_is_told_from_a_slow_rank():
    spread = find_stragglers([1.0, 1.1, 1.0, 1.0, 2.0, 2.1], NODES, factor=1.5)
    assert spread.slow_ranks == (5, 4)
    assert spread.slow_nodes == ("c",)
    assert "node c" in spread.message()


def test_even_work_names_nobody():
    spread = find_stragglers([1.0, 1.2, 1.1], ["a", "b", "c"], factor=1.5)
    assert spread.slow_ranks == spread.slow_nodes == ()


def test_single_rank_is_no_straggler():
    assert find_stragglers([3.0], ["a"], factor=1.5).slow_ranks == ()


def test_waiting_is_not_work():
    clock = OwnWork(window=3)
    assert clock.seconds == 0.0
    for _ in range(3):
        clock.start()
        time.sleep(0.01)
        clock.waiting()
        time.sleep(0.05)
    assert clock.seconds == pytest.approx(0.01, abs=0.02)
