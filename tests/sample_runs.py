"""Run folders with random weights and a byte-level tokenizer, for tests of what works from a checkpoint."""

from pathlib import Path

import tokenizers
import torch

from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.load import from_dict, to_dict, to_yaml
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.engine import build_engine
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.parallel.mesh import init_mesh, shutdown

CONTEXT, STEP = 32, 7


def make_tokenizer(folder: Path) -> None:
    """One id per byte, an end-of-text token and a mask."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "</s>"}')


def make_run(folder: Path, objective: str = "bd3lm", **diffusion) -> Path:
    """A run folder with one checkpoint of random weights, none of them zero."""
    make_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    if objective == "bd3lm":
        diffusion.setdefault("block_size", 4)
    config = from_dict(
        {
            "run_dir": str(folder),
            "precision": "fp32",
            "data": {"path": str(folder), "context_length": CONTEXT},
            "diffusion": {"objective": objective, **diffusion},
            "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "cond_dim": 32, "dropout": 0.0},
        }
    )
    mesh = init_mesh(config.parallel, "cpu")
    engine = build_engine(config, mesh, tokenizer.vocab_size, tokenizer.mask_token_id, for_training=False)
    generator = torch.Generator().manual_seed(5)
    tensors = []
    for name, parameter in named_parameters(engine.chunks):
        values = parameter.detach() + torch.randn(parameter.shape, generator=generator) * 0.1
        tensors.append((name, "master", values))
    shutdown()
    (folder / "config.yaml").write_text(to_yaml(config))
    meta = {
        "step": STEP,
        "tokens": 0,
        "config": to_dict(config),
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_token_id,
        "tokenizer_hash": tokenizer.hash,
    }
    write_weights(folder / "checkpoints" / f"step_{STEP:08d}", tensors, meta)
    return folder
