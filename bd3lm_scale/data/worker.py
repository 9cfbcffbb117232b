"""A data worker: a small process that reads rows ahead of the training process.

    requests  (standard input)   {"step", "slot", "generation", "origin", "index": [...], "excluded": [...]}
    answers   (standard output)  {"step", "slot", "generation", "rows"} or {..., "error", "shard"}; one JSON per line
    rows                         in shared memory, slot after slot

It is started with SIGTERM, SIGINT and SIGUSR1 blocked (a scheduler signals every process of a step) and ends
when its parent does, however that ends.
"""

import json
import mmap
import os
import queue
import select
import signal
import sys
import threading

import numpy as np

from bd3lm_scale.config.schema import DataConfig, MixtureSource
from bd3lm_scale.data.source import Source, open_source
from bd3lm_scale.errors import BadShardError

IGNORED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_PARENT_POLL_SECONDS = 1.0


def config_from_json(raw: dict) -> DataConfig:
    """DataConfig out of its `dataclasses.asdict`."""
    return DataConfig(**{**raw, "mixture": tuple(MixtureSource(**m) for m in raw["mixture"])})


def _listen(requests: queue.SimpleQueue, latest: list[int], parent: int) -> None:
    """Pass requests on; end the process at once when the parent is gone."""
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], _PARENT_POLL_SECONDS)
        if os.getppid() != parent:
            os._exit(0)
        if not ready:
            continue
        data = os.read(0, 1 << 20)
        if not data:
            os._exit(0)
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            latest[0] = request["generation"]
            requests.put(request)


class _Server:
    """Answers requests, one after another."""

    def __init__(self, setup: dict):
        self._setup = setup
        self._memory = np.frombuffer(mmap.mmap(setup["memory"], 0), setup["dtype"]).reshape(setup["shape"])
        self._source: Source | None = None

    def answer(self, request: dict) -> dict:
        """Read the rows into memory and say so, or what went wrong."""
        answer = {key: request[key] for key in ("step", "slot", "generation")}
        try:
            source = self._opened(tuple(request["excluded"]))
            source.seek(request["origin"])
            rows = source.read(np.array(request["index"], np.int64))
            self._memory[request["slot"], : len(rows)] = rows
            return answer | {"rows": len(rows)}
        except BadShardError as problem:
            return answer | {"error": problem.reason, "shard": problem.shard}
        except (ValueError, OSError, RuntimeError, MemoryError) as problem:
            return answer | {"error": f"{type(problem).__name__}: {problem}", "shard": None}

    def _opened(self, excluded: tuple[str, ...]) -> Source:
        if self._source is None:
            config = config_from_json(self._setup["config"])
            self._source = open_source(
                config, self._setup["seed"], self._setup["split"], excluded, self._setup["block_size"]
            )
        elif excluded != self._source.excluded:
            self._source.close()
            self._source = self._source.without(excluded)
        return self._source


def main() -> None:
    """Serve requests until standard input closes; the argument says what to read, as JSON."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    setup = json.loads(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    requests: queue.SimpleQueue = queue.SimpleQueue()
    latest = [0]
    threading.Thread(target=_listen, args=(requests, latest, setup["parent"]), daemon=True).start()
    server = _Server(setup)
    while True:
        request = requests.get()
        if request["generation"] != latest[0]:
            continue  # asked before a seek: nobody waits for it
        try:
            os.write(answers, json.dumps(server.answer(request)).encode() + b"\n")
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
