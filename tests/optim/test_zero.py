"""The DeepSpeed engine on one rank: what Adam is given is what backward left, to the last bit."""

import pytest
import torch

from bd3lm_scale.config.load import load_config
from bd3lm_scale.engine import build_engine
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import FULL_RANGE, noise_step, train_step
from bd3lm_scale.values import Rows
from tests.variants import overrides

TINY = [
    "data.context_length=16", "data.path=unused", "diffusion.block_size=4", "model.num_layers=1",
    "model.hidden_size=32", "model.num_heads=2", "model.cond_dim=8", "model.dropout=0.0", "runtime.device=cpu",
    "precision=bf16", "train.global_batch_size=6", "train.micro_batch_size=2", "optim.warmup_steps=0",
    "optim.beta1=0", "optim.grad_clip=1e9",
]  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_accumulated_and_reduced_in_fp32(stage):
    """With beta1 = 0 the first moment is the gradient itself: the fp32 sum of three bf16 micro-batches."""
    config = load_config("configs/demo.yaml", [*TINY, f"optim.zero_stage={stage}"])
    engine = build_engine(config, init_mesh(config.parallel, "cpu"), 50, 49)
    totals: dict[str, torch.Tensor] = {}

    def add(name: str, gradient: torch.Tensor) -> None:
        assert gradient.dtype == torch.bfloat16
        totals[name] = totals.get(name, 0.0) + gradient.float().flatten()

    for name, parameter in engine.optimizer.named:
        parameter.register_hook(lambda gradient, name=name: add(name, gradient))
    text = torch.randint(0, 49, (6, 16), generator=torch.Generator().manual_seed(0))
    rows = [Rows(text[i : i + 2], torch.arange(i, i + 2), torch.ones(2, dtype=torch.bool)) for i in (0, 2, 4)]
    for step in range(3):  # the weights that start at zero let no gradient through before they have moved
        totals.clear()
        noised = noise_step(engine, config, step, rows, FULL_RANGE)
        train_step(engine, config, step, noised, AnomalyPolicy(config.runtime))
    found = {s.name: s.tensors["exp_avg"] for s in engine.optimizer.slices()}
    assert set(found) == set(totals)
    for name, total in totals.items():
        assert torch.equal(found[name], total), name
        assert not torch.equal(total, total.bfloat16().float()), name
    shutdown()


def trained(*settings: str) -> dict[str, torch.Tensor]:
    """The masters after one step at a rate of 0.1."""
    config = load_config("configs/demo.yaml", [*TINY, "precision=fp32", "optim.lr=0.1", *settings])
    engine = build_engine(config, init_mesh(config.parallel, "cpu"), 50, 49)
    text = torch.randint(0, 49, (2, 16), generator=torch.Generator().manual_seed(0))
    rows = [Rows(text, torch.arange(2), torch.ones(2, dtype=torch.bool))]
    train_step(engine, config, 0, noise_step(engine, config, 0, rows, FULL_RANGE), AnomalyPolicy(config.runtime))
    found = {s.name: s.tensors["master"].clone() for s in engine.optimizer.slices()}
    shutdown()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("network", [[], overrides("decoder"), overrides("mixed")])
def test_norms_and_biases_are_left_alone_where_matrices_decay(stage, network):
    """Decay is decoupled from the gradient: with the same step, w is smaller by lr * decay * w, or not at all."""
    settings = [*network, f"optim.zero_stage={stage}"]
    without = trained(*settings)
    matrices = trained(*settings, "optim.weight_decay=0.25", "optim.weight_decay_on=matrices")
    all_of_them = trained(*settings, "optim.weight_decay=0.25")
    assert without.keys() == matrices.keys() == all_of_them.keys()
    vectors = {name for name in without if name.endswith(".bias") or "norm" in name}
    assert {"head.norm.weight", "decoder.layers.0.input_layernorm.weight"} <= vectors < set(without)
    for name, weight in without.items():
        assert torch.equal(matrices[name], weight if name in vectors else all_of_them[name]), name
    moved = [name for name in without if not torch.equal(without[name], all_of_them[name])]
    assert {name for name in without if "modulation" not in name and "head.output" not in name} <= set(moved)
    assert (without["head.norm.weight"] - all_of_them["head.norm.weight"]).mean().item() == pytest.approx(0.025, 1e-3)
