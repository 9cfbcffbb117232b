"""Every choice of `model.*` against a decoder written by hand: shapes, losses, gradients, decoding, exports."""

import json

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.metadata import weights_meta
from bd3lm_scale.checkpoint.names import table, to_ours
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.load import from_dict, load_config
from bd3lm_scale.config.sizes import count, parameters
from bd3lm_scale.diffusion.loss import score_rows
from bd3lm_scale.diffusion.noising import given_noise
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.model import attention
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.model.fast_decoder import FastDecoder, FastWeights
from bd3lm_scale.model.inference import CachedDecoder
from bd3lm_scale.model.parameters import Architecture
from bd3lm_scale.parallel.mesh import shutdown
from tests.diffusion.heads import head_of
from tests.plain_decoder import PlainDecoder, decoder_shapes, random_decoder
from tests.test_objective_laws import (
    HEADS,
    LENGTH,
    MASK,
    ROOT,
    TINY,
    VOCAB,
    engine_with,
    given_rows,
    loss_and_gradients,
)
from tests.variants import VARIANTS, overrides

SIZE = 4


@pytest.fixture(autouse=True)
def _leave_groups():
    yield
    shutdown()


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def weights_of(variant):
    model = VARIANTS[variant]
    return random_decoder(decoder_shapes(model, VOCAB, num_heads=HEADS), model.get("tie_embeddings", False))


def plain(variant, weights, dtype=None) -> PlainDecoder:
    """The hand-written network on leaves of its own; a tied head stays the embedding."""
    leaves = {id(w): (w if dtype is None else w.to(dtype)).detach().clone().requires_grad_() for w in weights.values()}
    model = VARIANTS[variant]
    kept = {name: leaves[id(w)] for name, w in weights.items()}
    return PlainDecoder(kept, HEADS, num_kv_heads=model.get("num_kv_heads", HEADS), model=model)


def config_of(variant, *more):
    return load_config(
        ROOT / "configs" / "demo.yaml", [*TINY, *overrides(variant), f"diffusion.block_size={SIZE}", *more]
    )


def test_parameters_are_those_written_by_hand(variant):
    config = config_of(variant)
    by_hand = decoder_shapes(VARIANTS[variant], VOCAB, num_heads=HEADS)
    assert [(e.published, e.shape) for e in table(Architecture.of(config, VOCAB))] == list(by_hand.items())
    sizes = {name: torch.Size(shape).numel() for name, shape in by_hand.items()}
    if config.model.tie_embeddings:
        del sizes["output_layer.linear.weight"]
    assert count(config, VOCAB) == sum(sizes.values())
    engine, _ = engine_with(weights_of(variant), *overrides(variant))
    found = {name: tuple(p.shape) for name, p in named_parameters(engine.chunks)}
    assert found == {name: p.shape for name, p in parameters(config, 128).items()}


@pytest.mark.parametrize(
    ("objective", "backend"), [("bd3lm", "dense"), ("bd3lm", "chunked"), ("ar", "auto"), ("mdlm", "auto")]
)
def test_losses_and_gradients_equal_the_plain_decoder(variant, objective, backend):
    """fp32 against float64: losses to 1e-5, every gradient to 1e-4 of its size."""
    weights = weights_of(variant)
    if objective == "ar":
        weights = {n: w for n, w in weights.items() if "adaLN" not in n and "sigma_map" not in n}
    chosen = [f"diffusion.objective={objective}", f"diffusion.block_size={SIZE}", f"model.attention={backend}"]
    engine, arch = engine_with(weights, *overrides(variant), *chosen)
    clean, shown, time = given_rows(SIZE if objective == "bd3lm" else LENGTH)
    noisy = given_noise(clean, shown, time, engine.process, training=True)
    model = plain(variant, weights)
    if objective == "bd3lm":
        logits = model.two_pass_logits(noisy.input_BP[:, :LENGTH], clean, SIZE)
    else:
        logits = model.causal_logits(noisy.input_BP) if objective == "ar" else model.full_logits(noisy.input_BP)
    oracle = score_rows(head_of(logits, noisy, MASK), noisy, engine.process)
    oracle.weighted_nll.backward()
    block_loss_BN, gradients = loss_and_gradients(engine, arch, noisy)
    assert oracle.weighted_nll > 10
    torch.testing.assert_close(block_loss_BN, oracle.block_loss_BN, rtol=1e-5, atol=1e-6)
    for name, leaf in model.parameters.items():
        assert leaf.grad.norm() > 1e-3, name
        assert (gradients[name] - leaf.grad).norm() < 1e-4 * leaf.grad.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cached", "fast"])
