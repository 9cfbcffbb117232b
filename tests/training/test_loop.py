"""What the loop leaves behind however it ends: the progress bar closed, each rollback said once."""

import logging
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from bd3lm_scale.config.schema import LoggingConfig, RunConfig, TrainConfig
from bd3lm_scale.runtime.anomaly import OK, ROLLBACK, STOP, AnomalyPolicy
from bd3lm_scale.runtime.exit_codes import ExitCode
from bd3lm_scale.runtime.log import ROOT
from bd3lm_scale.runtime.progress import Progress
from bd3lm_scale.training import loop as module
from bd3lm_scale.training import trainer
from bd3lm_scale.training.trainer import Session
from bd3lm_scale.values import Cursor, StepReport

STEPS = 4


class Run:
    """A loop over steps that end as told, on one rank; its session is real, its parts are not."""

    def __init__(self, monkeypatch, verdicts, rank=0):
        config = RunConfig(train=TrainConfig(steps=STEPS), logging=LoggingConfig(every_steps=1000))
        parts = {name: Mock() for name in ("engine", "stream", "ahead", "store", "agreement")}
        parts["engine"].mesh.is_main_rank = rank == 0
        parts["ahead"].bad_shard.return_value = None
        parts["store"].last_save = None
        policy = AnomalyPolicy(config.runtime)
        self.session = Session(config, **parts, policy=policy, cursor=Cursor(), clip_interval=(0.0, 1.0))
        monkeypatch.setattr(trainer, "restore", lambda session, reader: session.seek(Cursor(0)))
        monkeypatch.setattr(trainer, "sum_over_ranks", lambda engine, floats, flags: (floats, flags))
        monkeypatch.setattr(module, "_validate", Mock())
        monkeypatch.setattr(module, "_save", Mock())
        self.metrics, self.bars, left = Mock(), [], iter(verdicts)

        def train_step(*_args, **_options):
            verdict = next(left)
            if isinstance(verdict, Exception):
                raise verdict
            policy.reason = "" if verdict == OK else "loss is nan"
            report = StepReport(self.session.step + 1, 2.0, 1.0, 0.1, 0, 0, 0.0, 1.0)
            return SimpleNamespace(report=report, verdict=verdict, votes=(0, 0))

        def progress(*args):
            self.bars.append(Progress(*args))
            return self.bars[-1]

        monkeypatch.setattr(module, "train_step", train_step)
        monkeypatch.setattr(module, "Progress", progress)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def __call__(self):
        return module.run_loop(self.session, Mock(), Mock(reason=None), self.metrics, Mock())

    @property
    def bar(self):
        (progress,) = self.bars
        return progress._bar


@pytest.fixture
def said(caplog, monkeypatch):
    """Lines of our own logger, each once."""
    logger = logging.getLogger(ROOT)
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield lambda text: [record.getMessage() for record in caplog.records if text in record.getMessage()]
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("verdicts", "code", "shown"),
    [([OK] * STEPS, ExitCode.FINISHED, STEPS), ([OK, STOP], ExitCode.DIVERGED, 1), ([STOP], ExitCode.DIVERGED, 0)],
)
def test_the_progress_bar_is_closed_however_the_run_ends(monkeypatch, verdicts, code, shown):
    run = Run(monkeypatch, verdicts)
    assert run()[0] == code
    assert run.bar.disable, "tqdm disables a bar that is closed; an open one would be drawn again at exit"
    assert run.bar.n == shown


def test_the_progress_bar_is_closed_by_an_error(monkeypatch):
    run = Run(monkeypatch, [OK, ConnectionError("a rank is gone")])
    with pytest.raises(ConnectionError):
        run()
    assert run.bar.disable


def test_a_diverged_run_saves_nothing_and_others_save_their_last_step(monkeypatch):
    for verdicts, saves in (([OK, STOP], 0), ([OK] * STEPS, 1)):
        Run(monkeypatch, verdicts)()
        assert module._save.call_count == saves


@pytest.mark.parametrize(("rank", "lines"), [(0, 2), (1, 0)])
def test_each_rollback_is_said_once_by_the_first_rank(monkeypatch, said, rank, lines):
    run = Run(monkeypatch, [OK, ROLLBACK, OK, OK, ROLLBACK, *[OK] * STEPS], rank)
    assert run() == (ExitCode.FINISHED, "all steps are done")
    assert len(said("rolled back")) == lines
    if rank == 0:
        size = run.session.config.train.global_batch_size
        # the checkpoint knows nothing of the first rollback, so the second leaves out its rows as well
        assert said("rolled back") == [
            f"rolled back from step 1 to 0; {2 * size} rows are left out",
            f"rolled back from step 2 to 0; {(2 + 3) * size} rows are left out",
        ]
    events = [call.kwargs["event"] for call in run.metrics.write.call_args_list if call.args[0] == "event"]
    assert events == ["rollback: loss is nan"] * 2
