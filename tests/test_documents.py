"""Documents that share a row: each has the loss and the gradient that it has alone, on every attention path."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from bd3lm_scale.config.load import load_config
from bd3lm_scale.diffusion.noising import _assemble, _next_token_rows, noise_rows
from bd3lm_scale.diffusion.visibility import training_visibility
from bd3lm_scale.engine import build_engine, run_pass
from bd3lm_scale.model.attention import AttentionPattern
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.values import PADDING, Interval, Rows

ROOT = Path(__file__).parents[1]
VOCAB, MASK, LENGTH = 30, 29, 320
LONG = (150, 1, 37, 90)
"""Documents of the first row: one longer than a run of 128 queries, one of a single token; then one whole row."""
TINY = [
    f"data.context_length={LENGTH}", "data.path=unused", "model.hidden_size=32", "model.num_heads=2",
    "model.num_layers=2", "model.cond_dim=16", "model.dropout=0.0", "precision=fp32", "runtime.device=cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_groups():
    yield
    shutdown()


def engine_for(*overrides):
    config = load_config(ROOT / "configs" / "demo.yaml", [*TINY, *overrides])
    engine = build_engine(config, init_mesh(config.parallel, "cpu", 60), VOCAB, MASK, for_training=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the output layers start at zero: nothing would depend on anything
        for _, parameter in named_parameters(engine.chunks):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return engine


def noised(engine, block_size, documents, seed=5):
    """Rows of documents (lists of their lengths) with the same ids, times and masks wherever a document stands."""
    step = block_size if engine.process.objective == "bd3lm" else 1
    size = engine.process.block_size
    tokens = torch.full((len(documents), LENGTH), 0)
    document = torch.full((len(documents), LENGTH), PADDING)
    time = torch.full((len(documents), LENGTH // size), 0.5, dtype=torch.float64)
    masked = torch.zeros(len(documents), LENGTH, dtype=torch.bool)
    for row, lengths in enumerate(documents):
        start = 0
        for number, (name, length) in enumerate(lengths):
            generator = torch.Generator().manual_seed(seed * 1000 + name)
            place = slice(start, start + length)
            tokens[row, place] = torch.randint(0, MASK, (length,), generator=generator)
            masked[row, place] = torch.rand(length, generator=generator) < 0.6
            document[row, place] = number
            blocks = -(-length // size) if size < LENGTH else 0
            first = start // size
            time[row, first : first + blocks] = 0.3 + 0.6 * torch.rand(blocks, generator=generator, dtype=torch.float64)
            start += -(-length // step) * step
        assert start <= LENGTH
    rows = Rows(
        tokens, torch.arange(len(documents)), torch.ones(len(documents), dtype=torch.bool), document, document >= 0
    )
    if engine.process.objective == "ar":
        return _next_token_rows(rows, engine.process)
    return _assemble(rows, masked, time, 1 / time, engine.process.schedule, engine.process, training=True)


def losses_by_document(engine, noisy, loss_scale=1.0):
    """{(row, document): loss in nats}, and the gradients."""
    (sums,) = run_pass(engine, [noisy], loss_scale=loss_scale)
    found = {}
    for row, number in {(r, int(n)) for r in range(len(noisy.document_BL)) for n in noisy.document_BL[r] if n >= 0}:
        here = noisy.document_BL[row] == number
        found[row, number] = float(sums.token_loss_BL[row][here].sum())
    gradients = {}
    for name, parameter in named_parameters(engine.chunks):
        gradients[name], parameter.grad = parameter.grad, None
    return found, gradients


PATHS = [
    *(("bd3lm", size, backend, ()) for size in (1, 4, 16, LENGTH) for backend in ("dense", "chunked")),
    *((objective, 4, backend, ()) for objective in ("mdlm", "ar", "sedd") for backend in ("dense", "chunked")),
    ("bd3lm", 4, "chunked", ("diffusion.shift_targets=true",)),
    ("mdlm", 4, "chunked", ("diffusion.shift_targets=true",)),
    ("bd3lm", 4, "chunked", ("data.restart_positions=false",)),
]


@pytest.mark.parametrize(("objective", "block_size", "backend", "more"), PATHS)
def test_a_document_has_the_loss_and_the_gradient_that_it_has_alone(objective, block_size, backend, more):
    engine = engine_for(
        f"diffusion.objective={objective}", f"diffusion.block_size={block_size}", f"model.attention={backend}", *more
    )
    lengths = list(enumerate(LONG if block_size < LENGTH or objective != "bd3lm" else (150,)))
    packed, sums = losses_by_document(engine, noised(engine, block_size, [lengths, [(9, LENGTH)]]))
    assert min(v for k, v in packed.items() if k != (0, 1)) > 1
    total = {name: torch.zeros_like(gradient) for name, gradient in sums.items()}
    for name, length in [*lengths, (9, LENGTH)]:
        alone, gradients = losses_by_document(engine, noised(engine, block_size, [[(name, length)]]))
        key = (1, 0) if name == 9 else (0, name)
        assert packed[key] == pytest.approx(alone[0, 0], rel=1e-5 if objective == "sedd" else 1e-6, abs=1e-6)
        for parameter, gradient in gradients.items():
            total[parameter] += gradient
    for parameter, gradient in sums.items():
        assert (gradient - total[parameter]).norm() < 1e-5 * gradient.norm() + 1e-6, parameter


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_what_happens_in_one_document_is_seen_in_no_other(backend):
    """Other ids, masks and times in one document, and other ids in the padding, change no loss elsewhere."""
    engine = engine_for("diffusion.block_size=4", f"model.attention={backend}")
    lengths = list(enumerate(LONG))
    noisy = noised(engine, 4, [lengths])
    (before,) = run_pass(engine, [noisy])
    others = noised(engine, 4, [lengths], seed=6)
    for number in range(len(LONG)):
        here_L = noisy.document_BL[0] == number
        mixed = torch.cat([here_L, here_L])
        changed = replace(noisy, input_BP=torch.where(mixed, others.input_BP, noisy.input_BP))
        (after,) = run_pass(engine, [changed])
        assert torch.equal(after.token_loss_BL[0][~here_L], before.token_loss_BL[0][~here_L])
        is_seen = (after.token_loss_BL - before.token_loss_BL).abs().max() > 1e-3
        assert is_seen == (LONG[number] > 1)
    padding = (noisy.document_BL == PADDING).repeat(1, 2)
    (after,) = run_pass(engine, [replace(noisy, input_BP=torch.where(padding, 7, noisy.input_BP))])
    assert torch.equal(after.token_loss_BL, before.token_loss_BL)


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 1), ("bd3lm", 16), ("mdlm", 0), ("ar", 0)])
def test_every_path_sees_what_the_dense_mask_says(objective, block_size, monkeypatch):
    """Chunked and FlexAttention, for keys of fewer heads, all queries and the first half, and rows of padding alone."""
    monkeypatch.setattr("bd3lm_scale.model.attention._compiled_flex", lambda: flex_attention)
    visibility = training_visibility(objective, LENGTH, block_size)
    positions = len(visibility.view_P) - (block_size if objective == "bd3lm" else 0)
    visibility = visibility.first(positions)
    document = torch.full((3, LENGTH), PADDING)
    start = 0
    for number, length in enumerate(LONG):
        document[0, start : start + length] = number
        start += -(-length // 16) * 16
    document[1] = 0
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(positions, 3, heads, 16, generator=generator) for heads in (4, 2, 2))
    for count in (positions, LENGTH):
        dense = AttentionPattern(visibility, "dense").attend_documents(query, key, value, count, document)
        for backend in ("chunked", "flex"):
            found = AttentionPattern(visibility, backend).attend_documents(query, key, value, count, document)
            torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
        assert dense.isfinite().all()


def test_positions_count_from_each_documents_start_or_from_the_rows():
    document = torch.tensor([[0] * 5 + [PADDING] * 3 + [1] * 300 + [2] * 12, [0] * LENGTH])
    wanted = torch.tensor([*range(5), *range(3), *range(300), *range(12)])
    (chunk,) = engine_for("diffusion.block_size=4").chunks
    assert chunk.config.restart_positions
    angles = chunk.restarted_rotary(document)
    for row, position in ((0, wanted), (1, torch.arange(LENGTH))):
        both = torch.cat([position, position])[: chunk.config.sequence_length]
        assert torch.equal(angles[:, row, 0], chunk.rotary(both)[:, 0, 0])
    shutdown()
    (plain,) = engine_for("diffusion.block_size=4", "data.restart_positions=false").chunks
    assert not plain.config.restart_positions


def test_documents_inside_blocks_are_refused():
    engine = engine_for("diffusion.block_size=4")
    document = (torch.arange(LENGTH)[None] >= 6).long()
    rows = Rows(document, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool), document, document >= 0)
    with pytest.raises(ValueError, match="documents begin inside blocks of 4; open the data with block_size=4"):
        noise_rows(rows, engine.process, seed=1, step=0, global_batch_size=1, interval=Interval(0.0, 1.0))
