"""Shards of conversations: which tokens are targets, in the tar and in the index; prepared as plain text is."""

import json
import random

import numpy as np
import pytest
import webdataset

from bd3lm_scale.config.schema import DataConfig, MixtureSource
from bd3lm_scale.data import tokenizing
from bd3lm_scale.data.chat import ChatFormat
from bd3lm_scale.data.http import DamagedError
from bd3lm_scale.data.index import open_split
from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.shards import write_shard
from bd3lm_scale.data.stream import open_stream
from bd3lm_scale.data.targets import TargetIndex, check_runs, cut_runs, runs_of
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.tokenizing import Preparation
from bd3lm_scale.errors import BadShardError
from tests.data.preparing import contents, load_tool, prepare_through_kills, write_jsonl
from tests.data.templates import CHATML, FORGETS, MARKED, PLAIN, turns, write_conversations, write_tokenizer

CONVERSATIONS = [
    turns(*[f"x{i} is {'x ' * (i % 5)}the square" for i in range(2 * n)], *(["and?"] if n % 3 == 0 else []))
    for n in [1, 2, 3, 1, 5, 2, 1, 1, 4, 2] * 3
]


def marks(split) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a split, and which of them are targets, as plain webdataset reads them."""
    tokens, is_target = [], []
    for sample in webdataset.WebDataset(sorted(map(str, split.glob("*.tar"))), shardshuffle=False).decode():
        tokens.append(sample["tokens.npy"])
        is_target.append(np.zeros(len(tokens[-1]), bool))
        for start, stop in sample["targets.npy"]:
            is_target[-1][start:stop] = True
    return np.concatenate(tokens), np.concatenate(is_target)


@pytest.mark.parametrize("seed", range(20))
def test_runs_say_what_the_marks_say(seed):
    draw = np.random.default_rng(seed)
    is_target = draw.random(draw.integers(0, 90)) < draw.random()
    runs = runs_of(is_target)
    check_runs(runs, len(is_target), "it")
    index = TargetIndex(runs)
    for length in (1, 4, 9):
        start = np.arange(max(0, len(is_target) - length + 1))
        expected = np.array([is_target[s : s + length] for s in start], bool).reshape(len(start), length)
        assert (index.mark(start, length) == expected).all()
        assert (index.count(start, length) == expected.sum(1)).all()
    low, high = sorted(draw.integers(0, len(is_target) + 1, 2))
    assert (cut_runs(runs, low, high) == runs_of(is_target[low:high])).all()


@pytest.mark.parametrize("runs", [[[0, 4], [4, 6]], [[2, 2]], [[-1, 3]], [[5, 11]], [[4, 6], [1, 2]]])
def test_runs_that_cannot_be_are_refused(runs):
    with pytest.raises(ValueError, match=r"a\.tar: its target_runs are no runs"):
        check_runs(np.array(runs, np.int64), 10, "a.tar")


@pytest.fixture
def corpus(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return write_conversations(tmp_path / "talk.jsonl", CONVERSATIONS)


def task(corpus, **changes) -> Preparation:
    options = tokenizing.documents.Options(field="messages")
    return Preparation((str(corpus),), options=options, messages=True, shard_tokens=700, chunk_tokens=64, **changes)


def test_the_shards_hold_the_conversations_and_mark_the_answers(corpus, tmp_path):
    form = ChatFormat(load_tokenizer(tmp_path / "tokenizer"))
    made = prepare(task(corpus), str(tmp_path / "tokenizer"), tmp_path / "out", 0)["train"]
    ids, is_target = [], []
    for messages in CONVERSATIONS:
        found = form.encode(messages)
        ids += [*found.ids, form._tokenizer.eos_token_id]
        is_target += [*found.is_target, False]  # <|im_end|> has ended the answer
    tokens, found = marks(tmp_path / "out" / "train")
    assert tokens.tolist() == ids
    assert found.tolist() == is_target
    raw = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert (raw["version"], raw["num_targets"], made.num_targets) == (3, sum(is_target), sum(is_target))
    assert raw["tokenizer"]["chat_template"] == form.hash
    assert made.num_documents == len(CONVERSATIONS)
    whole = np.concatenate([TargetIndex(s.target_runs).mark(np.zeros(1, int), s.num_tokens)[0] for s in made.shards])
    assert whole.tolist() == is_target
    assert len(made.shards) > 2
    assert load_tokenizer(tmp_path / "out" / "tokenizer").chat_template == CHATML


def test_an_answer_that_nothing_has_ended_ends_with_eos(corpus, tmp_path):
    (tmp_path / "plain.jinja").write_text(PLAIN)
    plain = task(corpus, chat_template=str(tmp_path / "plain.jinja"))
    prepare(plain, str(tmp_path / "tokenizer"), tmp_path / "out", 0)
    tokens, is_target = marks(tmp_path / "out" / "train")
    eos = load_tokenizer(tmp_path / "tokenizer").eos_token_id
    ends_with_answer = [messages[-1]["role"] == "assistant" for messages in CONVERSATIONS]
    assert is_target[tokens == eos].tolist() == ends_with_answer
    assert load_tokenizer(tmp_path / "out" / "tokenizer").chat_template == PLAIN


def test_workers_and_kills_change_no_byte(corpus, tmp_path, monkeypatch):
    split = {"validation_fraction": 0.3}
    prepare(task(corpus, **split), str(tmp_path / "tokenizer"), tmp_path / "two", 2)
    monkeypatch.setattr(tokenizing, "_UNIT_BYTES", 500)
    prepare(task(corpus, **split), str(tmp_path / "tokenizer"), tmp_path / "whole", 0)
    assert contents(tmp_path / "two") == contents(tmp_path / "whole")
    kills = prepare_through_kills(task(corpus, **split), str(tmp_path / "tokenizer"), tmp_path / "out", units=5)
    assert kills > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_template_is_another_preparation(corpus, tmp_path):
    prepare(task(corpus), str(tmp_path / "tokenizer"), tmp_path / "out", 0)
    (tmp_path / "t.jinja").write_text(MARKED)
    other = task(corpus, chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(ValueError, match="another chat_template"):
        prepare(other, str(tmp_path / "tokenizer"), tmp_path / "out", 0)


BAD = [
    ('{"messages": null}', "null", "field 'messages' is null"),
    ('{"text": "x"}', "no such field", "no field 'messages'"),
    ('{"messages": "x"}', "no messages", "not a list of messages but str"),
    ('{"messages": []}', "no messages", "has no messages"),
    ('{"messages": ["x"]}', "bad message", "message 1 is not an object but str"),
    ('{"messages": [{"content": "x"}]}', "unknown role", "message 1: its role is none"),
    ('{"messages": [{"role": "asistant", "content": "x"}]}', "unknown role", '"asistant"; use system'),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role", "message 1: its role is"),
    ('{"messages": [{"role": "user"}]}', "no content", r"message 1 \(user\): its content is none"),
    ('{"messages": [{"role": "user", "content": null}]}', "no content", "its content is null"),
    ('{"messages": [{"role": "user", "content": ["x"]}]}', "not text", "not text but list"),
    ('{"messages": [{"role": "user", "content": " \\n"}]}', "empty message", "its content is empty"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no answer", "no message has the role 'assistant'"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character", r"message 1 \(user\) has \\ud800"),
    ('{"messages": [{"role": "user", "content": "\\ufdd0"}]}', "noncharacter", r"U\+FDD0"),
    (json.dumps({"messages": turns("x", "y"), "tools": "x"}), "bad tools", "'tools' is not a list but str"),
    (json.dumps({"messages": turns("x", "y", "z", "z")}), "answer not found", r"message 2 \(assistant\): the chat"),
    ("[1, 2]", "not a JSON object", "not a JSON object but list"),
    ("{", "not a JSON object", "not a JSON object"),
]


@pytest.mark.parametrize(("line", "kind", "reason"), BAD)
def test_a_bad_conversation_is_named_or_left_out_and_listed(tmp_path, line, kind, reason):
    write_tokenizer(tmp_path / "tokenizer", FORGETS)
    good = json.dumps({"messages": turns("x", "y")})
    (tmp_path / "talk.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=rf"talk.jsonl, record 2: .*{reason}.*line 2.*--on-bad-record skip"):
        prepare(task(tmp_path / "talk.jsonl"), str(tmp_path / "tokenizer"), tmp_path / "out", 0)
    skips = task(tmp_path / "talk.jsonl", on_bad_record="skip")
    made = prepare(skips, str(tmp_path / "tokenizer"), tmp_path / "skipped", 0)["train"]
    assert made.num_documents == 2
    assert made.preparation["read"]["bad_records"] == {kind: 1}
    (listed,) = [json.loads(text) for text in (tmp_path / "skipped" / "bad_records.jsonl").read_text().splitlines()]
    assert (listed["record"], listed["kind"]) == (2, kind)
    marked = marks(tmp_path / "skipped" / "train")[1]
    prepare(task(write_conversations(tmp_path / "good.jsonl", [turns("x", "y")] * 2)), str(tmp_path / "tokenizer"),
            tmp_path / "good", 0)  # fmt: skip
    assert (marked == marks(tmp_path / "good" / "train")[1]).all()


def test_the_tool_takes_conversations_and_says_what_does_not_go_with_them(corpus, tmp_path, capsys):
    tool = load_tool("prepare_data")
    command = [str(corpus), "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "out")]
    assert tool.main([*command, "--messages", "--workers", "0", "--validation-documents", "5"]) == 0
    assert "tokens of answers" in capsys.readouterr().out
    assert tool.main([*command, "--messages", "--workers", "0", "--dry-run"]) == 0
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "no").mkdir()
    write_tokenizer(tmp_path / "no", None)
    for arguments, reason in {
        ("--chat-template", "x"): "--chat-template: is for conversations; give --messages",
        ("--messages", "--detokenizer", "lm1b"): "--detokenizer: undoes the tokenization of plain text",
        ("--messages", "--validation-input", str(tmp_path / "text.txt")): "text.txt is another kind",
        ("--messages", "--tokenizer", str(tmp_path / "no")): "has no chat template; give one with --chat-template",
        ("--messages", "--field", "talk", "--output", str(tmp_path / "new")): "no field 'talk'",
    }.items():
        assert tool.main([*command, "--workers", "0", *arguments]) == 1
        assert reason in capsys.readouterr().err


def test_shards_without_targets_are_as_they_were(tmp_path):
    tokens, starts = np.arange(300) % 90, np.arange(0, 300, 7)
    plain = write_shard(tmp_path, "a.tar", tokens, starts, "uint8", 64)
    write_shard(tmp_path, "b.tar", tokens, starts, "uint8", 64, np.ones(300, bool))
    assert plain.target_runs is plain.target_members is None
    names = [sample.keys() for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)]
    assert all("targets.npy" not in keys for keys in names)
    assert plain.sha256 == "dc7be0cd2ab84d7ecf73fb586fdc306b5c514d3c8b93375b38460aea6c8d8546"


def test_a_changed_index_gives_the_same_targets_or_one_error(corpus, tmp_path):
    prepare(task(corpus), str(tmp_path / "tokenizer"), tmp_path / "out", 0)
    folder = tmp_path / "out" / "train"
    expected = [shard.target_runs.tolist() for shard in open_split(folder).shards]
    files = {name: (folder / name).read_bytes() for name in ("index.bin", "manifest.json")}
    draw, refused = random.Random(3), []
    for number in range(300):
        name = draw.choice(list(files))
        data = bytearray(files[name])
        if number % 3:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        else:
            del data[draw.randrange(len(data)) :]
        (folder / name).write_bytes(bytes(data))
        try:
            assert [shard.target_runs.tolist() for shard in open_split(folder).shards] == expected
        except (ValueError, OSError, DamagedError) as problem:
            refused.append(str(problem))
        (folder / name).write_bytes(files[name])
    assert len(refused) > 200
    assert [reason for reason in refused if str(folder) not in reason] == []
    text = files["manifest.json"].decode()
    for version in ("1", "2", "4"):
        (folder / "manifest.json").write_text(text.replace('"version": 3', f'"version": {version}'))
        with pytest.raises((ValueError, DamagedError), match="train"):
            [shard.target_runs for shard in open_split(folder).shards]


def test_a_mixture_with_plain_text_has_one_tokenizer_and_the_conversations_template(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", None)
    (tmp_path / "t.jinja").write_text(MARKED)
    (tmp_path / "other.jinja").write_text(CHATML)
    talk = write_conversations(tmp_path / "talk.jsonl", CONVERSATIONS)
    plain = tokenizing.Preparation((str(write_jsonl(tmp_path / "text.jsonl")),), shard_tokens=700, chunk_tokens=64)
    tasks = {"plain": plain}
    for name in ("t", "other"):
        tasks[name] = task(talk, chat_template=str(tmp_path / f"{name}.jinja"))
    for name, one in tasks.items():
        prepare(one, str(tmp_path / "tokenizer"), tmp_path / name, 0)
    sources = [MixtureSource(str(tmp_path / name), 1.0) for name in tasks]
    mixed = DataConfig(mixture=tuple(sources[:2]), context_length=16)
    stream = open_stream(mixed, 1)
    assert load_tokenizer(stream.tokenizer_path).chat_template == MARKED
    index = np.arange(400)
    is_plain = stream.source.dataset_of(index) == 0
    found = stream.layout(index)["is_target_BL"].numpy()
    assert found[is_plain].all()
    assert 0 < found[~is_plain].mean() < 0.9
    counts = stream.source.num_targets(index)
    assert (counts[:, 0] == found.sum(1)).all()
    assert (counts[:, 1] == found[:, 0]).all()
    assert stream.targets(index) == tuple(counts.sum(0))
    assert open_stream(DataConfig(path=str(tmp_path / "plain"), context_length=16), 1).targets(index) is None
    with pytest.raises(ValueError, match="another chat template than those before"):
        open_stream(DataConfig(mixture=tuple(sources), context_length=16), 1)
    (tmp_path / "t" / "tokenizer" / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ValueError, match="another chat template than its manifest"):
        open_stream(mixed, 1)


def test_rows_between_bos_and_eos_and_remote_shards_keep_their_targets(corpus, tmp_path):
    prepare(task(corpus), str(tmp_path / "tokenizer"), tmp_path / "out", 0)
    plain = open_stream(DataConfig(path=str(tmp_path / "out"), context_length=14), 1)
    remote = DataConfig(path=f"local://{tmp_path / 'out'}", context_length=16, wrap_rows=True, cache_dir=str(tmp_path))
    wrapped = open_stream(remote, 1)
    index = np.arange(50)
    marks = wrapped.layout(index)["is_target_BL"].numpy()
    assert (marks[:, 1:-1] == plain.layout(index)["is_target_BL"].numpy()).all()
    assert not marks[:, [0, -1]].any()
    assert wrapped.targets(index) == (marks.sum(), 0)
    assert load_tokenizer(wrapped.tokenizer_path).chat_template == CHATML


def test_a_damaged_list_of_targets_is_a_damaged_shard(corpus, tmp_path):
    made = prepare(task(corpus), str(tmp_path / "tokenizer"), tmp_path / "out", 0)["train"]
    config = DataConfig(path=str(tmp_path / "out"), context_length=16, retries=0)
    index = tmp_path / "out" / "train" / "index.bin"
    data = bytearray(index.read_bytes())
    place = data.find(made.shards[1].target_runs.tobytes())
    data[place] ^= 1
    index.write_bytes(bytes(data))
    stream = open_stream(config, 1)
    with pytest.raises(BadShardError) as caught:
        stream.targets(np.arange(stream.num_rows))
    assert caught.value.shard == "train-000001.tar"
    assert stream.without(("train-000001.tar",)).targets(np.arange(stream.num_rows)).tokens > 0
