"""A data worker: a small process that reads rows ahead of the training process.

    requests  (standard input)   {"slot", "step", "generation", "index": [...], "excluded": [...]}   one JSON per line
    answers   (standard output)  {"slot", "step", "generation", "rows"} or {..., "error", "shard"}
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

from bd3lm_scale.config import DataConfig, MixtureSource
from bd3lm_scale.data.shards import BadShardError
from bd3lm_scale.data.source import RowSource

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


def _serve(source: RowSource, memory: np.ndarray, request: dict) -> tuple[RowSource, dict]:
    answer = {key: request[key] for key in ("slot", "step", "generation")}
    try:
        excluded = tuple(request["excluded"])
        if excluded != source.excluded:
            source.close()
            source = RowSource(source.config, source.seed, source.split, excluded)
        rows = source.read(np.array(request["index"], np.int64))
        memory[request["slot"], : len(rows)] = rows
        answer["rows"] = len(rows)
    except BadShardError as problem:
        answer |= {"error": problem.reason, "shard": problem.shard}
    except (ValueError, OSError, RuntimeError) as problem:
        answer |= {"error": str(problem), "shard": None}
    return source, answer


def main() -> None:
    """Serve requests until standard input closes. The first line says what to read."""
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_SIGNALS)
    setup = json.loads(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    memory = np.frombuffer(mmap.mmap(setup["memory"], 0), setup["dtype"]).reshape(setup["shape"])
    source = RowSource(config_from_json(setup["config"]), setup["seed"], setup["split"], tuple(setup["excluded"]))
    requests: queue.SimpleQueue = queue.SimpleQueue()
    latest = [0]
    threading.Thread(target=_listen, args=(requests, latest, setup["parent"]), daemon=True).start()
    while True:
        request = requests.get()
        if request["generation"] != latest[0]:
            continue  # asked before a seek: nobody waits for it
        source, answer = _serve(source, memory, request)
        try:
            os.write(answers, json.dumps(answer).encode() + b"\n")
        except BrokenPipeError:
            os._exit(0)


if __name__ == "__main__":
    main()
