"""Generative perplexity against a target-by-target computation, with a random-weight judge built here."""

import json
import math

import numpy as np
import pytest
import torch

from bd3lm_scale.diffusion.samplers.stopping import unigram_entropy
from bd3lm_scale.evaluation.generations import main, read_samples, summarize
from bd3lm_scale.evaluation.judge import JudgedText, JudgeMissing, judge_texts, load_judge, windows

CONTEXT = 32
EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """A GPT-2 of random weights with a byte-level tokenizer, saved as a user would have one."""
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("judge")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.6, eos_token_id=256
    )
    GPT2LMHeadModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(judge_folder):
    return load_judge(str(judge_folder))


TEXTS = ["short", "x" * 20 + " a longer text that needs several windows of the judge, so it goes on and on", "", "e"]


def nll_by_hand(judge, ids, context, stride):
    """Each target from its own forward pass over exactly the tokens its window shows it."""
    total, count = 0.0, 0
    for target in range(1, len(ids)):
        start = 0
        while target >= start + context:
            start += stride
        if ids[target] == judge.eos_token_id:
            continue
        logits = judge.model(torch.tensor([ids[start:target]])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[ids[target]].item()
        count += 1
    return total, count


@torch.inference_mode()
def test_judged_nll_is_the_target_by_target_sum(judge):
    texts = [*TEXTS, f"two documents{EOS}in one sample"]
    judged = judge_texts(judge, texts, context=CONTEXT, stride=12, batch_size=3)
    for text, figures in zip(texts, judged, strict=True):
        ids = judge.encode(text)
        nll, count = nll_by_hand(judge, ids, CONTEXT, 12)
        assert figures.num_tokens == len(ids)
        assert figures.num_scored == count
        assert figures.nll == pytest.approx(nll, rel=1e-5)
        assert figures.entropy == pytest.approx(unigram_entropy(np.array(ids)))
    assert judged[-1].num_scored == judged[-1].num_tokens - 2, "the end-of-text target is left out"
    assert judged[1].num_tokens > 2 * CONTEXT, "no text with several windows: the test lost its point"
    assert math.isnan(judged[2].perplexity)


def test_batching_does_not_change_the_figures(judge):
    alone = judge_texts(judge, TEXTS, context=CONTEXT, stride=16, batch_size=1)
    together = judge_texts(judge, TEXTS, context=CONTEXT, stride=16, batch_size=8)
    assert [t.nll for t in alone] == pytest.approx([t.nll for t in together], rel=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 48, 64, 65, 200])
@pytest.mark.parametrize("stride", [1, 16, 31])
def test_windows_score_every_target_once(num_tokens, stride):
    scored = []
    for window in windows(num_tokens, 32, stride):
        assert window.stop - window.start <= 32
        assert window.first_target > window.start
        scored += range(window.first_target, window.stop)
    assert scored == list(range(1, num_tokens))


def test_later_windows_score_their_last_stride_targets():
    assert [(w.start, w.stop, w.first_target) for w in windows(2048, 1024, 512)] == [
        (0, 1024, 1),
        (512, 1536, 1024),
        (1024, 2048, 1536),
    ]


def test_the_command_writes_the_papers_figures(judge_folder, judge, tmp_path, capsys):
    path = tmp_path / "block4.jsonl"
    lines = [
        {"text": t, "nfe": 10 + i, "num_tokens": n, "finish": f, "sampler": "first_hitting", "length": 24}
        for i, (t, n, f) in enumerate(zip(TEXTS, [5, 90, 0, 1], ["eos", "length", "eos", "eos"], strict=True))
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert main([str(path), "--judge", str(judge_folder), "--context", "32", "--stride", "16"]) == 0
    assert "gen_ppl" in capsys.readouterr().out
    figures = json.loads((tmp_path / "block4.evaluation.json").read_text())
    judged = judge_texts(judge, TEXTS, max_tokens=[24] * 4, context=32, stride=16)
    perplexities = [t.perplexity for t in judged if t.num_scored]
    assert figures["gen_ppl"] == pytest.approx(np.mean(perplexities))
    assert len(perplexities) == figures["num_judged"] == 2
    assert figures["num_unscored"] == 2
    assert figures["nfe"] == 11.5
    assert (figures["length_median"], figures["length_max"]) == (3, 90)
    assert figures["finish"] == {"eos": 3, "length": 1}
    assert figures["sampler"] == "first_hitting"


def test_pooled_perplexity_weighs_tokens_and_the_mean_weighs_samples():
    judged = [JudgedText(11, 10, 10 * math.log(2), 1.0), JudgedText(31, 30, 30 * math.log(8), 2.0)]
    figures = summarize([{"text": "a"}, {"text": "b"}], judged)
    assert figures["gen_ppl"] == pytest.approx(5.0)
    assert figures["gen_ppl_pooled"] == pytest.approx(2**2.5)
    assert figures["entropy"] == 1.5


def test_a_missing_judge_gets_one_message_with_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "s.jsonl"
    path.write_text('{"text": "hello"}\n')
    assert main([str(path), "--judge", "nobody/no-such-judge"]) == 2
    message = capsys.readouterr().err
    assert "hf download nobody/no-such-judge" in message
    assert "--judge no-such-judge" in message
    assert "Traceback" not in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(JudgeMissing, match=r"needs config\.json"):
        load_judge(str(tmp_path / "empty"))


def test_bad_sample_files_name_the_line(tmp_path):
    path = tmp_path / "s.jsonl"
    with pytest.raises(ValueError, match="no such file"):
        read_samples(path)
    path.write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_samples(path)
    path.write_text('{"tokens": [1]}\n')
    with pytest.raises(ValueError, match='line 1: no field "text"'):
        read_samples(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no samples"):
        read_samples(path)


def test_a_window_beyond_the_judges_context_is_refused(judge):
    with pytest.raises(ValueError, match=r"--context \(64\): judge .* at most 32"):
        judge_texts(judge, ["a"], context=64, stride=16)
    with pytest.raises(ValueError, match=r"--stride \(0\)"):
        windows(10, 32, 0)
