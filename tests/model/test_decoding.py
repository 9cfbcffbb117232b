"""Every way of decoding against one dense pass over the full history, written by hand.

Within the context and beyond it: with a sliding window the oracle is the full-history pass under the sliding
visibility mask (what was evicted lives on in the states of what saw it); with `recompute_window` it is a pass over the
window alone.
"""

import pytest
import torch

from bd3lm_scale.checkpoint.names import Architecture, table, to_published
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.model.fast_decoder import FastDecoder, FastWeights
from bd3lm_scale.model.inference import CachedDecoder, FullDenoiser
from bd3lm_scale.parallel.mesh import shutdown
from tests.model.test_fast_decoder import CONTEXT, MASK, VOCAB, build, tokens
from tests.plain_dit import PlainDiT

SIZE, HEADS = 4, 4


@pytest.fixture(autouse=True, scope="module")
def _leave_groups():
    yield
    shutdown()


def plain(model, objective="bd3lm") -> PlainDiT:
    """The same weights in the hand-written network."""
    config = from_dict(
        {
            "run_dir": "none",
            "data": {"path": "none", "context_length": CONTEXT},
            "diffusion": {"objective": objective, "block_size": SIZE},
            "model": {"num_layers": 2, "hidden_size": 64, "num_heads": HEADS, "cond_dim": 32, "vocab_size": VOCAB},
        }
    )
    arch = Architecture.of(config, VOCAB)
    ours = {name: parameter.detach() for name, parameter in named_parameters([model])}
    return PlainDiT({e.published: to_published(e, ours[e.ours], arch) for e in table(arch)}, HEADS)


def block_causal(length: int, size: int, window: int | None) -> torch.Tensor:
    block = torch.arange(length) // size
    distance = block[:, None] - block[None, :]
    return (distance >= 0) & (distance < (window or length + size) // size)


def assert_close(logits, oracle):
    """To 1e-5 of the logits' range, mask id excluded."""
    assert (logits[..., MASK] == -torch.inf).all()
    difference = (logits - oracle)[..., :MASK].abs().max()
    assert difference < 1e-5 * oracle[..., :MASK].abs().max()


def decoder_of(kind: str, model, batch: int, window: int | None, size: int = SIZE):
    if kind == "fast":
        return FastDecoder(FastWeights(model), size, batch, window)
    options = {"uncached": {"use_cache": False}, "recomputed": {"recompute_window": True}}.get(kind, {})
    return CachedDecoder(model, size, batch, window, **options)


@pytest.mark.parametrize("kind", ["fast", "cached", "uncached", "recomputed"])
@pytest.mark.parametrize("window", [None, CONTEXT, 12])
def test_blocks_equal_the_dense_pass(kind, window):
    model = build()
    oracle, decoder = plain(model), decoder_of(kind, model, 2, window)
    text = tokens(2, 92)
    decoder.commit(text[:, :20])
    for start in range(20, 92, SIZE):
        noisy = text[:, start : start + SIZE].clone()
        noisy[0, 1:3] = noisy[1, 0] = MASK
        history = text[:, :start]
        if kind == "recomputed" and window is not None:
            history, mask_window = history[:, -min(start, window - SIZE) :], None
        else:
            mask_window = window
        row = torch.cat([history, noisy], dim=1)
        length = row.shape[1]
        want = oracle.logits(row, block_causal(length, SIZE, mask_window), torch.arange(length))[:, -SIZE:]
        assert_close(decoder.denoise(noisy), want)
        scored = torch.tensor([[2], [0]])
        assert_close(decoder.denoise(noisy, scored), want.gather(1, scored[..., None].expand(-1, -1, VOCAB)))
        decoder.commit(text[:, start : start + SIZE])


@pytest.mark.parametrize("kind", ["fast", "cached", "uncached"])
@pytest.mark.parametrize("window", [None, 16])
def test_next_tokens_equal_the_dense_pass(kind, window):
    model = build("ar", 1)
    oracle, decoder = plain(model, "ar"), decoder_of(kind, model, 2, window, size=1)
    text = tokens(2, 50)
    for stop in (10, *range(11, 51)):
        start = 0 if stop == 10 else stop - 1
        logits = decoder.feed(text[:, start:stop])
        want = oracle.logits(text[:, :stop], block_causal(stop, 1, window), torch.arange(stop))[:, -1]
        assert_close(logits, want)


def test_whole_sequences_equal_the_dense_pass():
    model = build("mdlm", CONTEXT)
    text, scored = tokens(3, CONTEXT), torch.tensor([[3, 5], [0, 31], [7, 7]])
    want = plain(model).full_logits(text)
    assert_close(FullDenoiser(model).denoise(text), want)
    picked = want.gather(1, scored[..., None].expand(-1, -1, VOCAB))
    assert_close(FullDenoiser(model).denoise(text, None, scored), picked)
