#!/usr/bin/env python3
"""Damaged and hostile files for everything that reads weights or text, by the thousand, each reproducible by its seed.

    python tests/fuzz_files.py [--cases 5000] [--seed 1] [--kinds native lightning hf manifests shards servers]

Every case is one file, folder or server that was right, changed once to three times. It must be accepted, with every
tensor of the model and its shape or every row of the data, or refused with one message: no other exception, nothing
executed, no case longer than MAX_SECONDS or above MAX_BYTES of memory.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from bd3lm_scale.checkpoint.hf.importing import import_hf
from bd3lm_scale.checkpoint.lightning import import_lightning
from bd3lm_scale.checkpoint.manifest import MANIFEST, _digest
from bd3lm_scale.checkpoint.names import table
from bd3lm_scale.checkpoint.reader import open_checkpoint
from bd3lm_scale.checkpoint.write import write_weights
from bd3lm_scale.errors import BadShardError, CheckpointError
from tests.checkpoint.test_conversion_lightning import SIZES, Attack, QuietAttack, checkpoint
from tests.fuzz_data import Manifests, Servers, Shards, change_bytes

MAX_SECONDS = 20.0
MAX_BYTES = 6 << 30
GOLDEN = Path(__file__).parent / "goldens" / "hf_tiny"


def odd_values(draw: random.Random) -> Any:
    """Something that a field is not prepared for."""
    deep: Any = []
    for _ in range(draw.choice([3, 60, 2000])):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    wide = [0] * 10
    for _ in range(30):
        wide = [wide] * 40
    return draw.choice([
        None, True, -1, 0, 1, 3, 10**9, 10**30, -(10**400), 0.5, float("nan"), float("inf"), 1e308, "", "abc", "1e999",
        "../../etc/passwd", "\x00", "${block_size}", "${a.b}", [], [1], {}, {"a": 1}, deep, wide, "x" * 100_000,
    ])  # fmt: skip


def for_json(draw: random.Random) -> Any:
    """An odd value that a JSON file can hold."""
    while True:
        value = odd_values(draw)
        if isinstance(value, list) and len(value) == 40:
            continue  # shared lists are a pickle's
        return value


def as_json(value: Any) -> str:
    """JSON text; endless brackets where the value is nested too deep to be written."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 100_000


