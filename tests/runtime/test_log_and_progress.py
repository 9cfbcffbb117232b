import logging

import pytest

from bd3lm_scale.runtime.log import ROOT, get_logger, set_up_logging
from bd3lm_scale.runtime.progress import Progress, format_duration


@pytest.fixture(autouse=True)
def restore_logging():
    logger = logging.getLogger(ROOT)
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_zero_speaks_and_every_rank_warns(tmp_path, capsys, rank):
    set_up_logging(tmp_path, rank)
    set_up_logging(tmp_path, rank)  # twice: nothing is said twice
    log = get_logger("bd3lm_scale.train")
    log.info("hello")
    log.warning("careful: %d", 7)
    text = capsys.readouterr().err
    assert text.count("hello") == (1 if rank == 0 else 0)
    assert text.count("WARNING: careful: 7") == 1
    assert ("[rank 3]" in text) == (rank == 3)
    file = tmp_path / "log.txt" if rank == 0 else tmp_path / "runtime" / "rank_00003.log"
    assert file.read_text().count("train: WARNING: careful: 7") == 1
    assert (tmp_path / "log.txt").exists() == (rank == 0)


def test_libraries_are_quiet(tmp_path, capsys):
    set_up_logging(tmp_path, 0)
    logging.getLogger("DeepSpeed").warning("a thousand ranks say this")
    assert "thousand" not in capsys.readouterr().err


def test_plain_lines_without_a_terminal(capsys, tmp_path):
    set_up_logging(tmp_path, 0)
    progress = Progress(start=10, total=30, tokens_per_step=1000, enabled=True, every_seconds=0.0)
    progress.update(11, 2.5)
    progress._first_time -= 2.0  # as if the steps below took two seconds
    progress.update(21, 2.25)
    progress.update(30, 2.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "step 11/30  loss 2.5000" in lines[0]
    assert "0s left" in lines[2]
    progress._step = 21
    rate = progress.tokens_per_second(progress._first_time + 2.0)
    assert rate == pytest.approx(5000)
    assert Progress(0, 1, 1, enabled=False).update(1, 0.0) is None


def test_durations():
    assert [format_duration(s) for s in (5, 65, 3660, 90000)] == ["5s", "1m 05s", "1h 01m", "1d 01h"]
