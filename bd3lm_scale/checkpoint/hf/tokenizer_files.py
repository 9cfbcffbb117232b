"""Tokenizers as transformers reads them: one tokenizer.json for every kind, loadable without sentencepiece.

Special ids cannot be produced by text (`split_special_tokens`), nothing is added around text, the mask is never the
padding. A tokenizer with a chat template takes the names of special tokens for the tokens, as `apply_chat_template`
needs: transformers tokenizes what the template has written as one text. The original files (tokenizer.model,
vocab.json, ...) are copied too: from-hf takes them back unchanged.
"""

import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""SentencePiece's types of pieces."""
UNIGRAM, BPE = 1, 2
SPACE = "\u2581"
CHAT_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"
NEVER = -1e6
"""Score of pieces that no text may produce."""


class TokenizerLike(Protocol):
    """What is needed of a tokenizer (data.tokenizer.Tokenizer has it)."""

    @property
    def kind(self) -> str:
        """sentencepiece | gpt2 | bert | hugging_face."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids, the mask included."""
        ...

    @property
    def mask_token_id(self) -> int:
        """Differs from all other special ids."""
        ...

    @property
    def special_text(self) -> dict[int, str]:
        """How each special id is written."""
        ...

    @property
    def chat_template(self) -> str | None:
        """What turns messages into text."""
        ...

    def save(self, folder: str | Path) -> None:
        """Copy the original files."""
        ...


@dataclass(frozen=True)
class TokenizerReport:
    """What was written: the kind, and the special ids as config.json wants them."""

    kind: str
    ids: dict[str, int]


def export_tokenizer(tokenizer: TokenizerLike, folder: Path, vocab_size: int, mask_token_id: int) -> TokenizerReport:
    """Write tokenizer.json and its configuration beside the original files.

    Raises:
        ValueError: the tokenizer is not the one the model was trained with, or cannot be represented.
    """
    if (tokenizer.vocab_size, tokenizer.mask_token_id) != (vocab_size, mask_token_id):
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids with mask {tokenizer.mask_token_id}, the model "
            f"{vocab_size} with mask {mask_token_id}; give the tokenizer the model was trained with"
        )
    tokenizer.save(folder)
    build = {"sentencepiece": _sentencepiece, "gpt2": _gpt2, "bert": _bert, "hugging_face": _hugging_face}
    content = build[tokenizer.kind](folder)
    special = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "mask")}
    text = {**tokenizer.special_text, **{i: _written(content, i) for i in special.values() if _written(content, i)}}
    content["added_tokens"] = _added(content, {i: text[i] for i in (*tokenizer.special_text, *special.values())})
    _write(folder / "tokenizer.json", content)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "right",
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in content["added_tokens"]
        },
    }
    if tokenizer.chat_template is not None:
        settings |= {"chat_template": tokenizer.chat_template, "split_special_tokens": False}
    roles = {f"{role}_token": text[token] for role, token in special.items()}
    unknown = content["model"].get("unk_token")
    if unknown is not None:
        roles["unk_token"] = unknown
    _write(folder / "tokenizer_config.json", settings | roles)
    _write(folder / "special_tokens_map.json", roles)
    return TokenizerReport(tokenizer.kind, {f"{role}_token_id": token for role, token in special.items()})


