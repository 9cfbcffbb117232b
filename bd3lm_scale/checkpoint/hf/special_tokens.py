"""Special tokens of a tokenizer.json: names of their own, and no text that is read as one."""

import json
import re
from typing import Any

import tokenizers

NEVER = -1e6
"""Score of pieces of a unigram model that no text may produce."""


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """Every entry of the model's vocabulary and every added token."""
    vocab = content["model"]["vocab"]
    entries = vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return {**entries, **{token["content"]: token["id"] for token in content["added_tokens"]}}


def free_name(content: dict[str, Any], token_id: int, name: str) -> str:
    """The name of a special id, or another where a piece of text has that name: names find ids."""
    taken = {found for found, i in _ids(content).items() if i != token_id}
    candidates = (name, "<|mask|>", *(f"<|mask_{n}|>" for n in range(1, len(taken) + 2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def out_of_reach(content: dict[str, Any], special: dict[int, str]) -> dict[str, Any]:
    """The same tokenizer, whose model makes none of the special ids (with their names) of a text.

    With split_special_tokens a special token's name is text like any other, and a model whose vocabulary holds that
    name would read it. So nothing is merged into one, a unigram model takes anything else before it, and where that is
    not enough (a model of whole words, a character it does not know) the name is cut behind its first character.

    Raises:
        ValueError: a text is read as a special id all the same.
    """
    model, names = dict(content["model"]), set(special.values())
    if model.get("merges"):
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if names.isdisjoint((*pair, "".join(pair)))]
    if model.get("type") == "Unigram":
        model["vocab"] = [[name, NEVER if i in special else score] for i, (name, score) in enumerate(model["vocab"])]
    content = {**content, "model": model}
    readable = _read_from_text(content, special)
    if readable:
        borders = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in sorted(readable) if len(name) > 1)
        steps = [{"type": "Split", "pattern": {"Regex": "|".join(borders)}, "behavior": "Isolated", "invert": False}]
        if content["pre_tokenizer"] is not None:
            steps.insert(0, content["pre_tokenizer"])
        content = {**content, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
        readable = _read_from_text(content, special)
    if readable:
        raise ValueError(
            f"the tokenizer reads its special tokens {sorted(readable)} out of ordinary text, and a tokenizer.json "
            "cannot keep them apart; export without a tokenizer, or train with one that has other special tokens"
        )
    return content


def _read_from_text(content: dict[str, Any], special: dict[int, str]) -> set[str]:
    """Names of special ids that some text with such a name in it is read as."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    found: set[str] = set()
    for name in special.values():
        for written in (name, name.lower(), name.upper(), name.replace("\u2581", " ")):
            for text in (written, f"a{written}b", f"a {written} b", f"{written}{written}", f"\n{written}\n"):
                try:
                    ids = tokenizer.encode(text, add_special_tokens=False).ids
                except Exception:  # the library has no class of its own: characters without a token
                    continue
                found |= {special[i] for i in ids if i in special}
    return found
