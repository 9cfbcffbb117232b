"""What a Hugging Face tokenizer folder says of itself, and how its special tokens are put out of a text's reach."""

import json
import re
from pathlib import Path


def named_tokens(folder: Path) -> dict:
    """The special tokens that the configuration names, by role: "mask_token", ..."""
    named: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            named |= {key: value for key, value in content.items() if key.endswith("_token") and value}
    return named


def read_template(file: Path) -> str:
    """A chat template's text (ValueError where there is none)."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"chat template {file}: cannot be read ({problem})") from problem


def template_in(settings: Path) -> str | None:
    """The chat template in a tokenizer_config.json: the only one, or the one that is called default."""
    found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default") if len(named) != 1 else next(iter(named.values()))
    return found if isinstance(found, str) and found else None


def without_text(content: dict, special: set[int]) -> dict:
    """A tokenizer.json in which no text stands for the `special` ids, all other ids unchanged.

    Added tokens become special ones, which are not looked for in texts, and entries of the vocabulary get names that
    nobody writes (noncharacters); a text that holds one of these is found when it is encoded.
    """
    model = content["model"]
    vocab = model["vocab"]
    entries = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    renamed = {name: f"\ufdd0{i}\ufdd1" for name, i in entries if i in special}
    if isinstance(vocab, dict):
        vocab = {renamed.get(name, name): i for name, i in vocab.items()}
    else:
        vocab = [[renamed.get(name, name), score] for name, score in vocab]
    model = {**model, "vocab": vocab}
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if model.get("merges"):
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if renamed.keys().isdisjoint((*pair, "".join(pair)))]
    tokens = [
        {**token, "content": renamed.get(token["content"], token["content"]), "special": True}
        if token["id"] in special
        else token
        for token in content.get("added_tokens") or ()
    ]
    return {**content, "model": model, "added_tokens": tokens}


def is_byte_level(content: dict) -> bool:
    """Whether words are cut out as GPT-2 does, so that no token reaches across a lone space."""
    splitting = content.get("pre_tokenizer") or {}
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    is_plain = content.get("normalizer") is None and content["model"].get("type") == "BPE"
    reaching = (t for t in content.get("added_tokens") or () if not t["special"])
    return (
        is_plain
        and not content["model"].get("dropout")
        and wanted.items() <= {"use_regex": True, **splitting}.items()
        and not any(t["lstrip"] or t["rstrip"] or t["single_word"] or re.search(r"\s", t["content"]) for t in reaching)
    )
