"""Packed rows: every token exactly once per epoch, whole documents, and the same rows however they are asked for."""

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import DataConfig, MixtureSource
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.document_rows import count_rows, pack_documents
from bd3lm_scale.data.shards import MANIFEST, Manifest, manifest_to_json, token_dtype, write_shard
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.tokenizer import identity_of, load_tokenizer
from bd3lm_scale.errors import BadShardError, ConfigError
from bd3lm_scale.rng import derive_key
from bd3lm_scale.values import PADDING, Cursor

ROOT = Path(__file__).parents[2]
LENGTH, BLOCK, CHUNK = 16, 4, 8
SHARDS = ((3, 40, 1, 7, 16, 5), (17, 2, 2, 9), (4, 33, 8, 8, 1, 1, 12))
"""Tokens of each document of each shard; the second shard begins inside a document."""


def write_documents(folder, tokenizer_path, shards=SHARDS, offset=0):
    """Tokens of a split rise by one; returns the pieces that rows should hold."""
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.save(folder / "tokenizer")
    identity = identity_of(tokenizer)
    dtype, pieces = token_dtype(identity.vocab_size), []
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        entries, first, pieces = [], offset, []
        for number, lengths in enumerate(shards):
            starts = np.cumsum([0, *lengths])
            tokens = (np.arange(starts[-1]) + first) % 250 + 6  # no special id
            pieces += [tuple(tokens[a:b][i : i + LENGTH]) for a, b in pairwise(starts)
                       for i in range(0, b - a, LENGTH)]  # fmt: skip
            marked = starts[1:-1] if number == 1 else starts[:-1]
            entries.append(write_shard(folder / split, f"{split}-{number:06d}.tar", tokens, marked, dtype, CHUNK))
            first += int(starts[-1])
        count = sum(e.num_documents for e in entries)
        manifest = Manifest(split, dtype, CHUNK, first - offset, count, 0, identity, tuple(entries), {})
        (folder / split / MANIFEST).write_text(manifest_to_json(manifest))
    return Counter(pieces)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer_path):
    folder = tmp_path_factory.mktemp("documents")
    return folder, write_documents(folder, tokenizer_path)


def config(folder, **changes):
    return DataConfig(
        path=str(folder), context_length=LENGTH, packing="documents", shuffle_window=2, retries=0, **changes
    )


