"""The mask token of a model that was trained without one, and its tokenizer with it.

The mask is the tokenizer's own where it names one, else a reserved id that nothing uses, else a row of the embedding
that no token has, else a new row. Every id of the model is a token of the tokenizer that is written, so that both have
as many.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3lm_scale.checkpoint.hf.importing import read_json
from bd3lm_scale.data.sentencepiece_model import description, read_spec

NAMES = ("<|mask|>", "<mask>", "[MASK]", "<|MASK|>", "<MASK>")
"""What tokenizers call their mask; the first is the name of a new one."""
RESERVED = re.compile(r"[<\[]\|?(reserved|unused|extra|dummy)(_[a-z_]*)?\d+\|?[>\]]", re.IGNORECASE)
"""Names of ids that are kept for later use."""
JSON, CONFIG, MAP, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
OWN, RESERVED_ID, SPARE_ROW, NEW_ROW = "the tokenizer's own", "a reserved id", "an unused row", "a new row"


@dataclass(frozen=True)
class MaskToken:
    """The mask.

    Attributes:
        token_id: its id.
        text: how it is written.
        origin: the tokenizer's own | a reserved id | an unused row | a new row.
        vocab_size: ids of the model with it.
    """

    token_id: int
    text: str
    origin: str
    vocab_size: int


@dataclass(frozen=True)
class _Known:
    """What a tokenizer folder says: the text of each id, which ids are added tokens, and what its other files name."""

    text: dict[int, str]
    added: tuple[int, ...]
    roles: dict[str, str]
    template: str

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.text) + 1

    def has_role(self, token: int) -> bool:
        """Whether it is another special token than the mask."""
        return any(self.text[token] == named for role, named in self.roles.items() if role != "mask_token")

    def is_named(self, token: int) -> bool:
        """Whether a role other than the mask's, or the chat template, uses it."""
        return self.text[token] in self.template or self.has_role(token)


def choose_mask(
    folder: Path, rows: int, given: int | None = None, taken: set[int] | frozenset[int] = frozenset()
) -> MaskToken:
    """The mask of a model with `rows` ids.

    Args:
        folder: of the tokenizer; one without a tokenizer leaves a new row.
        rows: of the embedding.
        given: an id that shall be the mask; `rows` for a new one.
        taken: ids with a meaning of their own (BOS, EOS, padding).

    Raises:
        ValueError: the tokenizer has more ids than the model, or the given id is none or taken.
    """
    known = _read(folder)
    if known is not None and known.size > rows:
        raise ValueError(
            f"{folder}: the tokenizer has {known.size} ids, the model {rows}; give the model's own with --tokenizer"
        )
    if given is not None:
        return _given(known, rows, given, taken)
    if known is None:
        return MaskToken(rows, NAMES[0], NEW_ROW, rows + 1)
    by_text = {text: token for token, text in known.text.items()}
    own = [by_text[name] for name in (known.roles.get("mask_token"), *NAMES) if name in by_text]
    own = [token for token in own if token not in taken and not known.is_named(token)]
    if own:
        return MaskToken(own[0], known.text[own[0]], OWN, rows)
    is_free = (i for i in sorted(known.added) if RESERVED.fullmatch(known.text[i]) and i not in taken)
    for token in is_free:
        if not known.is_named(token):
            return MaskToken(token, known.text[token], RESERVED_ID, rows)
    if known.size < rows:
        return MaskToken(known.size, _unused_name(known, NAMES[0]), SPARE_ROW, rows)
    return MaskToken(rows, _unused_name(known, NAMES[0]), NEW_ROW, rows + 1)


def _given(known: _Known | None, rows: int, given: int, taken: set[int] | frozenset[int]) -> MaskToken:
    if not 0 <= given <= rows:
        raise ValueError(f"mask_token_id ({given}): use an id below {rows}, or {rows} for a new one")
    if given in taken or (known is not None and given in known.text and known.has_role(given)):
        raise ValueError(f"mask_token_id ({given}): has a meaning of its own; use an id that nothing uses")
    name = NAMES[0] if known is None else known.text.get(given) or _unused_name(known, NAMES[0])
    if given == rows:
        return MaskToken(rows, name, NEW_ROW, rows + 1)
    is_known = known is not None and given in known.text
    return MaskToken(given, name, RESERVED_ID if is_known else SPARE_ROW, rows)


def write_tokenizer(source: Path, folder: Path, mask: MaskToken) -> bool:
    """Write the tokenizer with the mask, and with a token for every row that has none; False where there is none.

    A SentencePiece model alone is copied: our reader gives it a mask behind its last piece.
    """
    if not (source / JSON).is_file():
        models = sorted(source.glob("*.model"))
        if len(models) == 1:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(models[0], folder / "tokenizer.model")
        return len(models) == 1
    known = _read(source)
    assert known is not None
    folder.mkdir(parents=True, exist_ok=True)
    content, settings = read_json(source / JSON), _optional(source / CONFIG)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = content.get("added_tokens") or []
    for token in range(known.size, mask.vocab_size):
        text = mask.text if token == mask.token_id else _unused_name(known, f"<|unused_{token}|>")
        added.append({"id": token, "content": text, **flags})
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"][str(token)] = {"content": text, **flags}
    _write(folder / JSON, {**content, "added_tokens": added})
    _write(folder / CONFIG, {**settings, "mask_token": mask.text})
    if (source / MAP).is_file():
        _write(folder / MAP, {**read_json(source / MAP), "mask_token": mask.text})
    if (source / TEMPLATE).is_file():
        shutil.copyfile(source / TEMPLATE, folder / TEMPLATE)
    return True


def _read(folder: Path) -> _Known | None:
    """None where the folder has no tokenizer that we can give a mask."""
    if not (folder / JSON).is_file():
        models = sorted(folder.glob("*.model"))
        if len(models) != 1:
            return None
        pieces = description(read_spec(models[0])).pieces
        return _Known({i: text for i, (text, _, _) in enumerate(pieces)}, (), {}, "")
    content, settings = read_json(folder / JSON), _optional(folder / CONFIG)
    model, tokens = content.get("model"), content.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict | list) or not vocab or not isinstance(tokens, list):
        raise ValueError(f"{folder / JSON}: has no vocabulary; save the tokenizer again")
    entries = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    text = {i: name for name, i in entries} | {token["id"]: token["content"] for token in tokens}
    roles = {
        role: str(named.get("content") if isinstance(named, dict) else named)
        for role, named in (_optional(folder / MAP) | settings).items()
        if role.endswith("_token") and isinstance(named, str | dict)
    }
    template = json.dumps(settings.get("chat_template") or "", ensure_ascii=False)
    if (folder / TEMPLATE).is_file():
        template += (folder / TEMPLATE).read_text(encoding="utf-8")
    return _Known(text, tuple(token["id"] for token in tokens), roles, template)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _unused_name(known: _Known, wanted: str) -> str:
    """`wanted`, with a number where the tokenizer has a token of that name."""
    texts, name, number = set(known.text.values()), wanted, 1
    while name in texts:
        name, number = f"{wanted[:-2]}_{number}{wanted[-2:]}", number + 1
    return name


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
