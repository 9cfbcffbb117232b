"""Logging: rank 0 logs everything, other ranks warnings; both also in files of the run folder."""

import logging
import os
import sys
import time
import warnings
from pathlib import Path

from bd3lm_scale.config.environment import number_from_environment

ROOT = "bd3lm_scale"
NOISY_LIBRARIES = (
    "DeepSpeed", "deepspeed", "megatron", "torch.distributed", "torch._dynamo", "torch._inductor", "transformers",
    "urllib3", "filelock", "fsspec", "webdataset", "wandb", "asyncio", "matplotlib",
)  # fmt: skip


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `log = get_logger(__name__)`."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


class _Formatter(logging.Formatter):
    """`21:40:07 message`; warnings and other ranks say who and how bad; files carry date and module."""

    def __init__(self, rank: int, full: bool) -> None:
        super().__init__()
        self.rank = rank
        self.full = full

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S" if self.full else "%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        module = f"{record.name.removeprefix(ROOT + '.')}: " if self.full else ""
        rank = f"[rank {self.rank}] " if self.rank or self.full else ""
        text = f"{clock} {rank}{module}{level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class _LogFile(logging.FileHandler):
    """Lines that a full or absent disk does not take are on stderr; they are no reason to write a traceback there."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def set_up_logging(run_dir: str | Path | None, rank: int | None = None, verbose: bool = False) -> None:
    """Send this process's log to stderr and its file; calling it again replaces what was set up before.

    Without a run folder to stderr only: until the run folder is this job's, another one may be writing there.
    Rank 0: everything to stderr and run_dir/log.txt. Other ranks: warnings to stderr and to a file of their own,
    run_dir/runtime/rank_00003.log, which exists only if there was one (appending to one file from several hosts
    loses lines on network file systems).
    """
    rank = (number_from_environment("RANK", "SLURM_PROCID") or 0) if rank is None else rank
    quiet_libraries()
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    level = logging.NOTSET if rank == 0 else logging.WARNING
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(_Formatter(rank, full=False))
    handlers: list[logging.Handler] = [console]
    if run_dir is not None:
        folder = Path(run_dir) if rank == 0 else Path(run_dir) / "runtime"
        folder.mkdir(parents=True, exist_ok=True)
        name = "log.txt" if rank == 0 else f"rank_{rank:05d}.log"
        file = _LogFile(folder / name, mode="a", delay=True)
        file.setFormatter(_Formatter(rank, full=True))
        handlers.append(file)
    for handler in handlers:
        handler.setLevel(level)
        logger.addHandler(handler)


def quiet_libraries() -> None:
    """Let third-party libraries report errors only: with thousands of ranks their chatter buries the run's own log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron|deepspeed)\b")
    for name in NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
