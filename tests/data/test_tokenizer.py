"""Every kind of tokenizer: lossless where it can be, mask and padding apart, the same after saving."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3lm_scale.data.demo_corpus import demo_documents
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from tests.data.conftest import TEXT

HARD_TEXTS = [
    "",
    " ",
    "  two  spaces\tand tabs \n\n\n  ",
    "\r\n windows \r\n",
    "\u2581 a literal \u2581\u2581 SentencePiece space",
    "<mask></s><s><pad><unk>[MASK][M] are only text",
    "<|endoftext|> too",
    "\u00e9\u6f22\u5b57\U0001f642\u200d\u0000\ufffd",
    "<0x41>",
]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A small byte-level BPE in GPT-2's two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def bert_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("bert") / "bert-vocab.txt"
    pieces = [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "cat",
        "##s",
        "sat",
        ".",
        "un",
        "##known",
    ]
    file.write_text("\n".join(pieces) + "\n")
    return file


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    model = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>", "[M]"]
    model.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=special, show_progress=False)
    model.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "mask_token": "[M]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


KINDS = ["sentencepiece", "gpt2", "bert", "hugging_face"]


@pytest.fixture
def paths(tokenizer_path, gpt2_folder, bert_file, hugging_face_folder):
    return dict(zip(KINDS, [tokenizer_path, gpt2_folder, bert_file, hugging_face_folder], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_in_the_vocabulary_and_mask_is_none_of_the_others(paths, kind):
    tokenizer = load_tokenizer(paths[kind])
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert tokenizer.mask_token_id not in others
    assert others | {tokenizer.mask_token_id} <= set(range(tokenizer.vocab_size))
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.mask_token_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_ids_by_kind(paths):
    gpt2 = load_tokenizer(paths["gpt2"])
    assert (gpt2.vocab_size, gpt2.mask_token_id) == (301, 300), "the mask is one id more than the files hold"
    assert gpt2.pad_token_id == gpt2.eos_token_id == gpt2.bos_token_id == 0
    bert = load_tokenizer(paths["bert"])
    assert (bert.vocab_size, bert.mask_token_id, bert.bos_token_id, bert.eos_token_id, bert.pad_token_id) == (
        (13, 5, 3, 4, 0)
    )
    ours = load_tokenizer(paths["sentencepiece"])
    assert len({ours.mask_token_id, ours.bos_token_id, ours.eos_token_id, ours.pad_token_id}) == 4
    hugging_face = load_tokenizer(paths["hugging_face"])
    assert (hugging_face.bos_token_id, hugging_face.eos_token_id, hugging_face.pad_token_id) == (0, 1, 2)
    assert (hugging_face.mask_token_id, hugging_face.vocab_size) == (3, 300)


def test_bert_splits_and_lowers_words(paths):
    bert = load_tokenizer(paths["bert"])
    assert bert.encode("The cats sat.") == [6, 7, 8, 9, 10]
    assert bert.decode([3, 6, 7, 8, 4]) == "the cats"


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "hugging_face"])
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_back_unchanged(paths, kind, text):
    tokenizer = load_tokenizer(paths[kind])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_our_tokenizer_loses_nothing(tokenizer_path, text):
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_source_code_comes_back_unchanged(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    for _, text in list(demo_documents())[:20]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_encode_as_single_texts_do(paths):
    for path in paths.values():
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode_batch(HARD_TEXTS) == [tokenizer.encode(text) for text in HARD_TEXTS]


def test_special_ids_are_dropped_or_shown(tokenizer_path):
    tokenizer = load_tokenizer(tokenizer_path)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("a b"), tokenizer.mask_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "a b"
    assert tokenizer.decode(ids, keep_special=True) == "<s>a b<mask></s>"
    with pytest.raises(ValueError, match="token id 320 is outside the vocabulary of 320"):
        tokenizer.decode([320])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_the_same(paths, kind, tmp_path):
    tokenizer = load_tokenizer(paths[kind])
    tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.hash == tokenizer.hash
    assert again.file_names == tokenizer.file_names == tuple(sorted(p.name for p in tmp_path.iterdir()))
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_other_tokenizers_have_other_hashes(paths):
    assert len({load_tokenizer(path).hash for path in paths.values()}) == len(paths)


def test_training_is_reproducible_wherever_it_is_written(tokenizer_path, tmp_path):
    again = train_sentencepiece([TEXT] * 20, tmp_path / "elsewhere", vocab_size=320)
    assert again.read_bytes() == tokenizer_path.read_bytes()
    unigram = [train_sentencepiece([TEXT] * 20, tmp_path / n, vocab_size=290, model_type="unigram") for n in "ab"]
    assert unigram[0].read_bytes() == unigram[1].read_bytes() != tokenizer_path.read_bytes()


def test_too_little_text_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"cannot train 5000 pieces .*--vocab-size"):
        train_sentencepiece(["a b c"], tmp_path, vocab_size=5000)
    with pytest.raises(ValueError, match="cannot train"):
        train_sentencepiece([], tmp_path, vocab_size=300)


@pytest.mark.parametrize("content", [None, "nothing useful", "empty folder"])
def test_what_is_no_tokenizer_is_one_clear_error(tmp_path, content):
    path = tmp_path / "t.model"
    if content == "nothing useful":
        path.write_text(content)
    elif content:
        path.mkdir()
    with pytest.raises(ValueError, match=r"tokenizer .*t\.model"):
        load_tokenizer(path)
