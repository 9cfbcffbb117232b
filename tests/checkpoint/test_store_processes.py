"""Saving by several ranks over gloo: real processes, one launch, ranks that fail and a rank that dies."""

import resource
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bd3lm_scale.checkpoint import search
from bd3lm_scale.checkpoint.reader import find_checkpoint
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.errors import CheckpointError
from tests.checkpoint.layouts import cut, whole_state

WORLD = 4
SHAPES = {"embedding.weight": (120, 8), "norm.weight": (8,), "fc2.weight": (8, 32), "fc1.weight": (32, 8)}
DIMS = {"embedding.weight": 0, "norm.weight": None, "fc2.weight": 1, "fc1.weight": 0}
LAYOUTS = {1: (2, 1, 2), 2: (2, 2, 1), 3: (1, 1, 4)}
LAST = 20


def failing(slices):
    """A rank whose optimizer cannot hand over its state."""
    yield slices[0]
    raise MemoryError("no host memory")


def saves_and_reads(store, rank):
    """Each layout's checkpoint is read by all ranks under each layout."""
    for step, layout in LAYOUTS.items():
        store.save(step, cut(SHAPES, DIMS, *layout, whole_state(SHAPES, step))[rank], {"tokens": step})
    store.wait()
    assert store.last_save.problem is None, store.last_save
    for step in LAYOUTS:
        reader = store.newest(step)
        for layout in LAYOUTS.values():
            mine = cut(SHAPES, DIMS, *layout)[rank]
            reader.fill(mine)
            for part, expected in zip(mine, cut(SHAPES, DIMS, *layout, whole_state(SHAPES, step))[rank], strict=True):
                assert all(torch.equal(part.tensors[k], expected.tensors[k]) for k in part.tensors)


def one_rank_fails(store, rank):
    """The others learn of it at once, the checkpoint before stays, and the next save works."""
    mine = cut(SHAPES, DIMS, *LAYOUTS[1], whole_state(SHAPES))[rank]
    begin = time.monotonic()
    store.save(4, failing(mine) if rank == 2 else mine, {})
    store.wait()
    assert store.last_save.problem == "rank 2: MemoryError: no host memory", store.last_save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    store.save(5, mine, {})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "rank 1: OSError: [Errno 27] File too large" in store.last_save.problem, store.last_save
    assert time.monotonic() - begin < 60
    assert store.newest().meta["step"] == 3
    store.save(6, mine, {})
    assert store.newest().meta["step"] == 6


def everybody_agrees_on_damage(store, rank, group):
    """One damaged file in one rank's share: all ranks fall back to the same older checkpoint."""
    if rank == 0:
        path = store.folder / "step_00000006" / "rank_00003.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier(group)
    assert store.newest().meta["step"] == 3
    assert (store.folder / "step_00000006.damaged").is_dir()
    with pytest.raises(CheckpointError, match="no checkpoint of step 6"):
        store.newest(6)
    # a rank that sees another file system than rank 0 does: an error, and nothing is set aside
    elsewhere = store.folder.with_name("elsewhere")
    if rank == 0:
        shutil.copytree(store.folder, elsewhere)
        for path in (elsewhere / "step_00000003").glob("*.safetensors"):
            path.unlink()
    dist.barrier(group)
    if rank == 3:
        examine = search._examine
        search._examine = lambda path, agreement: examine(elsewhere / path.name, agreement)
    with pytest.raises(CheckpointError, match=r"whole on rank 0, but rank 3 reads.*must be on a file system"):
        store.newest()
    assert (store.folder / "step_00000003").is_dir()
    if rank == 3:
        search._examine = examine


def one_rank_dies(store, rank):
    """The survivors' save ends with an error, not with a hang, and nothing half-made counts."""
    mine = cut(SHAPES, DIMS, *LAYOUTS[1], whole_state(SHAPES))[rank]
    if rank == 3:
        store._write_own = lambda folder, job: signal.raise_signal(signal.SIGKILL)
    begin = time.monotonic()
    store.save(LAST, mine, {})
    store.wait()
    assert store.last_save.problem is not None
    assert time.monotonic() - begin < 60


def worker(rank, folder):
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=timedelta(seconds=300)
    )
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=300))
    store = CheckpointStore(Path(folder) / "checkpoints", CheckpointConfig(keep_last=3), rank, WORLD, group)
    assert store.newest() is None
    saves_and_reads(store, rank)
    one_rank_fails(store, rank)
    everybody_agrees_on_damage(store, rank, group)
    (Path(folder) / f"reached_{rank}").touch()
    one_rank_dies(store, rank)
    (Path(folder) / f"done_{rank}").touch()


def test_ranks_agree_and_none_waits_for_one_that_failed(tmp_path):
    context = mp.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, str(tmp_path))) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    codes = [process.exitcode for process in processes]
    assert sorted(p.name for p in tmp_path.glob("reached_*")) == [f"reached_{r}" for r in range(WORLD)], codes
    assert sorted(p.name for p in tmp_path.glob("done_*")) == ["done_0", "done_1", "done_2"], codes
    assert codes == [0, 0, 0, -signal.SIGKILL]
    assert find_checkpoint(tmp_path).name == "step_00000003"
