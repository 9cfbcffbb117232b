"""Memory is bounded: a save holds one copy, reading and rewriting hold pieces."""

from pathlib import Path

import torch

from bd3lm_scale.checkpoint.reshard import reshard
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.checkpoint.verify import verify
from bd3lm_scale.config.schema import CheckpointConfig
from tests.checkpoint.layouts import FULL, cut

SHAPES = {f"layers.{i}.weight": (2048, 1024) for i in range(6)}
DIMS = dict.fromkeys(SHAPES, 1)
STATE_MB = 4 * 4 * 6 * 2048 * 1024 / 1e6
PIECES_MB = 110  # a few pieces and buffers of 16 MB, and the allocator's slack


def peak_growth_mb(action):
    """How far resident memory rises above where it was before `action`."""

    def read(field):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) / 1e3

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = read("VmRSS")
    action()
    return read("VmHWM") - before


def test_memory_of_saving_reading_and_rewriting_is_bounded(tmp_path):
    state = {kind: {name: torch.zeros(shape) for name, shape in SHAPES.items()} for kind in FULL}
    (slices,) = cut(SHAPES, DIMS, 1, 1, 1, state)
    del state
    assert STATE_MB > 1.5 * PIECES_MB
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(asynchronous=True))

    def save(step):
        store.save(step, slices, {})
        store.wait()
        assert store.last_save.problem is None

    assert peak_growth_mb(lambda: save(1)) < STATE_MB + PIECES_MB, "one copy"
    assert peak_growth_mb(lambda: save(2)) < PIECES_MB, "the same copy again"
    assert peak_growth_mb(lambda: verify(tmp_path)) < PIECES_MB
    assert peak_growth_mb(lambda: reshard(tmp_path, tmp_path / "out", 3)) < PIECES_MB
    reader = store.newest()
    assert peak_growth_mb(lambda: reader.fill(slices)) < PIECES_MB
