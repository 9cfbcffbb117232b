"""A resumed run has the data it began with, wherever that lies; a damaged validation shard is treated as any other."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from bd3lm_scale.config.load import load_config, to_dict
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.errors import ConfigError
from bd3lm_scale.train import main
from bd3lm_scale.training.checks import refuse_differences
from tests.data.sets import write_set

ROOT = Path(__file__).parents[2]
SMALL = [
    "train.steps=3", "train.global_batch_size=2", "train.micro_batch_size=2", "data.context_length=8", "data.workers=0",
    "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "diffusion.block_size=4", "data.retries=0",
    "evaluation.every_steps=2", "evaluation.rows=20", "checkpoint.every_steps=100", "runtime.device=cpu",
]  # fmt: skip


def offset_set(folder: Path, tokenizer_path: Path, lengths: list[int], offset: int = 5) -> Path:
    write_set(folder, tokenizer_path, lengths, offset)
    return folder


def test_the_same_shards_elsewhere_are_the_same_data_and_others_are_not(tmp_path, tokenizer_path):
    first = offset_set(tmp_path / "first", tokenizer_path, [64, 40])
    shutil.copytree(first, tmp_path / "moved")
    offset_set(tmp_path / "other", tokenizer_path, [64, 40], offset=6)
    offset_set(tmp_path / "cut_otherwise", tokenizer_path, [40, 64])

    def opened(name: str):
        config = load_config(ROOT / "configs" / "demo.yaml", ["data.context_length=8", f"data.path={tmp_path / name}"])
        return config, open_stream(config.data, config.seed)

    config, stream = opened("first")
    meta = {"config": to_dict(config), "tokenizer_hash": stream.tokenizer_hash, "data_hash": stream.data_hash}
    reader = SimpleNamespace(meta=meta, path=Path("step_00000002"))
    refuse_differences(reader, *opened("first"), fresh=False)
    refuse_differences(reader, *opened("moved"), fresh=False)
    for name in ("other", "cut_otherwise"):
        with pytest.raises(ConfigError, match=rf"data\.path \(.*{name}\): its shards are not those step_00000002"):
            refuse_differences(reader, *opened(name), fresh=False)
        earlier = SimpleNamespace(meta={k: v for k, v in meta.items() if k != "data_hash"}, path=reader.path)
        refuse_differences(earlier, *opened(name), fresh=False)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_damaged_validation_shard_is_treated_as_a_training_shard(
    tmp_path, tokenizer_path, monkeypatch, policy, capfd
):
    folder = offset_set(tmp_path / "set", tokenizer_path, [64, 120, 64])
    (folder / "validation" / "validation-000000.tar").write_bytes(b"short")
    run = tmp_path / "run"
    code = main(
        [
            str(ROOT / "configs" / "demo.yaml"),
            *SMALL,
            f"data.path={folder}",
            f"run_dir={run}",
            f"data.on_bad_shard={policy}",
        ]
    )
    log = (run / "log.txt").read_text()
    assert "Traceback" not in log
    assert len(re.findall(r"validation-000000\.tar", log)) >= 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "validation"]
    if policy == "stop":
        assert code == 86
        assert not validations
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"], "what was done is saved"
    else:
        assert code == 0
        assert log.count("leaving out damaged shards of the validation split") == 1
        assert [v["step"] for v in validations] == [2, 3]
        assert all(v["nelbo"] > 0 for v in validations)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_no_sound_shard_left_is_one_error(tmp_path, tokenizer_path, split):
    folder = offset_set(tmp_path / "set", tokenizer_path, [64, 120])
    for shard in folder.glob(f"{split}/*.tar"):
        shard.unlink()
    run = tmp_path / "run"
    code = main(
        [str(ROOT / "configs" / "demo.yaml"), *SMALL, f"data.path={folder}", f"run_dir={run}", "data.on_bad_shard=skip"]
    )
    log = (run / "log.txt").read_text()
    assert code == 86
    assert f"every shard is damaged or missing ({split}-000000.tar, {split}-000001.tar)" in log
    assert "restore them from their source" in log
    assert "Traceback" not in log
