"""Dropout: unbiased, its mask a pure function of (key, layer, place), and another one everywhere."""

import itertools

import pytest
import torch

from bd3lm_scale.config.load import load_config
from bd3lm_scale.diffusion.noising import noise_rows
from bd3lm_scale.engine import build_engine, run_pass
from bd3lm_scale.model.layer import dropout_site, keyed_dropout
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.values import Rows

RATE = 0.3
TINY = [
    "data.context_length=32", "diffusion.block_size=4", "model.num_layers=3", "model.hidden_size=32",
    "model.num_heads=2", "model.cond_dim=8", f"model.dropout={RATE}", "runtime.device=cpu", "precision=fp32",
]  # fmt: skip


def key(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int64)


def site(layer: int, index: int, shard: int) -> torch.Tensor:
    return torch.tensor(dropout_site(layer, index, shard))


def test_what_is_kept_is_enlarged_so_that_the_mean_stays():
    """Kept elements are exactly x / (1 - rate), the share dropped is the rate to 4 standard errors."""
    x = torch.rand(200, 500) + 0.5
    out = keyed_dropout(x, RATE, key(7), site(1, 0, 0))
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / (1 - RATE))
    error = (RATE * (1 - RATE) / x.numel()) ** 0.5
    assert abs(float((~kept).double().mean()) - RATE) < 4 * error
    for axis in (0, 1):  # no row and no column is treated otherwise
        share = kept.double().mean(axis)
        assert (share - (1 - RATE)).abs().max() < 5 * (RATE * (1 - RATE) / x.shape[axis]) ** 0.5


def test_the_mask_is_a_function_of_key_and_site_alone():
    x = torch.ones(64, 64)
    torch.manual_seed(1)
    first = keyed_dropout(x, RATE, key(7), site(2, 1, 0))
    torch.manual_seed(2)
    assert torch.equal(keyed_dropout(x, RATE, key(7), site(2, 1, 0)), first)
    assert torch.equal(keyed_dropout(x, 0.0, key(7), site(2, 1, 0)), x)
    assert torch.equal(keyed_dropout(x, RATE, None, site(2, 1, 0)), x)
    others = [(8, 2, 1, 0), (7, 1, 1, 0), (7, 2, 0, 0), (7, 2, 1, 1)]
    assert_unrelated([first != 0, *(keyed_dropout(x, RATE, key(k), site(*place)) != 0 for k, *place in others)])


def test_every_site_has_a_stretch_of_philox_of_its_own():
    """On CUDA 2^36 numbers from a place that fits 63 bits, for as many layers and ranks as a configuration may have."""
    sites = [
        dropout_site(layer, index, shard) for layer in (1, 2, 10_000) for index in (0, 1) for shard in (0, 1, 4095)
    ]
    assert len(set(sites)) == len(sites)
    assert max(sites) << 36 < 2**63


def test_gradients_pass_where_values_did():
    x = torch.ones(64, 64, requires_grad=True)
    out = keyed_dropout(x, RATE, key(7), site(1, 0, 0))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def assert_unrelated(masks: list[torch.Tensor]) -> None:
    """Independent masks agree in (1-r)^2 + r^2 of the places; the same ones everywhere."""
    expected = RATE**2 + (1 - RATE) ** 2
    for a, b in itertools.combinations(masks, 2):
        rows = min(len(a), len(b))
        agreement = (a[:rows] == b[:rows]).double()
        assert abs(float(agreement.mean()) - expected) < 5 * 0.5 / agreement.numel() ** 0.5


@pytest.fixture
def engine():
    config = load_config("configs/demo.yaml", TINY)
    yield build_engine(config, init_mesh(config.parallel, "cpu"), 50, 49, for_training=False)
    shutdown()


def test_every_layer_and_place_of_a_pass_has_a_mask_of_its_own(engine):
    """In a whole pass: two places in each of three layers, under two keys; none without a key or in evaluation."""
    (chunk,) = engine.chunks
    masks = []
    for layer in chunk.decoder.layers:

        def record(x, *rest, whole=layer.apply_dropout):
            out = whole(torch.ones_like(x), *rest)
            masks.append(out != 0)
            return out * x

        layer.apply_dropout = record
    rows = Rows(torch.arange(64).reshape(2, 32) % 49, torch.arange(2), torch.ones(2, dtype=torch.bool))
    noisy = noise_rows(rows, engine.process, seed=1, step=0, global_batch_size=2, interval=(0.0, 1.0))
    chunk.train()
    for number in (5, 6):
        run_pass(engine, [noisy], dropout_keys=[number])
    assert len(masks) == 2 * 3 * 2
    assert_unrelated(masks)
    run_pass(engine, [noisy])
    chunk.eval()
    run_pass(engine, [noisy], dropout_keys=[5])
    assert len(masks) == 2 * 3 * 2
