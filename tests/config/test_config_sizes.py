"""Sizes: parameter counts of the published models, shards that add up, memory that follows the layout."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.sizes import count, count_on_rank, memory, parameters, stage_layers
from bd3lm_scale.config.summary import dry_run, summary
from bd3lm_scale.errors import ConfigError

GOLDENS = Path(__file__).parents[1] / "goldens"


def make(objective="bd3lm", size=(12, 768, 12, 128), zero=1, precision="bf16", tie=False, **parallel):
    layers, width, heads, cond = size
    return from_dict(
        {
            "run_dir": "runs/x",
            "precision": precision,
            "data": {"path": "data/x"},
            "diffusion": {"objective": objective},
            "model": {
                "num_layers": layers,
                "hidden_size": width,
                "num_heads": heads,
                "cond_dim": cond,
                "tie_embeddings": tie,
            },
            "optim": {"zero_stage": zero},
            "parallel": parallel,
        }
    )


def test_small_model_has_exactly_the_published_number_of_parameters():
    assert count(make(), 50258) == 169_627_218
    assert count(make("ar"), 50258) == 162_246_482
    assert count(make(), 30522) == 139_292_986
    assert round(count(make(), 50258, with_embeddings=False) / 1e6, 2) == 92.38
    assert round(count(make("ar"), 50258, with_embeddings=False) / 1e6, 1) == 85.0
    assert round(count(make(size=(8, 256, 8, 64)), 50258) / 1e6, 2) == 32.94
    assert round(count(make(size=(24, 1024, 16, 128)), 50258) / 1e6, 2) == 424.48


def test_shapes_are_those_of_the_reference_model():
    reference = [tuple(shape) for shape in json.loads((GOLDENS / "small_param_shapes.json").read_text()).values()]
    ours = [p.shape for p in parameters(make(), 50258).values()]
    buffers_left_out = [shape for shape in reference if len(shape) and shape != (32,)]
    assert sorted(ours) == sorted(buffers_left_out)


@pytest.mark.parametrize(
    ("stages", "chunks", "expected"),
    [
        (1, None, [list(range(12))]),
        (2, None, [list(range(6)), list(range(6, 12))]),
        (2, 3, [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]),
        (3, 2, [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
    ],
)
def test_stages_hold_every_layer_once_in_schedule_order(stages, chunks, expected):
    config = make(pipeline_parallel_size=stages, virtual_pipeline_parallel_size=chunks)
    assert stage_layers(config) == expected


def test_shards_and_stages_add_up_to_the_padded_model():
    named = parameters(make(), 50304)
    replicated = sum(p.size for p in named.values() if p.shard_dim is None)
    whole = sum(p.size for p in named.values())
    for tensor, stages in ((1, 1), (2, 1), (4, 3), (1, 12)):
        config = make(tensor_parallel_size=tensor, pipeline_parallel_size=stages)
        on_ranks = sum(count_on_rank(config, 50258, stage) for stage in range(stages))
        assert on_ranks == replicated + (whole - replicated) // tensor


def test_tied_embeddings_are_stored_once_and_held_by_both_ends():
    tied, embedding = make(tie=True), 50304 * 768
    assert count(tied, 50304) == count(make(), 50304) - embedding
    two_stages = make(tie=True, pipeline_parallel_size=2)
    assert count_on_rank(two_stages, 50304, 1) == count_on_rank(make(pipeline_parallel_size=2), 50304, 1)


def test_memory_follows_zero_stage_precision_and_layout():
    n = count_on_rank(make(), 50258, 0)
    one, two, three = (memory(make(zero=stage), 8, 50258, 0) for stage in (1, 2, 3))
    assert one.weights == two.weights == 2 * n
    assert three.weights < n
    assert one.gradients == 4 * n
    assert two.gradients == three.gradients == 4 * n / 8
    assert (one.masters, one.adam, one.ema) == (4 * n / 8, 8 * n / 8, 4 * n / 8)
    assert memory(make(precision="fp32"), 8, 50258, 0).weights == 4 * n
    plain = memory(make(), 8, 50258, 0)
    assert memory(make(recompute="full"), 8, 50258, 0).activations < plain.activations / 5
    # the last layer spares its clean half; attention on runs of queries returns its output once more
    assert memory(make("mdlm"), 8, 50258, 0).activations == pytest.approx(plain.activations / 2, rel=0.05)
    tensor = memory(make(tensor_parallel_size=4), 8, 50258, 0)
    both = memory(make(tensor_parallel_size=4, sequence_parallel=True), 8, 50258, 0)
    assert both.activations == pytest.approx(plain.activations / 4, rel=0.05)  # each rank has all rotary angles
    assert both.activations < tensor.activations < plain.activations
    assert plain.head > 0 == memory(make(pipeline_parallel_size=2), 8, 50258, 0).head


def test_summary_says_what_matters():
    text = summary(make(tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True), 12, 50258)
    for words in (
        "12 = tensor 2 x pipeline 2 x data 3, ZeRO-1, sequence parallel",
        "parameters  169,627,218, without embedding and head 92,380,672",
        "vocabulary 50,258 padded to 50,304",
        "512 rows x 1024 = 524,288 tokens, 22 micro-batches of 8 rows per rank",
        "16 zero-weight rows of 528 (3.0% of the work)",
        "1,000,000 steps = 524.3 billion tokens",
    ):
        assert words in text, text
    assert "assumed" in summary(make(), 1)
    few = replace(make(), train=replace(make().train, steps=10))
    assert "10 steps = 5.2 million tokens" in summary(few, 1)
    assert "assumed" not in summary(make(), 1, 4096)


def test_dry_run_checks_first_and_assumes_the_smallest_world():
    config = make(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert "4 = tensor 2 x pipeline 2 x data 1" in dry_run(config)
    assert "8 = tensor 2 x pipeline 2 x data 2" in dry_run(config, 8)
    with pytest.raises(ConfigError, match="6 processes cannot be cut"):
        dry_run(config, 6)


MODEL_AGREES = """
from dataclasses import replace
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.sizes import parameters
from bd3lm_scale.engine import build_engine
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.parallel.mesh import init_mesh

small = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.cond_dim=8"]
base = load_config("configs/demo.yaml", small)
mesh = init_mesh(base.parallel, "cpu", 60)
for objective, tied in (("bd3lm", False), ("bd3lm", True), ("ar", False)):
    config = replace(
        base,
        diffusion=replace(base.diffusion, objective=objective),
        model=replace(base.model, tie_embeddings=tied),
    )
    chunks = build_engine(config, mesh, 256, 255, for_training=False).chunks
    real = {name: tuple(p.shape) for name, p in named_parameters(chunks)}
    table = {name: p.shape for name, p in parameters(config, 256).items()}
    assert real == table, (objective, tied, real.items() ^ table.items())
print("agree")
"""


def test_the_table_of_parameters_is_the_models():
    done = subprocess.run(
        [sys.executable, "-c", MODEL_AGREES], cwd=GOLDENS.parents[1], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("agree"), done.stderr
