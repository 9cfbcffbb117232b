"""torch.compile of the layers: the same figures, and no more graphs than there are kinds of calls."""

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from bd3lm_scale.config.load import load_config
from bd3lm_scale.diffusion.noising import noise_rows
from bd3lm_scale.engine import build_engine, compile_layers, run_pass
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.values import Interval, Rows

TINY = [
    "data.context_length=16", "diffusion.block_size=4", "model.num_layers=5", "model.hidden_size=32",
    "model.num_heads=2", "model.cond_dim=8", "model.dropout=0.3", "runtime.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_groups():
    yield
    shutdown()
    torch._dynamo.reset()


class Counting:
    """A backend that traces forward and backward without making machine code, and counts the forward graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return lookup_backend("aot_eager")(module, inputs)


def filled_engine(*overrides):
    """An engine whose parameters are all random, and one micro-batch."""
    config = load_config("configs/demo.yaml", [*TINY, *overrides])
    engine = build_engine(config, init_mesh(config.parallel, "cpu"), 50, 49, for_training=False)
    generator = torch.Generator().manual_seed(1)
    for chunk in engine.chunks:
        for parameter in chunk.train().parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    rows = Rows(torch.arange(32).reshape(2, 16), torch.arange(2), torch.ones(2, dtype=torch.bool))
    noisy = noise_rows(rows, engine.process, seed=1, step=0, global_batch_size=2, interval=Interval(0.0, 1.0))
    return engine, noisy


@pytest.mark.parametrize("overrides", [[], ["diffusion.objective=ar"], ["parallel.recompute=full"]])
def test_a_layer_is_one_graph_and_nothing_is_traced_again(overrides, monkeypatch):
    """The layers share a graph, whatever their dropout; the last one has its own, as has validation."""
    engine, noisy = filled_engine(*overrides)
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]

    def step(number: int) -> list[torch.Tensor]:
        monkeypatch.setattr("bd3lm_scale.engine._ROW_MULTIPLE", 64 * number)  # scored rows differ from batch to batch
        (sums,) = run_pass(engine, [noisy], loss_scale=1.0, dropout_keys=[number])
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return [sums.weighted_nll, *gradients]

    plain = [step(number) for number in (2, 3)]
    assert plain[0][0] != plain[1][0]
    held_out = run_pass(engine, [noisy])[0].weighted_nll
    backend = Counting()
    compile_layers(engine.chunks, backend)
    counters.clear()
    compiled = [step(2)]
    layers = 1 if "diffusion.objective=ar" in overrides else 2
    passes = 2 if "parallel.recompute=full" in overrides else 1  # the first one keeps nothing for a backward pass
    assert backend.graphs == passes * layers + 2, "and two for the head's tiles"
    compiled.append(step(3))
    assert backend.graphs == passes * layers + 2
    for ours, theirs in zip(compiled, plain, strict=True):
        for found, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run_pass(engine, [noisy])[0].weighted_nll, held_out, rtol=1e-6, atol=0)
    assert backend.graphs == (passes + 1) * layers + 3
    run_pass(engine, [noisy])
    step(4)
    assert backend.graphs == (passes + 1) * layers + 3
    assert not counters["graph_break"]


def test_flex_attention_does_not_cut_the_graph():
    """Forward only: its gradients need a GPU."""
    (plain, noisy), (engine, _) = filled_engine(), filled_engine()
    for layer in engine.chunks[0].decoder.layers:
        layer.self_attention.core_attention.pattern.backend = "flex"
    compile_layers(engine.chunks, "eager")
    counters.clear()
    (sums,), (wanted,) = run_pass(engine, [noisy]), run_pass(plain, [noisy])
    torch.testing.assert_close(sums.weighted_nll, wanted.weighted_nll, rtol=1e-5, atol=0)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
