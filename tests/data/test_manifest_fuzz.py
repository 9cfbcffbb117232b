"""Manifests changed at random: the same rows, or one error. Never other rows, never another exception."""

import copy
import json
import random

import numpy as np
import pytest

from bd3lm_scale.config.schema import DataConfig
from bd3lm_scale.data.shards import manifest_from_json, manifest_to_json
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.errors import BadShardError
from tests.data.sets import write_set

CASES = 500
VALUES = [None, True, 0, -1, 1, 16, 2**31, 2**63, 2**200, 0.5, 1e308, "", "x", "\ud800", "../x", [], {}, [[]], "train"]


def nodes(raw, path=()):
    """Places of all values in a JSON document."""
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from nodes(value, (*path, key))


def changed(text: str, draw: random.Random) -> str:
    if draw.random() < 0.15:
        place, noise = draw.randrange(len(text)), draw.choice(["", "0", "9", '"', "[", "]", "{", ",", "\u00e9"])
        return text[:place] + noise + text[place + draw.choice([0, 1, 40]) :]
    raw = json.loads(text)
    places = list(nodes(raw))
    for _ in range(draw.choice([1, 1, 2])):
        *above, key = draw.choice(places)
        holder = raw
        try:
            for step in above:
                holder = holder[step]
            act = draw.choice(["set", "delete", "swap", "double", "shift"])
            if act == "set":
                holder[key] = copy.deepcopy(draw.choice(VALUES))
            elif act == "delete":
                del holder[key]
            elif act == "swap":
                other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
                holder[key], holder[other] = holder[other], holder[key]
            elif act == "double" and isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            elif type(holder[key]) is int:
                holder[key] += draw.choice([-512, -16, -1, 1, 2, 16, 512])
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    return json.dumps(raw)


@pytest.mark.parametrize("has_hash", [True, False], ids=["as written now", "as earlier versions wrote it"])
def test_a_changed_manifest_gives_the_same_rows_or_one_error(tmp_path, tokenizer_path, has_hash):
    write_set(tmp_path, tokenizer_path, [70, 40, 40], version=1)
    config = DataConfig(path=str(tmp_path), context_length=8, retries=0)
    file = tmp_path / "train" / "manifest.json"
    text = file.read_text()
    if not has_hash:
        text = json.dumps({key: value for key, value in json.loads(text).items() if key != "rows_sha256"})
        file.write_text(text)
    rows = open_stream(config, 1).read(np.arange(30))
    draw, refused, other = random.Random(5), [], 0
    for _ in range(CASES if has_hash else CASES // 4):
        file.write_text(changed(text, draw), errors="surrogatepass")
        try:
            got = open_stream(config, 1).read(np.arange(30))
        except (ValueError, BadShardError) as problem:
            refused.append(str(problem))
        else:
            other += got.shape != rows.shape or bool((got != rows).any())
    assert len(refused) > 60
    assert [reason for reason in refused if str(tmp_path) not in reason and "train-" not in reason] == []
    if has_hash:
        assert other == 0
    else:
        assert other <= 5, "without the hash, whole shards can change places or go"


def test_a_changed_head_or_index_gives_the_same_rows_or_one_error(tmp_path, tokenizer_path):
    write_set(tmp_path, tokenizer_path, [70, 40, 40])
    config = DataConfig(path=str(tmp_path), context_length=8, retries=0)
    manifest, index = tmp_path / "train" / "manifest.json", tmp_path / "train" / "index.bin"
    text, table = manifest.read_text(), index.read_bytes()
    rows = open_stream(config, 1).read(np.arange(30))
    draw, refused = random.Random(7), []
    for case in range(CASES):
        if case % 2:
            manifest.write_text(changed(text, draw), errors="surrogatepass")
            index.write_bytes(table)
        else:
            manifest.write_text(text)
            place = draw.randrange(len(table))
            end = draw.choice([place + 1, place + 9, len(table)])
            index.write_bytes(table[:place] + draw.randbytes(draw.choice([0, 1, 8])) + table[end:])
        try:
            got = open_stream(config, 1).read(np.arange(30))
        except (ValueError, BadShardError) as problem:
            refused.append(str(problem))
        else:
            assert got.shape == rows.shape
            assert (got == rows).all()
    assert len(refused) > CASES // 2
    assert [reason for reason in refused if str(tmp_path) not in reason and "train-" not in reason] == []


def test_every_number_and_order_in_the_manifest_is_bound(tmp_path, tokenizer_path):
    write_set(tmp_path, tokenizer_path, [70, 40, 40], version=1)
    text = (tmp_path / "train" / "manifest.json").read_text()
    assert manifest_to_json(manifest_from_json(text, "here")) == text
    raw = json.loads(text)
    orders = [copy.deepcopy(raw) for _ in range(4)]
    orders[0]["shards"].reverse()
    orders[1]["shards"].pop()
    orders[2]["shards"][1]["name"], orders[2]["shards"][2]["name"] = "train-000002.tar", "train-000001.tar"
    orders[3]["num_text_bytes"] += 1
    for order in orders:
        with pytest.raises(ValueError, match=r"here: not a usable manifest \("):
            manifest_from_json(json.dumps(order), "here")
