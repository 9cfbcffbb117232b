"""Conversion loses no bit, lists what does not fit, and depends on the weights only."""

import json
import math
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import NETWORK, BD3LMConfig
from bd3lm_scale.checkpoint.hf.export import config_fields, export_hf, parse_size
from bd3lm_scale.checkpoint.hf.importing import FIELD_KINDS, hf_config_of, import_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.metadata import weights_meta
from bd3lm_scale.checkpoint.names import Architecture, num_parameters, shape_problems, table, to_ours, to_published
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.store import CheckpointStore
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.config.load import from_dict
from bd3lm_scale.config.schema import CheckpointConfig, DataConfig, DiffusionConfig, ModelConfig, RunConfig
from bd3lm_scale.config.sizes import parameters
from bd3lm_scale.diffusion.loss import token_losses
from bd3lm_scale.diffusion.noising import given_noise
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.values import HeadRows
from tests.checkpoint.layouts import cut, whole_state

GOLDENS = Path(__file__).parents[1] / "goldens"
TINY = GOLDENS / "hf_tiny"
VOCAB = 100


def configuration(objective="bd3lm", tied=False):
    return RunConfig(
        run_dir="runs/x",
        data=DataConfig(path="data", context_length=16),
        diffusion=DiffusionConfig(objective=objective, block_size=4, clip_low=0.3, clip_high=0.8),
        model=ModelConfig(num_layers=2, hidden_size=32, num_heads=4, cond_dim=8, tie_embeddings=tied),
    )


