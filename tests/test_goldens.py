"""Parity with the published implementation, through the real engine: its weights, logits, losses and training steps.

tests/goldens/README.md says what the files are. `from-hf` reads the weights, Megatron computes, DeepSpeed steps.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3lm_scale.checkpoint.hf.export import published_tensor
from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.names import Architecture, table
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.store import CheckpointStore, write_weights
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.schema import CheckpointConfig
from bd3lm_scale.diffusion.loss import num_loss_tokens, token_losses
from bd3lm_scale.diffusion.noising import given_noise
from bd3lm_scale.engine import build_engine, run_pass
from bd3lm_scale.inference.loading import load_model
from bd3lm_scale.model.fast_decoder import FastDecoder, FastWeights
from bd3lm_scale.model.inference import CachedDecoder
from bd3lm_scale.model.rotary import rotary_angles
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import given_step, train_step
from bd3lm_scale.values import HeadRows

GOLDENS = Path(__file__).parent / "goldens"
LENGTH, BLOCK = 32, 4
CPU = ["runtime.device=cpu", "model.dropout=0.0", "precision=fp32"]


def native(source: Path, destination: Path) -> Path:
    weights, meta = import_hf(source)
    return write_weights(destination, weights, meta)


@pytest.fixture(autouse=True)
def _leave_groups():
    yield
    shutdown()


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / "hf_tiny_goldens.npz").items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return native(GOLDENS / "hf_tiny", tmp_path_factory.mktemp("native") / "tiny")


def training_logits(model, noisy_BL, clean_BL, sigma_B) -> torch.Tensor:
    """Logits of the noisy half for [noisy ; clean], of which the model reads P, under the training pattern."""
    num_positions = model.config.sequence_length
    position = torch.arange(LENGTH).repeat(2)[:num_positions]
    with torch.no_grad():
        conditioning = model.condition(sigma_B)
        hidden = model.eval().decoder(
            hidden_states=model.embed(torch.cat([noisy_BL, clean_BL], dim=1)[:, :num_positions]),
            attention_mask=None,
            context=conditioning,
            context_mask=None,
            rotary_pos_emb=rotary_angles(position, model.config.kv_channels),
        )
        rows = hidden[:LENGTH].transpose(0, 1).reshape(-1, hidden.shape[-1])
        logits = model.head.full_logits(rows, conditioning.repeat_interleave(LENGTH, 0), None)
    return logits.reshape(len(noisy_BL), LENGTH, -1)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_training_logits_equal_the_published_ones(checkpoint, golden, conditioned, attention):
    overrides = [*CPU, f"model.attention={attention}", f"diffusion.time_conditioning={str(conditioned).lower()}"]
    model = load_model(checkpoint, overrides).engine.chunks[0]
    logits = training_logits(model, golden["xt"], golden["x0"], golden["timesteps"])
    want = golden[f"train_logits_bs4_tc{int(conditioned)}"]
    is_real = logits.isfinite()
    assert is_real.sum() == is_real.numel() - is_real[..., 0].numel(), "only the mask id is excluded"
    torch.testing.assert_close(logits[is_real], want[is_real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cached", "fast"])
def test_cached_decoding_equals_the_published_one(checkpoint, golden, kind):
    """Block by block after cached clean context: the noisy block, then the clean one."""
    model = load_model(checkpoint, CPU).engine.chunks[0]
    if kind == "fast":
        decoder = FastDecoder(FastWeights(model), BLOCK, batch_size=2)
    else:
        decoder = CachedDecoder(model, BLOCK, batch_size=2)
    for start in range(0, LENGTH, BLOCK):
        here = slice(start, start + BLOCK)
        for tokens, want in ((golden["xt"], golden["kv_masked_bs4"]), (golden["x0"], golden["kv_clean_bs4"])):
            logits = decoder.denoise(tokens[:, here])
            is_real = logits.isfinite()
            torch.testing.assert_close(logits[is_real], want[:, here][is_real], rtol=1e-5, atol=1e-5)
        decoder.commit(golden["x0"][:, here])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses_equal_the_published_ones(checkpoint, mode):
    golden = {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / "loss_goldens.npz").items()}
    engine = load_model(checkpoint, CPU).engine
    time_BN = golden["t_bs4"][:, ::BLOCK].double()
    noisy = given_noise(golden["x0"], golden["xt"], time_BN, engine.process, training=mode == "train")
    (sums,) = run_pass(engine, [noisy])
    total = float(sums.weighted_nll)
    assert total / float(noisy.counts_BL.sum()) == pytest.approx(float(golden[f"bd3lm_bs4_{mode}_loss"]), rel=1e-5)
    blocks = golden[f"bd3lm_bs4_{mode}_nlls"].reshape(2, -1, BLOCK).double().mean(2)
    torch.testing.assert_close(sums.block_loss_BN, blocks, rtol=1e-4, atol=1e-5)


def test_training_trajectory_equals_the_published_one(tmp_path):
    """8 steps of AdamW with clipping and EMA on given rows, noise and times: the step that training runs."""
    golden = np.load(GOLDENS / "traj_bd3lm_bs4.npz")
    weights = load_file(GOLDENS / "traj_bd3lm_bs4.safetensors")
    source = tmp_path / "init"
    source.mkdir()
    (source / "config.json").write_text((GOLDENS / "hf_tiny" / "config.json").read_text())
    start = {n.replace("init.", "backbone."): w.contiguous() for n, w in weights.items() if n.startswith("init.")}
    save_file(start, source / "model.safetensors")
    reader = open_checkpoint(native(source, tmp_path / "native"))
    lr = float(golden["lr"])
    config = from_dict(reader.meta["config"], [
        *CPU, f"optim.lr={lr}", "optim.warmup_steps=0", "optim.grad_clip=1.0", "optim.weight_decay=0.0",
        "optim.ema_decay=0.9999", "train.global_batch_size=4", "train.micro_batch_size=4",
    ])  # fmt: skip
    mesh = init_mesh(config.parallel, "cpu")
    engine = build_engine(config, mesh, reader.meta["vocab_size"], reader.meta["mask_token_id"])
    reader.fill(engine.optimizer.slices(), {"master": "master"})
    engine.optimizer.restored(0)
    engine.optimizer.reset_ema()
    policy = AnomalyPolicy(config.runtime)
    for step in range(8):
        clean, shown = torch.from_numpy(golden["x0"][step]), torch.from_numpy(golden["xt"][step])
        time_BN = torch.from_numpy(golden["t"][step])[:, ::BLOCK].double()
        noisy = given_noise(clean, shown, time_BN, engine.process, training=True)
        outcome = train_step(engine, config, step, given_step(config, step, [noisy]), policy)
        report = outcome.report
        assert outcome.verdict == "ok"
        assert report.loss == pytest.approx(float(golden["loss"][step]), rel=1e-4)
        assert report.grad_norm == pytest.approx(float(golden["grad_norm"][step]), rel=1e-4)
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False))
    store.save(8, engine.optimizer.slices(), {})
    trained, arch = store.newest(), Architecture.of(config, reader.meta["vocab_size"])
    for kind, published in (("master", "final"), ("ema", "ema")):
        for entry in table(arch):
            ours = published_tensor(trained, entry, arch, kind)
            torch.testing.assert_close(ours, weights[f"{published}.{entry.published}"], rtol=1e-4, atol=1e-4)


def test_initial_weights_follow_the_published_distributions():
    """Bounds and spread of every tensor of a fresh model."""
    stats = json.loads((GOLDENS / "init_stats.json").read_text())
    vocab, width = stats["vocab_embed.embedding"]["shape"]
    layers = 1 + max(int(name.split(".")[1]) for name in stats if name.startswith("blocks."))
    cond = stats["sigma_map.mlp.2.weight"]["shape"][0]
    config = from_dict({
        "run_dir": "unused", "precision": "fp32", "data": {"path": "unused", "context_length": 32},
        "model": {"num_layers": layers, "hidden_size": width, "num_heads": 8, "cond_dim": cond},
    })  # fmt: skip
    engine = build_engine(config, init_mesh(config.parallel, "cpu"), vocab, vocab - 1, for_training=False)
    ours = dict(engine.chunks[0].named_parameters())
    arch = Architecture.of(config, vocab)
    for entry in table(arch):
        tensor, want = ours[entry.ours].detach()[: entry.shape[0]], stats[entry.published]
        assert list(tensor.shape) == want["shape"], entry.ours
        assert tensor.abs().max().item() == pytest.approx(want["max"], rel=0.06, abs=1e-6), entry.ours
        if tensor.numel() > 1000 and want["std"] > 0:
            noise = 0.05 if tensor.numel() > 10_000 else 0.1  # both are samples
            assert tensor.std().item() == pytest.approx(want["std"], rel=noise), entry.ours


def test_token_losses_use_the_mask_as_no_candidate(checkpoint):
    """nll = logsumexp over real ids - target logit, and padding rows weigh nothing."""
    process = load_model(checkpoint, CPU).engine.process
    clean = torch.zeros(1, LENGTH, dtype=torch.int64)
    noisy = given_noise(clean, torch.full_like(clean, 99), torch.full((1, 8), 0.5).double(), process, training=True)
    rows = HeadRows(
        torch.tensor([1.0, 7.0]), torch.tensor([3.0, 9.0]), torch.tensor([5, 0]), torch.tensor([True, False])
    )
    assert token_losses(rows, noisy, process).tolist() == pytest.approx([2.0 * 2.0, 0.0])
    assert num_loss_tokens(process, 3) == 3 * LENGTH
