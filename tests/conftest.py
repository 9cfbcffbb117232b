"""Fixtures shared by the tests that start real training runs."""

import os

# Tiny matrices gain nothing from threads, and threads that wait for each other starve on a busy machine. Set before
# torch is imported anywhere, and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.training_runs import Trainer, prepare_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder of tiny shards, as data.path."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny") / "set")


@pytest.fixture(scope="session")
def trainer(tmp_path_factory, tiny_data):
    """Starts training runs on the tiny shards."""
    trainer = Trainer(tmp_path_factory.mktemp("trainer"), tiny_data)
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def straight(trainer, tmp_path_factory):
    """The run everything is compared with: one process, never interrupted."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    trainer.train(run_dir)
    return run_dir
