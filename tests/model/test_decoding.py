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


@pytest.mark.parametrize("kind", ["cached", "uncached"])
@pytest.mark.parametrize("window", [None, 12])
def test_shifted_predictions_are_those_of_the_positions_before(kind, window):
    """The dense pass over [clean text ; noisy block], one position early: the last clean token for the first."""
    model = build(shift_targets=True)
    oracle, decoder = plain(model), decoder_of(kind, model, 3, window)
    text, scored = tokens(3, 60), torch.tensor([[2], [0]])
    decoder.commit(text[:, :20])
    for start in range(20, 60, SIZE):
        if start == 40:
            decoder.keep_rows([2, 0])
            text = text[[2, 0]]
        noisy = text[:, start : start + SIZE].clone()
        noisy[0, 1:3] = noisy[1, 0] = MASK
        length = start + SIZE
        row = torch.cat([text[:, :start], noisy], dim=1)
        want = oracle.logits(row, block_causal(length, SIZE, window), torch.arange(length))[:, -SIZE - 1 : -1]
        assert_close(decoder.denoise(noisy), want)
        if len(text) == 2:
            assert_close(decoder.denoise(noisy, scored), want.gather(1, scored[..., None].expand(-1, -1, VOCAB)))
        decoder.commit(text[:, start : start + SIZE])
    with pytest.raises(ValueError, match="use CachedDecoder"):
        FastWeights(model)


def test_training_scores_what_decoding_predicts_with_shifted_targets():
    """[noisy ; clean] through the training pass, token by token, and block by block from the cache."""
    for objective, size in (("bd3lm", SIZE), ("bd3lm", 1), ("mdlm", CONTEXT)):
        model = build(objective, size, shift_targets=True)
        clean = tokens(2, CONTEXT)
        noisy = clean.clone()
        noisy[:, 1::2] = MASK
        row_R = torch.tensor([0, 1]).repeat_interleave(CONTEXT - 1)
        token_R = torch.arange(1, CONTEXT).repeat(2)
        given = torch.cat([noisy, clean], dim=1) if objective == "bd3lm" else noisy
        with torch.no_grad():
            target_R, normalizer_R = model(
                given, torch.zeros(2), None, row_R * CONTEXT + token_R, clean[row_R, token_R]
            )
        if objective == "mdlm":
            logits = FullDenoiser(model).denoise(noisy)
        else:
            decoder, parts = decoder_of("cached", model, 2, None, size), []
            for start in range(0, CONTEXT, size):
                parts.append(decoder.denoise(noisy[:, start : start + size]))
                decoder.commit(clean[:, start : start + size])
            logits = torch.cat(parts, dim=1)
        picked = logits[row_R, token_R]
        torch.testing.assert_close(picked.logsumexp(-1), normalizer_R, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            picked.gather(1, clean[row_R, token_R][:, None])[:, 0], target_R, rtol=1e-5, atol=1e-5
        )
