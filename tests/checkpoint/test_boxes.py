"""Boxes: any layout is read as any other, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3lm_scale.checkpoint import reader as reader_module
from bd3lm_scale.checkpoint.boxes import Box, BoxIndex, boxes_of
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.errors import CheckpointError
from bd3lm_scale.values import StateSlice
from tests.checkpoint.layouts import cut, shard, whole_state

TP_SIZES = (1, 2, 3)


@st.composite
def parameters(draw):
    """Shapes of 0 to 3 dimensions, a shard dimension that every TP size divides, and rows cut in one to three parts."""
    shapes, dims, parts = {}, {}, {}
    for i in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(1, 7), min_size=0, max_size=3))
        dim = draw(st.one_of(st.none(), st.integers(0, len(shape) - 1))) if shape else None
        if dim is not None:
            shape[dim] *= 6
        if dim == 0:
            parts[f"layer.{i}"] = tuple(6 * n for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
            shape[0] = sum(parts[f"layer.{i}"])
        shapes[f"layer.{i}"], dims[f"layer.{i}"] = tuple(shape), dim
    return shapes, dims, parts


layouts = st.tuples(st.sampled_from(TP_SIZES), st.integers(1, 3), st.integers(1, 5))


@settings(max_examples=150, deadline=None)
@given(parameters(), st.sampled_from(TP_SIZES), st.data())
def test_boxes_tile_the_run(model, tp, data):
    shapes, dims, parts = model
    name = next(iter(shapes))
    whole = torch.arange(torch.Size(shapes[name]).numel(), dtype=torch.float32).reshape(shapes[name])
    count = tp if dims[name] is not None else 1
    index = data.draw(st.integers(0, count - 1))
    pieces = parts.get(name, ()) if count > 1 else ()
    flat = shard(whole, dims[name], index, count, pieces).reshape(-1)
    start = data.draw(st.integers(0, flat.numel()))
    stop = data.draw(st.integers(start, flat.numel()))
    dim = dims[name] if count > 1 else None
    part = StateSlice(name, shapes[name], dim, index, count, start, stop, parts=pieces)
    boxes = boxes_of(part)
    assert len(boxes) <= (1, 1, 3, 5)[len(shapes[name])] + max(len(pieces) - 1, 0)
    pieces = [whole[tuple(slice(o, o + n) for o, n in zip(b.offset, b.shape, strict=True))].reshape(-1) for b in boxes]
    assert torch.equal(torch.cat([torch.empty(0), *pieces]), flat[start:stop])
    assert [b.start for b in boxes] == np.cumsum([0] + [b.volume for b in boxes])[:-1].tolist()


def store_all(folder, ranks):
    """Save what many ranks own through one store: the files differ, the boxes are the same."""
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=False))
    store.save(1, [part for rank in ranks for part in rank], {})
    assert store.last_save.problem is None
    return store.newest()


@settings(max_examples=150, deadline=None)
@given(parameters(), layouts, layouts, st.sampled_from([8, 40, 10**6]))
def test_any_layout_reads_as_any_other(tmp_path_factory, model, saved_as, read_as, row_bytes):
    shapes, dims, parts = model
    state = whole_state(shapes)
    folder = tmp_path_factory.mktemp("any")
    with pytest.MonkeyPatch.context() as patch:
        # both ways of reading rows, and several reads per region
        patch.setattr(reader_module, "SEPARATE_READ_BYTES", row_bytes)
        patch.setattr(reader_module, "ROWS_READ_BYTES", row_bytes)
        reader = store_all(folder, cut(shapes, dims, *saved_as, state, parts=parts))
        wanted = cut(shapes, dims, *read_as, state, parts=parts)
        for rank, expected in zip(cut(shapes, dims, *read_as, parts=parts), wanted, strict=True):
            reader.fill(rank)
            for part, other in zip(rank, expected, strict=True):
                for kind in part.tensors:
                    assert torch.equal(part.tensors[kind], other.tensors[kind]), (part.name, kind)
        for name in shapes:
            assert torch.equal(reader.read(name, "exp_avg"), state["exp_avg"][name])


def test_fill_reads_only_what_overlaps(tmp_path, monkeypatch):
    shapes = {"w": (64, 4096)}
    state = whole_state(shapes, kinds=("master",))
    reader = store_all(tmp_path, cut(shapes, {"w": 0}, 1, 1, 1, state, kinds=("master",)))
    counted = []
    preadv = reader_module.os.preadv
    monkeypatch.setattr(reader_module.os, "preadv", lambda *a: counted.append(preadv(*a)) or counted[-1])
    monkeypatch.setattr(reader_module, "SEPARATE_READ_BYTES", 4096)
    for dim in (0, 1):
        counted.clear()
        rank = cut(shapes, {"w": dim}, 4, 1, 1, kinds=("master",))[2]
        reader.fill(rank)
        assert torch.equal(rank[0].tensors["master"], shard(state["master"]["w"], dim, 2, 4).reshape(-1))
        assert sum(counted) == 64 * 4096 * 4 // 4


def test_a_region_that_is_not_stored_is_an_error(tmp_path):
    """verify and the manifest check forbid holes; fill checks for itself all the same."""
    shapes = {"w": (6, 4)}
    reader = store_all(tmp_path, cut(shapes, {"w": 0}, 1, 1, 2, whole_state(shapes)))
    reader._stored["ema", "w"].pop()
    (rank,) = cut(shapes, {"w": 0}, 1, 1, 1)
    with pytest.raises(CheckpointError, match=r"holds 12 of the 24 elements of ema w"):
        reader.fill(rank)


def test_box_index_finds_holes_doubles_and_strangers():
    assert BoxIndex((4,), [Box((0,), (2,)), Box((2,), (2,))]).problem() is None
    assert "2 of 4" in BoxIndex((4,), [Box((0,), (2,))]).problem()
    assert "twice" in BoxIndex((4,), [Box((0,), (3,)), Box((2,), (1,))]).problem()
    assert "outside" in BoxIndex((4,), [Box((3,), (2,))]).problem()
    assert "outside" in BoxIndex((4,), [Box((-1,), (5,))]).problem()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((6, 4), 0, 0, 4, 0, 1), "not divisible by 4"),
        (((6, 4), 2, 0, 2, 0, 1), "along 2"),
        (((6, 4), 0, 2, 2, 0, 1), "shard 2 of 2"),
        (((6, 4), None, 0, 2, 0, 1), "needs a shard_dim"),
        (((6, 4), 0, 0, 2, 0, 13), r"outside a shard of 12"),
        (((6, 4), 0, 0, 2, 0, 1, True, {}, (3, 3)), r"in parts of \(3, 3\) is not divisible by 2"),
        (((6, 4), 0, 0, 2, 0, 1, True, {}, (4, 4)), r"parts \(4, 4\) are not the rows"),
        (((6, 4), 1, 0, 2, 0, 1, True, {}, (2, 2)), r"which alone are cut in parts"),
    ],
)
def test_impossible_slices_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        boxes_of(StateSlice("w", *arguments))