def pieces_of(tokens, document):
    """The documents of rows, and the law of where they stand."""
    found = []
    for row, marks in zip(tokens.tolist(), document.tolist(), strict=True):
        start = 0
        for number in range(max(marks) + 1):
            size = marks.count(number)
            assert marks[start : start + size] == [number] * size, "a document stands at a block's start, in one run"
            found.append(tuple(row[start : start + size]))
            start += -(-size // BLOCK) * BLOCK
            assert set(marks[: min(start, LENGTH)]) <= {*range(number + 1), PADDING}
        assert set(marks[start:]) <= {PADDING}
    return Counter(found)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=40),
    block=st.sampled_from([1, 2, 8, 16]),
    keys=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_packing_loses_nothing_and_needs_as_many_rows_under_every_key(lengths, block, keys):
    starts = np.cumsum([0, *lengths])
    plans = [pack_documents(starts[:-1], int(starts[-1]), 16, block, derive_key(key, "packing")) for key in keys]
    wanted = sorted((a + i, min(16, b - a - i)) for a, b in pairwise(starts) for i in range(0, b - a, 16))
    for plan in plans:
        assert sorted(zip(plan.start.tolist(), plan.length.tolist(), strict=True)) == wanted
        assert (plan.place % block == 0).all()
        filled = []
        for row in range(len(plan.first) - 1):
            inside = slice(plan.first[row], plan.first[row + 1])
            ends = plan.place[inside] + -(-plan.length[inside] // block) * block
            assert (plan.place[inside] == np.append(0, ends[:-1])).all(), "pieces lie end to end"
            assert ends[-1] <= 16
            filled.append(ends[-1])
        assert sum(2 * f <= 16 for f in filled) <= 1, "two rows would fit into one"
    rows = count_rows(starts[:-1], int(starts[-1]), 16, block)
    assert [len(plan.first) - 1 for plan in plans] == [rows, rows]


def test_every_token_comes_once_per_epoch_and_neighbours_change(dataset):
    folder, pieces = dataset
    stream = open_stream(config(folder), 1, block_size=BLOCK)
    seen = set()
    for epoch in range(3):
        index = np.arange(stream.num_rows) + epoch * stream.num_rows
        tokens, layout = stream.read(index), stream.layout(index)
        assert pieces_of(tokens, layout["document_BL"].numpy()) == pieces
        assert (layout["is_target_BL"] == (layout["document_BL"] >= 0)).all()
        assert (tokens[layout["document_BL"].numpy() < 0] == stream.source.tokenizer.pad_token_id).all()
        targets = stream.targets(index)
        assert targets.tokens == sum(len(p) * n for p, n in pieces.items())
        assert targets.first == sum(pieces.values())
        seen.add(frozenset(map(tuple, tokens.tolist())))
    assert len(seen) == 3
    tokens = sum(map(sum, SHARDS))
    assert stream.source.padding_share == pytest.approx(1 - tokens / (stream.num_rows * LENGTH))
    other = open_stream(config(folder), 2, block_size=BLOCK).read(index)
    assert not np.array_equal(other, tokens)


def test_validation_holds_the_same_rows_for_every_seed(dataset):
    folder, pieces = dataset
    rows = []
    for seed in (1, 2):
        stream = open_stream(config(folder), seed, "validation", block_size=BLOCK)
        place = np.arange(stream.num_rows)
        rows.append(stream.read_held_out(place))
        assert pieces_of(rows[-1], stream.held_out_layout(place)["document_BL"].numpy()) == pieces
    assert (rows[0] == rows[1]).all()


@pytest.mark.parametrize(("dp", "micro", "workers"), [(1, 6, 0), (2, 2, 0), (4, 3, 0), (3, 2, 2)])
def test_rows_are_the_same_for_all_layouts_and_after_a_seek(dataset, dp, micro, workers):
    folder, _ = dataset
    whole = open_stream(config(folder), 1, block_size=BLOCK)
    for first in (0, 5):
        for rank in range(dp):
            stream = open_stream(config(folder), 1, block_size=BLOCK)
            with BatchReader(stream, BatchPlan(6, micro, rank, dp), Cursor(), workers, 2) as batches:
                if first:
                    next(batches)
                    batches.seek(Cursor(step=first, data_offset=4))
                for step in range(first, first + 3):
                    index = 4 * (first > 0) + step * 6 + np.arange(6)
                    tokens, layout, targets = whole.read(index), whole.layout(index), whole.targets(index)
                    for rows in next(batches):
                        real, place = rows.is_real_B, rows.position_B[rows.is_real_B]
                        assert (rows.tokens_BL[real].numpy() == tokens[place]).all()
                        assert (rows.document_BL[real] == layout["document_BL"][place]).all()
                        assert (rows.is_target_BL == (rows.document_BL >= 0)).all()
                        assert (rows.document_BL[~real] == PADDING).all()
                        assert rows.targets == targets


def test_a_damaged_shard_costs_its_own_rows_only(dataset):
    folder, pieces = dataset
    sound = open_stream(config(folder), 1, block_size=BLOCK)
    without = sound.without(("train-000001.tar",))
    index = np.arange(2 * sound.num_rows)
    names = [sound.source.shard_of(i) for i in index]
    kept = np.array([name != "train-000001.tar" for name in names])
    assert (sound.read(index)[kept] == without.read(index)[kept]).all()
    assert all(without.source.shard_of(i) != "train-000001.tar" for i in index)
    for rows, layout in ((without.read(index), without.layout(index)),):
        assert set(pieces_of(rows, layout["document_BL"].numpy())) <= set(pieces)
        assert without.targets(index).tokens == int(layout["is_target_BL"].sum())


def test_a_mixture_packs_each_dataset(tmp_path, tokenizer_path):
    both = [write_documents(tmp_path / name, tokenizer_path, offset=o) for name, o in (("a", 0), ("b", 100))]
    sources = tuple(MixtureSource(path=str(tmp_path / name), weight=1.0) for name in ("a", "b"))
    data = dataclasses.replace(config(tmp_path), path=None, mixture=sources)
    stream = open_stream(data, 1, block_size=BLOCK)
    index = np.arange(4 * stream.num_rows)
    found = pieces_of(stream.read(index), stream.layout(index)["document_BL"].numpy())
    assert set(found) <= set(both[0]) | set(both[1])
    assert all(set(found) & set(pieces) for pieces in both)
    assert stream.targets(index).tokens == sum(len(p) * n for p, n in found.items())


def test_no_token_is_read_to_pack_and_damage_is_named(tmp_path, tokenizer_path):
    write_documents(tmp_path, tokenizer_path)
    wanted = open_stream(config(tmp_path), 1, block_size=BLOCK)
    shard = wanted.source._datasets[0].manifest.shards[1]
    path = tmp_path / "train" / shard.name
    data = bytearray(path.read_bytes())
    data[shard.token_members[0][0] + 130] ^= 1
    path.write_bytes(data)
    stream = open_stream(config(tmp_path), 1, block_size=BLOCK)
    index = np.arange(stream.num_rows)
    assert stream.targets(index) == wanted.targets(index)
    with pytest.raises(BadShardError, match="train-000001"):
        stream.read(index)
    data[shard.document_members[2][0] + 128] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"data\.packing.*train-000001.*chunk 2.*restore the shard"):
        open_stream(config(tmp_path), 1, block_size=BLOCK)


def test_what_cannot_be_packed_is_refused_by_name(tmp_path, tokenizer_path):
    write_documents(tmp_path / "set", tokenizer_path)
    remote = dataclasses.replace(config(f"pipe:cat {tmp_path}/set/{{}}"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"data\.packing \(documents\): pipe:.* is remote.*use data\.packing=stream"):
        open_stream(remote, 1, block_size=BLOCK)
    overrides = ["run_dir=x", "data.path=x", "data.packing=documents", "data.wrap_rows=true", "data.stream_text=true"]
    found = refusal(*overrides)
    assert "data.wrap_rows (true): wraps rows of a stream" in found
    assert "data.packing (documents): text tokenized on the fly is a stream" in found
    schedule = "diffusion.block_size_schedule=[{block_size: 3, steps: 10}]"
    wanted = "documents begin at multiples of diffusion.block_size 4, inside blocks of 3 of the schedule"
    assert wanted in refusal("run_dir=x", "data.packing=documents", "data.context_length=48", schedule)


def refusal(*overrides):
    with pytest.raises(ConfigError) as refused:
        load_config(ROOT / "configs" / "demo.yaml", list(overrides))
    return str(refused.value)
