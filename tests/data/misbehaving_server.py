"""A real HTTP server on loopback that serves a folder and misbehaves on demand."""

import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class MisbehavingServer:
    """Serves `folder`; `faults[name]` lists what to do with the next requests whose path ends in `name`.

    Faults: an int (that HTTP status), "short" (half the bytes, then close), "flip" (one wrong byte),
    "drip" (one byte now and then), "hang" (no answer), "refuse range" (whole file, status 200).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults: dict[str, list] = {}
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.ranges: list[str] = []
        self._end = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *unused):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.rsplit("/", 1)[-1]
        self.requests[name] += 1
        waiting = self.faults.get(name) or []
        fault = waiting.pop(0) if waiting else None
        path = self.folder / handler.path.lstrip("/")
        if fault == "hang":
            self._end.wait(30)
            return
        if isinstance(fault, int) or not path.is_file():
            handler.send_error(fault if isinstance(fault, int) else 404)
            return
        data = path.read_bytes()
        total, start = len(data), 0
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and fault != "refuse range":
            self.ranges.append(name)
            start = int(asked[1])
            if start >= total:
                handler.send_error(416)
                return
        data = data[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        self._send(handler, name, data, fault)

    def _send(self, handler, name: str, data: bytes, fault) -> None:
        if fault == "flip":
            data = data[:-5000] + bytes([data[-5000] ^ 1]) + data[-4999:]
        if fault == "short":
            data = data[: len(data) // 2]
        try:
            if fault == "drip":
                for i in range(len(data)):
                    handler.wfile.write(data[i : i + 1])
                    time.sleep(0.05)
                    if self._end.is_set():
                        return
            self.bytes_sent[name] += len(data)  # before the client can know
            handler.wfile.write(data)
        except OSError:
            pass  # the client has given up, which is what it should do
