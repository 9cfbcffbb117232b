"""Lightning checkpoints: weights, EMA by parameter order, interval and step; nothing in the file is executed."""

import contextlib
import os

import pytest
import torch
from omegaconf import OmegaConf

from bd3lm_scale.checkpoint.lightning import import_lightning, load_restricted
from bd3lm_scale.checkpoint.names import PREFIX, Architecture, rotary_frequencies, table, to_ours

SIZES = Architecture(num_layers=2, hidden_size=32, num_heads=4, cond_dim=8, mlp_ratio=4, vocab_size=50)
CONFIG = {
    "block_size": 4,
    "algo": {"name": "bd3lm", "time_conditioning": False, "ignore_bos": True},
    "model": {"length": 16, "n_heads": 4, "dropout": 0.1, "hidden_size": "${hidden}"},
    "hidden": 32,
    "training": {"resample": True},
}


class Tokenizer:
    """Like the tokenizer objects that the reference pickles into its checkpoints."""

    def __init__(self):
        self.vocab = {"a": 1}


class Attack:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class QuietAttack(Attack):
    """The same through a function that is on no list of forbidden modules."""

    def __reduce__(self):
        import subprocess

        return subprocess.call, (self.command.split(),)


def checkpoint(arch=SIZES, config=CONFIG, **more):
    generator = torch.Generator().manual_seed(0)
    state = {PREFIX + e.published: 0.2 * torch.randn(e.shape, generator=generator) for e in table(arch)}
    average = [0.2 * torch.randn(e.shape, generator=generator) for e in table(arch)]
    state |= {
        f"{PREFIX}rotary_emb.inv_freq": rotary_frequencies(arch),
        "sampling_eps_min": torch.tensor(0.45),
        "sampling_eps_max": torch.tensor(0.95),
    }
    return {
        "state_dict": state,
        "ema": {"decay": 0.9999, "num_updates": 12, "shadow_params": average},
        "global_step": 1234,
        "hyper_parameters": {"config": OmegaConf.create(config), "tokenizer": Tokenizer()},
        **more,
    }


def saved(path, content):
    torch.save(content, path)
    return path


def test_weights_average_interval_and_step_arrive(tmp_path):
    content = checkpoint()
    tensors, meta = import_lightning(saved(tmp_path / "last.ckpt", content))
    found = {(name, kind): tensor for name, kind, tensor in tensors}
    entries = table(SIZES)
    assert len(found) == 2 * len(entries)
    for i, entry in enumerate(entries):
        raw = to_ours(entry, content["state_dict"][PREFIX + entry.published], SIZES)
        average = to_ours(entry, content["ema"]["shadow_params"][i], SIZES)
        assert torch.equal(found[entry.ours, "master"], raw), entry
        assert torch.equal(found[entry.ours, "ema"], average), entry
    assert meta["clip"] == {"low": 0.45, "high": 0.95}
    assert (meta["step"], meta["vocab_size"], meta["mask_token_id"]) == (1234, 50, 49)
    config = meta["config"]
    assert config["model"] | {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "cond_dim": 8} == config["model"]
    assert (config["data"]["context_length"], config["diffusion"]["block_size"]) == (16, 4)
    assert config["diffusion"]["resample"] is True
    assert config["diffusion"]["clip_low"] == 0.45


def test_autoregressive_checkpoints_and_ones_without_ema(tmp_path):
    arch = Architecture(**{**vars(SIZES), "uses_adaln": False})
    content = checkpoint(arch, CONFIG | {"algo": {"name": "ar", "time_conditioning": False}})
    del content["ema"], content["state_dict"]["sampling_eps_min"], content["state_dict"]["sampling_eps_max"]
    tensors, meta = import_lightning(saved(tmp_path / "ar.ckpt", content))
    assert {kind for _, kind, _ in tensors} == {"master"}
    assert meta["config"]["diffusion"]["objective"] == "ar"


def test_what_a_file_does_not_say_is_asked_for(tmp_path):
    content = checkpoint()
    del content["hyper_parameters"]
    path = saved(tmp_path / "bare.ckpt", content)
    with pytest.raises(ValueError, match=r"add data\.context_length=N diffusion\.block_size=N"):
        import_lightning(path)
    _, meta = import_lightning(path, ["data.context_length=32", "diffusion.block_size=8", "mask_token_id=3"])
    assert (meta["config"]["diffusion"]["block_size"], meta["mask_token_id"]) == (8, 3)
    assert meta["config"]["model"]["num_heads"] == 4, "read off the rotary frequencies"


@pytest.mark.parametrize("attack", [Attack, QuietAttack])
def test_nothing_is_executed(tmp_path, attack):
    trap = tmp_path / "ran"
    path = saved(tmp_path / "hostile.ckpt", checkpoint(hostile=attack(f"touch {trap}")))
    with contextlib.suppress(ValueError):  # refused, or read with the attack as an inert object
        import_lightning(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the attack is a real one"


def test_broken_files_are_named(tmp_path):
    path = saved(tmp_path / "good.ckpt", checkpoint())
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:-2000])
    (tmp_path / "text.ckpt").write_text("hello")
    for name, message in (("cut.ckpt", "cut off"), ("text.ckpt", "not a checkpoint"), ("none.ckpt", "no such file")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            load_restricted(tmp_path / name)
    with pytest.raises(ValueError, match="has no state_dict with"):
        import_lightning(saved(tmp_path / "other.ckpt", {"state_dict": {"x": torch.zeros(1)}}))
    with pytest.raises(ValueError, match="holds no dictionary"):
        import_lightning(saved(tmp_path / "list.ckpt", [1]))


def test_all_wrong_tensors_are_listed(tmp_path):
    content = checkpoint()
    del content["state_dict"]["backbone.blocks.0.norm1.weight"]
    content["ema"]["shadow_params"][3] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"norm1") as error:
        import_lightning(saved(tmp_path / "bad.ckpt", content))
    assert "missing: backbone.blocks.0.norm1.weight (32,)" in str(error.value)
    assert "ema.shadow_params[3] (sigma_map.mlp.2.weight) is (7,), not (8, 8)" in str(error.value)
    content = checkpoint()
    content["ema"]["shadow_params"].pop()
    with pytest.raises(ValueError, match="has 29 tensors, the model 30 parameters"):
        import_lightning(saved(tmp_path / "short.ckpt", content))