def native(folder, config, seed=0, kinds=("master", "ema")):
    """A native checkpoint with random weights, padding included."""
    shapes = {name: parameter.shape for name, parameter in parameters(config, 128).items()}
    state = whole_state(shapes, seed, kinds)
    meta = weights_meta(config, VOCAB, VOCAB - 1, "a test")
    # small enough for attention that does not saturate
    write_weights(folder, ((name, kind, 0.2 * tensor) for kind in kinds for name, tensor in state[kind].items()), meta)
    return open_checkpoint(folder)


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tiny_copy(folder, **changes):
    """The golden folder with changed fields in config.json."""
    shutil.copytree(TINY, folder)
    (folder / "config.json").chmod(0o644)
    fields = json.loads((TINY / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def rewrite(folder, change):
    """Rewrite model.safetensors with other tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(change(tensors), folder / "model.safetensors")


# ---- names ---------------------------------------------------------------------------------------------------------


def test_the_table_has_the_published_names_in_their_order():
    published = json.loads((GOLDENS / "small_param_shapes.json").read_text())
    small = Architecture(12, 768, 12, 128, 4, 50258)
    found = {entry.published: list(entry.shape) for entry in table(small)}
    expected = published.get("shapes", published)
    named = {name.removeprefix("backbone."): shape for name, shape in expected.items() if isinstance(shape, list)}
    assert list(found.items()) == [(name, shape) for name, shape in named.items() if name in found]
    assert len(named) == len(found)
    assert num_parameters(small) == 169_627_218


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd", "ar"])
def test_the_table_has_all_of_our_parameters(objective, tied):
    config = configuration(objective, tied)
    ours = {entry.ours: entry.our_shape for entry in table(Architecture.of(config, VOCAB))}
    assert ours == {name: parameter.shape for name, parameter in parameters(config, 128).items()}


def test_layouts_are_inverses_and_move_every_head():
    arch = Architecture(1, 12, 3, 4, 4, 5)
    for entry in table(arch):
        tensor = torch.randn(entry.shape)
        assert torch.equal(to_published(entry, to_ours(entry, tensor, arch), arch), tensor), entry
    qkv = next(entry for entry in table(arch) if entry.kind == "qkv")
    rows = torch.arange(36.0)[:, None].expand(36, 12)
    # published: q of heads 0 1 2, then k, then v (4 rows each); ours: q k v of head 0, then of head 1, ...
    blocks = to_ours(qkv, rows, arch)[:, 0].view(9, 4)[:, 0] / 4
    assert blocks.tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]


# ---- there and back ------------------------------------------------------------------------------------------------


def test_published_weights_come_back_bit_by_bit(tmp_path):
    tensors, meta = import_hf(TINY)
    write_weights(tmp_path / "native", tensors, meta)
    export_hf(open_checkpoint(tmp_path / "native"), tmp_path / "hf")
    before, after = load_file(TINY / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert set(before) == set(after), "the published names, strictly"
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    published = json.loads((TINY / "config.json").read_text())
    assert published.pop("auto_map").items() <= fields["auto_map"].items()
    not_kept = {"return_dict", "transformers_version"}
    assert {n: v for n, v in published.items() if n not in not_kept}.items() <= fields.items()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd", "ar"])
def test_native_weights_come_back_bit_by_bit(tmp_path, objective, tied):
    config = configuration(objective, tied)
    reader = native(tmp_path / "native", config)
    export_hf(reader, tmp_path / "hf")
    tensors, meta = import_hf(tmp_path / "hf")
    back = open_checkpoint(write_weights(tmp_path / "back", tensors, meta))
    assert back.names() == reader.names()
    for name in reader.names():
        rows = VOCAB if reader.shape(name)[0] == 128 and name.startswith(("embedding", "head.output")) else None
        assert torch.equal(back.read(name)[:rows], reader.read(name, "ema")[:rows]), name
    restored = from_dict(back.meta["config"])
    assert (restored.model, restored.data.context_length) == (
        ModelConfig(**{**vars(config.model), "vocab_size": VOCAB}),
        config.data.context_length,
    )
    assert restored.diffusion.objective == objective
    assert restored.time_conditioning == config.time_conditioning
    assert (back.meta["vocab_size"], back.meta["mask_token_id"]) == (VOCAB, VOCAB - 1)


def test_clip_intervals_come_back_bit_by_bit(tmp_path):
    export_hf(native(tmp_path / "native", configuration()), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert tensors["sampling_eps_max"].item() == torch.tensor(0.8).item()
    _, meta = import_hf(tmp_path / "hf")
    assert meta["clip"] == {"low": 0.3, "high": 0.8}


def test_ema_and_raw_weights_are_told_apart(tmp_path):
    reader = native(tmp_path / "native", configuration())
    assert export_hf(reader, tmp_path / "ema").weights == "ema"
    assert export_hf(reader, tmp_path / "raw", weights="raw").weights == "raw"
    name = "backbone.blocks.1.mlp.0.weight"
    ours = "decoder.layers.1.mlp.linear_fc1.weight"
    for folder, kind in (("ema", "ema"), ("raw", "master")):
        assert torch.equal(load_file(tmp_path / folder / "model.safetensors")[name], reader.read(ours, kind))


def test_bfloat16_rounds_weights_and_nothing_else(tmp_path):
    reader = native(tmp_path / "native", configuration())
    export_hf(reader, tmp_path / "fp32")
    export_hf(reader, tmp_path / "bf16", dtype="bf16")
    full = load_file(tmp_path / "fp32" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "bf16" / "model.safetensors").items():
        is_buffer = "inv_freq" in name or "sampling" in name
        assert torch.equal(tensor, full[name] if is_buffer else full[name].bfloat16()), name


def test_every_layout_exports_the_same_bytes(tmp_path):
    config = configuration()
    found = parameters(config, 128)
    shapes, dims = {n: p.shape for n, p in found.items()}, {n: p.shard_dim for n, p in found.items()}
    state, exports = whole_state(shapes), []
    for number, (tensor, pipeline, data) in enumerate([(1, 1, 1), (2, 2, 2), (1, 1, 4), (2, 1, 3)]):
        store = CheckpointStore(tmp_path / str(number), CheckpointConfig(asynchronous=False))
        meta = weights_meta(config, VOCAB, VOCAB - 1, "")
        del meta["source"]
        meta["layout"] = {"tensor_parallel_size": tensor}
        ranks = cut(shapes, dims, tensor, pipeline, data, state)
        store.save(7, [part for rank in ranks for part in rank], {**meta, "contents": "full"})
        export_hf(store.newest(), tmp_path / f"hf{number}", figures={"Validation perplexity": 12.5})
        exports.append(folder_bytes(tmp_path / f"hf{number}"))
    assert all(export == exports[0] for export in exports)
    card = exports[0]["README.md"].decode()
    assert "| Validation perplexity | 12.5 |" in card
    assert "| Optimizer steps | 7 |" in card


@torch.no_grad()
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd"])
def test_losses_of_the_exported_class_are_ours(tmp_path, objective):
    """The same noise and logits through the exported class's losses and through diffusion/loss.py."""
    config = configuration(objective)
    export_hf(native(tmp_path / "native", config), tmp_path / "hf")
    model = BD3LM.from_pretrained(tmp_path / "hf").eval()
    process = make_process(config.diffusion, 16, VOCAB, VOCAB - 1)
    clean, uniform = torch.randint(0, VOCAB - 1, (3, 16)), torch.rand(3, 16)
    time = torch.rand(3, process.num_blocks) * 0.9 + 0.1
    rate = time.repeat_interleave(process.block_size, dim=1)
    noisy = torch.where(uniform < rate, VOCAB - 1, clean)
    noisy[:, 0] = clean[:, 0]
    rows = given_noise(clean, noisy, time, process, training=False)
    found, logits = model.token_losses(noisy, clean, model._counted(clean, None), rate, rows.sigma_B)
    logits[..., VOCAB - 1] = float("-inf")
    index = rows.is_scored_BL.flatten().nonzero()[:, 0]
    scored = logits.flatten(0, 1)[index]
    target = scored.gather(1, clean.flatten()[index, None])[:, 0]
    head = HeadRows(target, scored.logsumexp(1), index, torch.ones(len(index), dtype=torch.bool))
    expected = torch.zeros(48).index_add_(0, index, token_losses(head, rows, process))
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-4)


# ---- shards --------------------------------------------------------------------------------------------------------


class CountingReader:
    """A reader that knows how many bytes of what it gave out are still alive."""

    def __init__(self, reader):
        self.reader, self.meta, self.alive, self.peak = reader, reader.meta, 0, 0
        self.names, self.shape = reader.names, reader.shape

    def read(self, name, kind="master"):
        tensor = self.reader.read(name, kind)
        size = tensor.untyped_storage().nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor.untyped_storage(), self.release, size)
        return tensor

    def release(self, size):
        self.alive -= size


