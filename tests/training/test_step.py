"""One process, one optimizer step after another: the loss falls, and what a step draws is keyed by the step."""

import math

import pytest
import torch

from bd3lm_scale.config.load import load_config
from bd3lm_scale.engine import build_engine
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import noise_step, train_step
from bd3lm_scale.values import Interval, Rows

VOCAB, LENGTH, ROWS = 50, 16, 4
TINY = [
    f"data.context_length={LENGTH}", "data.path=unused", "diffusion.block_size=4", "model.num_layers=2",
    "model.hidden_size=64", "model.num_heads=2", "model.cond_dim=16", "precision=fp32", "runtime.device=cpu",
    f"train.global_batch_size={ROWS}", "train.micro_batch_size=2", "optim.warmup_steps=0", "optim.lr=0.01",
]  # fmt: skip


@pytest.fixture
def steps():
    """steps(numbers, *overrides): the reports of these steps on one fixed text, and the dropout keys they used."""

    def take(numbers, *overrides):
        config = load_config("configs/demo.yaml", [*TINY, *overrides])
        engine = build_engine(config, init_mesh(config.parallel, "cpu"), VOCAB, VOCAB - 1)
        text = torch.randint(0, VOCAB - 1, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        rows = [
            Rows(text[i : i + 2], torch.arange(i, i + 2), torch.ones(2, dtype=torch.bool)) for i in range(0, ROWS, 2)
        ]
        policy, reports, keys = AnomalyPolicy(config.runtime), [], []
        for number in numbers:
            noised = noise_step(engine, config, number, rows, Interval(0.5, 1.0))
            keys.append([None if b.dropout_key is None else int(b.dropout_key) for b in noised.micro_batches])
            outcome = train_step(engine, config, number, noised, policy)
            assert outcome.verdict == "ok"
            reports.append(outcome.report)
        shutdown()
        return reports, keys

    return take


def test_the_loss_starts_at_ln_of_the_ids_and_falls(steps):
    """The head starts at zero, so every real id is as likely; forty steps on four rows learn them."""
    reports, _ = steps(range(40), "model.dropout=0.0", "diffusion.ignore_bos=false", "optim.ema_decay=0.9")
    losses = [report.loss for report in reports]
    # ln(V - 1) times the weight of what happens to be masked, which is 1 in the mean over noise
    assert losses[0] == pytest.approx(math.log(VOCAB - 1), rel=0.2)
    start, middle, end = (sum(losses[i : i + 5]) / 5 for i in (0, 20, 35))
    assert start > 1.3 * middle > 1.3 * end
    assert end < 0.5 * start
    assert [report.step for report in reports] == list(range(1, 41))
    assert [report.tokens for report in reports] == [ROWS * LENGTH * n for n in range(1, 41)]
    assert {report.lr for report in reports} == {0.01}


def test_every_step_and_micro_batch_has_its_own_noise_and_dropout(steps):
    """The same step gives the same loss, stream and keys whenever it is taken; another step gives others."""
    first, keys = steps([0, 1, 2], "model.dropout=0.2")
    again, same_keys = steps([0], "model.dropout=0.2")
    other, _ = steps([0], "model.dropout=0.2", "seed=2")
    assert vars(again[0]) == vars(first[0])
    assert same_keys[0] == keys[0]
    assert len({key for step_keys in keys for key in step_keys}) == 6
    assert len({report.stream_hash for report in [*first, *other]}) == 4
    without, none = steps([0, 1, 2], "model.dropout=0.0")
    assert none == [[None, None]] * 3
    assert [report.stream_hash for report in without] == [report.stream_hash for report in first]
    assert without[2].loss != first[2].loss  # the gates start at zero, so the first steps drop nothing