@pytest.mark.parametrize("window", [None, 12])
def test_decoding_equals_the_dense_pass(variant, kind, window):
    weights = weights_of(variant)
    engine, _ = engine_with(weights, *overrides(variant), f"diffusion.block_size={SIZE}")
    network = engine.chunks[0].eval()
    decoder = (
        FastDecoder(FastWeights(network), SIZE, 2, window)
        if kind == "fast"
        else CachedDecoder(network, SIZE, 2, window)
    )
    oracle = plain(variant, weights)
    text = torch.randint(0, MASK, (2, 36), generator=torch.Generator().manual_seed(1))
    decoder.commit(text[:, :8])
    for start in range(8, 36, SIZE):
        row = text[:, : start + SIZE].clone()
        row[0, start + 1 : start + 3] = row[1, start] = MASK
        block = torch.arange(start + SIZE) // SIZE
        distance = block[:, None] - block[None, :]
        may_see = (distance >= 0) & (distance < (window or 36) // SIZE)
        want = oracle.logits(row, may_see, torch.arange(start + SIZE))[:, -SIZE:, :MASK]
        found = decoder.denoise(row[:, start:])
        assert (found[..., MASK] == -torch.inf).all()
        assert (found[..., :MASK] - want).abs().max() < 1e-5 * want.abs().max()
        decoder.commit(text[:, start : start + SIZE])


def test_flex_attention_shares_keys_and_values_in_groups(monkeypatch):
    """Uncompiled, which the CPU can; in CUDA's place."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    visibility, draw = training_visibility("bd3lm", LENGTH, SIZE), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2 * LENGTH, 3, heads, 16, generator=draw) for heads in (4, 2, 2))
    dense, flex = (
        attention.AttentionPattern(visibility, backend).attend(query, key, value, LENGTH)
        for backend in ("dense", "flex")
    )
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


def exported(variant, folder, objective="bd3lm"):
    """A native checkpoint with the oracle's weights, and its export."""
    weights = weights_of(variant)
    config = config_of(variant, f"diffusion.objective={objective}")
    arch = Architecture.of(config, VOCAB)
    native = {e.ours: to_ours(e, weights[e.published].float(), arch) for e in table(arch)}
    meta = weights_meta(config, VOCAB, MASK, "a test")
    write_weights(folder / "native", ((name, "master", tensor) for name, tensor in native.items()), meta)
    export_hf(open_checkpoint(folder / "native"), folder / "hf")
    return weights, config


@torch.no_grad()
def test_exports_compute_the_plain_decoder(variant, tmp_path):
    weights, _ = exported(variant, tmp_path)
    oracle, model = plain(variant, weights), BD3LM.from_pretrained(tmp_path / "hf").eval()
    clean, shown, _ = given_rows(SIZE)
    want = oracle.training_logits(shown, clean, SIZE)
    found = model(torch.cat([shown, clean], dim=1)).logits
    assert (found - want).abs().max() < 1e-5 * want.abs().max()
    cache, text = model.new_cache(), clean[:, : 3 * SIZE]
    model(text[:, : 2 * SIZE], past_key_values=cache, store_kv=True)
    causal = oracle.training_logits(text, text, SIZE)[:, -SIZE:]
    assert (model(text[:, -SIZE:], past_key_values=cache).logits - causal).abs().max() < 1e-5 * causal.abs().max()
    ids = model.generate(clean[:, :5], max_new_tokens=20, seed=1)
    assert ids.shape == (3, 25)
    assert torch.isfinite(model.score(clean).nats).all()


def test_exports_come_back_bit_by_bit(variant, tmp_path):
    _, config = exported(variant, tmp_path)
    tensors, meta = import_hf(tmp_path / "hf")
    back, native = (
        open_checkpoint(write_weights(tmp_path / "back", tensors, meta)),
        open_checkpoint(tmp_path / "native"),
    )
    assert back.names() == native.names()
    for name in native.names():
        assert torch.equal(back.read(name), native.read(name)), name
    restored = from_dict(meta["config"])
    assert vars(restored.model) | {"vocab_size": None} == vars(config.model)


def test_the_papers_network_is_exported_without_fields_of_variants(tmp_path):
    config = load_config(ROOT / "configs" / "demo.yaml", TINY)
    shapes = {name: p.shape for name, p in parameters(config, 128).items()}
    weights = ((name, "master", torch.rand(shape)) for name, shape in shapes.items())
    write_weights(tmp_path / "native", weights, weights_meta(config, VOCAB, MASK, "a test"))
    export_hf(open_checkpoint(tmp_path / "native"), tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not {"norm", "mlp", "head_dim", "n_kv_heads", "ffn_hidden_size", "qk_norm", "rope", "head_bias"} & set(
        fields
    )
