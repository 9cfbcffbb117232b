"""The objectives through the real model: Megatron's layers, the vectorized pass, the pipeline schedule.

Compared with tests/plain_dit.py, which is written independently, and with the model's own cached decoding.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bd3lm_scale.checkpoint.names import Architecture, table, to_ours, to_published
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.diffusion.loss import score_rows
from bd3lm_scale.diffusion.noising import given_noise
from bd3lm_scale.engine import Engine, build_engine, run_pass
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.model.inference import CachedDecoder
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.values import NoisyRows
from tests.diffusion.heads import head_of
from tests.plain_dit import PlainDiT, random_parameters

ROOT = Path(__file__).parents[1]
VOCAB, MASK, LENGTH, HEADS = 30, 29, 16, 4
TINY = [
    f"data.context_length={LENGTH}", "data.path=unused", "model.hidden_size=32", f"model.num_heads={HEADS}",
    "model.num_layers=2", "model.cond_dim=16", "model.dropout=0.0", "precision=fp32", "runtime.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_groups():
    yield
    shutdown()


def engine_with(weights: dict[str, Tensor], *overrides: str) -> tuple[Engine, Architecture]:
    """The real model holding the plain model's weights."""
    config = load_config(ROOT / "configs" / "demo.yaml", [*TINY, *overrides])
    arch = Architecture.of(config, VOCAB)
    engine = build_engine(config, init_mesh(config.parallel, "cpu", 60), VOCAB, MASK, for_training=False)
    ours = {e.ours: to_ours(e, weights[e.published].detach().float(), arch) for e in table(arch)}
    parameters = dict(named_parameters(engine.chunks))
    assert set(parameters) == set(ours)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(ours[name])
    return engine, arch


def loss_and_gradients(engine: Engine, arch: Architecture, noisy: NoisyRows) -> tuple[Tensor, dict[str, Tensor]]:
    """Block losses, and the gradient of the summed loss by published name."""
    (sums,) = run_pass(engine, [noisy], loss_scale=1.0)
    gradients = {name: parameter.grad for name, parameter in named_parameters(engine.chunks)}
    return sums.block_loss_BN, {e.published: to_published(e, gradients[e.ours], arch) for e in table(arch)}


