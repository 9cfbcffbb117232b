"""verify and reshard: what they report and what they write."""

import json

import pytest
import torch

from bd3lm_scale.checkpoint import reshard as reshard_module
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.reshard import reshard
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.checkpoint.verify import verify
from bd3lm_scale.config.load import from_dict, to_dict
from bd3lm_scale.config.schema import CheckpointConfig, DataConfig, ModelConfig, RunConfig
from bd3lm_scale.config.sizes import parameters
from bd3lm_scale.errors import CheckpointError
from tests.checkpoint.layouts import cut, whole_state
from tests.variants import VARIANTS

CONFIG = RunConfig(
    run_dir="runs/x",
    data=DataConfig(path="data"),
    model=ModelConfig(num_layers=2, hidden_size=32, num_heads=2, cond_dim=8),
)
VOCAB = 100
PARAMETERS = parameters(CONFIG, 128)
SHAPES = {name: tuple(p.shape) for name, p in PARAMETERS.items()}
DIMS = {name: p.shard_dim for name, p in PARAMETERS.items()}


def save(run, state, step=5, shapes=None):
    meta = {
        "config": to_dict(CONFIG),
        "vocab_size": VOCAB,
        "layout": {"tensor_parallel_size": 2, "zero_stage": 1},
        "tokens": 7,
    }
    store = CheckpointStore(run / "checkpoints", CheckpointConfig(asynchronous=False))
    ranks = cut(shapes or SHAPES, {**DIMS, "extra": None}, 2, 2, 3, state)
    store.save(step, [part for rank in ranks for part in rank], meta)
    assert store.last_save.problem is None
    return store.folder / f"step_{step:08d}"


def assert_equal(reader, expected):
    assert sorted(expected) == reader.kinds()
    assert all(torch.equal(reader.read(n, k), expected[k][n]) for k in expected for n in SHAPES)


