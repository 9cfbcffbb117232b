"""What a session decides on its own: where the data goes on after a rollback."""

from unittest.mock import Mock

import pytest

from bd3lm_scale.config.schema import RunConfig, TrainConfig
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training import trainer as module
from bd3lm_scale.training.trainer import Session
from bd3lm_scale.values import Cursor


@pytest.fixture
def session(monkeypatch):
    """At step 0; its only checkpoint is of step 10, saved before anything was skipped."""
    monkeypatch.setattr(module, "restore", lambda session, reader: session.seek(Cursor(10)))
    config = RunConfig(train=TrainConfig(global_batch_size=8))
    parts = {name: Mock() for name in ("engine", "stream", "ahead", "store", "agreement")}
    policy = AnomalyPolicy(config.runtime)
    return Session(config, **parts, policy=policy, cursor=Cursor(), clip_interval=(0.0, 1.0))


def next_row(cursor: Cursor) -> int:
    return cursor.data_offset + cursor.step * 8


def test_every_rollback_goes_on_past_all_rows_read_before(session):
    """Also the second one to the same checkpoint, which knows nothing of the first."""
    session.seek(Cursor(12))
    for step in (12, 11, 10):
        session.cursor = Cursor(step, session.cursor.data_offset, session.cursor.excluded_shards)
        after_the_bad_step = next_row(session.cursor) + 8
        session.roll_back()
        assert session.step == 10
        assert next_row(session.cursor) == after_the_bad_step


def test_a_rollback_keeps_what_was_learnt_of_damaged_shards(session):
    session.seek(Cursor(12, excluded_shards=("train-000003.tar",)))
    session.roll_back()
    assert session.cursor.excluded_shards == ("train-000003.tar",)
