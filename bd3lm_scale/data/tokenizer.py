"""Tokenizers behind one small face: SentencePiece, GPT-2 files, BERT vocab.txt, Hugging Face folders.

Every tokenizer here has a mask id that no text can produce and that is not the padding id. A tokenizer without
a mask token gets one more id at the end of its vocabulary (GPT-2: V = 50,258, mask = 50,257). The names of the mask,
BOS and EOS inside a text are text; where a tokenizer cannot write one of them otherwise, encoding is an error.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bd3lm_scale.data import sentencepiece_model, tokenizer_json
from bd3lm_scale.data.shards import TokenizerIdentity

MASK_PIECE = "<mask>"
CHAT_TEMPLATE = "chat_template.jinja"
_GPT2_EOS = "<|endoftext|>"
_FOLDER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


@dataclass(eq=False)
class Tokenizer:
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids, the mask included.
        mask_token_id, bos_token_id, eos_token_id, pad_token_id: special ids; mask differs from all others.
        files: the files it was read from, which `save` copies.
        template_file: its chat template, copied with them; it decides what text a conversation is, not a text's ids.
        special_text: how each special id is written when a caller wants to see it.
        cuts_at_spaces: a text cut before a lone space or newline between visible ASCII characters has the tokens of
            its two parts. What is not known to have this property is encoded whole.
        special_strips: special tokens that take blanks with them where a text names them: before, behind.
    """

    kind: str
    vocab_size: int
    mask_token_id: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    files: tuple[Path, ...]
    special_text: dict[int, str]
    _encode: Callable[[list[str]], list[list[int]]] = field(repr=False)
    _decode: Callable[[list[int]], str] = field(repr=False)
    cuts_at_spaces: bool = False
    special_strips: dict[int, tuple[bool, bool]] = field(default_factory=dict)
    template_file: Path | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special id (ValueError where that cannot be done)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts at once, without any special id (ValueError where that cannot be done)."""
        encoded = self._encode(list(texts))
        for ids in encoded:
            if not self._never.isdisjoint(ids):
                found = next(i for i in ids if i in self._never)
                raise ValueError(
                    f"text that this tokenizer writes as its special token {self.special_text.get(found, found)!r}"
                )
        return encoded

    @cached_property
    def _never(self) -> frozenset[int]:
        """Ids that stand for something else than text."""
        return frozenset((self.mask_token_id, self.bos_token_id, self.eos_token_id))

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """Text of `ids`; special ids are dropped, or written out (as "<mask>") with `keep_special`.

        Ids must be below vocab_size (ValueError).
        """
        parts, run = [], []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
            if token not in self.special_text:
                run.append(token)
            elif keep_special:
                parts += [self._decode(run) if run else "", self.special_text[token]]
                run = []
        return "".join(parts) + (self._decode(run) if run else "")

    @cached_property
    def hash(self) -> str:
        """Hex digest of what determines a text's ids: kind, special ids and file contents."""
        digest = hashlib.sha256()
        special = (self.vocab_size, self.mask_token_id, self.bos_token_id, self.eos_token_id, self.pad_token_id)
        digest.update(json.dumps([self.kind, *special]).encode())
        for file in sorted(self.files, key=lambda path: _stored_name(self.kind, path)):
            digest.update(_stored_name(self.kind, file).encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    @property
    def chat_template(self) -> str | None:
        """What turns messages into text, a Jinja template; None where the tokenizer comes without one."""
        if self.template_file is not None:
            return tokenizer_json.read_template(self.template_file)
        settings = next((file for file in self.files if file.name == "tokenizer_config.json"), None)
        return None if settings is None else tokenizer_json.template_in(settings)

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of the files that `save` writes."""
        template = [] if self.template_file is None else [CHAT_TEMPLATE]
        return tuple(sorted([*(_stored_name(self.kind, file) for file in self.files), *template]))

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files to `folder`, from which `load_tokenizer` gives an equal one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sources = {_stored_name(self.kind, file): file for file in self.files}
        if self.template_file is not None:
            sources[CHAT_TEMPLATE] = self.template_file
        for name, file in sources.items():
            destination = folder / name
            if not (destination.exists() and destination.samefile(file)):
                shutil.copyfile(file, destination)


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a SentencePiece .model file, a BERT vocab.txt, a tokenizer.json, or a folder with one of these or
            with GPT-2's vocab.json and merges.txt.
        chat_template: a Jinja file in place of the tokenizer's own chat template.
    """
    path = Path(path)
    tokenizer = _load(path)
    beside = (path.parent if path.name == "tokenizer.json" else path) / CHAT_TEMPLATE
    if chat_template is not None:
        tokenizer.template_file = Path(chat_template)
    elif beside.is_file():
        tokenizer.template_file = beside
    return tokenizer


def _load(path: Path) -> Tokenizer:
    # one process per core tokenizes; threads inside would only fight over the cores
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if path.is_file():
        if path.suffix == ".model":
            return _sentencepiece(path)
        if path.name.endswith("vocab.txt"):
            return _bert(path)
        if path.name == "tokenizer.json":
            return _hugging_face(path.parent)
    elif path.is_dir():
        names = {file.name for file in path.iterdir()}
        models = sorted(file for file in path.iterdir() if file.suffix == ".model")
        if "tokenizer.json" in names:
            return _hugging_face(path)
        if {"vocab.json", "merges.txt"} <= names:
            return _gpt2(path)
        if "vocab.txt" in names:
            return _bert(path / "vocab.txt")
        if len(models) == 1:
            return _sentencepiece(models[0])
    raise ValueError(
        f"tokenizer {path}: {'nothing there' if not path.exists() else 'not recognised'}; give a SentencePiece "
        ".model, a BERT vocab.txt, or a folder with tokenizer.json, vocab.json + merges.txt, vocab.txt or one .model"
    )


def identity_of(tokenizer: Tokenizer) -> TokenizerIdentity:
    """What shards made with this tokenizer remember of it."""
    return TokenizerIdentity(
        hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        files=tokenizer.file_names,
    )


def _stored_name(kind: str, file: Path) -> str:
    if kind == "sentencepiece":
        return "tokenizer.model"
    return "vocab.txt" if kind == "bert" else file.name


def _sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    spec = sentencepiece_model.read_spec(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString(), num_threads=1)
    except (RuntimeError, OSError) as problem:
        raise ValueError(f"tokenizer {path}: not a SentencePiece model ({problem})") from problem
    size = model.get_piece_size()
    masks = [i for i in (model.piece_to_id(p) for p in (MASK_PIECE, "[MASK]")) if model.is_control(i)]
    mask = masks[0] if masks else size
    eos = model.eos_id() if model.eos_id() >= 0 else model.bos_id()
    if eos < 0:
        raise ValueError(f"tokenizer {path}: has no </s> to put between documents; train one with train_tokenizer.py")
    bos = model.bos_id() if model.bos_id() >= 0 else eos
    pad = model.pad_id() if model.pad_id() not in (-1, mask) else eos
    text = {i: model.id_to_piece(i) for i in range(size) if model.is_control(i)} | {mask: MASK_PIECE}
    special = (mask, bos, eos, pad)
    keeps_text = sentencepiece_model.keeps_text(spec)
    encode = sentencepiece_model.exact_encoder(model, spec) if keeps_text else model.encode
    cuts = sentencepiece_model.cuts_at_spaces(spec)
    return Tokenizer(
        "sentencepiece", max(size, mask + 1), *special, (path,), text, encode, model.decode, cuts_at_spaces=cuts
    )


def _fast(tokenizer) -> tuple[Callable, Callable]:
    tokenizer.encode_special_tokens = True  # the name of a special token in a text is text

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as problem:  # the library has no class of its own: a missing unknown token, for instance
            raise ValueError(f"text that this tokenizer cannot encode ({problem})") from problem

    return encode, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def _gpt2(folder: Path) -> Tokenizer:
    import tokenizers

    files = (folder / "merges.txt", folder / "vocab.json")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(files[1]), str(files[0])))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    size = tokenizer.get_vocab_size()
    eos = tokenizer.token_to_id(_GPT2_EOS)
    if eos is None:
        raise ValueError(f"tokenizer {folder}: vocab.json has no {_GPT2_EOS}; is it GPT-2's?")
    text = {eos: _GPT2_EOS, size: MASK_PIECE}
    special = (size, eos, eos, eos)
    return Tokenizer("gpt2", size + 1, *special, files, text, *_fast(tokenizer), cuts_at_spaces=True)


