"""Tile lists and chunk biases equal the dense rule, and cost what tiles cost."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model.attention import AttentionPattern
from bd3lm_scale.model.tiles import seen_tiles
from bd3lm_scale.values import Visibility

BLOCKS = [
    (1, 300),
    (4, 300),
    (16, 512),
    (64, 576),
    (1024, 2048),
    (3, 297),
    (5, 640),
    (100, 300),
    (127, 254),
    (129, 387),
]


def dense_tiles(visibility, query_edges, key_edges):
    index = torch.arange(visibility.view_P.numel())
    seen = visibility.may_see(index[:, None], index[None, :]).numpy()
    cells = [[seen[a:b, c:d] for c, d in pairwise(key_edges)] for a, b in pairwise(query_edges)]
    return [np.array([[reduce(cell) for cell in row] for row in cells]) for reduce in (np.any, np.all)]


STRETCH = st.tuples(
    st.integers(0, 2), st.integers(0, 1), st.integers(0, 4), st.lists(st.sampled_from([0, 1, 1, 2, -1]), max_size=12)
)


@settings(max_examples=300, deadline=None)
@example(stretches=[(1, 0, 0, [2]), (1, 0, 1, [])], cuts=[2, 2])  # a tile of noisy blocks 0 and 2, one of block 1
@example(
    stretches=[(0, 0, 0, [1]), (1, 0, 1, [])], cuts=[2, 2]
)  # a tile of clean blocks 0 and 1, seen by noisy block 1
@given(stretches=st.lists(STRETCH, min_size=1, max_size=5), cuts=st.lists(st.integers(1, 60), max_size=12))
def test_any_pattern_is_summed_up_as_the_rule_says(stretches, cuts):
    """Stretches of any view and segment, blocks in any order, tiles of any widths: not only those of training."""
    view, segment, block = ([], [], [])
    for one_view, one_segment, first, steps in stretches:
        block += (first + np.cumsum([0, *steps])).tolist()
        view += [one_view] * (len(steps) + 1)
        segment += [one_segment] * (len(steps) + 1)
    visibility = Visibility(torch.tensor(view), torch.tensor(segment), torch.tensor(block), 1)
    edges = [sorted({0, len(view), *(c for c in part if c < len(view))}) for part in (cuts[::2], cuts[1::2])]
    for ours, dense in zip(seen_tiles(visibility, *edges), dense_tiles(visibility, *edges), strict=True):
        assert np.array_equal(ours, dense)


def test_many_pieces_are_worked_off_in_parts(monkeypatch):
    monkeypatch.setattr("bd3lm_scale.model.tiles._PAIRS_AT_ONCE", 50)
    visibility = training_visibility("bd3lm", 60, 4)
    edges = [*range(0, 120, 7), 120]
    for ours, dense in zip(seen_tiles(visibility, edges, edges), dense_tiles(visibility, edges, edges), strict=True):
        assert np.array_equal(ours, dense)


@pytest.mark.parametrize(("block_size", "length"), BLOCKS)
@pytest.mark.parametrize("half", [False, True])
def test_flex_tile_lists_equal_those_made_from_the_whole_mask(block_size, length, half):
    """The library's own way evaluates every pair; where rows end inside a tile, and where only the noisy half asks."""
    positions = 2 * length - block_size
    pattern = AttentionPattern(training_visibility("bd3lm", length, block_size).first(positions))
    queries = length if half else positions
    ours = pattern._block_mask(torch.device("cpu"), queries)
    theirs = create_block_mask(ours.mask_mod, None, None, queries, positions, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        count, wanted = (getattr(mask, f"{kind}_num_blocks") for mask in (ours, theirs))
        assert torch.equal(count, wanted), kind
        lists, wanted_lists = (getattr(mask, f"{kind}_indices") for mask in (ours, theirs))
        assert lists.dtype == wanted_lists.dtype
        used = torch.arange(lists.shape[-1]) < count[..., None]
        assert torch.equal(lists[used], wanted_lists[used]), kind
    index = torch.arange(positions)
    dense = pattern.visibility.may_see(index[:queries, None], index[None, :])
    assert torch.equal(ours.mask_mod(0, 0, index[:queries, None], index[None, :]), dense)


@pytest.mark.parametrize(("block_size", "length"), BLOCKS)
@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
def test_chunks_cover_exactly_what_is_seen_and_share_their_biases(block_size, length, objective):
    visibility = training_visibility(objective, length, block_size)
    pattern = AttentionPattern(visibility)
    covered = torch.zeros(pattern.num_positions, pattern.num_positions, dtype=torch.bool)
    chunks = pattern._chunks(torch.device("cpu"), torch.float32)
    for chunk in chunks:
        keys = torch.cat([torch.arange(a, b) for a, b in chunk.keys])
        assert len(keys.unique()) == len(keys)
        allowed = torch.ones(chunk.stop - chunk.start, len(keys), dtype=torch.bool)
        if chunk.bias is not None:
            assert chunk.bias.shape == allowed.shape
            assert ((chunk.bias == 0) | (chunk.bias == -torch.inf)).all()
            allowed = chunk.bias == 0
        covered[chunk.start : chunk.stop, keys] = allowed
    index = torch.arange(pattern.num_positions)
    assert torch.equal(covered, visibility.may_see(index[:, None], index[None, :]))
    assert [chunk.stop for chunk in chunks[:-1]] == [chunk.start for chunk in chunks[1:]]
    stored = {chunk.bias.untyped_storage().data_ptr() for chunk in chunks if chunk.bias is not None}
    assert len(stored) <= 4  # noisy and clean, and the last chunk of each where it is shorter


@pytest.mark.parametrize(("block_size", "length"), [(1, 300), (4, 300), (16, 512), (5, 330), (100, 300)])
def test_chunked_and_flex_attention_equal_the_dense_oracle(block_size, length, monkeypatch):
    """For all positions and for the noisy half; flex as torch computes it without a kernel, which has no gradients."""
    monkeypatch.setattr("bd3lm_scale.model.attention._compiled_flex", lambda: flex_attention)
    positions = 2 * length - block_size
    visibility = training_visibility("bd3lm", length, block_size).first(positions)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(positions, 2, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    for queries in (length, positions):
        flex = AttentionPattern(visibility, "flex").attend(q, k, v, queries)
        found = []
        for backend in ("chunked", "dense"):
            tensors = [t.clone().requires_grad_() for t in (q, k, v)]
            out = AttentionPattern(visibility, backend).attend(*tensors, queries)
            out.square().sum().backward()
            found.append([out.detach(), *(t.grad for t in tensors)])
        for ours, oracle in zip(*found, strict=True):
            torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(flex, found[1][0], rtol=1e-5, atol=1e-5)  # its softmax is taken in fp32


def test_preparing_long_rows_takes_little_memory():
    """L = 65,536: the tile lists and the biases, each within 64 MiB; the dense mask would have 17 GB."""
    script = """
import json, re, sys
import torch
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model.attention import AttentionPattern
from torch.nn.attention.flex_attention import BlockMask

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

def peak(prepare):
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    kept = prepare()
    return memory("VmHWM") - before

length, cpu = 65536, torch.device("cpu")
small = AttentionPattern(training_visibility("bd3lm", 512, 16))
small._block_mask(cpu, 1024), small._chunks(cpu, torch.float32)  # libraries come in first
found = {}
for size in (1, 16, 1024):
    pattern = AttentionPattern(training_visibility("bd3lm", length, size))
    found[f"flex {size}"] = peak(lambda: pattern._block_mask(cpu, 2 * length))
    found[f"chunks {size}"] = peak(lambda: pattern._chunks(cpu, torch.float32))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    for name, mebibytes in json.loads(done.stdout.splitlines()[-1]).items():
        assert mebibytes <= 64, (name, mebibytes)
