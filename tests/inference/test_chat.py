"""`sample --chat`: the prompt of the template, answers as blocks are finished, until the answer's end."""

import io
import json

import pytest

from bd3lm_scale.data.chat import ChatFormat
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.inference.sampling import main
from bd3lm_scale.runtime.exit_codes import ExitCode
from tests.data.templates import MARKED, MISTRAL, turns
from tests.sample_runs import make_run

LENGTH = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    found = {name: make_run(folder / name, name) for name in ("bd3lm", "ar", "mdlm", "sedd")}
    for run in found.values():
        (run / "tokenizer" / "chat_template.jinja").write_text(MISTRAL)
    return found


class Written(io.StringIO):
    """What a command writes, and in which pieces."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


class Terminal(io.StringIO):
    """Lines that a person types."""

    def isatty(self):
        return True


@pytest.fixture
def talk(runs, monkeypatch, tmp_path):
    """Run the command on some lines: (exit code, what it wrote, its records)."""

    def run(name, lines, *arguments, terminal=False):
        out, file = Written(), tmp_path / "out.jsonl"
        file.unlink(missing_ok=True)
        monkeypatch.setattr("sys.stdin", (Terminal if terminal else io.StringIO)("".join(f"{x}\n" for x in lines)))
        monkeypatch.setattr("sys.stdout", out)
        options = ["--chat", "--length", LENGTH, "--output", file, "runtime.device=cpu", *arguments]
        code = main([str(runs[name]), *map(str, options)])
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return code, out, records

    return run


@pytest.mark.parametrize("name", ["bd3lm", "ar", "mdlm", "sedd"])
def test_answers_follow_the_prompt_of_the_template_block_by_block(runs, talk, name):
    tokenizer = load_tokenizer(runs[name] / "tokenizer")
    form = ChatFormat(tokenizer)
    lines = ["hi", json.dumps({"role": "user", "content": "a\nb"})] if name != "sedd" else ["x"]
    code, out, records = talk(name, lines, *(["--length", 8, "sampling.steps=20"] if name == "sedd" else []))
    assert code == 0
    messages = []
    for record, line in zip(records, ["hi", "a\nb"] if name != "sedd" else ["x"], strict=True):
        messages = [*messages, {"role": "user", "content": line}]
        prompt = [tokenizer.eos_token_id, *form.prompt(messages)]
        answer = record["tokens"][record["prompt_tokens"] :]
        assert record["tokens"][: record["prompt_tokens"]] == prompt
        assert 0 < len(answer) <= LENGTH
        assert record["finish"] == ("eos" if answer[-1] == tokenizer.eos_token_id else "length")
        assert record["finish"] == "eos" or len(answer) == (8 if name == "sedd" else LENGTH)
        messages = [*messages, {"role": "assistant", "content": tokenizer.decode(answer)}]
        assert record["messages"] == messages
    assert out.getvalue() == "".join(message["content"] + "\n" for message in messages[1::2])
    if name == "bd3lm":
        assert len(out.pieces) > 2 * LENGTH // 4 - 2, "an answer comes in blocks of 4"


def test_an_answer_ends_with_eos_and_is_the_same_at_any_place_of_the_input(talk):
    conversation = json.dumps({"messages": turns("x", "y", "z")})
    lines = [conversation, "", json.dumps(turns("x", "y", "z"))]
    options = ["--length", 900, "sampling.temperature=9", "sampling.nucleus_p=1.0"]
    code, _, records = talk("ar", lines, *options)
    assert code == 0
    assert [record["finish"] for record in records] == ["eos", "eos"]
    ends = [record["tokens"].count(256) for record in records]
    assert ends == [4, 4], "start, the template's own BOS, the answer before, this one"
    assert records[0]["tokens"][: records[0]["prompt_tokens"]] == records[1]["tokens"][: records[1]["prompt_tokens"]]
    again = talk("ar", [conversation], *options)[2]
    assert again[0]["tokens"] == records[0]["tokens"]


def test_at_a_terminal_a_person_is_asked_and_a_bad_line_is_no_end(talk):
    bad = json.dumps({"role": "nobody", "content": "x"})
    code, out, records = talk("bd3lm", ["one", bad, "/new", "two"], "--system", "be brief", terminal=True)
    assert code == 0
    assert out.getvalue().count("> ") == 5
    assert 'its role is "nobody"' in out.getvalue()
    system = {"role": "system", "content": "be brief"}
    assert [r["messages"][:2] for r in records] == [[system, turns("one")[0]], [system, turns("two")[0]]]


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        (["x", '{"messages": []}'], [], "--chat, line 2: field 'messages' has no messages"),
        ([json.dumps(turns("x", "y"))], [], "--chat, line 1: the last message is the assistant's own"),
        ([json.dumps([{"role": "tool", "content": "x"}, *turns("x")])], [], "roles must alternate"),
        (["x"], ["--prompt", "x"], "--chat: answers messages; leave out --prompt"),
        (["x"], ["--num-samples", 2], "--chat: answers messages; leave out --prompt"),
        (["x"], ["--chat-template", "nowhere.jinja"], "chat template nowhere.jinja: cannot be read"),
    ],
)
def test_what_cannot_be_answered_is_one_message(talk, capsys, lines, options, reason):
    code, _, _ = talk("bd3lm", lines, *options)
    assert code == ExitCode.CONFIG
    assert reason in capsys.readouterr().err


def test_the_template_may_come_from_elsewhere(talk, tmp_path, runs):
    (tmp_path / "other").write_text(MARKED)
    record = talk("bd3lm", ["hi"], "--chat-template", tmp_path / "other")[2][0]
    assert record["text"].startswith("</s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
