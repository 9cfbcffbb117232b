"""The moving average beside Adam: its warm-up, its recurrence, and steps that are left out."""

import pytest
import torch

from bd3lm_scale.optim.ema import STATE_KEYS, AdamWithEma, ema_decay_at


def test_the_decay_warms_up_and_stops_at_its_limit():
    assert [ema_decay_at(n, 0.9999) for n in (1, 2, 8)] == pytest.approx([2 / 11, 3 / 12, 9 / 18])
    assert ema_decay_at(10**6, 0.9999) == 0.9999
    assert ema_decay_at(1, 0.1) == 0.1


def train(decays, discarded=()):
    """(parameter after each step, average after each step, the optimizer, its partition)."""
    partition = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    adam = AdamWithEma([partition], lr=0.1, fused=True)
    adam.prepare(partition)
    values, averages = [partition.detach().clone()], [adam.state[partition]["ema"].clone()]
    for step, decay in enumerate(decays):
        partition.grad = torch.tensor([1.0, -0.5]) * (1 + step)
        adam.ema_decay, adam.discard = decay, lambda step=step: torch.tensor(step in discarded)
        adam.step()
        values.append(partition.detach().clone())
        averages.append(adam.state[partition]["ema"].clone())
    return values, averages, adam, partition


def test_the_average_follows_its_recurrence():
    """It starts at the parameter, and ema <- decay ema + (1 - decay) parameter after every update."""
    decays = [0.2, 0.5, 0.9]
    values, averages, _, _ = train(decays)
    assert torch.equal(averages[0], values[0])
    for step, decay in enumerate(decays):
        assert not torch.equal(values[step + 1], values[step])
        torch.testing.assert_close(averages[step + 1], decay * averages[step] + (1 - decay) * values[step + 1])


def test_updates_are_those_of_adamw():
    values, *_ = train([0.5] * 3)
    plain = torch.nn.Parameter(values[0].clone())
    adam = torch.optim.AdamW([plain], lr=0.1)
    for step in range(3):
        plain.grad = torch.tensor([1.0, -0.5]) * (1 + step)
        adam.step()
        assert torch.equal(plain.detach(), values[step + 1])


def test_a_discarded_step_leaves_everything_as_it_is():
    values, averages, adam, partition = train([0.5, 0.5], discarded={1})
    assert torch.equal(values[2], values[1])
    assert torch.equal(averages[2], averages[1])
    assert adam.state[partition]["step"] == 1
    assert set(STATE_KEYS) < set(adam.state[partition])