def given_rows(block_size: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, x_t, t with every block partly masked."""
    generator = torch.Generator().manual_seed(seed)
    clean_BL = torch.randint(0, MASK, (3, LENGTH), generator=generator)
    time_BN = 0.3 + 0.6 * torch.rand(3, LENGTH // block_size, generator=generator, dtype=torch.float64)
    masked_BL = torch.rand(3, LENGTH, generator=generator) < time_BN.repeat_interleave(block_size, 1)
    return clean_BL, torch.where(masked_BL, MASK, clean_BL), time_BN


def plain(weights: dict[str, Tensor], **options) -> PlainDiT:
    return PlainDiT({name: w.detach().clone().requires_grad_() for name, w in weights.items()}, HEADS, **options)


def assert_equal_to_plain(engine, arch, noisy, model, logits_BLV):
    """fp32 against float64: losses to 1e-5, every gradient to 1e-4 of its size."""
    oracle = score_rows(head_of(logits_BLV, noisy, MASK), noisy, engine.process)
    wanted = torch.autograd.grad(oracle.weighted_nll, list(model.parameters.values()), allow_unused=True)
    block_loss_BN, gradients = loss_and_gradients(engine, arch, noisy)
    assert oracle.weighted_nll > 10
    torch.testing.assert_close(block_loss_BN, oracle.block_loss_BN, rtol=1e-5, atol=1e-6)
    for name, want in zip(model.parameters, wanted, strict=True):
        assert want.norm() > 1e-3, name
        assert (gradients[name] - want).norm() < 1e-4 * want.norm(), name


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_vectorized_pass_equals_two_passes(block_size):
    """Algorithm 1 of the paper: clean pass, then each noisy block reads the keys and values of earlier ones."""
    weights = random_parameters(VOCAB)
    engine, arch = engine_with(weights, f"diffusion.block_size={block_size}")
    clean, shown, time = given_rows(block_size)
    noisy = given_noise(clean, shown, time, engine.process, training=True)
    model = plain(weights)
    logits = model.two_pass_logits(noisy.input_BP[:, :LENGTH], clean, block_size)
    assert_equal_to_plain(engine, arch, noisy, model, logits)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_what_is_left_out_was_seen_by_nobody(block_size, monkeypatch):
    """The last clean block, and the last layer's clean rows: the same losses and gradients as with them, in less."""
    weights = random_parameters(VOCAB)
    clean, shown, time = given_rows(block_size)
    found = []
    for cut in (True, False):
        if not cut:
            monkeypatch.setattr(RunConfig, "sequence_length", 2 * LENGTH)
            monkeypatch.setattr(RunConfig, "scores_noisy_half_only", False)
        engine, arch = engine_with(weights, f"diffusion.block_size={block_size}")
        noisy = given_noise(clean, shown, time, engine.process, training=True)
        read = []
        for layer in engine.chunks[0].decoder.layers:
            layer.mlp.register_forward_pre_hook(lambda _module, inputs, seen=read: seen.append(len(inputs[0])))
        found.append((read, *loss_and_gradients(engine, arch, noisy)))
        shutdown()
    (read, loss, gradients), (all_read, same_loss, same_gradients) = found
    assert read == [2 * LENGTH - block_size, LENGTH]
    assert all_read == [2 * LENGTH] * 2
    torch.testing.assert_close(loss, same_loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["mdlm", "sedd", "ar"])
def test_baselines_equal_the_plain_model(objective):
    weights = random_parameters(VOCAB, is_ar=objective == "ar")
    engine, arch = engine_with(weights, f"diffusion.objective={objective}")
    clean, shown, time = given_rows(LENGTH)
    noisy = given_noise(clean, shown, time, engine.process, training=True)
    model = plain(weights, time_conditioning=objective == "sedd")
    if objective == "ar":
        logits = model.causal_logits(noisy.input_BP)
    else:
        logits = model.full_logits(noisy.input_BP, noisy.sigma_B)
        assert (noisy.sigma_B.unique().numel() == 3) == (objective == "sedd")
    assert_equal_to_plain(engine, arch, noisy, model, logits)


def test_blocks_of_one_token_are_the_chain_rule_position_by_position():
    """The pass that scores all positions at once, against one prediction at a time from what has been committed."""
    engine, _ = engine_with(random_parameters(VOCAB), "diffusion.block_size=1")
    clean = given_rows(1)[0]
    everything = torch.full_like(clean, MASK)
    noisy = given_noise(clean, everything, torch.ones(3, LENGTH, dtype=torch.float64), engine.process, training=False)
    (sums,) = run_pass(engine, [noisy])
    decoder = CachedDecoder(engine.chunks[0].eval(), block_size=1, batch_size=len(clean))
    nll = torch.zeros(len(clean), LENGTH, dtype=torch.float64)
    for place in range(LENGTH):
        logits_BV = decoder.denoise(everything[:, place : place + 1])[:, 0].double()
        target_B1 = clean[:, place : place + 1]
        nll[:, place] = logits_BV.logsumexp(1) - logits_BV.gather(1, target_B1)[:, 0]
        decoder.commit(target_B1)
    assert nll.min() > 0
    assert nll.std() > 0.1
    torch.testing.assert_close(sums.block_loss_BN[:, 1:], nll[:, 1:], rtol=1e-5, atol=1e-5)
    assert float(sums.weighted_nll) == pytest.approx(float(nll[:, 1:].sum()), rel=1e-5), "the first token is given"


def test_mdlm_is_one_block_per_row_without_the_clean_half():
    weights = random_parameters(VOCAB)
    clean, shown, time = given_rows(LENGTH)
    found = []
    for overrides in (["diffusion.objective=mdlm"], [f"diffusion.block_size={LENGTH}"]):
        engine, arch = engine_with(weights, *overrides)
        noisy = given_noise(clean, shown, time, engine.process, training=True)
        found.append((noisy.input_BP.shape[1], *loss_and_gradients(engine, arch, noisy)))
        shutdown()
    (short, loss, gradients), (long, same_loss, same_gradients) = found
    assert (short, long) == (LENGTH, 2 * LENGTH)
    torch.testing.assert_close(loss, same_loss, rtol=1e-6, atol=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same_gradients[name], rtol=1e-4, atol=1e-5)
