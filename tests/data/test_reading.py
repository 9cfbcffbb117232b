"""What is read from a corpus is exactly what is there, or it is said what was left out."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from bd3lm_scale.data.documents import Meter, Options, find_inputs, read_records, record_text

DOCUMENTS = [f"document number {i} " * (1 + i % 40) for i in range(50)]
TAR_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def archive(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    written = io.BytesIO()
    with tarfile.open(mode="w", fileobj=written, format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(content))
    return written.getvalue()


def as_json(text: object) -> bytes:
    return json.dumps({"text": text}).encode()


def texts_of(path: Path | str, meter: Meter | None = None, **options) -> list[str]:
    wanted = Options(**options)
    return [record_text(record, wanted) for record in read_records(str(path), wanted, meter)]


@pytest.mark.parametrize("form", TAR_FORMATS)
def test_damaged_archive_never_passes_for_a_shorter_one(tmp_path, form):
    """Cut anywhere, one bit flipped anywhere, any header zeroed: all documents, or an error."""
    documents = DOCUMENTS[20:32]
    whole = archive([(f"d/{i:04d}.txt", t.encode()) for i, t in enumerate(documents)], TAR_FORMATS[form])
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    draw = random.Random(form)
    damaged = [whole[:cut] for m in members for cut in (m.offset, m.offset + 200, m.offset_data + m.size // 2)]
    damaged += [whole[: end + 512], whole[: end + 700], whole + b"more", whole + whole, whole[:-100] + b"x" * 100]
    for member in members:
        blank = bytearray(whole)
        blank[member.offset : member.offset + 512] = bytes(512)
        damaged.append(bytes(blank))
    path = tmp_path / "a.tar"
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.tar: damaged or cut off at byte \d+|a\.tar: damaged at byte \d+"):
            texts_of(path)
    path.write_bytes(whole[: end + 1024])
    assert texts_of(path) == documents, "two blocks of zeros are an end, with or without padding"
    errors = 0
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[draw.randrange(end)] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert len(texts_of(path)) == len(documents)
        except ValueError as problem:
            errors += "not UTF-8" not in str(problem)
    assert errors > 10, "headers were among the flipped bytes"


SAMPLES = [("a.txt", b"A"), ("a.json", as_json("ja")), ("b.json", as_json("jb")), ("b.txt", b"B")]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_sample_is_one_document_however_its_members_lie(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for order in itertools.permutations([*SAMPLES, ("c.json", as_json("C"))]):
        data = archive(list(order))
        path.write_bytes(gzip.compress(data, 1) if suffix.endswith("gz") else data)
        assert sorted(texts_of(path)) == ["A", "B", "C"], [name for name, _ in order]


def test_a_stream_that_cannot_look_ahead_is_exact_or_refused(tmp_path):
    refused = 0
    for number, order in enumerate(itertools.permutations(SAMPLES)):
        (tmp_path / f"{number}.tar").write_bytes(archive(list(order)))
        path = f"pipe:cat {tmp_path}/{number}.tar"
        if number % 4 == 0:
            try:
                assert sorted(texts_of(path)) == ["A", "B"]
            except ValueError as problem:
                refused += "sort the archive by name" in str(problem)
    assert 0 < refused < 6


def test_members_of_all_kinds_are_read_or_counted(tmp_path):
    lines = as_json("4") + b"\n\n" + as_json("5") + b"\n"
    members = [
        ("A.TXT", b"1"), ("b.text", b"2"), ("c.txt.gz", gzip.compress(b"3")), ("d.jsonl", lines),
        ("e.jpg", b"x"), ("f", b"x"), ("._g.txt", b"x"), (".git/h.txt", b"x"), ("i.meta.json", b"{}"),
        ("j.JSON", as_json("6")), ("k.txt", b"7"), ("k.json", b"{}"), ("./l.txt.zst", zstandard.compress(b"8")),
        ("m.txt.xz", lzma.compress(b"9")),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(archive(members))
    meter = Meter()
    assert texts_of(tmp_path / "a.tar", meter) == list("123456789")
    assert +meter.ignored == Counter(
        {
            ".jpg members of archives": 1,
            "members of archives without suffix": 1,
            "hidden members of archives": 2,
            ".meta.json members of archives": 1,
            ".json members beside a text": 1,
        }
    )
    (tmp_path / "c.tar").write_bytes(archive([("a.txt.gz", gzip.compress(b"1")[:-4]), ("b.txt", b"2")]))
    damaged, sound = read_records(str(tmp_path / "c.tar"), Options())
    assert (str(damaged.problem)[:18], damaged.where, sound.data) == ("damaged or cut off", "member a.txt.gz", b"2")
    (tmp_path / "b.tar").write_bytes(archive([("a.txt", b"1"), ("b.txt", b"2"), ("a.text", b"3")]))
    with pytest.raises(ValueError, match="a second document of sample 'a'"):
        texts_of(tmp_path / "b.tar")


def test_compressed_files_of_every_kind_are_read_whole_or_refused(tmp_path):
    plain = b"".join(as_json(text) + b"\n" for text in DOCUMENTS)
    long = (
        subprocess.run(["zstd", "--long=28", "-c"], input=plain, capture_output=True) if shutil.which("zstd") else None
    )
    window = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, write_checksum=True)
    checked = zstandard.ZstdCompressor(write_checksum=True)
    writers = {
        ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": checked.compress,
        ".long.zst": zstandard.ZstdCompressor(compression_params=window).compress,
    }  # fmt: skip
    for suffix, compress in writers.items():
        path = tmp_path / f"A.JSONL{suffix}".replace("A.JSONL.long", "long.JSONL")
        frames = compress(plain[:2000]) + compress(plain[2000:])
        path.write_bytes(frames)
        assert texts_of(path) == DOCUMENTS, suffix
        damage = {
            "cut in a frame": frames[:-10],
            "no second frame but noise": compress(plain[:2000]) + b"noise that is no frame",
            "flipped": frames[: len(frames) // 2] + b"\xff\xfe\xfd" + frames[len(frames) // 2 + 3 :],
            "empty": b"",
        }
        for name, content in damage.items():
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{path.name}: damaged or cut off"):
                assert texts_of(path) == DOCUMENTS, name
    if long is not None and long.returncode == 0:
        (tmp_path / "tool.jsonl.zst").write_bytes(long.stdout)
        assert texts_of(tmp_path / "tool.jsonl.zst") == DOCUMENTS


@pytest.mark.parametrize("form", ["file", "stream"])
def test_both_arrow_formats_are_read_whole_or_refused(tmp_path, form):
    path = tmp_path / "a.arrow"
    table = pa.table({"n": range(50), "text": pa.array(DOCUMENTS).dictionary_encode()})
    new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        for start in range(0, 50, 10):
            writer.write_table(table.slice(start, 10))
    assert texts_of(path) == DOCUMENTS
    whole = path.read_bytes()
    for cut in (len(whole) - 8, len(whole) - 4, len(whole) // 2, 100, 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.arrow: damaged or cut off"):
            texts_of(path)


def test_parquet_with_a_flipped_byte_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": DOCUMENTS}), path, compression="none", write_page_checksum=True)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"document number 30") + 3] ^= 4
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a\.parquet: damaged or cut off"):
        texts_of(path)


def test_folders_hold_what_is_data_and_count_the_rest(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in ("sub/.ipynb_checkpoints", ".cache", "table"):
        (corpus / folder).mkdir(parents=True)
    elsewhere.mkdir()
    written = {
        "sub/.ipynb_checkpoints/a-checkpoint.txt": "hidden", ".cache/b.txt": "hidden", ".c.txt": "hidden",
        "sub/E.JSONL": '{"text": "1"}\n', "sub/f.csv": "no", "README": "no", "table/dataset_infos.json": '{"a": {}}',
        "table/stats.json": '{"mean":\n 3}', "table/more.json": '{"text": "2"}\n', "notes.Md": "no",
    }  # fmt: skip
    for name, content in written.items():
        (corpus / name).write_text(content)
    (corpus / "g.txt.xz").write_bytes(lzma.compress(b"3"))
    (corpus / "h.txt.BZ2").write_bytes(bz2.compress(b"4"))
    pyarrow.parquet.write_table(pa.table({"text": ["5"]}), corpus / "table" / "t.parquet")
    (elsewhere / "i.txt").write_text("6")
    (corpus / "linked").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(corpus)
    (corpus / "broken.txt").symlink_to(tmp_path / "nowhere")
    ignored: Counter[str] = Counter()
    files = find_inputs([str(corpus)], ignored=ignored)
    assert sorted(text for file in files for text in texts_of(file)) == list("123456")
    assert ignored == {
        "hidden folders": 2, "hidden files": 1, ".csv files": 1, ".md files": 1, "files without suffix": 1,
        ".json files that describe data": 2, "links to a folder that holds them": 1, "links that lead nowhere": 1,
    }  # fmt: skip
    (corpus / "again.txt").symlink_to(elsewhere / "i.txt")
    with pytest.raises(ValueError, match=r"i\.txt: the same file as .*again\.txt is given twice"):
        find_inputs([str(corpus)])
    for twice in ([str(elsewhere / "i.txt")] * 2, ["http://h/a.txt", "http://h/a.txt"], [str(elsewhere), str(corpus)]):
        with pytest.raises(ValueError, match="given twice"):
            find_inputs(twice)


def test_saved_datasets_are_found_below_other_folders(tmp_path):
    saved = tmp_path / "corpus" / "part"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    (saved / "cache-1234.arrow").write_bytes(b"not of the data set")
    with pytest.raises(ValueError, match=r"names data-0\.arrow, which is not there"):
        find_inputs([str(tmp_path / "corpus")])
    (saved / "data-0.arrow").write_bytes(b"")
    assert find_inputs([str(tmp_path / "corpus")]) == [str(saved / "data-0.arrow")]
    other = tmp_path / "other"
    other.mkdir()
    (other / "state.json").write_text('{"epoch": 3}')
    (other / "a.txt").write_text("x")
    assert find_inputs([str(other)]) == [str(other / "a.txt")]


BAD = {
    "null.jsonl": (b'{"text": "a"}\n\n{"text": null}\n', "field 'text' is null", "line 3"),
    "key.jsonl": (b'{"txt": "a"}\n', "no field 'text'", "line 1"),
    "type.jsonl": (b'{"text": ["a"]}\n', "field 'text' is not text but list", "line 1"),
    "list.jsonl": (b'["text"]\n', "not a JSON object but list", "line 1"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "not a JSON object", "line 1"),
    "byte.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "byte 0xff in line 2 is not UTF-8", "line 2"),
    "half.jsonl": (b'{"text": "a\\ud800"}\n', r"has \ud800, half a character", "line 1"),
    "zeros.jsonl": (b'{"text": "a"}\n' + bytes(100), "not a JSON object", "line 2"),
    "byte.txt": ("one\ntwo é".encode("latin-1"), "byte 0xe9 in line 2 is not UTF-8", "the whole file"),
    "marked.txt": ("some text".encode("utf-16"), "text in UTF-16", "the whole file"),
    "unmarked.txt": ("some text".encode("utf-16-be"), "text in UTF-16", "the whole file"),
    "wide.txt": ("some text".encode("utf-32"), "text in UTF-32", "the whole file"),
    "bare.txt": ("some text".encode("utf-32-le"), "text in UTF-32", "the whole file"),
    "wide.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "text in UTF-16", "the whole file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_document_is_a_bad_record_with_its_place(tmp_path, name):
    content, reason, where = BAD[name]
    (tmp_path / name).write_bytes(content)
    bad = []
    for record in read_records(str(tmp_path / name), Options()):
        try:
            record_text(record, Options())
        except ValueError as problem:
            bad.append((str(problem), record.where))
    assert len(bad) == 1
    assert reason in bad[0][0]
    assert bad[0][1] == where


def test_tables_and_archives_keep_the_same_rules(tmp_path):
    column = pa.StringArray.from_buffers(4, pa.py_buffer(pa.array([0, 1, 1, 2, 2], pa.int32()).buffers()[1]),
                                         pa.py_buffer(b"a\xff"), pa.py_buffer(b"\x0d"))  # fmt: skip
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    (tmp_path / "a.tar").write_bytes(
        archive([("a.txt", b"a"), ("b.json", as_json(None)), ("c.txt", b"\xff"), ("d.txt", b"")])
    )
    found = {}
    for name in ("a.parquet", "a.tar"):
        found[name] = []
        for record in read_records(str(tmp_path / name), Options()):
            try:
                found[name].append(record_text(record, Options()))
            except ValueError as problem:
                found[name].append(f"{record.where}: {problem}")
    assert found == {
        "a.parquet": [
            "a", "row 2: column 'text' is null", "row 3: byte 0xff in line 1 is not UTF-8 (invalid start byte)", "",
        ],
        "a.tar": [
            "a", "member b.json: field 'text' is null",
            "member c.txt: byte 0xff in line 1 is not UTF-8 (invalid start byte)", "",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_the_byte_order_mark_is_no_text_and_everything_else_is(tmp_path, document):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \x00\r\n\n\xef\xbb\xbftwo\x0c\x1e\xc2\x85\xe2\x80\xa8")
    whole = "one \x00\r\n\n\ufefftwo\x0c\x1e\x85\u2028"
    parts = {"file": [whole], "line": ["one \x00", "", "\ufefftwo\x0c\x1e\x85\u2028"],
             "paragraph": ["one \x00\r\n", "\ufefftwo\x0c\x1e\x85\u2028"]}  # fmt: skip
    assert texts_of(tmp_path / "a.txt", document=document) == parts[document]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + as_json("x") + b"\n")
    assert texts_of(tmp_path / "a.jsonl") == ["x"]