def test_shards_keep_their_size_and_memory_holds_one(tmp_path):
    reader = native(tmp_path / "native", configuration())
    counting = CountingReader(reader)
    report = export_hf(counting, tmp_path / "hf", max_shard_size="24KB")
    # a shard's tensors, and the one that is being read
    assert counting.peak <= 24_000 + max(4 * math.prod(reader.shape(name)) for name in reader.names())
    whole = export_hf(reader, tmp_path / "whole")
    assert len(report.weight_files) > 3
    assert whole.weight_files == ("model.safetensors",)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "whole" / "model.safetensors")
    shards = {file: load_file(tmp_path / "hf" / file) for file in report.weight_files}
    for name, file in index["weight_map"].items():
        assert torch.equal(shards[file][name], one[name])
    assert set(index["weight_map"]) == set(one)
    assert index["metadata"]["total_size"] == report.size_bytes == whole.size_bytes
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 24_000
    tensors, meta = import_hf(tmp_path / "hf")
    assert open_checkpoint(write_weights(tmp_path / "back", tensors, meta)).verify() == []


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(text) for text in ("5GB", "1.5 MiB", "200kb", 7, "12")] == [5 * 10**9, 1572864, 200_000, 7, 12]
    for text in ("", "GB", "-1GB", "many"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(text)


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_all_wrong_tensors_are_listed_by_name(tmp_path):
    def spoil(tensors):
        del tensors["backbone.blocks.1.norm2.weight"]
        tensors["backbone.extra"] = torch.zeros(3)
        tensors["backbone.blocks.0.attn_out.weight"] = torch.zeros(64, 32)
        return tensors

    folder = tiny_copy(tmp_path / "spoiled")
    rewrite(folder, spoil)
    with pytest.raises(ValueError, match=r"\(3 tensors\)") as error:
        import_hf(folder)
    message = str(error.value)
    assert "missing: backbone.blocks.1.norm2.weight (64,)" in message
    assert "not expected: backbone.extra (3,)" in message
    assert "wrong shape: backbone.blocks.0.attn_out.weight is (64, 32), the configuration asks for (64, 64)" in message


def test_a_wrong_vocabulary_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"vocab_embed.embedding is \(100, 64\), the configuration asks for \(90, 64\)"
    ):
        import_hf(tiny_copy(tmp_path / "other", vocab_size=90))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "another architecture"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bd3lm"}'), "lacks block_size, vocab_size"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "is a pickle, which is not read"),
        (lambda f: os.truncate(f / "model.safetensors", 90_000), "cut off"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cut off"),
    ],
)  # fmt: skip
def test_broken_folders_are_named(tmp_path, spoil, message):
    folder = tiny_copy(tmp_path / "broken")
    for path in folder.iterdir():
        path.chmod(0o644)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        import_hf(folder)


