"""The sample command: every objective, run folders, checkpoints and Hugging Face folders, one process or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd3lm_scale.checkpoint.hf.export import export_hf
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.reader import find_checkpoint, open_checkpoint
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.inference.sampling import main
from tests.sample_runs import CONTEXT, STEP, make_run

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in ("bd3lm", "ar", "mdlm", "sedd")}


def sample(source, *arguments, output: Path) -> list[dict]:
    code = main([str(source), "--output", str(output), "--quiet", "runtime.device=cpu", *map(str, arguments)])
    assert code == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize(
    ("objective", "arguments"),
    [
        ("bd3lm", ["--length", 48]),
        ("bd3lm", ["--length", 70, "sampling.sampler=ancestral", "sampling.steps=3"]),
        ("bd3lm", ["--length", 30, "sampling.sampler=entropy", "sampling.threshold=5"]),
        ("bd3lm", ["--length", 48, "sampling.recompute_window=true"]),
        ("bd3lm", ["--length", 20, "sampling.kv_cache=false"]),
        ("bd3lm", ["--length", 24, "--sampler", "simplex", "sampling.steps=3"]),
        ("ar", ["--length", 50]),
        ("mdlm", ["--length", 60]),
        ("sedd", ["--length", 32, "sampling.steps=20"]),
    ],
)
def test_every_objective_and_sampler_writes_whole_samples(runs, tmp_path, objective, arguments):
    prompts = ["--prompt", "def f(", "--prompt", "class A:\n    pass"]
    records = sample(runs[objective], *arguments, *prompts, "--num-samples", 2, output=tmp_path / "out.jsonl")
    tokenizer = load_tokenizer(runs[objective] / "tokenizer")
    assert [r["sample"] for r in records] == [0, 1, 2, 3]
    for record, prompt in zip(records, ["def f("] * 2 + ["class A:\n    pass"] * 2, strict=True):
        assert record["num_tokens"] == len(record["tokens"]) == arguments[1]
        assert record["tokens"][: record["prompt_tokens"]] == [tokenizer.eos_token_id, *tokenizer.encode(prompt)]
        assert record["text"].startswith("</s>" + prompt)
        assert tokenizer.mask_token_id not in record["tokens"]
        assert (record["finish"], record["step"], record["objective"]) == ("length", STEP, objective)
        assert 0 < record["nfe"] <= record["forward_calls"] or objective == "sedd"
    assert len({r["text"] for r in records}) == 4


def test_batch_size_does_not_change_the_samples(runs, tmp_path):
    """float32 rounding differs between batch sizes, which may move a draw at the very edge; it does not in these."""
    one = sample(runs["bd3lm"], "--num-samples", 5, "--length", 64, "--batch-size", 1, output=tmp_path / "1.jsonl")
    four = sample(runs["bd3lm"], "--num-samples", 5, "--length", 64, "--batch-size", 4, output=tmp_path / "4.jsonl")
    assert [r["tokens"] for r in one] == [r["tokens"] for r in four]
    other = sample(runs["bd3lm"], "--num-samples", 5, "--length", 64, "--seed", 2, output=tmp_path / "s.jsonl")
    assert all(a["tokens"] != b["tokens"] for a, b in zip(one, other, strict=True))


def test_the_plain_decoder_gives_the_same_samples(runs, tmp_path):
    """Within the context, the fast cached decoder and the uncached model draw the same text."""
    length = ["--num-samples", 3, "--length", CONTEXT]
    fast = sample(runs["bd3lm"], *length, output=tmp_path / "fast.jsonl")
    slow = sample(runs["bd3lm"], *length, "sampling.kv_cache=false", output=tmp_path / "slow.jsonl")
    assert [r["tokens"] for r in fast] == [r["tokens"] for r in slow]
    assert slow[0]["forward_calls"] < fast[0]["forward_calls"]


def test_samples_end_at_the_end_of_text(runs, tmp_path):
    settings = ["--length", 600, "--num-samples", 6, "sampling.stop_at_eos=true", "sampling.nucleus_p=1.0"]
    records = sample(runs["bd3lm"], *settings, output=tmp_path / "out.jsonl")
    ended = [r for r in records if r["finish"] == "eos"]
    assert ended
    for record in ended:
        assert record["text"].endswith("</s>")
        assert record["text"].count("</s>") == 2


def test_degenerate_samples_are_drawn_again(runs, tmp_path):
    settings = ["--length", 300, "sampling.min_entropy=100", "--num-samples", 2]
    once = sample(runs["bd3lm"], *settings, output=tmp_path / "once.jsonl")
    assert [(r["finish"], r["redraws"]) for r in once] == [("low_entropy", 0)] * 2
    again = sample(runs["bd3lm"], *settings, "sampling.max_redraws=2", output=tmp_path / "again.jsonl")
    assert [(r["finish"], r["redraws"]) for r in again] == [("low_entropy", 2)] * 2
    assert again[0]["tokens"] != once[0]["tokens"]


def test_a_hugging_face_folder_gives_the_same_samples_as_the_run_it_came_from(runs, tmp_path):
    run = runs["bd3lm"]
    reader = open_checkpoint(find_checkpoint(run))
    export_hf(reader, tmp_path / "hf")
    for file in (run / "tokenizer").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    ours = sample(run, "--length", 40, "--num-samples", 2, output=tmp_path / "a.jsonl")
    theirs = sample(tmp_path / "hf", "--length", 40, "--num-samples", 2, output=tmp_path / "b.jsonl")
    assert [r["text"] for r in ours] == [r["text"] for r in theirs]


def test_the_run_folder_receives_the_samples_and_the_terminal_the_text(runs, capsys):
    assert main([str(runs["bd3lm"]), "--length", "16", "--num-samples", "1", "runtime.device=cpu"]) == 0
    captured = capsys.readouterr()
    path = runs["bd3lm"] / "samples" / f"step_{STEP:08d}_first_hitting_16.jsonl"
    record = json.loads(path.read_text())
    tokenizer = load_tokenizer(runs["bd3lm"] / "tokenizer")
    assert tokenizer.decode(record["tokens"]) in captured.out
    assert "tokens/s" in captured.err
    assert str(path) in captured.err


def test_four_processes_give_the_samples_of_one(runs, tmp_path):
    """Two ranks hold one model together (tensor parallel), two such pairs share out the samples."""
    arguments = ["--num-samples", "5", "--length", "40", "--batch-size", "1", "--quiet", "runtime.device=cpu"]
    single = sample(runs["bd3lm"], *arguments, output=tmp_path / "single.jsonl")
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = ["-m", "bd3lm_scale.sample", str(runs["bd3lm"]), *arguments, "parallel.tensor_parallel_size=2"]
    done = subprocess.run(
        [*launch, *command, "--output", str(tmp_path / "four.jsonl")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "four.jsonl").read_text().splitlines()]
    assert [r["tokens"] for r in records] == [r["tokens"] for r in single]
    assert [r["sample"] for r in records] == list(range(5))


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "ar", "sedd"])
def test_gaps_in_a_text_are_filled(runs, tmp_path, objective):
    """One gap has the exported model's own log-probability; more of them, in texts of any length, are all written."""
    tokenizer, steps = (
        load_tokenizer(runs[objective] / "tokenizer"),
        ["sampling.steps=8"] if objective == "sedd" else [],
    )
    texts = ["def f(x):<mask:1> return x", "import <mask:3> as<mask>", "import <mask:2>"]
    arguments = [argument for text in texts for argument in ("--infill", text)]
    records = sample(runs[objective], *arguments, "--num-samples", 2, *steps, output=tmp_path / "out.jsonl")
    starts = [("def f(x):", " return x"), ("import ", " as"), ("import ", "")]
    assert [record["sample"] for record in records] == list(range(6))
    for record, (before, after), count in zip(
        records, [s for s in starts for _ in "ab"], (1, 1, 4, 4, 2, 2), strict=True
    ):
        given = len(tokenizer.encode(before)) + 1
        assert record["tokens"][:given] == [tokenizer.eos_token_id, *tokenizer.encode(before)]
        assert after in record["text"]
        assert [slot["token"] for slot in record["slots"]] == [record["tokens"][s["position"]] for s in record["slots"]]
        assert (len(record["slots"]), record["slots"][0]["position"]) == (count, given)
        assert record["num_tokens"] == record["length"] == record["prompt_tokens"] + count
        assert tokenizer.mask_token_id not in record["tokens"]
        assert all(slot["log_prob"] < 0 for slot in record["slots"])
    if objective != "sedd":
        export_hf(open_checkpoint(find_checkpoint(runs[objective])), tmp_path / "hf")
        model = BD3LM.from_pretrained(tmp_path / "hf").eval()
        tokens = torch.tensor([records[0]["tokens"]])
        tokens = tokens[:, : tokens.shape[1] // 4 * 4]  # whole blocks, so that nothing is open but the gap
        slot = records[0]["slots"][0]
        if objective == "ar":
            nats = model.score(tokens).token_nats[0, slot["position"]]
        else:
            labels = torch.full_like(tokens, -100)
            labels[0, slot["position"]] = slot["token"]
            nats = model.score(tokens, labels=labels).nats[0]
        assert -slot["log_prob"] == pytest.approx(float(nats), abs=2e-4)


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        ("sedd", ["--length", "33"], r"sampling.length (33)"),
        ("ar", ["sampling.sampler=ancestral"], "sampling.sampler (ancestral)"),
        ("bd3lm", ["--length", "4", "--prompt", "a long prompt"], "sampling.length (4)"),
        ("bd3lm", ["--checkpoint", "3"], "no checkpoint of step 3"),
        ("bd3lm", ["sampling.nucleus=0.5"], "sampling.nucleus_p"),
        ("bd3lm", ["--prompts", "nowhere.txt"], "no such file"),
        ("bd3lm", ["--infill", "no gap"], "nothing to fill in"),
        ("bd3lm", ["--infill", "a <mask:0>"], "nothing to fill in"),
        ("bd3lm", ["--infill", "a <mask:2>", "--length", "9"], "leave out --prompt"),
        ("sedd", ["--infill", "a <mask:40>"], "no way beyond its context of 32"),
        ("ar", ["--infill", "a <mask:2>", "sampling.sampler=ancestral"], "sampling.sampler (ancestral)"),
    ],
)
def test_mistakes_get_one_clear_message(runs, capsys, objective, arguments, message):
    assert main([str(runs[objective]), "runtime.device=cpu", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
