"""One small tokenizer of every kind that data.tokenizer reads."""

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from tests.data.conftest import TEXT

BERT_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "def", "square", "x", "##s", "=", "(", ")", ":", "the"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>", "unk_token": "<unk>"}
SPECIAL = list(NAMED.values())


def _sentencepiece(folder: Path, **options) -> Path:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXT * 30).split("\n")), model_writer=written, minloglevel=2, **options
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    return folder / "spiece.model"


def ours(folder: Path) -> Path:
    return train_sentencepiece([TEXT] * 20, folder, vocab_size=320)


def ours_unigram(folder: Path) -> Path:
    return train_sentencepiece([TEXT] * 20, folder, vocab_size=290, model_type="unigram")


def with_dummy_prefix(folder: Path) -> Path:
    """As the LLaMA models have it: exact, but for a space before the text."""
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    return _sentencepiece(folder, vocab_size=330, model_type="bpe", user_defined_symbols=["\n"], **exact)


def with_sentencepieces_defaults(folder: Path) -> Path:
    return _sentencepiece(folder, vocab_size=34)


def gpt2(folder: Path) -> Path:
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save_model(str(folder))
    return folder


def bert(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join(BERT_PIECES) + "\n")
    return folder / "vocab.txt"


def _folder(folder: Path, tokenizer: tokenizers.Tokenizer, added: list | None = None) -> Path:
    tokenizer.add_tokens(added or [])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED))
    return folder


def _byte_level(vocab_size: int = 300, **options) -> tokenizers.Tokenizer:
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT] * 3, vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    content = json.loads(model.to_str())
    content["model"] |= options
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def byte_level(folder: Path) -> Path:
    return _folder(folder, _byte_level())


def byte_level_whole_words(folder: Path) -> Path:
    """Whole words are looked up before merges, as in Llama 3."""
    return _folder(folder, _byte_level(ignore_merges=True))


def mask_as_plain_added_token(folder: Path) -> Path:
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=SPECIAL[:3], show_progress=False)
    tokenizer = tokenizers.Tokenizer.from_str(model.to_str())
    return _folder(folder, tokenizer, [tokenizers.AddedToken(name, special=False) for name in ("<mask>", "<tool>")])


def unigram(folder: Path) -> Path:
    """Special tokens are plain entries of the vocabulary."""
    pieces = sorted(set(TEXT) - {" "})
    words = ["\u2581", *pieces, "square", "\u2581x", "def", "\u2581for"]
    vocab = [(name, 0.0) for name in SPECIAL] + [(word, -1.0 - len(word) / 9) for word in words]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=SPECIAL.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _folder(folder, tokenizer)


def word_level(folder: Path) -> Path:
    """Special tokens are plain words of the vocabulary."""
    words = [*SPECIAL, *dict.fromkeys(TEXT.split())]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _folder(folder, tokenizer)


KINDS = {
    make.__name__: make
    for make in (
        ours, ours_unigram, with_dummy_prefix, with_sentencepieces_defaults, gpt2, bert, byte_level,
        byte_level_whole_words, mask_as_plain_added_token, unigram, word_level,
    )
}  # fmt: skip