def test_code_in_a_folder_is_never_run(tmp_path):
    folder = tiny_copy(tmp_path / "hostile")
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("configuration_bd3lm.py", "modeling_bd3lm.py"):
        (folder / name).write_text(trap)
    tensors, _ = import_hf(folder)
    assert len(list(tensors)) == 30
    assert not (tmp_path / "ran").exists()


def test_an_existing_destination_is_left_alone(tmp_path):
    reader = native(tmp_path / "native", configuration())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="choose another destination"):
        export_hf(reader, tmp_path / "there")
    assert folder_bytes(tmp_path / "there") == {"precious": b"x"}


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path):
    reader = native(tmp_path / "native", configuration())
    reader.meta["config"]["model"]["num_layers"] = 3
    with pytest.raises(ValueError, match=r"missing: decoder\.layers\.2\.input_layernorm\.weight"):
        export_hf(reader, tmp_path / "hf")
    assert shape_problems({"a": (1,)}, {"a": (1,)}) == []


def test_every_field_of_an_exported_network_is_read_again(tmp_path):
    """A field that is dropped on the way in would build another network."""
    assert set(NETWORK) <= set(FIELD_KINDS)
    odd = {
        "norm": "rmsnorm", "norm_eps": 1e-6, "mlp": "swiglu", "ffn_hidden_size": 48, "n_kv_heads": 2, "head_dim": 12,
        "qk_norm": True, "qkv_bias": True, "mlp_bias": False, "head_bias": False,
        "rope": {"theta": 5e5, "scaling": "linear", "factor": 2.0}, "shift_targets": True,
    }  # fmt: skip
    assert set(odd) == set(NETWORK), "give each new field a value that is not its default"
    config = from_dict(
        {}, ["data.path=unused", "run_dir=unused", "model.norm=rmsnorm", "model.mlp=swiglu", "model.ffn_hidden_size=96"]
    )
    written = config_fields(config, weights_meta(config, 50, 49, "a test"), "fp32", None)
    read = hf_config_of(tmp_path, {**written, **odd, "hidden_dim": 32, "n_heads": 4})
    expected = BD3LMConfig(vocab_size=50, mask_token_id=49, hidden_dim=32, n_heads=4, **odd)
    assert {name: getattr(read, name) for name in odd} == {name: getattr(expected, name) for name in odd}
    assert read.n_kv_heads == 2
    assert read.rope["theta"] == 5e5


def test_overrides_reach_the_configuration(tmp_path):
    _, meta = import_hf(TINY, ["mask_token_id=3", "sampling.length=7", "precision=bf16"])
    assert meta["mask_token_id"] == 3
    assert meta["config"]["sampling"]["length"] == 7
    assert meta["config"]["precision"] == "bf16"
    _, meta = import_hf(TINY)
    assert (meta["mask_token_id"], meta["config"]["precision"]) == (99, "fp32")
