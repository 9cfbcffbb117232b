"""Servers that do not keep to HTTP: every transfer ends within a bounded time, with bounded bytes, in one error."""

import contextlib
import hashlib
import socket
import threading
import time

import numpy as np
import pytest

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.cache import FileCache
from bd3lm_scale.data.files import RemoteFiles
from bd3lm_scale.data.shards import Shard
from bd3lm_scale.data.storage import DamagedError, TransferError, read_text, transfer
from bd3lm_scale.data.stream import open_stream
from tests.data.misbehaving_server import MisbehavingServer
from tests.data.sets import write_set

TIMEOUT = 0.4
SIZE = 5000
OK = b"HTTP/1.1 200 OK\r\n"


def endless(connection: socket.socket, first: bytes, again: bytes, pause: float) -> None:
    connection.sendall(first)
    while True:
        connection.sendall(again)
        time.sleep(pause)


def send(answer: bytes):
    return lambda connection: connection.sendall(answer)


# what the server does, and what the client must say
CONDUCT = {
    "endless body": (lambda c: endless(c, OK + b"\r\n", b"x" * 65536, 0), "brings more than the 5,000 bytes"),
    "body larger than the shard": (send(OK + b"Content-Length: 900000\r\n\r\n" + b"x" * 900_000), "brings more than"),
    "header without end": (lambda c: endless(c, OK, b"a", 0.05), "slow: no whole answer"),
    "headers without end": (lambda c: endless(c, OK, b"A: b\r\n", 0.02), "slow: no whole|more than 100 headers"),
    "status line without end": (lambda c: endless(c, b"HTTP/1.1 2", b"0", 0.05), "127.0.0.1"),
    "chunk size without end": (
        lambda c: endless(c, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0", 0.05), "after 0 bytes|slow: 0 bytes",
    ),
    "length is no number": (send(OK + b"Content-Length: abc\r\n\r\nxxx"), "Content-Length 'abc' is not a number"),
    "length is negative": (send(OK + b"Content-Length: -5\r\n\r\nxxx"), "Content-Length '-5' is not a number"),
    "length is huge": (send(OK + b"Content-Length: " + b"9" * 400 + b"\r\n\r\nx"), "is not a number of bytes"),
    "length is too large": (send(OK + b"Content-Length: 4000\r\n\r\n" + b"x" * 100), "cut off after 100 of 4000"),
    "no HTTP": (send(b"\x00\x01\x02 hello\r\n\r\n"), "127.0.0.1"),
    "nothing": (lambda c: None, "127.0.0.1"),
    "chunk size is no number": (send(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc"), "after 0 bytes"),
    "to a file": (send(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"), "302"),
    "to ftp": (send(b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1:1/x\r\n\r\n"), "unknown url type|ftp"),
    "in a circle": (send(b"HTTP/1.1 302 Found\r\nLocation: /a\r\nContent-Length: 0\r\n\r\n"), "redirect|302"),
    "other bytes than asked for": (
        send(b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 70-79/80\r\nContent-Length: 10\r\n\r\n0123456789"),
        "sent the bytes from 70 on",
    ),
}  # fmt: skip


@pytest.fixture
def serve():
    listening = []

    def start(conduct) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                conduct(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in listening:
        server.close()


@pytest.mark.parametrize("name", CONDUCT)
def test_transfer_ends_soon_and_small_in_one_error(serve, tmp_path, monkeypatch, name):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    conduct, message = CONDUCT[name]
    url = serve(conduct)
    started_at = time.monotonic()
    with pytest.raises((TransferError, DamagedError), match=message):
        transfer(f"{url}/shard.tar", tmp_path / "part", TIMEOUT, SIZE)
    assert time.monotonic() - started_at < 20 * TIMEOUT
    assert (tmp_path / "part").stat().st_size <= SIZE
    monkeypatch.setattr("bd3lm_scale.data.storage.LARGEST_SMALL_FILE", SIZE)
    with pytest.raises(TransferError):
        read_text(f"{url}/manifest.json", 0, TIMEOUT)


@pytest.mark.parametrize("name", ["endless body", "length is no number", "headers without end"])
def test_fetching_ahead_outlives_any_server(serve, tmp_path, monkeypatch, name):
    """Four of them in a row, one per thread; the fifth shard comes from a good server through the same threads."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = b"good" * 100
    good = Shard("good.tar", len(content), hashlib.sha256(content).hexdigest(), 1, 1, np.zeros(0), np.zeros(0))
    bad = [Shard(f"bad{i}.tar", SIZE, f"{i}" * 64, 1, 1, np.zeros(0), np.zeros(0)) for i in range(4)]

    def conduct(connection: socket.socket) -> None:
        CONDUCT[name][0](connection)

    files = RemoteFiles(serve(conduct), "train", FileCache(tmp_path, 10**6), TIMEOUT)
    files.fetch_ahead(bad)
    deadline = time.monotonic() + 60
    while files._asked and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not files._asked, "every attempt ended"
    files.where = serve(send(OK + b"Content-Length: 400\r\n\r\n" + content))
    files.fetch_ahead([good])
    while not list(tmp_path.glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path.read_bytes() for path in tmp_path.glob("*.tar")] == [content]


def test_rows_come_although_the_part_of_an_earlier_attempt_was_too_long(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("bd3lm_scale.data.storage._FIRST_PAUSE_SECONDS", 0.01)
    write_set(tmp_path / "set", tokenizer_path, [300, 200])
    server = MisbehavingServer(tmp_path / "set")
    settings = {"context_length": 10, "cache_dir": str(tmp_path / "cache"), "retries": 2}
    remote = open_stream(DataConfig(path=server.url, **settings), 1)
    for shard in remote.source._datasets[0].manifest.shards:
        (tmp_path / "cache" / f".{shard.sha256[:40]}.tar.part").write_bytes(b"x" * (shard.size + 10))
    expected = open_stream(DataConfig(path=str(tmp_path / "set"), **settings), 1).read(np.arange(40))
    assert (remote.read(np.arange(40)) == expected).all()
    server.close()
