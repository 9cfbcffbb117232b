#!/usr/bin/env python3
"""Break the core one line at a time and see whether the tests notice.

    tools/mutants.py                          all mutants of tools/mutation/: minutes
    tools/mutants.py --only optim lr          those whose file or name holds one of the words
    tools/mutants.py --list

Each mutant is a text replacement in a copy of the repository, against which the tests named beside it are run. One
that no test notices survives: a law is missing. Exit code 0 when all are noticed, 1 otherwise.
"""

import argparse
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mutation.core import MUTANTS
from mutation.mutant import Mutant
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("bd3lm_scale", "tests", "tools", "configs", "slurm", "pyproject.toml")
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"
PASSED, FAILED = 0, 1  # pytest's exit codes; any other means that no test was judged


def copy_of(repository: Path, folder: Path) -> Path:
    """A copy of what the tests need, without compiled files."""
    ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache")
    for name in COPIED:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        elif source.exists():
            shutil.copy2(source, folder / name)
    return folder


def start_tests(copy: Path, tests: Sequence[str], output: Path) -> int:
    """Run tests in a child that shares this process's imports; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path.insert(0, str(copy))
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--durations=0", *tests]))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = 99
    sys.stdout.flush()
    os._exit(code)


def finished(running: dict[int, float], timeout: float) -> tuple[int, int | None]:
    """Wait for a child: (process id, exit code; None: it was ended after `timeout` seconds)."""
    while True:
        for pid, started in running.items():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return pid, os.waitstatus_to_exitcode(status)
            if time.monotonic() - started > timeout:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return pid, None
        time.sleep(0.05)


def run(
    mutants: Sequence[Mutant], repository: Path, jobs: int, timeout: float, advance: Callable[[str, str], object]
) -> dict[str, str]:
    """The fate of each mutant by name: KILLED, SURVIVED, or BROKEN (no test ran); `advance(name, fate)` follows along.

    Raises:
        StaleMutantError: before anything runs.
        RuntimeError: the tests fail on the code as it is.
    """
    original = {m.file: (repository / m.file).read_text() for m in mutants}
    changed = {m.name: m.apply(original[m.file]) for m in mutants}
    fates: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants_") as temporary:
        free = [copy_of(repository, Path(temporary) / str(i)) for i in range(jobs)]
        _check_unchanged(free[0], mutants, timeout, advance)
        running: dict[int, float] = {}
        at: dict[int, tuple[Mutant, Path]] = {}
        waiting = list(mutants)
        while waiting or running:
            while waiting and free:
                mutant, copy = waiting.pop(0), free.pop()
                (copy / mutant.file).write_text(changed[mutant.name])
                pid = start_tests(copy, mutant.tests, copy / "output.txt")
                running[pid], at[pid] = time.monotonic(), (mutant, copy)
            pid, code = finished(running, timeout)
            del running[pid]
            mutant, copy = at.pop(pid)
            # a mutant that never ends is noticed too
            fates[mutant.name] = {PASSED: SURVIVED, FAILED: KILLED, None: KILLED}.get(code, BROKEN)
            if fates[mutant.name] == BROKEN:
                tqdm.write((copy / "output.txt").read_text()[-3000:])
            (copy / mutant.file).write_text(original[mutant.file])
            free.append(copy)
            advance(mutant.name, fates[mutant.name])
    return fates


def _check_unchanged(
    copy: Path, mutants: Iterable[Mutant], timeout: float, advance: Callable[[str, str], object]
) -> None:
    """A test that fails anyway would kill every mutant."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    output = copy / "output.txt"
    pid = start_tests(copy, tests, output)
    _, code = finished({pid: time.monotonic()}, timeout * len(tests) + 600)
    if code != PASSED:
        raise RuntimeError(f"the tests fail on the code as it is (pytest's exit code {code}):\n{output.read_text()}")
    advance("the code as it is", "passes")


def preload() -> None:
    """Import the libraries once, for all children; nothing of the package itself."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.dont_write_bytecode = True  # a mutant of the same size in the same second would meet old compiled code
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import warnings

    warnings.filterwarnings("ignore", message=".*(Apex|apex|Transformer Engine|full scope is deprecated).*")
    import deepspeed
    import hypothesis  # noqa: F401
    import megatron.core.transformer.moe.experts  # noqa: F401
    import pytest  # noqa: F401
    import scipy.stats  # noqa: F401

    _ = deepspeed.ops.__compatible_ops__  # found out once, not by every child
    gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""], help="in the file's path or the name")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a mutant counts as noticed")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if any(word in f"{m.file} {m.name}" for word in args.only)]
    if args.list or not chosen:
        print("\n".join(f"{m.file}: {m.name}" for m in chosen) or "no mutant has these words")
        return 0 if chosen else 2
    preload()
    with tqdm(total=len(chosen) + 1, unit="mutant", desc="mutants") as bar:

        def advance(name: str, fate: str) -> None:
            bar.update()
            if fate in (SURVIVED, BROKEN):
                tqdm.write(f"{fate}: {name}")

        fates = run(chosen, ROOT, args.jobs, args.timeout, advance)
    counts = {fate: sum(found == fate for found in fates.values()) for fate in (KILLED, SURVIVED, BROKEN)}
    print(f"{len(fates)} mutants: {counts[KILLED]} killed, {counts[SURVIVED]} survived, {counts[BROKEN]} broken")
    for mutant in chosen:
        if fates[mutant.name] != KILLED:
            print(f"  {fates[mutant.name]:8} {mutant.file}: {mutant.name} (tests: {', '.join(mutant.tests)})")
    return 0 if counts[KILLED] == len(fates) else 1


if __name__ == "__main__":
    sys.exit(main())