def change_tree(tree: Any, draw: random.Random, value: Callable[[random.Random], Any]) -> None:
    """Replace, remove or add one entry somewhere in nested dictionaries and lists."""
    while isinstance(tree, dict | list) and tree:
        key = draw.choice(list(tree)) if isinstance(tree, dict) else draw.randrange(len(tree))
        inner = tree[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            tree = inner
            continue
        how = draw.randrange(4)
        if how == 0:
            del tree[key]
        elif how == 1 and isinstance(tree, dict):
            tree[draw.choice(["extra", "num_labels", "attribute_map", "auto_map"])] = value(draw)
        else:
            tree[key] = value(draw)
        return


def odd_tensor(tensor: torch.Tensor, draw: random.Random) -> Any:
    """A tensor that is not what a checkpoint holds."""
    if tensor.numel() > 10**6 or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return tensor  # made odd before
    return draw.choice([
        lambda: tensor.expand(10**6, *tensor.shape),
        lambda: torch.zeros(1).expand(1 << 40),
        lambda: tensor.to(torch.int64),
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.reshape(-1)[:0],
        lambda: tensor.reshape(-1),
        lambda: tensor[None],
        lambda: tensor.double(),
        lambda: torch.full_like(tensor, float("nan")),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: odd_values(draw),
    ])()  # fmt: skip


class Lightning:
    """The reference implementation's checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.path, self.trap = folder / "a.ckpt", folder / "trap"
        self.content = checkpoint()

    def make(self, draw: random.Random) -> Callable[[], int]:
        content = copy.deepcopy(self.content)
        for _ in range(draw.randint(1, 3)):
            how = draw.randrange(4)
            if how == 0:
                state = content.get("state_dict")
                if isinstance(state, dict) and state:
                    key = draw.choice(list(state))
                    if isinstance(state[key], torch.Tensor) and state[key].layout == torch.strided:
                        state[key] = odd_tensor(state[key], draw)
            elif how == 1 and isinstance(content.get("ema"), dict):
                change_tree(content["ema"], draw, odd_values)
            elif how == 2 and draw.random() < 0.2:
                content[draw.choice(["global_step", "state_dict", "ema"])] = odd_values(draw)
            elif how == 2:
                content["hyper_parameters"] = {"config": {"model": {"length": 16}, "block_size": 4}}
                change_tree(content, draw, odd_values)
            else:
                attack = draw.choice([Attack, QuietAttack])
                content[draw.choice(["hostile", "ema", "hyper_parameters"])] = attack(f"touch {self.trap}")
        self.path.unlink(missing_ok=True)
        try:
            torch.save(content, self.path)
        except (RuntimeError, RecursionError, NotImplementedError, TypeError, OverflowError):
            torch.save(self.content, self.path)  # what cannot be written cannot be read
        if draw.random() < 0.4:
            change_bytes(self.path, draw)
        elif draw.random() < 0.05:
            compress(self.path)
        return self.read

    def read(self) -> int:
        tensors, _ = import_lightning(self.path)
        return sum(1 for _, kind, tensor in tensors if kind == "master" and tensor.dtype == torch.float32)

    def expected(self) -> int:
        return len(table(SIZES))


def compress(path: Path) -> None:
    """The same archive with deflated members: a few bytes can become gigabytes."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data + b"\0" * 10**7)


class HuggingFace:
    """Folders with config.json and safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trap = folder / "hf", folder / "trap"
        self.count = self._count()

    def _count(self) -> int:
        return sum(1 for _ in import_hf(GOLDEN)[0])

    def make(self, draw: random.Random) -> Callable[[], int]:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(GOLDEN, self.folder)
        weights, config = self.folder / "model.safetensors", self.folder / "config.json"
        fields = json.loads(config.read_text())
        code = f"open({str(self.trap)!r}, 'w')\n"
        (self.folder / "configuration_bd3lm.py").write_text(code)
        (self.folder / "modeling_bd3lm.py").write_text(code)
        for _ in range(draw.randint(1, 3)):
            how = draw.randrange(7)
            if how == 0:
                change_bytes(weights, draw)
            elif how == 1:
                change_bytes(config, draw)
                return self.read
            elif how == 2:
                name = draw.choice(["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.safetensors", "x"])
                index = {"weight_map": {"backbone.vocab_embed.embedding": name, "b": draw.choice([name, 3, None, []])}}
                change_tree(index, draw, for_json)
                (self.folder / "model.safetensors.index.json").write_text(as_json(index))
            elif how == 3:
                giant_header(weights, draw)
            elif how == 4 and weights.is_file():
                weights.unlink()
                draw.choice([weights.mkdir, lambda: weights.symlink_to("/dev/zero"), lambda: os.mkfifo(weights)])()
                break
            elif how == 5:
                fields[draw.choice(["n_blocks", "hidden_dim", "vocab_size", "n_heads", "num_labels"])] = 10**9
            else:
                change_tree(fields, draw, for_json)
        config.write_text(as_json(fields))
        return self.read

    def read(self) -> int:
        return sum(1 for _, _, tensor in import_hf(self.folder)[0] if tensor.dtype == torch.float32)

    def expected(self) -> int:
        return self.count


def giant_header(path: Path, draw: random.Random) -> None:
    """A safetensors file whose header claims what the file does not have."""
    if draw.random() < 0.3:
        path.write_bytes(struct.pack("<Q", draw.choice([0, 1, 1 << 30, (1 << 63) - 1, (1 << 64) - 1])) + b"{}")
        return
    save_file({"backbone.vocab_embed.embedding": torch.zeros(4, 4)}, path)
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change_tree(header, draw, for_json)
    text = as_json(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


class Native:
    """Our own checkpoints: every byte is covered by a checksum, which an attacker can compute as well."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trap, self.good = folder / "step_00000001", folder / "trap", folder / "good"
        generator = torch.Generator().manual_seed(0)
        tensors = [(f"layer.{i}.weight", "master", torch.randn(6, 4, generator=generator)) for i in range(5)]
        write_weights(self.good, tensors, {"step": 1, "config": {}})
        self.tensors = {name: tensor for name, _, tensor in tensors}

    def make(self, draw: random.Random) -> Callable[[], int]:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder)
        manifest, data = self.folder / MANIFEST, next(self.folder.glob("*.safetensors"))
        for _ in range(draw.randint(1, 2)):
            how = draw.randrange(4)
            if how == 0 and data.is_file():
                change_bytes(data, draw)
            elif how == 1:
                change_bytes(manifest, draw)
                break
            elif how == 2:
                data.unlink(missing_ok=True)
                draw.choice([data.mkdir, lambda: data.symlink_to("/dev/zero"), lambda: data.symlink_to(manifest)])()
                break
            else:
                content = json.loads(manifest.read_text())
                change_tree(content, draw, for_json)
                if draw.random() < 0.3 and isinstance(content.get("files"), dict):
                    content["files"] = {
                        draw.choice(["../x.safetensors", "/etc/passwd", ""]): v for v in content["files"].values()
                    }
                content.pop("sha256", None)
                try:
                    content["sha256"] = _digest(content)
                    manifest.write_text(json.dumps(content))
                except (RecursionError, ValueError):
                    manifest.write_text("[" * 100_000)
                break
        return self.read

    def read(self) -> int:
        reader = open_checkpoint(self.folder)
        if problems := reader.verify():
            raise CheckpointError("; ".join(problems))
        return sum(1 for name in reader.names() if reader.read(name).dtype == torch.float32)

    def expected(self) -> int:
        return len(self.tensors)


KINDS = {
    "native": Native,
    "lightning": Lightning,
    "hf": HuggingFace,
    "manifests": Manifests,
    "shards": Shards,
    "servers": Servers,
}


def fuzz(kind: str, seed: int, cases: int, folder: Path) -> Counter:
    """Outcomes of so many cases; AssertionError names the seed of the first that went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    subject, outcomes = KINDS[kind](folder), Counter()
    for number in range(cases):
        name = f"{kind} {seed}/{number}"
        read = subject.make(random.Random(name))
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            count = read()
        except (ValueError, CheckpointError, BadShardError) as error:
            outcomes["refused" if str(error).strip() else "refused without a reason"] += 1
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {str(error)[:500]}") from error
        else:
            if kind != "native":
                assert count == subject.expected(), f"{name}: {count} instead of {subject.expected()}"
            outcomes["accepted"] += 1
        used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert not subject.trap.exists(), f"{name}: code in the file was executed"
        assert time.monotonic() - started < MAX_SECONDS, f"{name}: took {time.monotonic() - started:.0f} s"
        assert used < MAX_BYTES, f"{name}: took {used / 1e9:.1f} GB"
    assert "refused without a reason" not in outcomes
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds:
            started = time.monotonic()
            outcomes = fuzz(kind, args.seed, -(-args.cases // len(args.kinds)), Path(folder) / kind)
            print(f"{kind:10s} {dict(outcomes)} in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