def original_files(folder: Path) -> list[Path]:
    """The tokenizer files of an export or a Hugging Face folder from which our own tokenizer can be made again."""
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models
    for names in (("vocab.json", "merges.txt"), ("vocab.txt",)):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return [folder / name for name in names if (folder / name).is_file()] if (folder / names[0]).is_file() else []


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy a Hugging Face folder's tokenizer, its chat template included, for our own use; False when it has none."""
    files = original_files(source)
    if not files:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if (source / CHAT_TEMPLATE).is_file():
        shutil.copyfile(source / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    elif (source / _SETTINGS).is_file() and not (folder / _SETTINGS).exists():
        template = json.loads((source / _SETTINGS).read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, str):
            (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return True


# ---- the kinds -----------------------------------------------------------------------------------------------------


def _template(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": [], "model": model, **parts}


def _gpt2(folder: Path) -> dict[str, Any]:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _template(_bpe(vocab, merges, byte_fallback=False), pre_tokenizer=level, decoder=level)


def _bpe(vocab: dict[str, int], merges: list[Any], byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "vocab": vocab,
        "merges": merges,
    }


def _bert(folder: Path) -> dict[str, Any]:
    # lines end at newlines and nowhere else: a piece may be any other separator
    lines = (folder / "vocab.txt").read_bytes().decode("utf-8").split("\n")
    pieces = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    is_cased = any(
        len(p) > 1 and p[0].isascii() and p[0].isupper() and p[1:].isalpha() and p[1:].islower() for p in pieces
    )
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {piece: i for i, piece in enumerate(pieces)},
    }
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": not is_cased,
    }
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    return _template(model, normalizer=normalizer, pre_tokenizer={"type": "BertPreTokenizer"}, decoder=decoder)


def _hugging_face(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return content | {"truncation": None, "padding": None, "post_processor": None}


def _sentencepiece(folder: Path) -> dict[str, Any]:
    """A SentencePiece model; its U+2581 is written as the space it stands for, so a literal U+2581 stays apart."""
    spec = read_sentencepiece(folder / "tokenizer.model")
    names = [piece.replace(SPACE, " ") if kind in (NORMAL, USER_DEFINED) else piece for piece, _, kind in spec.pieces]
    if spec.model_type == BPE:
        model = _bpe({name: i for i, name in enumerate(names)}, _merges(names, spec), spec.byte_fallback)
        if not spec.byte_fallback:
            model |= {"unk_token": _unknown_piece(spec), "fuse_unk": True}
    elif spec.model_type == UNIGRAM:
        scores = [score if kind in (NORMAL, USER_DEFINED) else NEVER for _, score, kind in spec.pieces]
        unknown = names.index(_unknown_piece(spec))
        model = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [list(pair) for pair in zip(names, scores, strict=True)],
            "byte_fallback": spec.byte_fallback,
        }
    else:
        raise ValueError(
            f"tokenizer.model: type {spec.model_type} (word or char) has no counterpart; train bpe or unigram"
        )
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps: list[dict[str, Any]] = []
    if spec.character_map:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.character_map).decode()})
    if spec.removes_spaces:
        steps += [{"type": "Strip", "strip_left": True, "strip_right": True}, _replace({"Regex": " {2,}"}, " ")]
    if spec.adds_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    symbols = [
        _token(i, names[i], special=False)
        for i, (_, _, kind) in enumerate(spec.pieces)
        if kind == USER_DEFINED and (len(names[i]) > 1 or spec.model_type == UNIGRAM)
    ]
    content = _template(model, decoder={"type": "Sequence", "decoders": decoders}, added_tokens=symbols)
    if steps:
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return content


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _unknown_piece(spec: "SentencePieceModel") -> str:
    return next(piece for piece, _, kind in spec.pieces if kind == UNKNOWN)


def _merges(names: list[str], spec: "SentencePieceModel") -> list[list[str]]:
    """The merges a SentencePiece BPE model implies: every way to make a piece of two, best pieces first."""
    score = {name: s for name, (_, s, kind) in zip(names, spec.pieces, strict=True) if kind == NORMAL}
    found = [
        (-merged, cut, name)
        for name, merged in score.items()
        for cut in range(1, len(name))
        if name[:cut] in score and name[cut:] in score
    ]
    return [[name[:cut], name[cut:]] for _, cut, name in sorted(found)]


# ---- added tokens --------------------------------------------------------------------------------------------------


def _token(token_id: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token_id, "content": text, **flags}


def _written(content: dict[str, Any], token_id: int) -> str | None:
    """How an added token of an existing tokenizer.json is written."""
    return next((token["content"] for token in content["added_tokens"] if token["id"] == token_id), None)


def _added(content: dict[str, Any], special: dict[int, str]) -> list[dict[str, Any]]:
    kept = {token["id"]: token for token in content["added_tokens"]}
    kept |= {token_id: _token(token_id, text, special=True) for token_id, text in special.items()}
    return [kept[token_id] for token_id in sorted(kept)]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ---- SentencePiece's file ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SentencePieceModel:
    """What a .model file says.

    Attributes:
        pieces: (text, score, type) by id.
        model_type: UNIGRAM, BPE, ...
        character_map: the normalizer's compiled rules, empty for identity.
    """

    pieces: list[tuple[str, float, int]]
    model_type: int
    byte_fallback: bool
    character_map: bytes
    adds_prefix: bool
    removes_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a SentencePiece model file through the library's own protocol buffer; ValueError when it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        spec.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: not a SentencePiece model ({error})") from error
    if not spec.pieces:
        raise ValueError(f"{path}: not a SentencePiece model (it has no pieces)")
    return SentencePieceModel(
        pieces=[(piece.piece, piece.score, piece.type) for piece in spec.pieces],
        model_type=spec.trainer_spec.model_type,
        byte_fallback=spec.trainer_spec.byte_fallback,
        character_map=spec.normalizer_spec.precompiled_charsmap,
        adds_prefix=spec.normalizer_spec.add_dummy_prefix,
        removes_spaces=spec.normalizer_spec.remove_extra_whitespaces,
    )
