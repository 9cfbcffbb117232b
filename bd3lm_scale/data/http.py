"""Bytes over HTTP, from servers that may misbehave: every wait is bounded, whatever comes or does not come."""

import contextlib
import http.client
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

_BLOCK = 1 << 20
# a transfer that brings less than this within one timeout has stalled
_LEAST_PROGRESS = 1 << 16
_TRANSIENT_STATUS = {408, 425, 429}
_PATIENCE = 1.5  # times the timeout: the socket's own time-out comes first where nothing at all arrives


class TransferError(OSError):
    """Bytes that could not be had; `is_lasting` says that asking again is no use."""

    def __init__(self, reason: str, is_lasting: bool = False):
        super().__init__(reason)
        self.is_lasting = is_lasting


class DamagedError(Exception):
    """Bytes that are not what the manifest says."""


class _Patience:
    """Ends a connection that takes too long. A socket's own time-out begins anew with every byte that arrives.

    Attributes:
        ran_out: the connection was ended; what was read of it may look complete.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._socket: socket.socket | None = None
        self._timer: threading.Timer | None = None
        self._since = 0.0
        self.ran_out = False

    def watch(self, connected: socket.socket) -> None:
        """Wait for something of this connection from now on."""
        self._socket = connected
        self.renew(force=True)

    def renew(self, force: bool = False) -> None:
        """Something came: begin to wait anew."""
        if force or time.monotonic() - self._since > self._seconds / 4:
            self.end()
            self._since = time.monotonic()
            self._timer = threading.Timer(self._seconds, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def end(self) -> None:
        """No longer wait."""
        if self._timer is not None:
            self._timer.cancel()

    def _give_up(self) -> None:
        self.ran_out = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # not the method of an SSL socket, which changes it under the reading thread
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _watched(kind: type, patience: _Patience) -> type:
    class Watched(kind):
        def connect(self) -> None:
            super().connect()
            patience.watch(self.sock)

    return Watched


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, patience: _Patience):
        urllib.request.HTTPSHandler.__init__(self)
        self._patience = patience

    def http_open(self, req):
        return self.do_open(_watched(http.client.HTTPConnection, self._patience), req)  # pyright: ignore[reportArgumentType]

    def https_open(self, req):
        return self.do_open(_watched(http.client.HTTPSConnection, self._patience), req)  # pyright: ignore[reportArgumentType]


def _opener(patience: _Patience) -> urllib.request.OpenerDirector:
    """Only HTTP: no redirection leads to ftp, file or data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Handler(patience),
    ):
        opener.add_handler(handler)
    return opener


def from_http(url: str, offset: int, timeout: float) -> tuple[int, Iterator[bytes]]:
    """Where the bytes begin (`offset`, or earlier where the server will not skip) and the bytes. TransferError."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    patience = _Patience(timeout * _PATIENCE)
    try:
        response = _opener(patience).open(request, timeout=timeout)
    except urllib.error.HTTPError as problem:
        problem.close()
        if problem.code == 416:  # nothing is missing any more
            return offset, iter(())
        is_lasting = 400 <= problem.code < 500 and problem.code not in _TRANSIENT_STATUS
        raise TransferError(f"{url}: HTTP {problem.code} {problem.reason}", is_lasting) from problem
    except (OSError, http.client.HTTPException, ValueError) as problem:
        raise TransferError(f"{url}: {getattr(problem, 'reason', problem)}") from problem
    finally:
        patience.end()
    if patience.ran_out:
        response.close()
        raise TransferError(f"{url}: slow: no whole answer in {timeout * _PATIENCE:.1f} s")
    start = 0
    if response.status == 206:
        found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = int(found[1]) if found else offset
    if start > offset:
        response.close()
        raise TransferError(f"{url}: sent the bytes from {start} on, asked for those from {offset}")
    return start, _blocks(url, response, timeout, patience)


def _expected(url: str, response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    if length is not None and not re.fullmatch("[0-9]{1,18}", length.strip()):
        raise TransferError(f"{url}: Content-Length {length[:40]!r} is not a number of bytes")
    return None if length is None else int(length)


def _blocks(url: str, response: http.client.HTTPResponse, timeout: float, patience: _Patience) -> Iterator[bytes]:
    received, checked, checked_at = 0, 0, time.monotonic()
    with response, contextlib.ExitStack() as stack:
        stack.callback(patience.end)
        expected = _expected(url, response)
        patience.renew(force=True)
        while expected is None or received < expected:
            try:
                block = response.read1(_BLOCK)
            except (OSError, http.client.HTTPException, ValueError) as problem:
                raise TransferError(f"{url}: {problem} after {received} bytes") from problem
            if not block:
                break
            patience.renew()
            received += len(block)
            yield block
            now = time.monotonic()
            if now - checked_at > timeout:
                if received - checked < _LEAST_PROGRESS and received != expected:
                    raise TransferError(f"{url}: slow: {received - checked} bytes in {now - checked_at:.1f} s")
                checked, checked_at = received, now
    if patience.ran_out:
        raise TransferError(f"{url}: slow: {received} bytes, and then no more for {timeout * _PATIENCE:.1f} s")
    if expected is not None and received < expected:
        raise TransferError(f"{url}: cut off after {received} of {expected} bytes")
