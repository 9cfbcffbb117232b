"""Remote shards: whole into a shared cache, through every kind of misbehaviour, with the same rows as local ones."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.cache import CacheFullError, FileCache
from bd3lm_scale.data.storage import TransferError, transfer
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.errors import BadShardError
from bd3lm_scale.values import Cursor
from tests.data.misbehaving_server import MisbehavingServer
from tests.data.sets import write_set

SHARD = "train-000002.tar"
SLOW = {"hang", "drip"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path):
    path = tmp_path_factory.mktemp("set")
    write_set(path, tokenizer_path, [2000, 1800, 2200, 1500])
    return path


@pytest.fixture
def server(folder):
    server = MisbehavingServer(folder)
    yield server
    server.close()


@pytest.fixture
def expected(folder):
    return open_stream(DataConfig(path=str(folder), context_length=50), 1).read(np.arange(200))


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("bd3lm_scale.data.storage._FIRST_PAUSE_SECONDS", 0.01)


def config(path: str, cache: Path, **changes) -> DataConfig:
    settings = {"path": path, "context_length": 50, "cache_dir": str(cache), "retries": 2, "timeout_seconds": 20.0}
    return DataConfig(**settings | changes)


def test_rows_and_tokenizer_are_those_of_the_local_folder(server, tmp_path, expected, tokenizer_path):
    stream = open_stream(config(server.url, tmp_path), 1)
    assert (stream.read(np.arange(200)) == expected).all()
    assert load_tokenizer(stream.tokenizer_path).hash == load_tokenizer(tokenizer_path).hash
    assert Path(stream.tokenizer_path).is_relative_to(tmp_path)
    validation = open_stream(config(server.url, tmp_path), 1, "validation")
    local = open_stream(config(str(server.folder), tmp_path), 1, "validation")
    everything = np.arange(local.num_rows)
    assert (validation.read(everything) == local.read(everything)).all()


def test_each_shard_is_fetched_once_for_all_processes_of_a_node(server, tmp_path, expected):
    readers = [
        BatchReader(open_stream(config(server.url, tmp_path), 1), BatchPlan(10, 10, rank, 2), Cursor(), 2, 2)
        for rank in range(2)
    ]
    for step in range(0, 10):
        for rank, reader in enumerate(readers):
            rows = next(reader)[0]
            if rank == 0:
                assert (rows.tokens_BL.numpy() == expected[step * 10 : (step + 1) * 10]).all()
    for reader in readers:
        reader.close()
    assert {name: n for name, n in server.requests.items() if name.endswith(".tar")} == {
        f"train-{i:06d}.tar": 1 for i in range(4)
    }


@pytest.mark.parametrize(
    "faults",
    [[503], [503, 429], ["short"], ["short", "short"], ["hang"], ["drip"], ["flip"], ["short", "refuse range"]],
    ids=str,
)
def test_passing_trouble_is_survived(server, tmp_path, expected, faults):
    server.faults[SHARD] = list(faults)
    settings = config(server.url, tmp_path, timeout_seconds=1.0 if SLOW & set(faults) else 20.0)
    assert (open_stream(settings, 1).read(np.arange(200)) == expected).all()
    assert server.requests[SHARD] == 1 + sum(fault != "refuse range" for fault in faults)
    assert not list(tmp_path.glob(".*.part"))


def test_broken_transfer_goes_on_where_it_stopped(server, tmp_path, expected):
    server.faults[SHARD] = ["short"]
    open_stream(config(server.url, tmp_path), 1).read(np.arange(200))
    assert server.ranges == [SHARD]
    assert server.bytes_sent[SHARD] == (server.folder / "train" / SHARD).stat().st_size


def test_connection_that_keeps_breaking_gets_there_while_it_brings_something(tmp_path):
    data = np.random.default_rng(0).bytes(6_000_000)
    (tmp_path / "large").write_bytes(data)
    server = MisbehavingServer(tmp_path)
    server.faults["large"] = ["short", "short"]
    transfer(f"{server.url}/large", tmp_path / "copy", 20.0)
    assert (tmp_path / "copy").read_bytes() == data
    server.faults["large"] = ["short"] * 20
    with pytest.raises(TransferError, match="cut off after"):
        transfer(f"{server.url}/large", tmp_path / "second", 20.0)
    assert server.requests["large"] < 10
    server.close()


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        (404, "HTTP 404", 1),
        (403, "HTTP 403", 1),
        (503, "HTTP 503", 3),
        ("short", "cut off after", 3),
        ("flip", "SHA-256", 3),
        ("hang", "timed out", 3),
        ("drip", "slow: .* bytes in", 3),
    ],
)
def test_lasting_trouble_is_one_error_that_names_the_shard(server, tmp_path, expected, fault, reason, requests):
    server.faults[SHARD] = [fault] * 20
    stream = open_stream(config(server.url, tmp_path, timeout_seconds=0.3 if fault in SLOW else 20.0), 1)
    with pytest.raises(BadShardError, match=reason) as caught:
        stream.read(np.arange(200))
    assert caught.value.shard == SHARD
    assert server.requests[SHARD] >= requests
    skipping = open_stream(config(server.url, tmp_path), 1, cursor=Cursor(excluded_shards=(SHARD,)))
    shard, _ = stream.source._datasets[0].order.locate(np.arange(200))
    assert (skipping.read(np.arange(200))[shard != 2] == expected[shard != 2]).all()


def test_tokenizer_that_cannot_be_had_is_one_error_and_none_is_kept(server, tmp_path):
    server.faults["tokenizer.model"] = [404, 503]
    with pytest.raises(ValueError, match=r"cannot read tokenizer/tokenizer\.model .*HTTP 404"):
        open_stream(config(server.url, tmp_path), 1)
    assert Path(open_stream(config(server.url, tmp_path), 1).tokenizer_path).is_dir()


def test_manifest_that_cannot_be_had_is_one_error(server, tmp_path):
    server.faults["manifest.json"] = [503, 503]
    assert open_stream(config(server.url, tmp_path), 1).num_rows
    with pytest.raises(ValueError, match=r"cannot read train/manifest\.json .*HTTP 404"):
        open_stream(config(server.url + "/nowhere", tmp_path), 1)


def test_damaged_copy_in_the_cache_is_fetched_anew(server, tmp_path, expected):
    open_stream(config(server.url, tmp_path), 1).read(np.arange(200))
    for number, copy in enumerate(sorted(tmp_path.glob("*.tar"))):
        data = bytearray(copy.read_bytes())
        copy.write_bytes(data[:-700] if number % 2 else data[:700] + bytes([data[700] ^ 1]) + data[701:])
    assert (open_stream(config(server.url, tmp_path), 1).read(np.arange(200)) == expected).all()


def test_pipe_and_fsspec_paths_give_the_same_rows(folder, tmp_path, expected):
    pipe = f"pipe:cat {folder}/{{}}"
    assert (open_stream(config(pipe, tmp_path / "a"), 1).read(np.arange(200)) == expected).all()
    assert (open_stream(config(f"local://{folder}", tmp_path / "c"), 1).read(np.arange(200)) == expected).all()
    assert len(list((tmp_path / "c").glob("*.tar"))) == 4
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/set", recursive=True)
    assert (open_stream(config("memory://set", tmp_path / "b"), 1).read(np.arange(200)) == expected).all()


def test_pipe_that_fails_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set" / "train" / SHARD).unlink()
    stream = open_stream(config(f"pipe:cat {tmp_path}/set/{{}}", tmp_path / "cache", retries=0), 1)
    with pytest.raises(BadShardError, match="pipe:cat") as caught:
        stream.read(np.arange(200))
    assert caught.value.shard == SHARD
    with pytest.raises(ValueError, match=r"put \{\} where"):
        open_stream(config("pipe:cat /nowhere", tmp_path / "cache"), 1)


def test_url_scheme_nobody_knows_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="cannot read train/manifest"):
        open_stream(config("nosuchstore://bucket/set", tmp_path), 1)


def test_next_window_is_fetched_ahead(server, tmp_path):
    stream = open_stream(config(server.url, tmp_path, shuffle_window=2), 1)
    stream.read(np.arange(2))
    for _ in range(100):
        if len(list(tmp_path.glob("*.tar"))) == 4:
            break
        time.sleep(0.05)
    assert len(list(tmp_path.glob("*.tar"))) == 4


def test_cache_stays_below_its_limit_and_drops_the_least_recently_used(tmp_path):
    cache = FileCache(tmp_path, 1000)

    def fetch(path: Path) -> None:
        path.write_bytes(b"x" * 300)

    for number in range(3):
        cache.get(f"{number}", 300, fetch)
        os.utime(tmp_path / str(number), (number, number))
    cache.get("0", 300, fetch)  # used again: 1 is the oldest now
    cache.get("3", 300, fetch)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["0", "2", "3"]
    with pytest.raises(CacheFullError, match=r"larger than all of it; raise data\.cache_size_gb"):
        cache.get("4", 2000, fetch)


@pytest.mark.parametrize("key", ["../escape", "/etc/passwd", "a/b", ".hidden", ""])
def test_nothing_leaves_the_cache_folder(tmp_path, key):
    with pytest.raises(ValueError, match="not a plain file name"):
        FileCache(tmp_path / "cache", 1000).get(key, 1, lambda path: path.write_bytes(b"x"))


def test_small_cache_still_gives_all_rows(server, tmp_path, expected):
    # room for two of the four shards: they are fetched again and again
    stream = open_stream(config(server.url, tmp_path, cache_size_gb=600e-6), 1)
    for start in range(0, 200, 10):
        assert (stream.read(np.arange(start, start + 10)) == expected[start : start + 10]).all()
        assert sum(p.stat().st_size for p in tmp_path.glob("*.tar")) <= 600_000


def test_full_disk_is_one_error_and_excludes_no_shard(server, tmp_path):
    """/dev/full answers every write with "no space left on device"."""
    cache = FileCache(tmp_path, 10**9)
    (tmp_path / "old").write_bytes(b"x" * 100)
    (tmp_path / ".new.part").symlink_to("/dev/full")

    def fetch(path: Path) -> None:
        path.write_bytes(b"x" * 300)

    with pytest.raises(CacheFullError, match=r"no space for a file of 300 bytes .*data\.cache_dir"):
        cache.get("new", 300, fetch)
    assert not (tmp_path / "old").exists(), "room was made before giving up"
    assert not (tmp_path / ".new.part").is_symlink()
    assert cache.get("new", 300, fetch) == tmp_path / "new"


def test_process_killed_during_a_transfer_leaves_a_usable_cache(server, tmp_path, expected):
    server.faults[SHARD] = ["drip"]
    code = (
        "import sys, numpy as np\n"
        "from bd3lm_scale.config.schema import DataConfig\n"
        "from bd3lm_scale.data.source import open_source\n"
        "config = DataConfig(path=sys.argv[1], context_length=50, cache_dir=sys.argv[2])\n"
        "open_source(config, 1, 'train', ()).read(np.arange(200))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)])
    alone = 0  # the other shards come at once; the one that drips is then under way alone
    while alone < 6 and process.poll() is None:
        alone = alone + 1 if server.requests[SHARD] and len(list(tmp_path.glob(".*.part"))) == 1 else 0
        time.sleep(0.05)
    process.kill()
    process.wait()
    (part,) = tmp_path.glob(".*.part")
    assert part.stat().st_size
    assert (open_stream(config(server.url, tmp_path), 1).read(np.arange(200)) == expected).all()
    assert server.ranges == [SHARD], "it went on where the killed one was"
