"""The index of a split: what it keeps, what opening it costs, and that nothing in it is believed unverified."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data import dataset_folder, reader
from bd3lm_scale.data.cache import default_folder
from bd3lm_scale.data.files import LocalFiles
from bd3lm_scale.data.index import IndexWriter, open_split
from bd3lm_scale.data.shards import Manifest, TokenizerIdentity, manifest_to_json, write_shard
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.tokenizer import identity_of, load_tokenizer
from bd3lm_scale.errors import BadShardError
from tests.data.sets import write_set, write_split

LENGTHS = [70, 40, 16]


def config(folder, **changes) -> DataConfig:
    return DataConfig(**{"path": str(folder), "context_length": 8, "retries": 1, **changes})


def with_documents(folder: Path, tokenizer_path, rows: int, itemsize: int, chunk_tokens: int) -> np.ndarray:
    """One shard of `rows` rows of 1,024 tokens, a document every 100 tokens."""
    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.save(folder / "tokenizer")
    identity = replace(identity_of(tokenizer), vocab_size=320 if itemsize == 2 else 70_000)
    tokens = np.random.default_rng(0).integers(5, 300, rows * 1024)
    (folder / "train").mkdir()
    index = IndexWriter(folder / "train")
    dtype, starts = f"uint{8 * itemsize}", np.arange(0, len(tokens), 100)
    index.append(write_shard(folder / "train", "train-000000.tar", tokens, starts, dtype, chunk_tokens))
    index.finish(Manifest("train", dtype, chunk_tokens, 0, 0, 0, identity, (), {}))
    return tokens


def test_the_index_keeps_what_a_shard_is(tmp_path):
    tokens, starts = np.arange(1000) % 300, np.arange(0, 1000, 7)
    shards = [write_shard(tmp_path, f"{name}.tar", tokens + i, starts + i, "uint16", 64) for i, name in enumerate("ab")]
    index = IndexWriter(tmp_path)
    for shard in shards:
        index.append(shard)
    found = index.finish(Manifest("train", "uint16", 64, 0, 0, 5, TokenizerIdentity("x", 310, 4, 2, 3, 0), (), {}))
    assert (found.num_tokens, found.num_documents, len(found.shards)) == (2000, 2 * len(starts), 2)
    for shard, again in zip(shards, found.shards, strict=True):
        assert again.to_json() == shard.to_json()
        for name in ("block_crc32", "document_starts"):
            assert getattr(again, name).tolist() == getattr(shard, name).tolist()
            assert getattr(again, name).dtype == getattr(shard, name).dtype
    assert [shard.name for shard in found.shards[:-1]] == ["a.tar"]
    with pytest.raises(IndexError):
        found.shards[2]


@pytest.mark.parametrize(("itemsize", "chunk_tokens"), [(2, 1 << 16), (4, 1 << 16), (2, 5000)])
def test_a_row_reads_no_more_than_its_own_blocks(tmp_path, tokenizer_path, monkeypatch, itemsize, chunk_tokens):
    tokens = with_documents(tmp_path, tokenizer_path, 150, itemsize, chunk_tokens)
    shards = open_split(tmp_path / "train").shards
    read = reader.ShardReader(open_split(tmp_path / "train"), shards, reader_files(tmp_path), 0)
    sizes, pread = [], os.pread
    monkeypatch.setattr(reader.os, "pread", lambda *call: (sizes.append(call[1]), pread(*call))[1])
    read.read(np.zeros(1, int), np.zeros(1, int), 1)
    sizes.clear()  # the shard is open
    for length, start in [(1024, 1024 * 77), (1022, 1022 * 51), (128, 128 * 400), (1024, 65_536 - 500)]:
        got = read.read(np.zeros(1, int), np.array([start]), length)
        assert (got[0] == tokens[start : start + length]).all()
        chunks = (start + length - 1) // chunk_tokens - start // chunk_tokens + 1
        assert sum(sizes) < length * itemsize + chunks * 2 * 4096
        sizes.clear()


def reader_files(folder: Path):
    return LocalFiles(str(folder / "train"))


def test_every_byte_of_a_row_is_verified_whenever_it_is_read(tmp_path, tokenizer_path):
    tokens = with_documents(tmp_path, tokenizer_path, 8, 2, 3000)
    path, settings = tmp_path / "train" / "train-000000.tar", config(tmp_path, context_length=1024, retries=0)
    stream = open_stream(settings, 1)
    index = np.arange(8)
    before = stream.read(index)
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, tokens.reshape(8, 1024).tolist()))
    content = path.read_bytes()
    members = [row for shard in open_split(tmp_path / "train").shards for row in shard.token_members.tolist()]
    for offset, size, _ in members:
        for place in (128, size // 2, size - 1):
            damaged = bytearray(content)
            damaged[offset + place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(BadShardError, match="flipped bytes in chunk"):
                stream.read(index)
    path.write_bytes(content)
    assert (stream.read(index) == before).all()


def test_an_index_that_is_damaged_stale_or_missing_is_refused(tmp_path, tokenizer_path):
    write_set(tmp_path / "a", tokenizer_path, LENGTHS)
    write_set(tmp_path / "b", tokenizer_path, LENGTHS, offset=3)
    file = tmp_path / "a" / "train" / "index.bin"
    content = file.read_bytes()
    shutil.copy(tmp_path / "b" / "train" / "index.bin", file)
    with pytest.raises(ValueError, match=r"train/manifest\.json: not a usable manifest \(index\.bin is damaged, or of"):
        open_stream(config(tmp_path / "a"), 1)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"index\.bin is cut off"):
        open_stream(config(tmp_path / "a"), 1)
    file.write_bytes(b"\0" + content[1:])  # in the arrays of the first shard
    with pytest.raises(BadShardError, match=r"its entry in .*index\.bin is damaged; restore that file") as caught:
        open_stream(config(tmp_path / "a"), 1).read(np.arange(15))
    assert caught.value.shard == "train-000000.tar"
    file.unlink()
    with pytest.raises(ValueError, match=r"cannot read train/manifest\.json .*index\.bin"):
        open_stream(config(tmp_path / "a"), 1)


@pytest.fixture
def short_limit(monkeypatch):
    monkeypatch.setattr(dataset_folder, "_PARSED_BYTES", 100)


def test_a_long_old_manifest_becomes_an_index_once_per_node(tmp_path, tokenizer_path, short_limit, monkeypatch):
    write_set(tmp_path / "old", tokenizer_path, LENGTHS, version=1)
    write_set(tmp_path / "new", tokenizer_path, LENGTHS)
    settings = config(tmp_path / "old", cache_dir=str(tmp_path / "cache"))
    rows, index = open_stream(config(tmp_path / "new"), 1), np.arange(30)
    built = []
    convert = dataset_folder.convert
    monkeypatch.setattr(dataset_folder, "convert", lambda *call: (built.append(call), convert(*call))[1])
    for _ in range(2):
        stream = open_stream(settings, 1)
        assert stream.data_hash == rows.data_hash
        assert (stream.read(index) == rows.read(index)).all()
        assert len(built) == 1
    (entry,) = (tmp_path / "cache").glob("*.index")
    content = entry.read_bytes()
    for place in (0, 700, len(content) // 2, len(content) - 300, len(content) - 1):
        entry.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert (open_stream(settings, 1).read(index) == rows.read(index)).all()
        except BadShardError as problem:
            assert "its entry in" in problem.reason  # noqa: PT017
        entry.write_bytes(content)
    built.clear()
    path = tmp_path / "old" / "train" / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"preparation": {"changed": True}}))
    assert (open_stream(settings, 1).read(index) == rows.read(index)).all()
    assert len(built) == 1, "another manifest, another index"
    path.write_text(json.dumps(raw | {"num_tokens": 5}))
    with pytest.raises(ValueError, match=r"its shards have|rows_sha256"):
        open_stream(settings, 1)


def test_an_old_and_a_new_folder_have_one_identity(tmp_path, tokenizer_path):
    """A resumed run finds its data again, whichever program prepared it."""
    write_set(tmp_path / "old", tokenizer_path, LENGTHS, version=1)
    write_set(tmp_path / "new", tokenizer_path, LENGTHS)
    old, new = (open_stream(config(tmp_path / name), 1) for name in ("old", "new"))
    assert old.data_hash == new.data_hash
    assert (old.read(np.arange(40)) == new.read(np.arange(40))).all()
    raw = json.loads((tmp_path / "old" / "train" / "manifest.json").read_text())
    shards = [[[shard["sha256"], shard["num_tokens"]] for shard in raw["shards"]]]
    assert old.data_hash == hashlib.sha256(json.dumps(shards).encode()).hexdigest()


_MEASURE = """
import sys, resource
from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.shard_source import ShardSource

def kilobytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

settings = lambda path: DataConfig(path=path, context_length=8, shuffle_window=16)
ShardSource(settings(sys.argv[1]), 1, "train")  # what every process has anyway
before = kilobytes()
source = ShardSource(settings(sys.argv[2]), 1, "train")
source.data_hash
for epoch in range(3):
    source._datasets[0].order.locate(__import__("numpy").arange(16) + epoch * source.num_rows)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(kilobytes() - before, peak - before)
"""


def test_memory_per_process_grows_by_a_constant_per_shard(tmp_path, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    tokens = np.arange(16) % 300
    (tmp_path / "tars").mkdir()
    shard = write_shard(tmp_path / "tars", "x.tar", tokens, np.zeros(1, int), "uint16", 16)
    folders = {}
    for count in (10, 10_000, 40_000):
        folders[count] = tmp_path / str(count)
        index = IndexWriter(folders[count] / "train")
        record = index.append(shard)
        index._records += [{**record, "name": f"train-{i:06d}.tar"} for i in range(1, count)]
        index.finish(Manifest("train", "uint16", 16, 0, 0, 0, identity_of(tokenizer), (), {}))
    used = {}
    for count in (10_000, 40_000):
        command = [sys.executable, "-c", _MEASURE, str(folders[10]), str(folders[count])]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        used[count] = [1024 * int(word) for word in done.stdout.split()]
    for at in (0, 1):  # what stays, and the peak
        per_shard = (used[40_000][at] - used[10_000][at]) / 30_000
        assert per_shard < 400, f"{per_shard:.0f} bytes: 100,000 shards would take more than 40 MB"


def test_the_default_cache_is_on_the_node_and_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert default_folder().parent == Path("/tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    assert default_folder().parent == tmp_path / "temporary"
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    folder = default_folder()
    assert folder.parent == tmp_path / "job"
    assert folder.stat().st_mode & 0o077 == 0
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="belongs to another user"):
        default_folder()
    assert not (tmp_path / "home").exists()


def test_a_remote_index_comes_once_and_a_damaged_copy_again(tmp_path, tokenizer_path, server_of):
    write_set(tmp_path / "served", tokenizer_path, LENGTHS)
    url, asked = server_of(tmp_path / "served")
    settings = config(url, cache_dir=str(tmp_path / "cache"))
    expected = open_stream(config(tmp_path / "served"), 1).read(np.arange(30))
    for _ in range(2):
        assert (open_stream(settings, 1).read(np.arange(30)) == expected).all()
    assert asked.count("/train/index.bin") == 1
    (entry,) = (tmp_path / "cache").glob("*.index")
    entry.write_bytes(entry.read_bytes()[:-4] + b"oops")
    assert (open_stream(settings, 1).read(np.arange(30)) == expected).all()
    assert asked.count("/train/index.bin") == 2


@pytest.fixture
def server_of():
    """Serves a folder over HTTP and notes what is asked for."""
    servers = []

    def serve(folder: Path):
        asked: list[str] = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *unused):
                asked.append(self.path)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_manifest_of_version_1_is_read_as_it_is(tmp_path, tokenizer_path):
    write_split(tmp_path, "train", [np.arange(64)], identity_of(load_tokenizer(tokenizer_path)), version=1)
    manifest = dataset_folder.read_manifest(config(tmp_path), str(tmp_path), "train")
    assert manifest_to_json(manifest) == (tmp_path / "train" / "manifest.json").read_text()
    assert manifest.shards[0].block_crc32 is None
    assert manifest.shards[0].document_starts is None
