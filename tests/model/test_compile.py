"""torch.compile of the layers: the same figures, and no more graphs than there are kinds of calls."""

import pytest
import torch

from bd3lm_scale.config.load import load_config
from bd3lm_scale.diffusion.noising import noise_rows
from bd3lm_scale.engine import build_engine, compile_layers, run_pass
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.values import Rows

TINY = [
    "data.context_length=16", "diffusion.block_size=4", "model.num_layers=5", "model.hidden_size=32",
    "model.num_heads=2", "model.cond_dim=8", "model.dropout=0.3", "runtime.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_groups():
    yield
    shutdown()
    torch._dynamo.reset()


def test_compiled_layers_drop_the_same_and_share_their_graphs():
    """Traced, but not turned into machine code; dropout has another key in every layer and place."""
    config = load_config("configs/demo.yaml", TINY)
    mesh = init_mesh(config.parallel, "cpu")
    engine = build_engine(config, mesh, 50, 49, for_training=False)
    generator = torch.Generator().manual_seed(1)
    for chunk in engine.chunks:
        for parameter in chunk.train().parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    rows = Rows(torch.arange(32).reshape(2, 16), torch.arange(2), torch.ones(2, dtype=torch.bool))
    noisy = noise_rows(rows, engine.process, seed=1, step=0, global_batch_size=2, interval=(0.0, 1.0))

    def losses() -> list[float]:
        return [float(run_pass(engine, [noisy], dropout_keys=[key])[0].weighted_nll) for key in (5, 6)]

    plain = losses()
    assert plain[0] != plain[1]
    compile_layers(engine.chunks, backend="eager")
    # without sharing, five layers of two places each would need ten
    with torch._dynamo.config.patch(recompile_limit=6, fail_on_recompile_limit_hit=True):
        assert losses() == pytest.approx(plain, rel=1e-6)
