"""Corpora to prepare, what preparation made of them, and preparation that is killed again and again."""

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import webdataset
import zstandard

from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.tokenizing import Preparation

TOOLS = Path(__file__).parents[2] / "tools"
DOCUMENTS = [f"def f{i}(x):\n    return x * {i}\n" * (1 + i % 7) for i in range(60)] + ["", "  last\n\n one "]


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_jsonl(path: Path, documents=DOCUMENTS) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


def write_all_formats(folder: Path) -> dict[str, list[str]]:
    """The same documents in every format, each as arguments of the tool."""
    plain = write_jsonl(folder / "a.jsonl").read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(plain[:2000]) + gzip.compress(plain[2000:]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(plain[:2000]) + zstandard.compress(plain[2000:]))
    table = pa.table({"id": range(len(DOCUMENTS)), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=10)
    saved = folder / "saved"
    saved.mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 25), table.slice(25)), strict=True):
        with pa.OSFile(str(saved / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (saved / "dataset_info.json").write_text("{}")
    texts = folder / "texts"
    texts.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (texts / f"{i:03d}.txt").write_bytes(text.encode())
    with webdataset.TarWriter(str(folder / "e.tar")) as sink:
        for i, text in enumerate(DOCUMENTS):
            sink.write({"__key__": f"{i:04d}", "txt": text, "json": {"text": "not this"}})
    with webdataset.TarWriter(str(folder / "f.tar.gz")) as sink:
        for i, text in enumerate(DOCUMENTS):
            sink.write({"__key__": f"x/{i:04d}", "json": {"text": text}, "cls": i})
    inputs = {p.name: [str(p)] for p in sorted(folder.iterdir())}
    return inputs | {"pipe": [f"pipe:cat {folder}/e.tar"]}


def tokens_of(output: Path, split: str) -> np.ndarray:
    """All tokens of a split, as plain webdataset reads them."""
    shards = sorted(str(p) for p in (output / split).glob("*.tar"))
    return np.concatenate([s["tokens.npy"] for s in webdataset.WebDataset(shards, shardshuffle=False).decode()])


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


class Killed(BaseException):
    """What ends a preparation in the middle; nothing in it expects this."""


def prepare_through_kills(
    task: Preparation,
    tokenizer: str,
    output: Path,
    units: int,
    after: Callable[[], object] = lambda: None,
    most: int = 100,
) -> int:
    """Prepare, killed at every `units`-th unit of a life; `after` is called after each kill. How many kills it took."""
    kills = 0
    while True:
        seen = 0

        def report(unit, tokens):
            nonlocal seen
            seen += 1
            if seen == units:
                raise Killed

        try:
            prepare(task, tokenizer, output, 0, report)
            return kills
        except Killed:
            kills += 1
            after()
            assert kills < most, "no progress is made between kills"
