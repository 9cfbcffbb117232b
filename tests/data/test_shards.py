"""Shards are standard tars with deterministic bytes, and any row length can be cut out of them."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import webdataset

from bd3lm_scale.config.schema import DataConfig, MixtureSource
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.index import open_split
from bd3lm_scale.data.order import mixture_quota
from bd3lm_scale.data.shards import TokenizerIdentity, manifest_from_json, manifest_to_json, token_dtype, write_shard
from bd3lm_scale.data.source import open_source
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.values import Cursor
from tests.data.sets import rows_of, write_set, write_split

LENGTHS = [70, 16, 15, 40, 33]


def corrupt(path, offset, data=b"\xff\xfe"):
    content = bytearray(path.read_bytes())
    assert content[offset : offset + len(data)] != data
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.fixture
def dataset(tmp_path, tokenizer_path):
    return tmp_path / "set", write_set(tmp_path / "set", tokenizer_path, LENGTHS)


@pytest.fixture
def old_dataset(tmp_path, tokenizer_path):
    return tmp_path / "old", write_set(tmp_path / "old", tokenizer_path, LENGTHS, version=1)


def config(folder, **changes) -> DataConfig:
    return DataConfig(
        **{"path": folder and str(folder), "context_length": 8, "shuffle_window": 2, "retries": 1, **changes}
    )


def test_plain_webdataset_reads_our_shards(dataset):
    folder, shards = dataset
    manifest = open_split(folder / "train")
    for shard, tokens in zip(manifest.shards, shards, strict=True):
        samples = list(webdataset.WebDataset(str(folder / "train" / shard.name), shardshuffle=False).decode())
        assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(-(-len(tokens) // 16))]
        assert np.array_equal(np.concatenate([s["tokens.npy"] for s in samples]), tokens)
        assert samples[0]["documents.npy"].tolist() == [0]


def test_equal_tokens_give_equal_bytes(tmp_path):
    tokens, starts = np.arange(1000) % 300, np.arange(0, 1000, 10)
    first = write_shard(tmp_path, "a.tar", tokens, starts, "uint16", 64)
    second = write_shard(tmp_path, "b.tar", tokens.astype("uint32"), starts, "uint16", 64)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert dataclasses.replace(second, name="a.tar").to_json() == first.to_json()


def test_manifest_survives_the_round_trip(old_dataset):
    text = (old_dataset[0] / "train" / "manifest.json").read_text()
    assert manifest_to_json(manifest_from_json(text, "here")) == text


@pytest.mark.parametrize("name", ["../escape.tar", "/etc/passwd", "a/b.tar", ".hidden", "..", ""])
def test_names_cannot_leave_their_folder(old_dataset, name):
    text = (old_dataset[0] / "train" / "manifest.json").read_text()
    for place in ("shard", "tokenizer file"):
        raw = json.loads(text)
        if place == "shard":
            raw["shards"][0]["name"] = name
        else:
            raw["tokenizer"]["files"] = [name]
        with pytest.raises(ValueError, match="not a plain file name"):
            manifest_from_json(json.dumps(raw), "here")


@pytest.mark.parametrize("damage", ["{", "{}", '{"format": "other", "version": 1}'])
def test_unusable_manifest_is_one_clear_error(dataset, damage):
    (dataset[0] / "train" / "manifest.json").write_text(damage)
    with pytest.raises(ValueError, match=r"train/manifest\.json: not a usable manifest \(.*prepare_data"):
        open_stream(config(dataset[0]), 1)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65537, "uint32")])
def test_dtype_is_the_smallest_that_fits(vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype


def test_dtype_overflow_is_refused_when_writing_and_reading(tmp_path, dataset):
    with pytest.raises(ValueError, match="token id 300 does not fit uint8"):
        write_shard(tmp_path, "a.tar", np.array([1, 300]), np.zeros(1, int), "uint8", 64)
    path = dataset[0] / "train" / "manifest.json"
    path.write_text(path.read_text().replace('"dtype": "uint16"', '"dtype": "uint8"'))
    with pytest.raises(ValueError, match="dtype uint8 does not fit a vocabulary of 320"):
        open_stream(config(dataset[0]), 1)


@pytest.mark.parametrize("length", [1, 5, 8, 16, 40])
def test_rows_of_any_length_are_cut_at_load_time(dataset, length):
    folder, shards = dataset
    train = open_stream(config(folder, context_length=length), 1)
    expected = rows_of(shards, length)
    assert train.num_rows == len(expected)
    got = train.read(np.arange(train.num_rows))
    assert got.dtype == np.int64
    assert sorted(map(tuple, got.tolist())) == sorted(expected)


def test_validation_is_in_natural_order_and_ends(dataset):
    folder, shards = dataset
    stream = open_stream(config(folder), 1, "validation")
    rows = rows_of(shards[:2], 8)
    assert [tuple(row) for row in stream.read(np.arange(len(rows))).tolist()] == rows
    with pytest.raises(ValueError, match="validation row 10 does not exist"):
        stream.read(np.array([len(rows)]))


def test_wrapped_rows_stand_between_bos_and_eos(dataset):
    folder, shards = dataset
    stream = open_stream(config(folder, wrap_rows=True), 1, "validation")
    identity = stream.source.tokenizer
    expected = [(identity.bos_token_id, *row, identity.eos_token_id) for row in rows_of(shards[:2], 6)]
    assert [tuple(row) for row in stream.read(np.arange(stream.num_rows)).tolist()] == expected


def test_mixture_reads_each_source_in_its_own_order(tmp_path, tokenizer_path):
    first = write_set(tmp_path / "a", tokenizer_path, [64, 64])
    second = write_set(tmp_path / "b", tokenizer_path, [128], offset=160)
    sources = (MixtureSource(str(tmp_path / "a"), 3.0), MixtureSource(str(tmp_path / "b"), 1.0))
    mixed = open_stream(config(None, mixture=sources), 1)
    rows = list(map(tuple, mixed.read(np.arange(4000)).tolist()))
    from_second = [row in set(rows_of(second, 8)) - set(rows_of(first, 8)) for row in rows]
    assert abs(np.mean(from_second) - mixture_quota([3.0, 1.0])[1] / 65536) < 0.03
    assert set(rows) == set(rows_of(first, 8)) | set(rows_of(second, 8))
    validation = open_stream(config(None, mixture=sources), 1, "validation")
    everything = validation.read(np.arange(validation.num_rows)).tolist()
    assert list(map(tuple, everything)) == rows_of(first, 8) + rows_of(second, 8)


def test_evaluation_takes_the_validation_rows_of_a_mixture_by_weight(tmp_path, tokenizer_path):
    write_set(tmp_path / "a", tokenizer_path, [128, 64], offset=5)
    write_set(tmp_path / "b", tokenizer_path, [96, 32], offset=5)
    sources = (MixtureSource(str(tmp_path / "a"), 0.25), MixtureSource(str(tmp_path / "b"), 0.75))
    stream = open_stream(config(None, mixture=sources), 1, "validation")
    index = stream.source.by_weight(np.arange(stream.num_rows))
    dataset = stream.source.dataset_of(index)
    for count in (4, 8, 20):
        assert (dataset[:count] == 1).sum() == 0.75 * count
    assert sorted(index.tolist()) == list(range(40)), "every row once, also where one set is at its end"
    for number in (0, 1):
        assert (np.diff(index[dataset == number]) == 1).all(), "each set in its own order"
    assert (stream.read_held_out(np.arange(12, 20)) == stream.read(index[12:20])).all()
    cursor = Cursor(excluded_shards=("1:validation-000001.tar",))
    gone = open_stream(config(None, mixture=sources), 1, "validation", cursor)
    assert gone.num_rows == stream.without(cursor.excluded_shards).num_rows == 36
    left = index[(dataset == 0) | (index < 24 + 12)]
    assert (gone.read_held_out(np.arange(36)) == stream.read(left)).all(), "the sound rows, in the same order"
    with pytest.raises(ValueError, match="every shard is excluded"):
        stream.without(("1:validation-000000.tar", "1:validation-000001.tar"))


def test_the_mask_in_a_text_is_damage_of_its_shard(tmp_path, tokenizer_path):
    mask = load_tokenizer(tokenizer_path).mask_token_id
    shards = write_set(tmp_path, tokenizer_path, [64, 640, 64], offset=5)
    assert [mask in shard for shard in shards] == [False, True, False]
    plan, settings = BatchPlan(24, 24), config(tmp_path)
    with BatchReader(open_stream(settings, 1), plan, Cursor(), 0, 1, True) as reader:
        with pytest.raises(BadShardError, match=r"the mask, id 4, stands in its text \(row \d+ of the run\)") as caught:
            list(itertools.islice(reader, 8))
        assert caught.value.shard == "train-000001.tar"
    with pytest.raises(BadShardError, match="the mask, id 4") as caught:
        open_stream(settings, 1, "validation").read_held_out(np.arange(88))
    assert caught.value.shard == "validation-000001.tar"
    cursor = Cursor(excluded_shards=("train-000001.tar",))
    with BatchReader(open_stream(settings, 1, cursor=cursor), plan, cursor, 0, 1, True) as reader:
        assert len(list(itertools.islice(reader, 8))) == 8


def test_mixture_excludes_the_shard_of_one_source_only(tmp_path, tokenizer_path):
    for name in "ab":
        write_set(tmp_path / name, tokenizer_path, [64, 64])
    sources = (MixtureSource(str(tmp_path / "a")), MixtureSource(str(tmp_path / "b")))
    (tmp_path / "b" / "train" / "train-000001.tar").unlink()
    stream = open_stream(config(None, mixture=sources, retries=0), 1)
    with pytest.raises(BadShardError) as caught:
        stream.read(np.arange(200))
    assert caught.value.shard == "1:train-000001.tar"
    rows = open_stream(config(None, mixture=sources), 1, cursor=Cursor(excluded_shards=(caught.value.shard,)))
    assert rows.read(np.arange(200)).shape == (200, 8)


def test_mixture_of_two_tokenizers_is_refused(tmp_path, tokenizer_path):
    for name in "ab":
        write_set(tmp_path / name, tokenizer_path, [64])
    path = tmp_path / "b" / "train" / "manifest.json"
    path.write_text(path.read_text().replace('"hash": "', '"hash": "0'))
    sources = (MixtureSource(str(tmp_path / "a")), MixtureSource(str(tmp_path / "b")))
    with pytest.raises(ValueError, match=r"data\.mixture .*made with tokenizer 0"):
        open_stream(config(None, mixture=sources), 1)


def test_shards_of_another_tokenizer_are_refused(dataset):
    folder = dataset[0]
    (folder / "tokenizer" / "tokenizer.model").unlink()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    with pytest.raises(ValueError, match=r"were made with tokenizer .* but .* holds"):
        open_stream(config(folder), 1)


def test_nothing_to_read_is_one_clear_error(tmp_path, dataset):
    with pytest.raises(ValueError, match=r"data\.path: not set"):
        open_stream(config(None), 1)
    with pytest.raises(ValueError, match=r"cannot read train/manifest\.json"):
        open_stream(config(tmp_path / "nowhere"), 1)
    with pytest.raises(ValueError, match=r"no text: its 174 train tokens give no row of data\.context_length=100"):
        open_stream(config(dataset[0], context_length=100), 1)


# damage: what is done to train-000003.tar (40 tokens, three chunks), and the reason that is reported
DAMAGES = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:700]), "has 700 bytes, the manifest says"),
    "flipped": (lambda path: corrupt(path, 512 + 128 + 3), "flipped bytes in chunk 0"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "directory|has .* bytes"),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_named_and_can_be_excluded(request, damage, version):
    folder = request.getfixturevalue("dataset" if version == 2 else "old_dataset")[0]
    sound = open_stream(config(folder), 1)
    index = np.arange(2 * sound.num_rows)
    before = sound.read(index)
    act, reason = DAMAGES[damage]
    act(folder / "train" / "train-000003.tar")
    with pytest.raises(BadShardError, match=reason) as caught:
        open_stream(config(folder), 1).read(index)
    assert caught.value.shard == "train-000003.tar"
    assert "data.on_bad_shard=skip" in str(caught.value)
    after = open_stream(config(folder), 1, cursor=Cursor(excluded_shards=("train-000003.tar",))).read(index)
    shard, _ = sound.source._datasets[0].order.locate(index)
    assert (after[shard != 3] == before[shard != 3]).all()
    assert (shard == 3).sum() == 10


def test_a_damaged_chunk_does_no_harm_until_it_is_read(dataset):
    stream = open_stream(config(dataset[0]), 1, "validation")
    offset, size, _ = stream.source._datasets[0].manifest.shards[0].token_members[-1]
    corrupt(dataset[0] / "validation" / "validation-000000.tar", offset + size - 2)
    assert stream.read(np.arange(8)).shape == (8, 8)  # rows 0 to 7 lie in chunks 0 to 3
    with pytest.raises(BadShardError, match="flipped bytes in chunk 4"):
        open_stream(config(dataset[0], context_length=70), 1, "validation").read(np.arange(1))


def test_ids_beyond_the_vocabulary_are_damage(tmp_path, tokenizer_path):
    identity = TokenizerIdentity("x" * 64, 300, 4, 2, 3, 0, ())
    write_split(tmp_path / "set", "train", [np.full(64, 310)], identity)
    with pytest.raises(BadShardError, match="token id 310 in chunk 0, the vocabulary is 300"):
        open_source(config(tmp_path / "set", retries=0), 1, "train", ()).read(np.arange(2))