def bert_pieces(path: Path) -> list[str]:
    """The pieces of a vocab.txt: its lines, which end at newlines and nowhere else."""
    lines = path.read_bytes().decode("utf-8").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _bert(path: Path) -> Tokenizer:
    import tokenizers

    pieces = bert_pieces(path)
    missing = [piece for piece in ("[UNK]", "[CLS]", "[SEP]", "[MASK]") if piece not in pieces]
    if missing:
        raise ValueError(f"tokenizer {path}: vocab.txt lacks {', '.join(missing)}; is it BERT's?")
    # a cased vocabulary says so by holding capitals
    lowercase = not any(re.fullmatch(r"[A-Z][a-z]+", piece) for piece in pieces)
    # not BertWordPieceTokenizer: that one turns "[MASK]" in a text into the mask; and not from_file, which trims lines
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    pad = vocab.get("[PAD]", vocab["[SEP]"])
    text = {vocab[piece]: piece for piece in ("[CLS]", "[SEP]", "[MASK]")} | {pad: pieces[pad]}
    special = (vocab["[MASK]"], vocab["[CLS]"], vocab["[SEP]"], pad)
    return Tokenizer("bert", len(pieces), *special, (path,), text, *_fast(tokenizer), cuts_at_spaces=True)


def _hugging_face(folder: Path) -> Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        named = tokenizer_json.named_tokens(folder)
    except Exception as problem:  # the library has no class of its own
        raise ValueError(
            f"tokenizer {folder}: not a usable tokenizer.json or tokenizer_config.json ({problem})"
        ) from problem

    def id_of(*keys: str) -> int | None:
        texts = [named[key]["content"] if isinstance(named[key], dict) else named[key] for key in keys if key in named]
        found = [tokenizer.token_to_id(text) for text in texts if isinstance(text, str)]
        return next((i for i in found if i is not None), None)

    size = max(tokenizer.get_vocab().values()) + 1
    mask = id_of("mask_token")
    eos = id_of("eos_token", "sep_token")
    if eos is None:
        eos = tokenizer.token_to_id(_GPT2_EOS)
    if eos is None:
        raise ValueError(f"tokenizer {folder}: no eos_token in tokenizer_config.json; add one")
    bos = id_of("bos_token", "cls_token")
    pad = id_of("pad_token")
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    mask = size if mask is None else mask
    bos = eos if bos is None else bos
    special = (mask, bos, eos, eos if pad in (None, mask) else pad)
    text = {mask: MASK_PIECE, **{i: tokenizer.id_to_token(i) for i in (bos, eos, mask) if i < size}, **added}
    out_of_reach = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.without_text(content, {mask, bos, eos})))
    out_of_reach.no_truncation()
    out_of_reach.no_padding()
    kept = tuple(folder / name for name in _FOLDER_FILES if (folder / name).exists())
    tokens = tokenizer.get_added_tokens_decoder()
    strips = {i: (t.lstrip, t.rstrip) for i, t in tokens.items() if i in text and (t.lstrip or t.rstrip)}
    return Tokenizer(
        "hugging_face",
        max(size, mask + 1),
        *special,
        kept,
        text,
        *_fast(out_of_reach),
        cuts_at_spaces=tokenizer_json.is_byte_level(content),
        special_strips=strips,
    )
