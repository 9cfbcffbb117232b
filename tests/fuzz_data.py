"""Hostile shards, manifests and HTTP servers for fuzz_files.py: whatever they are, the right rows come or one error."""

import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data import storage
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from tests.data.sets import write_set

LENGTHS = [70, 40, 40]
ROW = 8
TEXT = "def square(x):\n    return x * x\n\nfor i in range(10):\n    print(square(i), 'is the square of', i)\n"
VALUES = [None, True, 0, -1, 1, 16, 2**31, 2**63, 2**200, 0.5, 1e308, "", "x", "\ud800", "../x", [], {}, [[]], "train"]
TIMEOUT = 0.3


def nodes(raw: Any, path: tuple = ()):
    """Paths of all values in a JSON document."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from nodes(value, (*path, key))


def changed_json(text: str, draw: random.Random) -> str:
    """One or two entries replaced, deleted, exchanged, doubled or shifted; or characters in the text."""
    if draw.random() < 0.15:
        at, noise = draw.randrange(len(text)), draw.choice(["", "0", "9", '"', "[", "]", "{", ",", "\u00e9"])
        return text[:at] + noise + text[at + draw.choice([0, 1, 40]) :]
    raw = json.loads(text)
    paths = list(nodes(raw))
    for _ in range(draw.choice([1, 1, 2])):
        *above, key = draw.choice(paths)
        holder = raw
        try:
            for step in above:
                holder = holder[step]
            act = draw.choice(["set", "delete", "swap", "double", "shift"])
            if act == "set":
                holder[key] = copy.deepcopy(draw.choice(VALUES))
            elif act == "delete":
                del holder[key]
            elif act == "swap":
                other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
                holder[key], holder[other] = holder[other], holder[key]
            elif act == "double" and isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            elif type(holder[key]) is int:
                holder[key] += draw.choice([-512, -16, -1, 1, 2, 16, 512])
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the value away
    return json.dumps(raw)


class Data:
    """A prepared folder, and whether what is read from it is right."""

    def __init__(self, folder: Path) -> None:
        self.trap, self.good, self.folder = folder / "trap", folder / "good", folder / "set"
        tokenizer = train_sentencepiece([TEXT] * 20, folder / "made", vocab_size=320)
        write_set(self.good, tokenizer, LENGTHS, version=1)
        self.index = np.arange(2 * sum(n // ROW for n in LENGTHS))
        self.rows = open_stream(self.config(str(self.good)), 1).read(self.index)

    def config(self, path: str, **settings: Any) -> DataConfig:
        return DataConfig(path=path, context_length=ROW, retries=0, **settings)

    def restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder)

    def read(self) -> int:
        return self.judge(open_stream(self.config(str(self.folder)), 1))

    def judge(self, stream: Any) -> int:
        try:
            got = stream.read(self.index)
        finally:
            stream.close()
        return int(got.shape == self.rows.shape and bool((got == self.rows).all()))

    def expected(self) -> int:
        return 1


class Manifests(Data):
    """Their entries, their text, and what may lie in their place."""

    def make(self, draw: random.Random) -> Callable[[], int]:
        self.restore()
        path = self.folder / "train" / "manifest.json"
        if draw.random() < 0.05:
            put_another_kind(path, draw)
        else:
            path.write_text(changed_json(path.read_text(), draw), errors="surrogatepass")
        return self.read


class Shards(Data):
    """Bytes of the tars, tars made anew with members that escape, and what may lie in their place."""

    def make(self, draw: random.Random) -> Callable[[], int]:
        self.restore()
        for _ in range(draw.randint(1, 2)):
            path = draw.choice(sorted((self.folder / "train").glob("*.tar")))
            how = draw.randrange(4)
            if not path.is_file() or path.is_symlink():
                continue  # replaced before
            if how == 0:
                put_another_kind(path, draw)
            elif how == 1:
                self.make_anew(path, draw)
            else:
                change_bytes(path, draw)
        return self.read

    def make_anew(self, path: Path, draw: random.Random) -> None:
        """Another tar under the same name; sometimes the manifest's size and checksum are those of the new one."""
        try:
            with tarfile.open(path) as tar:
                members = [(member, tar.extractfile(member).read()) for member in tar if member.isfile()]
        except tarfile.TarError:
            return  # damaged before
        with tarfile.open(path, "w") as tar:
            for member, content in members:
                if draw.random() < 0.3:
                    member.name = draw.choice([f"../{self.trap.name}", str(self.trap), "x" * 90, "", ".", "a/../../b"])
                if draw.random() < 0.1:
                    member.type = draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
                    member.linkname = draw.choice(["/etc/passwd", "../x", ""])
                content = bytes(reversed(content)) if draw.random() < 0.1 else content
                member.size = len(content) if member.isreg() else 0
                for _ in range(2 if draw.random() < 0.05 else 1):
                    tar.addfile(member, io.BytesIO(content))
        if draw.random() < 0.3:
            manifest = self.folder / "train" / "manifest.json"
            raw = json.loads(manifest.read_text())
            entry = next(shard for shard in raw["shards"] if shard["name"] == path.name)
            entry["size"], entry["sha256"] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
            manifest.write_text(json.dumps(raw))


