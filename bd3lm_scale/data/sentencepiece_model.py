"""What a SentencePiece model says of itself, and what follows for encoding."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SPACE_SYMBOL = "\u2581"  # what SentencePiece writes for a space
_BPE = 2  # the library's number for it
# a piece that holds a visible character and then a space or newline
_ACROSS_A_CUT = re.compile(f"[!-~][{_SPACE_SYMBOL} \n]")


@dataclass(frozen=True)
class SentencePieceModel:
    """What a model file says, as far as its counterpart in a tokenizer.json needs it.

    Attributes:
        pieces: (text, score, type) by id; text, score and type are the library's.
        model_type: the library's number: 1 unigram, 2 BPE, 3 word, 4 char.
        byte_fallback: characters without a piece are spelled in bytes.
        character_map: the normalizer's compiled rules, empty for identity.
        adds_prefix: a space is put before the text.
        removes_spaces: runs of spaces become one.
    """

    pieces: tuple[tuple[str, float, int], ...]
    model_type: int
    byte_fallback: bool
    character_map: bytes
    adds_prefix: bool
    removes_spaces: bool


def read_spec(path: Path):
    """A .model file as SentencePiece's own protocol buffer (ValueError when it is none)."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    spec = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        spec.ParseFromString(path.read_bytes())
    except DecodeError as problem:
        raise ValueError(f"tokenizer {path}: not a SentencePiece model ({problem})") from problem
    if not spec.pieces:
        raise ValueError(f"tokenizer {path}: not a SentencePiece model (it has no pieces)")
    return spec


def description(spec) -> SentencePieceModel:
    """What exports need to know of it."""
    return SentencePieceModel(
        pieces=tuple((piece.piece, piece.score, piece.type) for piece in spec.pieces),
        model_type=spec.trainer_spec.model_type,
        byte_fallback=spec.trainer_spec.byte_fallback,
        character_map=spec.normalizer_spec.precompiled_charsmap,
        adds_prefix=spec.normalizer_spec.add_dummy_prefix,
        removes_spaces=spec.normalizer_spec.remove_extra_whitespaces,
    )


def keeps_text(spec) -> bool:
    """Whether a model takes text as it is, and can spell every character in bytes."""
    rules = spec.normalizer_spec
    return (
        spec.trainer_spec.byte_fallback
        and not rules.precompiled_charsmap
        and not rules.remove_extra_whitespaces
        and not spec.trainer_spec.treat_whitespace_as_suffix
    )


def exact_encoder(model, spec) -> Callable[[list[str]], list[list[int]]]:
    """Encode so that a literal U+2581 comes back: the library would make a space of it, so it is spelled in bytes."""
    import sentencepiece

    space_bytes = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
    inside = model
    if spec.normalizer_spec.add_dummy_prefix:  # a space before the text, but none before its later parts
        spec.normalizer_spec.add_dummy_prefix = False
        inside = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString(), num_threads=1)
        spec.normalizer_spec.add_dummy_prefix = True

    def encode(texts: list[str]) -> list[list[int]]:
        if not any(_SPACE_SYMBOL in text for text in texts):
            return model.encode(texts)
        encoded = []
        for text in texts:
            first, *others = text.split(_SPACE_SYMBOL)
            ids = model.encode(first)
            for part in others:
                ids += (*space_bytes, *inside.encode(part))
            encoded.append(ids)
        return encoded

    return encode


def cuts_at_spaces(spec) -> bool:
    """Whether no piece reaches across a lone space or newline, so that a text may be cut before one.

    A unigram model adds up its scores in single precision from the beginning of the text: there, parts may differ.
    """
    is_local = keeps_text(spec) and not spec.normalizer_spec.add_dummy_prefix and spec.trainer_spec.model_type == _BPE
    return is_local and not any(_ACROSS_A_CUT.search(piece.piece) for piece in spec.pieces)
