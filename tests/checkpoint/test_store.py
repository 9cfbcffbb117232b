"""Saving and finding: atomic, verified, pruned; alone in one process."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bd3lm_scale.checkpoint.folders import put_in_place
from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.checkpoint.store import CheckpointStore, write_weights
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.errors import CheckpointError
from tests.checkpoint.layouts import cut, whole_state

SHAPES = {"embedding.weight": (12, 8), "norm.weight": (8,), "fc2.weight": (8, 32), "bias": (32,)}
DIMS = {"embedding.weight": 0, "norm.weight": None, "fc2.weight": 1, "bias": 0}


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def store(request, tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(asynchronous=request.param, keep_last=3))


def save(store, step, seed=None, meta=None):
    state = whole_state(SHAPES, step if seed is None else seed)
    store.save(step, cut(SHAPES, DIMS, 1, 1, 1, state)[0], meta or {"tokens": step * 10})
    store.wait()
    assert store.last_save.problem is None
    return state


def assert_holds(reader, state):
    for kind, tensors in state.items():
        assert reader.names(kind) == sorted(tensors)
        for name, tensor in tensors.items():
            assert reader.shape(name) == tensor.shape
            assert torch.equal(reader.read(name, kind), tensor), (kind, name)


def test_what_is_saved_is_read(store):
    meta = {"tokens": 7, "cursor": {"step": 3, "excluded_shards": ["a"]}, "clip": {"low": 0.1 + 0.2, "table": [1e-300]}}
    state = save(store, 3, meta=meta)
    reader = store.newest()
    assert reader.meta == {**meta, "step": 3, "contents": "full"}
    assert_holds(reader, state)
    assert reader.verify() == []


def test_asynchronous_save_holds_the_moment_of_the_call(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(asynchronous=True))
    state = whole_state(SHAPES)
    slices = cut(SHAPES, DIMS, 1, 1, 1, state)[0]
    store.save(1, slices, {})
    for part in slices:
        for tensor in part.tensors.values():
            tensor.fill_(-1)
    store.save(2, slices, {})
    store.wait()
    assert_holds(store.newest(step=1), state)
    assert (store.newest().read("bias") == -1).all()


def test_files_are_ordinary_safetensors(store):
    state = save(store, 1)
    (path,) = store.newest().path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("ema/fc2.weight@0,0"), state["ema"]["fc2.weight"])
        assert len(file.keys()) == 16


def test_keep_last_and_keep_every(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=2, keep_every=30))
    for step in range(10, 90, 10):
        save(store, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_000000{n}" for n in (30, 60, 70, 80)]


def test_newest_is_none_without_checkpoints(store):
    assert store.newest() is None


def test_leftovers_of_dead_saves_are_ignored_and_removed(store):
    state = save(store, 1)
    left = store.folder / ".writing_step_00000009_1_2"
    left.mkdir()
    (left / "rank_00000.safetensors").write_bytes(b"half")
    assert_holds(store.newest(), state)
    save(store, 2)
    assert not left.exists()


def test_a_save_of_the_same_step_replaces(store):
    save(store, 1, seed=5)
    state = save(store, 1, seed=6)
    assert_holds(store.newest(), state)


def test_death_between_the_two_renames_of_a_replacement_loses_nothing(store):
    state = save(store, 1)
    (store.folder / "step_00000001").rename(store.folder / ".replaced_step_00000001")
    assert_holds(store.newest(), state)


def test_going_back_abandons_the_later_checkpoints(store):
    for step in (1, 2, 3):
        save(store, step)
    assert store.newest(step=1).meta["step"] == 1
    save(store, 2, seed=77)
    assert store.newest().meta["step"] == 2
    assert (store.folder / "step_00000003.abandoned").is_dir()


def test_a_failing_save_keeps_the_run_and_the_checkpoint_before(store, caplog):
    state = save(store, 1)
    slices = cut(SHAPES, DIMS, 1, 1, 1, whole_state(SHAPES))[0]
    with caplog.at_level(logging.ERROR, logger="bd3lm_scale"):
        store.save(2, slices[:-1] + slices[:1], {})
        store.wait()
    assert "embedding.weight" in store.last_save.problem
    assert "NOT saved" in caplog.text
    store.save(3, slices, {"bad": object()})
    store.wait()
    assert "not JSON serializable" in store.last_save.problem
    incomplete = [part for part in slices if part.name != "bias"]
    store.save(4, [*incomplete, *cut(SHAPES, DIMS, 2, 1, 1, whole_state(SHAPES))[0][-1:]], {})
    store.wait()
    assert "bias: 16 of 32 elements" in store.last_save.problem
    assert [p.name for p in store.folder.iterdir()] == ["step_00000001"]
    assert_holds(store.newest(), state)


def test_find_checkpoint_accepts_run_and_checkpoint_folders(store, tmp_path):
    save(store, 1)
    save(store, 2)
    second = store.folder / "step_00000002"
    for path in (tmp_path, store.folder, second, str(tmp_path)):
        assert find_checkpoint(path) == second
    assert find_checkpoint(tmp_path, step=1).name == "step_00000001"
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 .*steps there: 1, 2"):
        find_checkpoint(tmp_path, step=5)
    with pytest.raises(CheckpointError, match="none is there"):
        find_checkpoint(tmp_path / "nowhere")
    (second / "manifest.json").unlink()
    assert find_checkpoint(tmp_path).name == "step_00000001"
    with pytest.raises(CheckpointError, match=r"step_00000002/manifest\.json"):
        find_checkpoint(tmp_path, step=2)


def test_choosing_a_step(store):
    save(store, 1)
    save(store, 2)
    assert store.newest(step=1).meta["step"] == 1
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9 .*1, 2"):
        store.newest(step=9)


def test_weights_only_checkpoints(tmp_path):
    state = whole_state(SHAPES, kinds=("master", "ema"))
    triples = [(name, kind, tensor) for kind, tensors in state.items() for name, tensor in tensors.items()]
    path = write_weights(tmp_path / "run" / "step_00000000", triples, {"step": 0, "vocab_size": 12})
    reader = open_checkpoint(path)
    assert reader.meta == {"step": 0, "vocab_size": 12, "contents": "weights"}
    assert_holds(reader, state)
    assert reader.kinds() == ["ema", "master"]
    (rank,) = cut(SHAPES, DIMS, 1, 1, 1)
    with pytest.raises(CheckpointError, match=r"holds no 'exp_avg' of embedding\.weight"):
        reader.fill(rank)
    reader.fill(rank, {"master": "ema"})
    assert torch.equal(rank[0].tensors["master"], state["ema"]["embedding.weight"].reshape(-1))
    with pytest.raises(CheckpointError, match="exists"):
        write_weights(path, triples, {})


def test_bf16_weights_are_stored_as_float32(tmp_path):
    weight = torch.randn(4, 3).bfloat16()
    reader = open_checkpoint(write_weights(tmp_path / "w", [("w", "master", weight)], {"step": 0}))
    assert torch.equal(reader.read("w"), weight.float())


def test_fill_refuses_what_does_not_fit(store):
    save(store, 1)
    reader = store.newest()
    for shapes, message in (({"bias": (31,)}, "shape"), ({"other": (3,)}, "no parameter 'other'")):
        (rank,) = cut(shapes, dict.fromkeys(shapes), 1, 1, 1)
        with pytest.raises(CheckpointError, match=message):
            reader.fill(rank)


def test_manifest_is_plain_json(store):
    save(store, 1)
    content = json.loads((store.newest().path / "manifest.json").read_text())
    assert content["version"] == 1
    assert list(content["files"]) == ["rank_00000.safetensors"]


def test_a_finished_checkpoint_has_a_durable_name(tmp_path, monkeypatch):
    """The folder is fsynced after the rename: before, a power cut may still take the name away."""
    calls, rename, fsync = [], os.rename, os.fsync

    def renamed(source, target, *args, **options):
        calls.append(("rename", Path(target).name))
        return rename(source, target, *args, **options)

    def synced(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("fsync", path.name))
        return fsync(descriptor)

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    for _ in range(2):  # the second one replaces the first
        temporary = tmp_path / "checkpoints" / ".saving"
        temporary.mkdir(parents=True)
        put_in_place(temporary, tmp_path / "checkpoints" / "step_00000001")
        last = max(number for number, call in enumerate(calls) if call == ("rename", "step_00000001"))
        assert ("fsync", "checkpoints") in calls[last:]
        calls.clear()
