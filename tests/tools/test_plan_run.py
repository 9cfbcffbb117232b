"""Planning: FLOPs counted exactly, suggestions that pass the checks and fit, errors with a way out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.load import from_dict, load_config
from bd3lm_scale.config.schema import ParallelConfig
from bd3lm_scale.config.sizes import parameters
from bd3lm_scale.diffusion.visibility import training_visibility
from tools import plan_run

CONFIGS = Path(__file__).parents[2] / "configs"


def make(objective="bd3lm", length=32, block_size=4, **model):
    sizes = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "cond_dim": 16, **model}
    return from_dict(
        {
            "run_dir": "r",
            "data": {"path": "d", "context_length": length},
            "diffusion": {"objective": objective, "block_size": block_size},
            "model": sizes,
        }
    )


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd", "ar"])
@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_attention_pairs_are_those_the_visibility_rule_allows(objective, block_size):
    config = make(objective, block_size=block_size)
    visibility = training_visibility(objective, 32, config.block_size).first(config.sequence_length)
    positions = torch.arange(len(visibility.view_P))
    allowed = visibility.may_see(positions[:, None], positions[None, :])
    assert plan_run.attention_pairs(config) == int(allowed.sum())


@pytest.mark.parametrize(("length", "size", "ranks", "positions"), [(36, 6, 4, 68), (36, 12, 4, 60), (36, 2, 4, 72)])
def test_sequence_parallel_ranks_get_equal_parts_of_what_is_read(length, size, ranks, positions):
    """As much of the last clean block is left out as can be; the pairs are still those of the rule."""
    parallel = {"tensor_parallel_size": ranks, "sequence_parallel": True}
    config = replace(make(length=length, block_size=size), parallel=ParallelConfig(**parallel))
    assert problems(config, ranks) == []
    assert config.sequence_length == positions
    visibility = training_visibility("bd3lm", length, size).first(positions)
    position = torch.arange(positions)
    allowed = visibility.may_see(position[:, None], position[None, :])
    assert plan_run.attention_pairs(config) == int(allowed.sum())
    noisy, products = int(allowed[:length].sum()), 3 * 12 * 64 * 64
    forward = plan_run.forward_flops(config, 128)
    assert forward["attention"] == 4 * 64 * (3 * int(allowed.sum()) - int(allowed.sum()) + noisy)
    assert forward["linear layers"] == 2 * (products * positions - products / 3 * 10 / 12 * (positions - length))


def test_rows_that_cannot_be_cut_keep_the_whole_last_layer():
    parallel = {"tensor_parallel_size": 4, "sequence_parallel": True}
    config = replace(make(length=30, block_size=5), parallel=ParallelConfig(**parallel))
    assert config.sequence_length == 56
    assert not config.scores_noisy_half_only
    assert make(length=30, block_size=5).scores_noisy_half_only
    forward = plan_run.forward_flops(config, 128)
    assert forward["linear layers"] == 2 * 3 * 12 * 64 * 64 * 56


def test_linear_flops_are_two_per_weight_and_position():
    config = make()
    named = parameters(config, 128)
    matrices = sum(
        p.size for name, p in named.items() if name.startswith("decoder.") and len(p.shape) == 2 and "modul" not in name
    )
    forward = plan_run.forward_flops(config, 128)
    # 60 positions; in the last layer the 28 clean ones only need K and V, 2 of 12 units of width squared
    assert forward["linear layers"] == 2 * (matrices * 60 - matrices / 3 * 10 / 12 * 28)
    assert forward["attention"] == 4 * 64 * (3 * (16 * 36 + 14 * 32) - 14 * 32)
    mdlm = plan_run.forward_flops(make("mdlm"), 128)
    assert mdlm["linear layers"] == 2 * matrices * 32
    modulation = sum(p.size for name, p in named.items() if name.endswith("modulation.weight"))
    assert forward["conditioning"] == 2 * modulation
    assert plan_run.forward_flops(make("ar"), 128)["conditioning"] == 0
    assert plan_run.forward_flops(make("ar"), 128)["head"] == 2 * 31 * 64 * 128


def test_flops_of_a_decoder_are_those_of_its_shapes():
    """Width 64, 4 query heads and 2 of keys and values, each 24 wide, gate and value 96 wide, no conditioning."""
    config = make(num_kv_heads=2, head_dim=24, mlp="swiglu", ffn_hidden_size=96, adaln=False)
    forward = plan_run.forward_flops(config, 128)
    layer = 64 * (4 + 2 * 2) * 24 + 4 * 24 * 64 + 3 * 64 * 96
    assert forward["linear layers"] == 2 * (3 * 60 * layer - 28 * (layer - 64 * 2 * 2 * 24))
    assert forward["attention"] == 4 * 4 * 24 * (3 * (16 * 36 + 14 * 32) - 14 * 32)
    assert forward["conditioning"] == 0


def test_block_diffusion_costs_between_one_and_two_ar_passes(capsys):
    assert plan_run.main([str(CONFIGS / "owt_110m_block4.yaml"), "--gpus", "8", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 1 < figures["cost_relative_to_ar"] < 2
    assert figures["tokens"] == 75_000 * 512 * 1024
    seconds = figures["days"] * 86_400
    assert figures["tokens"] / seconds == pytest.approx(figures["tokens_per_second"])
    assert figures["total_flops"] / seconds == pytest.approx(8 * 989e12 * 0.4)


@pytest.mark.parametrize(("name", "gpus", "gpu"), [("owt_7b_tp4_pp4", 64, "h100"), ("owt_7b_tp4_pp4", 16, "l40s")])
def test_the_suggested_layout_passes_every_check_and_fits(name, gpus, gpu, capsys):
    path = str(CONFIGS / f"{name}.yaml")
    assert plan_run.main([path, "--gpus", str(gpus), "--gpu", gpu]) == 0
    text = capsys.readouterr().out
    suggestion = text.split("suggestion")[1].split()
    config = load_config(path, [*suggestion, "parallel.virtual_pipeline_parallel_size=null"])
    assert problems(config, gpus) == []
    assert plan_run.peak_memory(config, gpus, 50258) < 0.86 * plan_run.GPUS[gpu].memory_gib * 2**30


def test_pipeline_bubble_shrinks_with_micro_batches_and_interleaving():
    def config(chunks, batch):
        overrides = ["parallel.pipeline_parallel_size=4", f"train.global_batch_size={batch}"]
        overrides += [f"parallel.virtual_pipeline_parallel_size={chunks}", "train.micro_batch_size=1"]
        return load_config(CONFIGS / "owt_7b_tp4_pp4.yaml", overrides)

    assert plan_run.bubble(config("null", 4), 1) == 3 / 7
    assert plan_run.bubble(config("2", 4), 1) == 3 / 11
    assert plan_run.bubble(config("2", 64), 1) < 0.03


def test_impossible_worlds_are_refused_with_a_layout_that_is_possible(capsys):
    assert plan_run.main([str(CONFIGS / "owt_1b_tp2_pp2.yaml"), "--gpus", "6"]) == 2
    message = capsys.readouterr().err
    assert "6 processes cannot be cut" in message
    assert "a layout for 6 GPUs: parallel.tensor_parallel_size=" in message
    assert plan_run.main([str(CONFIGS / "absent.yaml"), "--gpus", "6"]) == 2
