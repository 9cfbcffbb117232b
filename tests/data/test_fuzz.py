"""Hostile shards and HTTP servers: the right rows or one error. Thousands: python tests/fuzz_files.py."""

import os

import pytest

from bd3lm_scale.data import storage
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.errors import BadShardError
from tests.fuzz_data import Servers, Shards
from tests.fuzz_files import fuzz


@pytest.mark.parametrize(("kind", "cases"), [("shards", 80), ("servers", 25)])
def test_every_case_gives_the_right_rows_or_one_error(kind, cases, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("_FIRST_PAUSE_SECONDS", "LARGEST_SMALL_FILE"):
        monkeypatch.setattr(storage, name, getattr(storage, name))  # put back what the servers' cases shorten
    outcomes = fuzz(kind, seed=20, cases=cases, folder=tmp_path)
    assert outcomes["refused"] > cases / 4, outcomes
    assert outcomes["accepted"] > cases / 10, outcomes


def test_a_server_that_behaves_gives_the_rows(tmp_path, monkeypatch):
    """What the cases compare with: none of them would be accepted if this were not."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("_FIRST_PAUSE_SECONDS", "LARGEST_SMALL_FILE"):
        monkeypatch.setattr(storage, name, getattr(storage, name))
    servers = Servers(tmp_path)
    stream = open_stream(servers.config(servers.url, cache_dir=str(servers.cache)), 1)
    assert servers.judge(stream) == 1


@pytest.mark.parametrize("name", ["train/train-000000.tar", "train/manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_one_error_at_once(tmp_path, name, kind):
    data = Shards(tmp_path)
    data.restore()
    path = data.folder / name
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises((BadShardError, ValueError), match=f"{path.name}.*is not a regular file"):
        data.read()