def change_bytes(path: Path, draw: random.Random) -> None:
    """Flip bits, cut off, fill, or append."""
    data = bytearray(path.read_bytes())
    how = draw.randrange(5)
    if how == 0 and data:
        for _ in range(draw.choice([1, 1, 8, 200])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del data[draw.randrange(len(data) + 1) :]
    elif how == 2 and data:
        start = draw.randrange(len(data))
        data[start : start + draw.choice([1, 8, 512])] = draw.choice([b"\0", b"\xff"]) * draw.choice([1, 8, 512])
    elif how == 3:
        data[draw.choice([0, len(data)]) : 0] = draw.randbytes(draw.choice([1, 8, 100]))
    else:
        data[: min(300, len(data))] = bytes(b ^ (draw.random() < 0.02) for b in data[:300])
    path.write_bytes(bytes(data))


def put_another_kind(path: Path, draw: random.Random) -> None:
    """A folder, a pipe, or a link to a device, to nothing, to itself or to another file."""
    path.unlink()
    targets = ["/dev/zero", "/dev/full", "/nowhere", path.name, "/etc/passwd", "../tokenizer", "train-000001.tar"]
    how = draw.randrange(3)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    else:
        path.symlink_to(draw.choice(targets))


class Servers(Data):
    """HTTP servers that answer some requests, or all of them, with something else than the file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cache = folder / "cache"
        self.conduct: list[Callable[[socket.socket, bytes, bytes], None] | None] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        os.environ["NO_PROXY"] = "127.0.0.1"
        storage._FIRST_PAUSE_SECONDS = 0.01
        storage.LARGEST_SMALL_FILE = 1 << 21
        threading.Thread(target=self._accept, daemon=True).start()

    def make(self, draw: random.Random) -> Callable[[], int]:
        shutil.rmtree(self.cache, ignore_errors=True)
        count = draw.choice([1, 1, 2, 4, 12, 1000])
        # None: this request is answered as it should be
        mostly = draw.choice([0.3, 0.7, 1.0])
        kinds = [draw.choice(CONDUCT)(draw) for _ in range(draw.randint(1, 3))]
        self.conduct = [draw.choice(kinds) if draw.random() < mostly else None for _ in range(min(count, 40))]
        retries = draw.choice([0, 1, 3])

        def read() -> int:
            settings = {"cache_dir": str(self.cache), "timeout_seconds": TIMEOUT}
            config = DataConfig(path=self.url, context_length=ROW, retries=retries, **settings)
            return self.judge(open_stream(config, 1))

        return read

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._answer, args=(self._listening.accept()[0],), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError, IndexError):
            request = connection.recv(65536)
            path = self.good / request.split()[1].decode().lstrip("/")
            content = path.read_bytes() if path.is_file() else b""
            act = self.conduct.pop(0) if self.conduct else None
            if act is not None:
                act(connection, content, request)
            elif path.is_file():
                well(connection, content, request)
            else:
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")


def well(connection: socket.socket, content: bytes, request: bytes) -> None:
    """The answer that HTTP asks for, ranges included."""
    start = 0
    for line in request.split(b"\r\n"):
        if line.lower().startswith(b"range: bytes="):
            start = int(line.partition(b"=")[2].rstrip(b"-"))
    if start and start < len(content):
        first = f"HTTP/1.1 206 Partial\r\nContent-Range: bytes {start}-{len(content) - 1}/{len(content)}\r\n"
    else:
        start, first = 0, "HTTP/1.1 200 OK\r\n"
    connection.sendall(f"{first}Content-Length: {len(content) - start}\r\n\r\n".encode() + content[start:])


def lying_about_length(draw: random.Random):
    claim = draw.choice(["0", "1", "10", "999999", "-5", "abc", "9" * 300, "", "0x10", "1e3", "10, 10"])
    return lambda c, content, _: c.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {claim}\r\n\r\n".encode() + content)


def breaking_off(draw: random.Random):
    share, gives = draw.random(), draw.choice([True, False])

    def act(connection: socket.socket, content: bytes, _: bytes) -> None:
        length = f"Content-Length: {len(content)}\r\n" if gives else ""
        connection.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode() + content[: int(share * len(content))])

    return act


def with_status(draw: random.Random):
    code = draw.choice([100, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 408, 416, 429, 500, 502, 503, 999, 0])
    more = draw.choice(["", "Retry-After: 100000\r\n", "Retry-After: x\r\n", "Location: \r\n"])
    body = draw.choice([b"", b"x" * 100])
    return lambda c, *_: c.sendall(f"HTTP/1.1 {code} No\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def redirecting(draw: random.Random):
    to = draw.choice(
        ["/a", "", "http://127.0.0.1:1/x", "file:///etc/passwd", "ftp://127.0.0.1:1/x", "http://", "//[", "\t"]
    )
    return lambda c, *_: c.sendall(f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())


def wrong_range(draw: random.Random):
    said = draw.choice(["bytes 70-79/80", "bytes 0-0/1", "bytes */80", "items 1-2/3", "bytes 5-1/x", ""])
    return lambda c, content, _: c.sendall(
        f"HTTP/1.1 206 Partial\r\nContent-Range: {said}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    )


def other_bytes(draw: random.Random):
    seed, appended = draw.random(), draw.choice([0, 0, 1, 100_000])

    def act(connection: socket.socket, content: bytes, _: bytes) -> None:
        here, data = random.Random(seed), bytearray(content)
        for _ in range(3):
            if data:
                data[here.randrange(len(data))] ^= 1 << here.randrange(8)
        data += here.randbytes(appended)
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    return act


def endless(draw: random.Random):
    first, again, pause = draw.choice([
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, 0.0),
        (b"HTTP/1.1 200 OK\r\n", b"a", 0.02),
        (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", 0.01),
        (b"HTTP/1.1 2", b"0", 0.02),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0", 0.02),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x", 0.02),
    ])  # fmt: skip

    def act(connection: socket.socket, *_: bytes) -> None:
        connection.sendall(first)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            connection.sendall(again)
            time.sleep(pause)

    return act


def silent(draw: random.Random):
    first = draw.choice([b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123"])

    def act(connection: socket.socket, *_: bytes) -> None:
        connection.sendall(first)
        connection.settimeout(5 * TIMEOUT)
        connection.recv(1)  # until the client gives up

    return act


def noise(draw: random.Random):
    answer = draw.choice([
        b"", b"\x00\x01 hello\r\n\r\n", draw.randbytes(200), b"HTTP/1.1 200 OK\r\n" + draw.randbytes(100) + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", b"ICY 200 OK\r\n\r\n",
    ])  # fmt: skip
    return lambda c, *_: c.sendall(answer)


CONDUCT = [
    lying_about_length, breaking_off, with_status, redirecting, wrong_range, other_bytes, endless, silent, noise,
]  # fmt: skip
