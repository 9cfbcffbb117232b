"""Text shards written by plain webdataset, tokenized on the fly."""

from pathlib import Path

import numpy as np
import pytest
import webdataset

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.values import Cursor
from tests.data.misbehaving_server import MisbehavingServer

LENGTH = 16
SHARDS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"text-{shard:04d}.tar")) as sink:
            for i in range(60):
                sink.write({"__key__": f"{i:04d}", "txt": f"def f_{shard}_{i}(x): return x * {i}\n"})
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))


def config(path, tokenizer_path, **changes) -> DataConfig:
    settings = {"path": str(path), "tokenizer": str(tokenizer_path), "context_length": LENGTH, "stream_text": True}
    return DataConfig(**settings | changes)


def read(settings, dp: int, workers: int, steps: int, cursor=Cursor()) -> np.ndarray:  # noqa: B008
    out = np.zeros((steps, 4, LENGTH), np.int64)
    for rank in range(dp):
        plan = BatchPlan(4, 1, rank, dp)
        with BatchReader(open_stream(settings, 1), plan, cursor, workers, 2) as reader:
            for step in range(steps):
                for rows in next(reader):
                    out[step, rows.position_B.numpy()] = rows.tokens_BL.numpy()
    return out


def test_rows_are_the_texts_with_eos_between_and_endless(folder, tokenizer_path):
    stream = open_stream(config(folder, tokenizer_path), 1)
    tokenizer = load_tokenizer(tokenizer_path)
    assert [p.name for p in Path(stream.tokenizer_path).iterdir()] == ["tokenizer.model"], "a folder to copy"
    assert (stream.vocab_size, stream.mask_token_id) == (tokenizer.vocab_size, tokenizer.mask_token_id)
    tokens = stream.read(np.arange(2000)).reshape(-1)
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_token_id) + 1)[1:-1]
    texts = [tokenizer.decode(document) for document in documents]
    first_pass = texts[: SHARDS * 60]
    assert all(text.startswith("def f_") and text.endswith("\n") for text in texts)
    assert len(set(texts)) < len(texts), "more than one pass"
    assert len({text.split("_")[1] for text in first_pass}) == SHARDS


def test_ranks_workers_and_sources_agree(folder, tokenizer_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    settings = config(folder, tokenizer_path)
    expected = read(settings, 1, 0, 6)
    assert (read(settings, 2, 0, 6) == expected).all()
    assert (read(settings, 2, 2, 6) == expected).all()
    pipes = config(f"pipe:cat {folder}/text-{{0000..000{SHARDS - 1}}}.tar", tokenizer_path)
    assert (read(pipes, 1, 0, 6) == expected).all()
    server = MisbehavingServer(folder)
    urls = config(f"{server.url}/text-{{0000..000{SHARDS - 1}}}.tar", tokenizer_path)
    assert (read(urls, 1, 0, 6) == expected).all()
    server.close()


def test_seek_starts_other_text_without_replay_alike_on_all_ranks(folder, tokenizer_path):
    settings = config(folder, tokenizer_path)
    far = read(settings, 1, 0, 3, Cursor(step=10**9))
    assert (read(settings, 2, 1, 3, Cursor(step=10**9)) == far).all()
    assert not (far == read(settings, 1, 0, 3)).all()


def test_held_out_documents_are_not_trained_on(folder, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    validation = open_stream(config(folder, tokenizer_path, context_length=4), 1, "validation")
    assert 1 <= validation.num_rows <= 64
    held_out = tokenizer.decode(validation.read(np.arange(validation.num_rows)).reshape(-1)).split("\n")[0]
    assert held_out.startswith("def f_")
    train = tokenizer.decode(open_stream(config(folder, tokenizer_path), 1).read(np.arange(2000)).reshape(-1))
    assert held_out + "\n" not in train


def test_damaged_text_shard_is_passed_over(folder, tokenizer_path, tmp_path, caplog):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "text-0002.tar").write_bytes(b"noise" * 500)
    tokens = open_stream(config(tmp_path, tokenizer_path), 1).read(np.arange(1000)).reshape(-1)
    text = load_tokenizer(tokenizer_path).decode(tokens)
    assert "f_3_" in text
    assert "f_2_" not in text
    assert "text-0002.tar" in caplog.text


def test_wrapped_rows(folder, tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    rows = open_stream(config(folder, tokenizer_path, wrap_rows=True), 1).read(np.arange(5))
    assert rows.shape == (5, LENGTH)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert (rows[:, -1] == tokenizer.eos_token_id).all()


def test_what_is_missing_is_said(folder, tokenizer_path, tmp_path):
    with pytest.raises(ValueError, match=r"needs data\.path .* and data\.tokenizer"):
        open_stream(config(folder, tokenizer_path, tokenizer=None), 1)
    with pytest.raises(ValueError, match="does not exist"):
        open_stream(config(tmp_path / "nowhere", tokenizer_path), 1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no text in 1 shards"):
        open_stream(config(tmp_path / "empty.txt", tokenizer_path), 1).read(np.arange(1))
