"""Starts training processes without their imports: imports everything once, then forks a process per rank.

`python -m tests.zygote` reads one JSON object per line: {"arguments": [...], "environment": {...}, "log": PATH}.
Each becomes a process of its own (its own session, signals, environment, exit code) that runs bd3lm_scale.train's
main; LOG.pid and LOG.exit say which and how it ended. At the end of the input its children die with it.
"""

import gc
import json
import os
import select
import signal
import sys
from pathlib import Path


def serve(children: dict[int, str]) -> list[str]:
    """Fork on request, for ever; returns only in the children, with their arguments."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread = b""
    while True:
        ready, _, _ = select.select([0, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            reap(children)
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                sys.exit(0)
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    become(request)
                    return request["arguments"]
                children[pid] = request["log"]
                say(request["log"] + ".pid", pid)


def reap(children: dict[int, str]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        say(children.pop(pid) + ".exit", os.waitstatus_to_exitcode(status))


def say(path: str, number: int) -> None:
    Path(path + ".new").write_text(str(number))
    os.replace(path + ".new", path)


def become(request: dict) -> None:
    """In the child: what exec would have done."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for file, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(file, number)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import megatron.core.transformer.moe.experts  # noqa: F401

    from bd3lm_scale import train
    from bd3lm_scale.parallel import cpu_shim

    cpu_shim.install()
    _ = deepspeed.ops.__compatible_ops__  # found out once, not by every child
    gc.freeze()  # collections in the children would copy the pages they share
    arguments = serve({})
    sys.exit(train.main(arguments))
