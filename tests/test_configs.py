"""Every shipped configuration passes its checks, says what it does, and spends the budget it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm_scale.config.checks import problems
from bd3lm_scale.config.load import load_config
from bd3lm_scale.config.sizes import count
from bd3lm_scale.config.summary import summary

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GPT2_VOCAB, BERT_VOCAB = 50258, 30522


def config_of(name):
    return load_config(ROOT / "configs" / f"{name}.yaml")


def tokens(name) -> int:
    config = config_of(name)
    return config.train.steps * config.train.global_batch_size * config.data.context_length


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_runs_on_the_smallest_world_and_on_larger_ones(path):
    config = load_config(path)
    group = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    vocab_size = config.model.vocab_size or (BERT_VOCAB if path.stem.startswith("lm1b") else GPT2_VOCAB)
    for replicas in (1, 2, 4, 8, 16):
        assert problems(config, group * replicas, vocab_size) == []
        text = summary(config, group * replicas, vocab_size)
        assert f"{config.train.steps:,} steps" in text
        assert text.startswith(config.run_dir)
    assert config.run_dir == f"runs/{path.stem}", "a run folder is found by its configuration's name"
    assert path.read_text().startswith("# "), "the first line says what the run is"


@pytest.mark.parametrize("name", ["owt_7b_tp4_pp4"])
def test_dry_run_prints_the_summary_and_touches_nothing(name, tmp_path):
    command = [sys.executable, "-m", "bd3lm_scale.train", str(ROOT / "configs" / f"{name}.yaml"), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    assert "memory per rank" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run creates no folders"


def test_dry_run_refuses_with_the_reasons_alone(tmp_path):
    command = [sys.executable, "-m", "bd3lm_scale.train", str(ROOT / "configs" / "demo.yaml"), "--dry-run"]
    command += ["diffusion.block_size=15", "optim.zero_stage=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "diffusion.block_size (15): " in done.stderr
    assert "optim.zero_stage (0): " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("names", "billions"),
    [
        (("owt_110m_pretrain", "owt_110m_block4"), 262),
        (("owt_110m_pretrain", "owt_110m_block8"), 262),
        (("owt_110m_pretrain", "owt_110m_block16"), 262),
        (("owt_110m_ar",), 262),
        (("owt_110m_mdlm",), 262),
        (("owt_110m_sedd",), 262),
        (("owt_1b_tp2_pp2",), 262),
        (("owt_7b_tp4_pp4",), 262),
        (("decoder_135m_block16",), 262),
        (("decoder_1b_tp2_pp2",), 262),
        (("lm1b_110m_pretrain", "lm1b_110m_block4"), 65),
        (("lm1b_110m_pretrain", "lm1b_110m_block16"), 65),
        (("lm1b_110m_ar",), 65),
        (("lm1b_110m_mdlm",), 65),
    ],
)
def test_budgets_are_the_papers(names, billions):
    assert int(sum(tokens(name) for name in names) / 1e9) == billions
    if len(names) == 2:
        pretraining = config_of(names[0])
        assert pretraining.diffusion.objective == "mdlm"
        assert tokens(names[0]) / sum(map(tokens, names)) == 0.85
        assert config_of(names[1]).train.init_from == pretraining.run_dir
        assert config_of(names[1]).model == pretraining.model


@pytest.mark.parametrize("path", [p for p in CONFIGS if "_110m_" in p.name], ids=lambda p: p.stem)
def test_the_papers_runs_have_the_papers_hyper_parameters(path):
    config = load_config(path)
    optim, model = config.optim, config.model
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps, optim.weight_decay) == (3e-4, 0.9, 0.999, 1e-8, 0)
    assert (optim.warmup_steps, optim.schedule, optim.grad_clip, optim.ema_decay) == (2500, "constant", 1.0, 0.9999)
    assert (model.num_layers, model.hidden_size, model.num_heads, model.dropout) == (12, 768, 12, 0.1)
    assert config.train.global_batch_size == 512
    assert config.data.context_length == (128 if path.stem.startswith("lm1b") else 1024)
    assert config.precision == "bf16"
    expected = {"ar": 85.0, "sedd": 92.4, "mdlm": 92.4, "bd3lm": 92.4}[config.diffusion.objective]
    assert round(count(config, GPT2_VOCAB, with_embeddings=False) / 1e6, 1) == expected
    if "block" in path.stem:
        assert config.block_size == int(path.stem.split("block")[1])
        assert config.diffusion.clip_search.widths == (0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "published"),
    [("convert_qwen3_0.6b_block16", 596_049_920), ("convert_llama3.2_1b_block16", 1_235_814_400)],
)
def test_converted_models_have_the_published_sizes(name, published):
    config = config_of(name)
    assert f"parameters  {published:,}," in summary(config, 1)
    assert config.diffusion.shift_targets


def test_large_configs_have_the_size_in_their_name():
    assert 1.0e9 < count(config_of("owt_1b_tp2_pp2"), GPT2_VOCAB, with_embeddings=False) < 1.1e9
    assert 6.5e9 < count(config_of("owt_7b_tp4_pp4"), GPT2_VOCAB) < 7.5e9


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("decoder_135m_block16", (30, 576, 9, 3, 64, 1536)), ("decoder_1b_tp2_pp2", (16, 2048, 32, 8, 64, 8192))],
)
def test_decoders_have_exactly_the_parameters_of_their_shapes(name, sizes):
    """Queries, keys, values and what joins the heads; gate, value and what joins them; norms; one tied embedding."""
    layers, width, heads, groups, head, inner = sizes
    layer = width * head * (2 * heads + 2 * groups) + 3 * width * inner + 2 * width + 2 * head
    assert count(config_of(name), GPT2_VOCAB) == layers * layer + width + GPT2_VOCAB * width
