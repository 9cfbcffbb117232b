"""The sample order is a pure function with laws of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3lm_scale.data.order import MIXTURE_PERIOD, MixtureOrder, RowOrder, mixture_quota

ROWS = np.array([7, 11, 0, 3, 20, 1, 8, 8])


def pairs(order: RowOrder, index) -> list[tuple[int, int]]:
    shard, row = order.locate(np.asarray(index))
    return list(zip(shard.tolist(), row.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_every_row_exactly_once_per_epoch(rows, window, seed):
    order = RowOrder(np.array(rows), seed, window)
    everything = sorted((s, r) for s, n in enumerate(rows) for r in range(n))
    for epoch in range(3):
        start = epoch * order.num_rows
        assert sorted(pairs(order, range(start, start + order.num_rows))) == everything


def test_order_does_not_depend_on_how_it_is_asked():
    whole = pairs(RowOrder(ROWS, 5, 3), range(300))
    scattered = np.random.default_rng(0).permutation(300)
    assert pairs(RowOrder(ROWS, 5, 3), scattered) == [whole[i] for i in scattered]
    one_by_one = RowOrder(ROWS, 5, 3)
    assert [pairs(one_by_one, [i])[0] for i in range(300)] == whole


def test_epochs_seeds_and_sources_differ():
    orders = [
        pairs(RowOrder(ROWS, 5, 3), range(58)),
        pairs(RowOrder(ROWS, 5, 3), range(58, 116)),
        pairs(RowOrder(ROWS, 6, 3), range(58)),
        pairs(RowOrder(ROWS, 5, 3, source=1), range(58)),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_rows_are_permuted_anew_in_every_window_epoch_and_source():
    """One shard is one window here, so the order of its rows tells what they are keyed by."""
    rows = 50

    def orders(**changes) -> list[tuple[int, ...]]:
        order = RowOrder(np.full(4, rows), **{"seed": 5, "window": 1, **changes})
        row = order.locate(np.arange(3 * 4 * rows))[1].reshape(-1, rows)  # three epochs of four windows
        return [tuple(part) for part in row.tolist()]

    found = orders() + orders(seed=6) + orders(source=1)
    assert len(set(found)) == len(found) == 36
    assert all(sorted(part) == list(range(rows)) for part in found)


def test_shards_are_permuted_anew_in_every_epoch_and_source():
    def orders(**changes) -> list[tuple[int, ...]]:
        order = RowOrder(np.full(30, 2), **{"seed": 5, "window": 1, **changes})
        return [tuple(part) for part in order.locate(np.arange(3 * 60))[0].reshape(3, 60)[:, ::2].tolist()]

    found = orders() + orders(seed=6) + orders(source=1)
    assert len(set(found)) == len(found) == 9


def test_a_window_of_shards_is_finished_before_the_next_begins():
    order = RowOrder(np.full(12, 10), 1, 4)
    shards = [{s for s, _ in pairs(order, range(start, start + 40))} for start in (0, 40, 80)]
    assert [len(window) for window in shards] == [4, 4, 4]
    assert set.union(*shards) == set(range(12))


def test_shards_needed_are_those_of_this_window_and_the_next():
    order = RowOrder(np.full(12, 10), 1, 4)
    read = [{s for s, _ in pairs(order, range(start, start + 40))} for start in (0, 40, 80)]
    assert set(order.shards_needed(17)) == read[0] | read[1]
    assert set(order.shards_needed(100)) == read[2]
    left_out = next(iter(read[0]))
    assert set(RowOrder(np.full(12, 10), 1, 4, excluded=frozenset({left_out})).shards_needed(0)) == (
        (read[0] | read[1]) - {left_out}
    )


def test_seeking_far_costs_nothing_and_agrees():
    order = RowOrder(np.full(5000, 32768), 3, 16)
    far = 10**12 + np.arange(8)
    assert pairs(order, far) == pairs(RowOrder(np.full(5000, 32768), 3, 16), far)
    assert len(order._tables) == 1


def test_excluding_a_shard_moves_no_other_row():
    index = np.arange(3 * 58)
    before = pairs(RowOrder(ROWS, 5, 3), index)
    one = pairs(RowOrder(ROWS, 5, 3, excluded=frozenset({4})), index)
    two = pairs(RowOrder(ROWS, 5, 3, excluded=frozenset({4, 1})), index)
    assert sum(a != b for a, b in zip(before, one, strict=True)) == 3 * 20
    assert all(b == a for a, b in zip(before, one, strict=True) if a[0] != 4)
    # the second exclusion moves only what stood in that shard, as itself or as a substitute
    assert all(c == b for b, c in zip(one, two, strict=True) if b[0] != 1)
    for result, gone in ((one, {4}), (two, {4, 1})):
        assert all(s not in gone and 0 <= r < ROWS[s] for s, r in result)
    assert two == pairs(RowOrder(ROWS, 5, 3, excluded=frozenset({1, 4})), index)


def test_substitutes_are_spread_over_all_that_is_left():
    """Each sample has its own: of 20 rows, 3,000 substitutes take every one about as often."""
    order = RowOrder(np.array([20, 300]), 5, 2, excluded=frozenset({1}))
    whole = RowOrder(np.array([20, 300]), 5, 2)
    index = np.arange(3200)
    row = order.locate(index)[1][whole.locate(index)[0] == 1]
    counts = np.bincount(row, minlength=20)
    assert counts.sum() == 3000
    assert np.abs(counts - 150).max() < 5 * 150**0.5
    assert len(np.unique(row[:300] * 1000 + row[300:600])) > 100, "another substitute in every epoch"


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [5.0, 1e-3]])
def test_mixture_uses_every_sample_once_and_weights_hold_in_each_period(weights):
    quota = mixture_quota(weights)
    assert quota.sum() == MIXTURE_PERIOD
    assert np.allclose(quota / MIXTURE_PERIOD, np.array(weights) / sum(weights), atol=1 / MIXTURE_PERIOD)
    order = MixtureOrder(quota, seed=3)
    source, inner = order.locate(np.arange(2 * MIXTURE_PERIOD))
    for number, share in enumerate(quota):
        assert sorted(inner[source == number].tolist()) == list(range(2 * share))
    # the periods are shuffled differently
    assert (source[:MIXTURE_PERIOD] != source[MIXTURE_PERIOD:]).any()
    again = MixtureOrder(quota, seed=3).locate(np.arange(1000, 1100))
    assert (again[0] == source[1000:1100]).all()
    assert (again[1] == inner[1000:1100]).all()


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 1e-9]])
def test_weights_that_cannot_hold_are_refused(weights):
    with pytest.raises(ValueError, match=r"data\.mixture"):
        mixture_quota(weights)
