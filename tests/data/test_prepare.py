"""Preparation: every input format, the same bytes for any number of workers and after any kill, nothing lost."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import webdataset
import zstandard

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data import tokenizing as tokenizing
from bd3lm_scale.data.documents import Options, count_documents, find_inputs, read_records, record_text
from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.tokenizing import Preparation
from tests.data.preparing import (
    DOCUMENTS,
    TOOLS,
    Killed,
    contents,
    load_tool,
    prepare_through_kills,
    tokens_of,
    write_all_formats,
    write_jsonl,
)


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(tokenizing, "_UNIT_BYTES", 500)


FORMATS = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "saved", "texts", "e.tar", "f.tar.gz", "pipe"]


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    found = write_all_formats(tmp_path_factory.mktemp("corpus"))
    assert sorted(found) == sorted(FORMATS)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(formats, name):
    files = find_inputs(formats[name], Options())
    texts = [record_text(r, Options(), f) for f in files for r in read_records(f, Options())]
    assert texts == DOCUMENTS
    assert sum(count_documents(f, Options()) for f in files) == len(DOCUMENTS)


def test_inputs_by_braces_and_globs(formats):
    folder = Path(formats["a.jsonl"][0]).parent
    assert find_inputs([f"{folder}/texts/{{003..005}}.txt"], Options()) == [
        f"{folder}/texts/{i:03d}.txt" for i in (3, 4, 5)
    ]
    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "texts"), "/corpus", recursive=True)
    found = find_inputs(["memory://corpus/00*.txt"], Options())
    assert len(found) == 10
    assert [r.data.decode() for f in found for r in read_records(f, Options())] == DOCUMENTS[:10]
    with pytest.raises(ValueError, match="unknown kind"):
        find_inputs(["http://127.0.0.1/corpus"], Options())


def test_format_is_what_the_option_says(tmp_path):
    (tmp_path / "news.en-00001-of-00100").write_text("one\ntwo\n")
    options = Options(document="line", format="txt")
    files = find_inputs([str(tmp_path)], options)
    assert [r.data for f in files for r in read_records(f, options)] == [b"one", b"two"]
    with pytest.raises(ValueError, match="no file inside"):
        find_inputs([str(tmp_path)], Options())


def test_shards_hold_the_documents_with_eos_between(tmp_path, tokenizer_path):
    task = Preparation((str(write_jsonl(tmp_path / "a.jsonl")),), shard_tokens=700, chunk_tokens=64)
    manifests = prepare(task, str(tokenizer_path), tmp_path / "out", 0)
    tokenizer = load_tokenizer(tokenizer_path)
    eos = tokenizer.eos_token_id
    expected = [i for text in DOCUMENTS if text for i in (*tokenizer.encode(text), eos)]
    assert tokens_of(tmp_path / "out", "train").tolist() == expected
    manifest = manifests["train"]
    assert [s.num_tokens for s in manifest.shards[:-1]] == [700] * (len(manifest.shards) - 1)
    assert len(manifest.shards) > 2
    assert manifest.num_tokens == len(expected)
    assert manifest.num_documents == len(DOCUMENTS) - 1
    assert manifest.num_text_bytes == sum(map(len, DOCUMENTS))
    assert list(manifests) == ["train"], "no document was held out"
    # document starts: the token after each EOS
    starts, position = [], 0
    for shard in manifest.shards:
        path = str(tmp_path / "out" / "train" / shard.name)
        for sample in webdataset.WebDataset(path, shardshuffle=False).decode():
            starts += (position + sample["documents.npy"].astype(int)).tolist()
            position += len(sample["tokens.npy"])
    ends = np.flatnonzero(np.array(expected) == eos) + 1
    assert starts == [0, *ends[:-1].tolist()]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 40)  # three units of 1000 records
    results = []
    for workers in (0, 1, 3):
        task = Preparation((str(corpus),), validation_fraction=0.2, shard_tokens=9000, chunk_tokens=512)
        prepare(task, str(tokenizer_path), tmp_path / str(workers), workers)
        results.append(contents(tmp_path / str(workers)))
    assert results[0] == results[1] == results[2]
    assert {name.split("/")[0] for name in results[0]} == {"train", "validation", "tokenizer"}


@pytest.mark.parametrize("rule", ["fraction", "last", "inputs"])
def test_interrupted_preparation_goes_on_to_the_same_bytes(tmp_path, tokenizer_path, small_units, rule):
    corpus = str(write_jsonl(tmp_path / "a.jsonl"))
    (tmp_path / "long.txt").write_text("one long line of text after another\n" * 200)
    split = {
        "fraction": {"validation_fraction": 0.3},
        "last": {"validation_documents": 20},
        "inputs": {"validation_inputs": (corpus,)},
    }[rule]
    task = Preparation((corpus, str(tmp_path / "long.txt")), shard_tokens=400, chunk_tokens=64, **split)
    whole = prepare(task, str(tokenizer_path), tmp_path / "whole", 0)
    assert min(len(m.shards) for m in whole.values()) > 2
    kills = prepare_through_kills(
        task,
        str(tokenizer_path),
        tmp_path / "out",
        units=4,
        after=lambda: append(tmp_path / "out" / "progress.jsonl", '{"split": "tr'),  # a line was being written
    )
    assert kills > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_process_with_workers_goes_on_to_the_same_bytes(tmp_path, tokenizer_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 120)
    options = [str(corpus), "--tokenizer", str(tokenizer_path), "--shard-tokens", "20000", "--workers", "2"]
    command = [sys.executable, str(TOOLS / "prepare_data.py"), *options, "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "out")], start_new_session=True)
    while not list((tmp_path / "out").glob("train/*.tar")):
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / "progress.jsonl").exists(), "it was not killed in the middle"
    for output in ("out", "whole"):
        subprocess.run([*command, str(tmp_path / output)], check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_last_documents_and_hashed_documents_are_held_out(tmp_path, tokenizer_path, small_units):
    corpus = (str(write_jsonl(tmp_path / "a.jsonl")),)
    tokenizer = load_tokenizer(tokenizer_path)
    prepare(Preparation(corpus, validation_documents=5), str(tokenizer_path), tmp_path / "last", 0)
    last = "".join(tokenizer.decode(tokens_of(tmp_path / "last", "validation")))
    assert last == "".join(DOCUMENTS[-5:])
    made = prepare(Preparation(corpus, validation_fraction=0.3), str(tokenizer_path), tmp_path / "hash", 0)
    assert 8 < made["validation"].num_documents < 30
    assert made["train"].num_documents + made["validation"].num_documents == len(DOCUMENTS) - 1
    held_out = tokenizer.decode(tokens_of(tmp_path / "hash", "validation"))
    # the choice is the document's own: it stays when others come or go
    fewer = (str(write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[10:30])),)
    prepare(Preparation(fewer, validation_fraction=0.3), str(tokenizer_path), tmp_path / "fewer", 0)
    assert tokenizer.decode(tokens_of(tmp_path / "fewer", "validation")) in held_out


def test_long_file_is_one_document_in_pieces(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr("bd3lm_scale.data.documents._PIECE_BYTES", 100)
    text = "a line of some text\n" * 50 + "no newline at the end"
    (tmp_path / "long.txt").write_text(text)
    records = list(read_records(str(tmp_path / "long.txt"), Options()))
    assert len(records) > 5
    assert [r.starts_document for r in records] == [True] + [False] * (len(records) - 1)
    made = prepare(Preparation((str(tmp_path / "long.txt"),)), str(tokenizer_path), tmp_path / "out", 0)
    tokens = tokens_of(tmp_path / "out", "train")
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.decode(tokens) == text
    assert (tokens == tokenizer.eos_token_id).sum() == made["train"].num_documents == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(document="line"), ["a", "b", "", "c"]),
        (Options(document="line", keep_newlines=True), ["a\n", "b\n", "\n", "c"]),
        (Options(document="paragraph"), ["a\nb\n", "c"]),
        (Options(), ["a\nb\n\nc"]),
    ],
)
def test_what_a_document_is_in_text_files(tmp_path, options, expected):
    (tmp_path / "a.txt").write_text("a\nb\n\nc")
    assert [r.data.decode() for r in read_records(str(tmp_path / "a.txt"), options)] == expected


def test_finished_preparation_is_reused_and_another_is_refused(tmp_path, tokenizer_path, capsys):
    tool = load_tool("prepare_data")
    corpus = str(write_jsonl(tmp_path / "a.jsonl"))
    command = [corpus, "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out"), "--workers", "0"]
    assert tool.main(command) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")}
    assert tool.main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")} == before
    assert "train: 61 documents" in capsys.readouterr().out
    assert tool.main([*command, "--validation-documents", "3"]) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")} == before


def test_changed_input_is_refused_by_name_before_and_after_the_end(tmp_path, tokenizer_path, small_units):
    """Equal name and size are not enough to be the same text."""
    first, second = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "b.txt"
    second.write_text("one line\n" * 100)
    task = Preparation((str(first), str(second)), shard_tokens=400, chunk_tokens=64)
    prepare(task, str(tokenizer_path), tmp_path / "whole", 0)
    whole = contents(tmp_path / "whole")

    def stop(unit, tokens):
        if tokens > 900:
            raise Killed

    def write(path: Path, content: bytes, times: int) -> None:
        path.write_bytes(content)
        os.utime(path, ns=(times, times))

    original, times = first.read_bytes(), first.stat().st_mtime_ns
    for changed, when, reason in (
        (original.replace(b"return", b"return".upper(), 1), times, "other content"),
        (original, times + 1, "changed later"),
        (original + b"\n", times, "other content"),
    ):
        with pytest.raises(Killed):
            prepare(task, str(tokenizer_path), tmp_path / "half", 0, stop)
        write(first, changed, when)
        for output in ("half", "whole"):
            with pytest.raises(ValueError, match=rf"other inputs.*: a\.jsonl \({reason}\); choose another --output"):
                prepare(task, str(tokenizer_path), tmp_path / output, 0)
        write(first, original, times)
        assert prepare(task, str(tokenizer_path), tmp_path / "whole", 0)
        prepare(task, str(tokenizer_path), tmp_path / "half", 0)
        assert contents(tmp_path / "half") == contents(tmp_path / "whole") == whole
        shutil.rmtree(tmp_path / "half")

    def change(unit, tokens):
        second.write_text("two line\n" * 100)

    with pytest.raises(ValueError, match=r"b\.txt \((other content|changed later)\)"):
        prepare(task, str(tokenizer_path), tmp_path / "meanwhile", 0, change)
    assert not list((tmp_path / "meanwhile").rglob("manifest.json"))
    (tmp_path / "c").mkdir()
    fewer = Preparation((str(first),), shard_tokens=400, chunk_tokens=64)
    with pytest.raises(ValueError, match="1 files instead of 2"):
        prepare(fewer, str(tokenizer_path), tmp_path / "whole", 0)


def write_bad_corpus(folder: Path) -> list[str]:
    """Five documents among all sorts of bad records."""
    lines = [b'{"text": "one"}', b'{"text": null}', b'{"txt": "x"}', b"", b'{"text": 5}', b'{"text": "\xff"}', b"[]"]
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "two"}', b"{"]) + b"\n")
    (folder / "b.txt").write_bytes(b"not UTF-8 \xff" + b"long " * 100)
    (folder / "c.txt").write_text("wide", encoding="utf-16")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n' + os.urandom(9000).hex().encode())[:-5000])
    pyarrow.parquet.write_table(pa.table({"text": ["four", None, ""]}), folder / "e.parquet")
    with webdataset.TarWriter(str(folder / "f.tar")) as sink:
        sink.write({"__key__": "x", "txt": b"five"})
        sink.write({"__key__": "y", "jpg": b"five", "txt": b"\xff"})
    (folder / "README.md").write_text("no data")
    return sorted(str(p) for p in folder.iterdir())


def test_bad_records_stop_or_are_left_out_counted_and_listed(
    tmp_path, tokenizer_path, capsys, monkeypatch, small_units
):
    monkeypatch.setattr("bd3lm_scale.data.documents._PIECE_BYTES", 64)
    (tmp_path / "corpus").mkdir()
    files = write_bad_corpus(tmp_path / "corpus")
    tool = load_tool("prepare_data")

    def command(what: str, output: str) -> list[str]:
        options = ["--output", str(tmp_path / output), "--tokenizer", str(tokenizer_path), "--validation-fraction", "0"]
        return [what, *options, "--workers", "0", "--shard-tokens", "4", "--chunk-tokens", "4"]

    places = {
        "a.jsonl": "record 2: field 'text' is null; it is line 2",
        "b.txt": "record 1: byte 0xff in line 1 is not UTF-8",
        "c.txt": "record 1: text in UTF-16",
        "d.jsonl.gz": "damaged or cut off",
        "e.parquet": "record 2: column 'text' is null; it is row 2",
        "f.tar": "record 2: byte 0xff in line 1 is not UTF-8 (invalid start byte); it is member y.txt",
    }
    for file in files:
        name = Path(file).name
        if name in places:
            assert tool.main(command(file, f"stop_{name}")) == 1
            error = capsys.readouterr().err
            assert places[name] in error
            assert name in error
            assert error.count("\n") == 1
    skip = [*command(str(tmp_path / "corpus"), "out"), "--on-bad-record", "skip"]
    assert tool.main(skip) == 0
    printed = capsys.readouterr().out
    tokens = tokens_of(tmp_path / "out", "train")
    tokenizer = load_tokenizer(tokenizer_path)
    documents = tokenizer.decode(tokens, keep_special=True).split("</s>")
    assert documents == ["one", "two", "three", "four", "five", ""]
    read = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["preparation"]["read"]
    assert read == {
        "files": {".jsonl": 2, ".parquet": 1, ".tar": 1, ".txt": 2},
        "documents": 6,
        "empty_documents": 1,
        "bad_records": {
            "UTF-16": 1, "damaged file": 1, "no such field": 1, "not UTF-8": 3, "not a JSON object": 2, "not text": 1,
            "null": 2,
        },
        "ignored": {".jpg members of archives": 1, ".md files": 1},
    }  # fmt: skip
    assert "ignored: 1 .jpg members of archives, 1 .md files" in printed
    assert "3 not UTF-8" in printed
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_records.jsonl").read_text().split("\n")[:-1]]
    assert len(listed) == sum(read["bad_records"].values())
    assert [(Path(b["file"]).name, b["record"], b["where"]) for b in listed][:3] == [
        ("a.jsonl", 2, "line 2"), ("a.jsonl", 3, "line 3"), ("a.jsonl", 4, "line 5"),
    ]  # fmt: skip
    assert tool.main(skip) == 0, "finished: nothing to do, and the same is said again"
    assert "3 not UTF-8" in capsys.readouterr().out
    check_that_kills_change_nothing(tmp_path, tokenizer_path, files)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def check_that_kills_change_nothing(folder: Path, tokenizer_path, files: list[str]) -> None:
    inputs = tuple(find_inputs([str(folder / "corpus")]))
    task = Preparation(inputs, on_bad_record="skip", shard_tokens=4, chunk_tokens=4, ignored=((".md files", 1),))
    kills = prepare_through_kills(
        task,
        str(tokenizer_path),
        folder / "killed",
        units=3,
        after=lambda: append(folder / "killed" / "bad_records.jsonl", '{"torn": '),
        most=30,
    )
    assert kills
    assert contents(folder / "killed") == contents(folder / "out")


def test_dry_run_estimates_and_writes_nothing(tmp_path, tokenizer_path, capsys):
    corpus = str(write_jsonl(tmp_path / "a.jsonl"))
    assert load_tool("prepare_data").main([corpus, "--tokenizer", str(tokenizer_path), "--dry-run"]) == 0
    figures = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    tokenizer = load_tokenizer(tokenizer_path)
    assert figures["documents"] == "62"
    assert int(figures["tokens"].replace(",", "")) == sum(len(tokenizer.encode(t)) + bool(t) for t in DOCUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_evaluation_set_alone(tmp_path, tokenizer_path):
    (tmp_path / "wiki.txt").write_text(' = Title = \n He said : " 2 @,@ 000 " . \n')
    command = [str(tmp_path / "wiki.txt"), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    options = ["--document", "line", "--detokenizer", "wikitext", "--validation-only", "--no-eos", "--workers", "0"]
    assert load_tool("prepare_data").main([*command, *options]) == 0
    tokens = tokens_of(tmp_path / "out", "validation")
    assert load_tokenizer(tokenizer_path).decode(tokens, keep_special=True) == ' = Title =  He said: "2,000". '
    assert not (tmp_path / "out" / "train").exists()
    assert open_stream(DataConfig(path=str(tmp_path / "out"), context_length=8), 1, "validation").num_rows > 1


BAD_INPUTS = {
    "malformed.jsonl": (b'{"text": "a"}\n{"text": \n', r"malformed\.jsonl, record 2: not a JSON object"),
    "field.jsonl": (b'{"content": "a"}\n', r"field\.jsonl, record 1: no field 'text'; .*--field"),
    "number.jsonl": (b'{"text": 5}\n', r"record 1: field 'text' is not text but int"),
    "empty.txt": (b"", "no text: the 1 input files"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "abc"}\n' * 500)[:-10], r"cut\.jsonl\.gz: damaged or cut off"),
    "cut.jsonl.zst": (zstandard.compress(os.urandom(5000))[:-10], r"cut\.jsonl\.zst: damaged or cut off"),
    "noise.txt.gz": (b"this is not gzip", r"noise\.txt\.gz: damaged or cut off"),
    "cut.tar": (b"x" * 700, r"cut\.tar: damaged or cut off"),
    "cut.parquet": (b"PAR1 and no more", r"cut\.parquet: damaged or cut off"),
    "table.xls": (b"x", "unknown kind; it must end in"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_error_naming_the_file(tmp_path, tokenizer_path, capsys, name):
    data, message = BAD_INPUTS[name]
    (tmp_path / name).write_bytes(data)
    command = [str(tmp_path / name), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    assert load_tool("prepare_data").main([*command, "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare_data: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not list((tmp_path / "out").rglob("manifest.json"))


BAD_COMMANDS = {
    "nothing": ([], "give INPUT"),
    "missing": (["/nowhere.txt"], "/nowhere.txt: does not exist"),
    "two rules": (["a.jsonl", "--validation-documents", "3", "--validation-only"], "exclude each other"),
    "fraction": (["a.jsonl", "--validation-fraction", "2"], "--validation-fraction 2.0"),
    "all": (["a.jsonl", "--validation-documents", "62"], "have only 62 documents"),
    "folder": (["empty"], "no file inside ends in"),
    "splits": (["splits"], "give one of .*splits/train"),
    "indices": (["indices"], "flatten_indices"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_bad_command_is_one_error(tmp_path, tokenizer_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl")
    for folder in ("empty", "splits", "indices"):
        (tmp_path / folder).mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "indices" / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}')
    arguments, message = BAD_COMMANDS[name]
    tail = ["--tokenizer", str(tokenizer_path), "--output", "out", "--workers", "0"]
    assert load_tool("prepare_data").main([*arguments, *tail]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_demo_is_one_command_and_reused(tmp_path, capsys):
    """The demo's whole path: corpus, tokenizer, shards; an older demo in the same folder is replaced."""
    tool = load_tool("prepare_data")
    command = ["--demo", "--output", str(tmp_path), "--workers", "0"]
    assert tool.main(command) == 0
    before = contents(tmp_path)
    started_at = time.monotonic()
    assert tool.main(command) == 0
    assert time.monotonic() - started_at < 5
    assert contents(tmp_path) == before
    stream = open_stream(DataConfig(path=str(tmp_path), context_length=256), 1)
    tokenizer = load_tokenizer(stream.tokenizer_path)
    assert stream.num_rows > 2000
    assert "def " in tokenizer.decode(stream.read(np.arange(20)).reshape(-1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "tokenizer", "train", "validation"]
    manifest = tmp_path / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    assert tool.main(command) == 0
    assert contents(tmp_path) == before
    capsys.readouterr()


def test_train_tokenizer_takes_the_same_inputs(formats, tmp_path, capsys):
    tool = load_tool("train_tokenizer")
    for name, output in (("a.jsonl", "a"), ("d.parquet", "b")):
        assert tool.main([*formats[name], "--vocab-size", "330", "--output", str(tmp_path / output)]) == 0
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()
    assert "330 ids, mask 4" in capsys.readouterr().out
    assert tool.main([*formats["a.jsonl"], "--vocab-size", "99999", "--output", str(tmp_path / "c")]) == 1
    assert "--vocab-size" in capsys.readouterr().err
