"""Exported tokenizers: the same ids as in training, lossless on source code, special ids out of text's reach."""

import json
import string
import sysconfig
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bd3lm_scale.checkpoint.hf.tokenizer_files import copy_tokenizer, export_tokenizer
from bd3lm_scale.data.chat import ChatFormat
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from tests.data.templates import MARKED, turns, write_tokenizer

SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
HARD = [
    "", "a", "  x", "\n\n\n", "\tif x:\n        pass\n   \n", "a\r\nb", "a\x00b", " " * 37 + "#" + "-" * 77 + "\n",
    "h\u00e9llo \u2581 w\u00f6rld \U0001f389 \u65e5\u672c\u8a9e e\u0301 \ufb01 \ufffd",
    "<mask> </s> <s> <pad> <unk> <0x0A> [MASK] <|endoftext|>",
]  # fmt: skip


def byte_alphabet():
    """GPT-2's 256 symbols for bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def texts(start, stop):
    return [path.read_text(encoding="utf-8") for path in SOURCES[start:stop]]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    train_sentencepiece(texts(0, 12), folder, vocab_size=600, model_type=request.param)
    return load_tokenizer(folder)


@pytest.fixture
def gpt2(tmp_path):
    """GPT-2's byte alphabet, a few merges and its end of text."""
    merges = ["\u0120 \u0120", "i f", "\u0120\u0120 \u0120\u0120", "r e", "\u0120 i", "\u0120i f"]
    pieces = [*byte_alphabet(), *(m.replace(" ", "") for m in merges), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return load_tokenizer(tmp_path)


@pytest.fixture
def bert(tmp_path):
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        "def",
        "##ort",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return load_tokenizer(tmp_path)


def exported(tokenizer, folder):
    folder.mkdir()
    report = export_tokenizer(tokenizer, folder, tokenizer.vocab_size, tokenizer.mask_token_id)
    assert report.kind == tokenizer.kind
    return AutoTokenizer.from_pretrained(folder)


def check_special(tokenizer, hugging_face):
    for role in ("mask", "bos", "eos", "pad"):
        assert getattr(hugging_face, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    assert hugging_face.mask_token_id != hugging_face.pad_token_id
    assert len(hugging_face) == tokenizer.vocab_size
    special = [tokenizer.mask_token_id, tokenizer.eos_token_id]
    assert hugging_face.decode(special, skip_special_tokens=True) == ""
    for text in HARD:
        assert not set(hugging_face(text)["input_ids"]) & set(special), f"{text!r} produced a special id"
    assert set(hugging_face(["a", "a b c"], padding=True)) == {"input_ids", "attention_mask"}


def test_sentencepiece_becomes_a_lossless_fast_tokenizer(sentencepiece, tmp_path):
    hugging_face = exported(sentencepiece, tmp_path / "hf")
    check_special(sentencepiece, hugging_face)
    differ = 0
    for text in [*HARD, *texts(20, 60)]:
        ids = hugging_face(text)["input_ids"]
        differ += ids != sentencepiece.encode(text)
        assert hugging_face.decode(ids) == text
        assert hugging_face.decode(sentencepiece.encode(text)) == text
    if sentencepiece.sentencepiece.model_type == 2:
        assert differ == 0, "BPE: the very same ids"
    hugging_face.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert all(again(text)["input_ids"] == hugging_face(text)["input_ids"] for text in HARD)


def test_our_own_tokenizer_comes_back_from_the_folder(sentencepiece, tmp_path):
    exported(sentencepiece, tmp_path / "hf")
    assert copy_tokenizer(tmp_path / "hf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").hash == sentencepiece.hash
    assert not copy_tokenizer(tmp_path / "back" / "nothing", tmp_path / "none")


def test_gpt2_files_become_a_fast_tokenizer(gpt2, tmp_path):
    hugging_face = exported(gpt2, tmp_path / "hf")
    check_special(gpt2, hugging_face)
    assert gpt2.mask_token_id == len(hugging_face) - 1 == 263
    for text in [*HARD, *texts(0, 5)]:
        assert hugging_face(text)["input_ids"] == gpt2.encode(text)
        assert hugging_face.decode(hugging_face(text)["input_ids"]) == text
    copy_tokenizer(tmp_path / "hf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").hash == gpt2.hash


def test_bert_vocabularies_become_a_fast_tokenizer(bert, tmp_path):
    hugging_face = exported(bert, tmp_path / "hf")
    assert hugging_face.mask_token_id == bert.mask_token_id == 4
    assert hugging_face.pad_token_id == 0
    for text in ("def sort(x): return 1", "Caf\u00e9  d\u00e9f", "a\nb"):
        assert hugging_face(text)["input_ids"] == bert.encode(text)
    copy_tokenizer(tmp_path / "hf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").hash == bert.hash


def test_hugging_face_folders_gain_the_mask(gpt2, tmp_path):
    exported(gpt2, tmp_path / "first")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "first" / name).unlink()
    content = json.loads((tmp_path / "first" / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<mask>"]
    (tmp_path / "first" / "tokenizer.json").write_text(json.dumps(content))
    roles = json.loads((tmp_path / "first" / "special_tokens_map.json").read_text())
    (tmp_path / "first" / "special_tokens_map.json").write_text(
        json.dumps({k: v for k, v in roles.items() if k != "mask_token"})
    )
    (tmp_path / "first" / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path / "first")
    assert tokenizer.kind == "hugging_face"
    check_special(tokenizer, exported(tokenizer, tmp_path / "hf"))


def test_the_chat_template_goes_into_the_folder_and_back(sentencepiece, tmp_path):
    (tmp_path / "t.jinja").write_text(MARKED)
    folder = write_tokenizer(tmp_path / "chatml", MARKED)
    plain, byte_level = sentencepiece.files[0], load_tokenizer(folder)
    for name, tokenizer in {"ours": load_tokenizer(plain, tmp_path / "t.jinja"), "theirs": byte_level}.items():
        hugging_face = exported(tokenizer, tmp_path / name)
        messages = turns("def f(x):", "return x", "more", "print(x)", system="short")
        found = hugging_face.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ours = ChatFormat(tokenizer).encode(messages)
        assert hugging_face.decode(found["input_ids"]) == ours.text
        assert "<|im_end|>" in ours.text
        if name == "theirs":
            assert found["input_ids"] == ours.ids
            assert found["assistant_masks"] == ours.is_target
            prompt = hugging_face.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)
            assert prompt == ChatFormat(tokenizer).prompt(messages[:2])
        assert copy_tokenizer(tmp_path / name, tmp_path / f"{name}_back")
        back = load_tokenizer(tmp_path / f"{name}_back")
        assert back.chat_template == MARKED
        assert ChatFormat(back).encode(messages).ids == ours.ids
        hugging_face.save_pretrained(tmp_path / f"{name}_again")
        assert AutoTokenizer.from_pretrained(tmp_path / f"{name}_again").chat_template == MARKED


def test_another_tokenizer_is_refused(gpt2, tmp_path):
    with pytest.raises(ValueError, match="give the tokenizer the model was trained with"):
        export_tokenizer(gpt2, tmp_path, 1000, 999)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")


SPECIAL = ["<unk>", "<s>", "</s>", "<mask>"]
LETTERS = [*"abekmst", " ", "mask", "a b", "ab"]


def hugging_face_tokenizer(folder, model, named=("<mask>",), **parts):
    """A tokenizer.json whose special tokens are plain entries of its vocabulary."""
    folder.mkdir()
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    content = {"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    roles = {"bos_token": "<s>", "eos_token": "</s>", **({"mask_token": named[0]} if named else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(folder)


def unigram(pieces):
    scored = [[piece, -1.0 - len(SPECIAL) - 0.1 * i] for i, piece in enumerate(pieces)]
    return {"type": "Unigram", "unk_id": 0, "vocab": [[s, -0.5] for s in SPECIAL] + scored, "byte_fallback": False}


def merged(pieces, merges, **more):
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    return {"type": "BPE", "unk_token": "<unk>", "fuse_unk": False, "vocab": vocab, "merges": merges, **more}


def words(kind):
    pieces = ["a", "b", "mask", "<", ">", "s", "/s", "##b", "##mask", "##>", "##s", "##/", "##<"]
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    more = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
    return {"type": kind, "unk_token": "<unk>", "vocab": vocab, **more}


SPELLED = [*"<>/ms", "<m", "as", "<mas", "k>"]
MODELS = {
    "unigram": (unigram(["<m", *LETTERS, "<", ">", "/"]), {}),
    "unigram that cannot spell the name": (unigram(LETTERS), {}),
    "merges that make the name": (
        merged([*SPELLED, "a", "k"], [["<", "m"], ["a", "s"], ["<m", "as"], ["k", ">"], ["<mas", "k>"]]), {},
    ),
    "whole pieces before merges": (merged([*SPELLED, "a", "k"], [], ignore_merges=True), {}),
    "words": (words("WordPiece"), {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
    "whole words": (words("WordLevel"), {"pre_tokenizer": {"type": "WhitespaceSplit"}}),
    "lower case": (
        words("WordPiece"),
        {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": {"type": "Lowercase"}},
    ),
}  # fmt: skip
TEXTS = ["<mask>", "a <mask> b", "ab<mask>ab", "<s>a</s>", "</s> <mask><mask>", "<MASK> a", "mask", "as ab a"]


@pytest.mark.parametrize("name", MODELS)
def test_no_text_is_read_as_a_special_token_that_is_a_plain_entry(name, tmp_path):
    model, parts = MODELS[name]
    tokenizer = hugging_face_tokenizer(tmp_path / "own", model, **parts)
    found = exported(tokenizer, tmp_path / "hf")
    special = {tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert found.mask_token_id == tokenizer.mask_token_id == 3
    for text in TEXTS:
        ids = found(text)["input_ids"]
        assert special.isdisjoint(ids), f"{text!r} produced a special id"
        if not any(s in text.lower() for s in SPECIAL) or name in ("unigram", "merges that make the name"):
            assert ids == tokenizer.encode(text), text
    assert found.convert_tokens_to_ids("<mask>") == 3


def test_a_mask_beside_a_piece_of_that_name_gets_another(tmp_path):
    """The tokenizer has no mask, so one is added; `<mask>` stays the ordinary piece that it is."""
    tokenizer = hugging_face_tokenizer(tmp_path / "own", unigram([*LETTERS, "<", ">", "/"]), named=())
    found = exported(tokenizer, tmp_path / "hf")
    assert found.mask_token_id == tokenizer.mask_token_id == len(found) - 1
    assert found("a<mask>b")["input_ids"] == tokenizer.encode("a<mask>b")
    assert 3 in tokenizer.encode("a<mask>b")


def test_a_special_token_that_no_cut_keeps_apart_is_refused(tmp_path):
    pieces = unigram(LETTERS)
    pieces["vocab"][3] = ["\x00", -0.5]
    tokenizer = hugging_face_tokenizer(tmp_path / "own", pieces, named=("\x00",))
    with pytest.raises(ValueError, match=r"out of ordinary text.*export without a tokenizer"):
        exported(tokenizer, tmp_path / "hf")


def test_a_sentencepiece_model_that_cannot_spell_its_special_names(tmp_path):
    """Without byte fallback and without '<' among its characters, the names are unknown characters."""
    import sentencepiece as library

    lines = ["a tiny text of common words and no brackets at all", "words of a text with common letters"] * 40
    for kind in ("unigram", "bpe"):
        (tmp_path / kind).mkdir()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(tmp_path / kind / "tokenizer"), vocab_size=28,
            model_type=kind, control_symbols=["<mask>"], minloglevel=2,
        )  # fmt: skip
        tokenizer = load_tokenizer(tmp_path / kind / "tokenizer.model")
        found = exported(tokenizer, tmp_path / f"{kind} hf")
        assert found.mask_token_id == tokenizer.mask_token_id
        for text in ("a <mask> b", "</s>", "<s><mask>words", "words of common text"):
            assert set(tokenizer.special_text).isdisjoint(found(text)["input_ids"]), text
        assert found("words of common text")["input_ids"] == tokenizer.encode("words of common text")
