"""Laws for tokenizers of every kind: no text is the mask, and text in pieces is text in one."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers

from bd3lm_scale.data import documents, tokenizing
from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.tokenizing import Preparation
from tests.data.preparing import tokens_of
from tests.data.test_reading import archive
from tests.data.tokenizer_kinds import KINDS, NAMED, SPECIAL

# single spaces and runs of them, blank lines, tabs, punctuation before and after, characters of several bytes
PROSE = """def square(x):
    return x * x


for i in range(10):
\tprint(square(i), 'is  the square of', i )
 \u00e9\u6f22\u5b57 x
"""
LITERAL = "a\u2581b \u2581\u2581 x\u2581"


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(kind, tmp_path_factory) -> Path:
    return KINDS[kind](tmp_path_factory.mktemp(kind))


def test_no_text_is_a_special_token(path):
    tokenizer = load_tokenizer(path)
    never = {tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    names = [*SPECIAL, "[MASK]", "[CLS]", "[SEP]", "<|endoftext|>", *tokenizer.special_text.values()]
    for name in dict.fromkeys(names):
        for text in (name, f"x {name} x", f"x{name}x", name * 3, f"\n{name}\n", f"\u2581{name}"):
            assert never.isdisjoint(tokenizer.encode(text)), text
            assert tokenizer.encode(text), "the name became other tokens, or an unknown one, but not nothing"


def test_what_can_only_be_written_as_the_mask_is_refused_with_its_document(tmp_path):
    """An entry that was put out of reach has a name of its own, which a text could hold in theory."""
    folder = tmp_path / "t"
    folder.mkdir()
    KINDS["word_level"](folder)
    mask = load_tokenizer(folder).mask_token_id
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": f"\ufdd0{mask}\ufdd1"}))
    task = Preparation((str(tmp_path / "a.jsonl"),))
    with pytest.raises(
        ValueError, match=r"a\.jsonl, record 2: text that this tokenizer writes as .*'<mask>'; it is line 2"
    ):
        prepare(task, str(folder), tmp_path / "out", 0)


def test_ordinary_text_and_ids_are_as_the_library_has_them(path):
    """Putting special tokens out of reach changes nothing else."""
    if not (path / "tokenizer.json").exists():
        pytest.skip("not a Hugging Face folder")
    plain = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(path)
    for text in (PROSE, "<tool> x <tool>", LITERAL, "\ufffd"):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == plain.decode([i for i in ids if i not in tokenizer.special_text])
    assert tokenizer.vocab_size == max(plain.get_vocab().values()) + 1
    roles = {f"{role}_token": getattr(tokenizer, f"{role}_token_id") for role in ("mask", "bos", "eos", "pad")}
    assert roles == {role: plain.token_to_id(NAMED[role]) for role in roles}


def test_literal_u2581_comes_back_where_the_model_keeps_text(kind, path):
    tokenizer = load_tokenizer(path)
    if kind in ("ours", "ours_unigram", "with_dummy_prefix"):
        for text in (LITERAL, "\u2581", "\u2581 a", " \u2581a", "x\u2581", "a b\u2581\u2581c  d"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    elif kind == "with_sentencepieces_defaults":
        assert tokenizer.encode("a\u2581b") == tokenizer.encode("a b"), "as SentencePiece itself has it"


def test_every_format_and_every_cut_gives_the_tokens_of_the_whole_text(path, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_PIECE_BYTES", 64)
    monkeypatch.setattr(tokenizing, "_HASHED_BYTES", 64)
    tokenizer = load_tokenizer(path)
    texts = [PROSE * 5 + LITERAL, " x " * 200, "x\n" * 300, "\n\n".join(["square"] * 100), LITERAL * 20]
    texts += [f"def f{i}(x): the square of {i}\n" * 20 for i in range(8)]
    expected = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.eos_token_id)]
    (tmp_path / "txt").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "txt" / f"{number:02}.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.tar").write_bytes(archive([(f"{i}.txt", text.encode()) for i, text in enumerate(texts)]))
    inputs = {"txt": sorted((tmp_path / "txt").iterdir())} | {
        n: [tmp_path / f"a.{n}"] for n in ("jsonl", "parquet", "tar")
    }
    held_out = set()
    for name, files in inputs.items():
        task = Preparation(tuple(map(str, files)), validation_fraction=0.4)
        prepare(task, str(path), tmp_path / f"out_{name}", 0)
        splits = [s for s in ("train", "validation") if (tmp_path / f"out_{name}" / s).exists()]
        held_out.add(json.dumps([tokens_of(tmp_path / f"out_{name}", split).tolist() for split in splits]))
        made = prepare(Preparation(tuple(map(str, files))), str(path), tmp_path / f"all_{name}", 0)
        assert tokens_of(tmp_path / f"all_{name}", "train").tolist() == expected, name
        assert made["train"].num_documents == len(texts)
    assert len(held_out) == 1, "a document goes to the same split whatever it lies in"


def test_texts_are_cut_where_the_tokenizer_allows_it(kind, path):
    """Otherwise the law above would hold for want of pieces."""
    expected = {"ours", "gpt2", "bert", "byte_level", "byte_level_whole_words", "mask_as_plain_added_token"}
    assert load_tokenizer(path).cuts_at_spaces == (kind in expected)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\x1c", "\u2029"])
def test_lines_of_a_vocab_txt_end_at_newlines_and_nowhere_else(tmp_path, separator):
    for ending in ("\n", "\r\n"):
        pieces = ["[PAD]", separator, "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
        (tmp_path / "vocab.txt").write_bytes(ending.join(pieces).encode())
        tokenizer = load_tokenizer(tmp_path / "vocab.txt")
        assert (tokenizer.mask_token_id, tokenizer.vocab_size) == (5, 7)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (3, 4, 0)
        assert tokenizer.encode("hello [MASK]") == [6, 2, 2, 2]
        (tmp_path / "vocab.txt").write_bytes((ending.join(pieces) + ending).encode())
        assert load_tokenizer(tmp_path / "vocab.txt").vocab_size == 7