def test_verify_reports_step_layout_and_sizes(tmp_path):
    path = save(tmp_path, whole_state(SHAPES))
    calls = []
    (report,) = verify(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert report.is_valid, report
    assert report.notes == ()
    assert (report.step, report.contents, report.num_tensors) == (5, "full", len(SHAPES))
    assert report.num_parameters == sum(p.size for p in PARAMETERS.values())
    assert report.kinds == ("ema", "exp_avg", "exp_avg_sq", "master")
    assert "tensor_parallel_size 2, zero_stage 1" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["is_valid"] is True
    size = open_checkpoint(path).manifest.size_bytes
    assert calls[-1][1] == 2 * size
    assert 0.9 < calls[-1][0] / calls[-1][1] <= 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_verify_finds_numbers_that_are_not_finite(tmp_path):
    state = whole_state(SHAPES)
    state["exp_avg"]["embedding.weight"][3, 4] = float("nan")
    state["ema"]["head.norm.weight"][:2] = float("inf")
    save(tmp_path, state)
    (report,) = verify(tmp_path)
    assert report.problems == (
        "ema of head.norm.weight: 2 of 32 numbers are not finite",
        "exp_avg of embedding.weight: 1 of 4,096 numbers are not finite",
    )


def test_verify_compares_shapes_with_the_saved_configuration(tmp_path):
    shapes = {name: shape for name, shape in SHAPES.items() if name != "decoder.layers.1.mlp.linear_fc2.bias"}
    shapes["head.norm.weight"] = (31,)
    shapes["extra"] = (2,)
    save(tmp_path, whole_state(shapes), shapes=shapes)
    (report,) = verify(tmp_path)
    assert report.problems == (
        "decoder.layers.1.mlp.linear_fc2.bias is missing",
        "extra does not belong to the saved configuration",
        "head.norm.weight has shape (31,), the saved configuration says (32,)",
    )


def test_verify_of_a_run_covers_every_checkpoint(tmp_path):
    save(tmp_path, whole_state(SHAPES), 5)
    second = save(tmp_path, whole_state(SHAPES, 1), 6)
    (second / "manifest.json").write_text("{}")
    reports = verify(tmp_path)
    assert [report.is_valid for report in reports] == [True, False]
    assert "manifest.json" in reports[1].problems[0]
    assert [report.step for report in verify(tmp_path, step=5)] == [5]
    with pytest.raises(CheckpointError, match="no checkpoint"):
        verify(tmp_path / "nothing")


@pytest.mark.parametrize("num_files", [1, 3, 7])
def test_reshard_keeps_every_bit(tmp_path, monkeypatch, num_files):
    monkeypatch.setattr(reshard_module, "PIECE_ELEMENTS", 1000)
    state = whole_state(SHAPES)
    source = save(tmp_path, state)
    calls = []
    report = reshard(source, tmp_path / "out", num_files, progress=lambda *c: calls.append(c))
    reader = open_checkpoint(tmp_path / "out")
    assert_equal(reader, state)
    assert reader.meta == open_checkpoint(source).meta
    assert verify(tmp_path / "out")[0].is_valid
    sizes = [file.size_bytes for file in reader.manifest.files]
    assert len(sizes) == num_files == report.num_files
    assert max(sizes) - min(sizes) < 0.1 * sum(sizes)
    assert calls[-1][0] == calls[-1][1]
    assert json.loads(json.dumps(report.as_dict()))["num_files"] == num_files


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [(2, 2, 3), (4, 1, 1), (1, 2, 2)])
def test_variants_are_resharded_and_verified(tmp_path, variant, layout):
    """Gates cut part by part, fewer heads of keys and values than ranks, no biases, no modulation."""
    given = to_dict(CONFIG)
    model = {**given["model"], "hidden_size": 64, "num_heads": 4, **VARIANTS[variant]}
    config = from_dict({**given, "model": model})
    named = parameters(config, 128)
    shapes = {name: p.shape for name, p in named.items()}
    state, meta = whole_state(shapes), {"config": to_dict(config), "vocab_size": VOCAB}
    dims, parts = {n: p.shard_dim for n, p in named.items()}, {n: p.parts for n, p in named.items()}
    store = CheckpointStore(tmp_path / "run" / "checkpoints", CheckpointConfig(asynchronous=False))
    store.save(3, [part for rank in cut(shapes, dims, *layout, state, parts=parts) for part in rank], meta)
    assert store.last_save.problem is None
    reshard(tmp_path / "run", tmp_path / "out", 3)
    for folder in (tmp_path / "run", tmp_path / "out"):
        (report,) = verify(folder)
        assert report.is_valid, report
        assert report.notes == ()
        assert report.num_parameters == sum(p.size for p in named.values())
    reader = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(reader.read(n, k), tensor) for k in state for n, tensor in state[k].items())
    wrong = from_dict({**given, "model": {**model, "num_kv_heads": 4}})
    store.save(4, [part for rank in cut(shapes, dims, *layout, state, parts=parts) for part in rank],
               meta | {"config": to_dict(wrong)})  # fmt: skip
    (report,) = verify(tmp_path / "run", step=4)
    assert not report.is_valid
    assert "linear_qkv" in report.problems[0]


def test_reshard_exports_a_slice(tmp_path):
    state = whole_state(SHAPES)
    save(tmp_path, state)
    reshard(tmp_path, tmp_path / "weights", contents="weights")
    reshard(tmp_path, tmp_path / "ema", 2, contents="ema")
    weights, ema = open_checkpoint(tmp_path / "weights"), open_checkpoint(tmp_path / "ema")
    assert_equal(weights, {"master": state["master"], "ema": state["ema"]})
    assert_equal(ema, {"master": state["ema"]})
    assert weights.meta["contents"] == ema.meta["contents"] == "weights"
    assert ema.meta["weights"] == "ema"
    with pytest.raises(CheckpointError, match="no averaged weights"):
        reshard(tmp_path / "ema", tmp_path / "x", contents="ema")


def test_reshard_refuses_damage_and_existing_destinations(tmp_path):
    source = save(tmp_path, whole_state(SHAPES))
    with pytest.raises(CheckpointError, match="exists"):
        reshard(source, source)
    with pytest.raises(ValueError, match="num_files"):
        reshard(source, tmp_path / "x", 0)
    with pytest.raises(ValueError, match="contents"):
        reshard(source, tmp_path / "x", contents="adam")
    (path,) = source.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        reshard(source, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("meta", [{}, {"config": {**to_dict(CONFIG), "nonsense": 1}, "vocab_size": VOCAB}])
def test_shapes_that_cannot_be_compared_are_noted(tmp_path, meta):
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False))
    store.save(1, cut(SHAPES, DIMS, 1, 1, 1, whole_state(SHAPES))[0], meta)
    (report,) = verify(tmp_path)
    assert report.is_valid
    assert "shapes were not compared" in str(report)
