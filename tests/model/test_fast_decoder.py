"""FastDecoder computes CachedDecoder's function: blocks, next tokens, prefill, sliding window, dropped rows."""

import pytest
import torch

from bd3lm_scale.config.load import from_dict
from bd3lm_scale.engine import build_engine
from bd3lm_scale.model.fast_decoder import FastDecoder, FastWeights
from bd3lm_scale.model.inference import CachedDecoder
from bd3lm_scale.parallel.mesh import init_mesh

VOCAB, MASK, CONTEXT = 100, 99, 32


def build(objective="bd3lm", block_size=4, tied=False, precision="fp32", shift_targets=False):
    config = from_dict(
        {
            "run_dir": "none",
            "precision": precision,
            "data": {"path": "none", "context_length": CONTEXT},
            "diffusion": {"objective": objective, "block_size": block_size, "shift_targets": shift_targets},
            "model": {
                "num_layers": 2, "hidden_size": 64, "num_heads": 4, "cond_dim": 32, "vocab_size": VOCAB,
                "tie_embeddings": tied,
            },
        }
    )  # fmt: skip
    mesh = init_mesh(config.parallel, "cpu")
    model = build_engine(config, mesh, VOCAB, MASK, for_training=False).chunks[0].eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # no weight is zero or one, so nothing hides
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def tokens(batch, length, seed=0):
    return torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_equal(ours, theirs, tolerance=2e-5):
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    assert (ours.isinf() == theirs.isinf()).all()
    assert ours.isinf().any()
    assert (ours - theirs)[~theirs.isinf()].abs().max() < tolerance * max(1.0, theirs[~theirs.isinf()].abs().max())


@pytest.mark.parametrize(("window", "tied"), [(None, False), (CONTEXT, True), (8, False)])
def test_blocks_equal_the_cached_decoder_as_far_as_text_goes(window, tied):
    """Prefill, then 20 blocks, four windows' worth: all places, scored places, and after rows have left."""
    model = build(tied=tied)
    fast, slow = FastDecoder(FastWeights(model), 4, 3, window), CachedDecoder(model, 4, 3, window)
    text = tokens(3, 24 + 80)
    for decoder in (fast, slow):
        decoder.commit(text[:, :24])
    for block in range(20):
        if block == 12:
            for decoder in (fast, slow):
                decoder.keep_rows(torch.tensor([2, 0]))
            text = text[[2, 0]]
        clean = text[:, 24 + 4 * block : 28 + 4 * block]
        noisy = clean.clone()
        noisy[:, block % 4] = MASK
        assert_equal(fast.denoise(noisy), slow.denoise(noisy))
        scored = tokens(len(noisy), 2, seed=block) % 4
        assert_equal(fast.denoise(noisy, scored), slow.denoise(noisy, scored))
        for decoder in (fast, slow):
            decoder.commit(clean)
        assert fast.length == slow.length


@pytest.mark.parametrize("window", [None, 16])
def test_next_tokens_equal_the_cached_decoder(window):
    model = build("ar", 1)
    fast, slow = FastDecoder(FastWeights(model), 1, 2, window), CachedDecoder(model, 1, 2, window)
    text = tokens(2, 70)
    assert_equal(fast.feed(text[:, :20]), slow.feed(text[:, :20]))
    for position in range(20, 70):
        assert_equal(fast.feed(text[:, position : position + 1]), slow.feed(text[:, position : position + 1]))


def test_bf16_agrees_to_its_precision():
    model = build(precision="bf16")
    fast = FastDecoder(FastWeights(model), 4, 2, cache_dtype=torch.bfloat16)
    slow = CachedDecoder(model, 4, 2, cache_dtype=torch.bfloat16)
    text = tokens(2, 20)
    for decoder in (fast, slow):
        decoder.commit(text[:, :16])
    assert_equal(fast.denoise(text[:, 16:]), slow.denoise(text[:, 16:]), tolerance=5e-2)


def test_what_it_cannot_do_is_refused():
    weights = FastWeights(build())
    with pytest.raises(ValueError, match="not whole blocks of 4"):
        FastDecoder(weights, 4, 1).commit(tokens(1, 6))
    with pytest.raises(ValueError, match=r"sampling\.window \(6\)"):
        FastDecoder(weights, 4, 1, window=6)
