"""The lm-evaluation-harness on a task of our own (no hub): figures, batches, text, and the command."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import BD3LMConfig
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.hf.tokenizer_files import export_tokenizer
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.train_sentencepiece import train_sentencepiece
from bd3lm_scale.evaluation.harness import BlockDiffusionLM, main
from tests.checkpoint.hf.test_modeling import FIELDS
from tests.checkpoint.hf.test_score import bound_of
from tests.sample_runs import make_run

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def stretch(generator, length):
    start = generator.randrange(26)
    return "".join(LETTERS[(start + i) % 26] for i in range(length))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer of letters, the task, and models of every objective; `trained` has learned the alphabet."""
    folder, generator = tmp_path_factory.mktemp("harness"), random.Random(1)
    texts = [stretch(generator, 24) + "\n" for _ in range(400)]
    train_sentencepiece(texts, folder / "tokenizer", vocab_size=292)
    tokenizer = load_tokenizer(folder / "tokenizer")
    for objective in ("bd3lm", "mdlm", "sedd", "ar"):
        build(folder / objective, tokenizer, objective)
    torch.manual_seed(1)
    model = build(folder / "trained", tokenizer, "bd3lm").train()
    rows = [[tokenizer.eos_token_id, *tokenizer.encode(text)] for text in texts]
    rows = torch.tensor([row[:20] for row in rows if len(row) >= 20])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        batch = rows[torch.randint(0, len(rows), (32,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder / "trained")
    docs = []
    for _ in range(40):
        text = stretch(generator, 14)
        wrong = [stretch(generator, 4) for _ in range(3)]
        choices = [text[10:], *wrong]
        generator.shuffle(choices)
        docs.append({"start": text[:10], "choices": choices, "answer": choices.index(text[10:])})
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "alphabet.yaml").write_text(TASK.format(name="alphabet", data=folder / "docs.jsonl"))
    return SimpleNamespace(folder=folder, docs=docs, tokenizer=tokenizer)


def build(folder, tokenizer, objective, length=24):
    torch.manual_seed(0)
    config = BD3LMConfig(
        **{
            "block_size": 8, "vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_token_id,
            "hidden_dim": 32, "n_blocks": 2, "n_heads": 2, "cond_dim": 8, "model_length": length, "dropout": 0.0,
            "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, **FIELDS[objective],
        },
    )  # fmt: skip
    config.block_size = 8
    model = BD3LM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and objective != "trained":
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    export_tokenizer(tokenizer, folder, tokenizer.vocab_size, tokenizer.mask_token_id)
    return model


def request(*args):
    return SimpleNamespace(args=args)


def answers(lm, pairs):
    return lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)


def evaluated(place, model, **arguments):
    found = simple_evaluate(
        model="bd3lm",
        model_args={"pretrained": str(place.folder / model), "device": "cpu", **arguments},
        tasks=["alphabet"],
        task_manager=TaskManager(include_path=str(place.folder / "tasks"), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return found["results"]["alphabet"]["acc,none"], found["samples"]["alphabet"]


def test_a_task_of_ones_own_tells_a_trained_model_from_a_random_one(place):
    trained, samples = evaluated(place, "trained")
    assert trained > 0.9
    assert evaluated(place, "bd3lm")[0] < 0.6
    assert len(samples) == 40
    # and its figures are those of the model itself: here by plain enumeration of all masks, which is exact
    model = BD3LM.from_pretrained(place.folder / "trained").eval()
    for sample in samples[:2]:
        doc = sample["doc"]
        context = place.tokenizer.encode(doc["start"])
        for choice, (found, _) in zip(doc["choices"], sample["filtered_resps"], strict=True):
            ids = place.tokenizer.encode(doc["start"] + choice)
            if ids[: len(context)] != context:  # a token spans the border
                ids = context + place.tokenizer.encode(choice)
            with torch.no_grad():
                assert float(found) == pytest.approx(-bound_of(model, torch.tensor([ids]), len(context)), rel=1e-4)


def test_no_text_is_lost_at_the_border_of_context_and_continuation(place):
    lm, spanned = BlockDiffusionLM(str(place.folder / "bd3lm"), device="cpu"), 0
    for context, continuation in [("abcdefgh"[:i], "abcdefghijklmnop"[i:]) for i in range(1, 9)] + [("ab \n", " cd")]:
        before, after = lm._encode_pair(context, continuation)
        assert after
        assert place.tokenizer.decode(before) + place.tokenizer.decode(after) == context + continuation
        assert before == place.tokenizer.encode(context.rstrip())
        spanned += before + after != place.tokenizer.encode(context + continuation)
    assert spanned, "no token spans a border: the test lost its point"


def test_ar_log_likelihoods_are_sums_of_its_log_probabilities(place):
    lm = BlockDiffusionLM(str(place.folder / "ar"), device="cpu")
    model, pairs = lm.model, [("abcde", "fgh"), ("", "klm"), ("xyzab", "q"), ("mn", "opqrstuv")]
    found = answers(lm, pairs)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        given = place.tokenizer.encode(context) or [place.tokenizer.eos_token_id]
        ids = torch.tensor(
            [given + (lm._encode_pair(context, continuation)[1] if context else place.tokenizer.encode(continuation))]
        )
        with torch.no_grad():
            logits = model(ids).logits
        logits[..., model.config.mask_token_id] = float("-inf")
        log_p = logits.log_softmax(-1)[0, len(given) - 1 : -1]
        target = ids[0, len(given) :]
        assert value == pytest.approx(float(log_p.gather(1, target[:, None]).sum()), rel=1e-4)
        assert is_greedy == bool((log_p.argmax(-1) == target).all())
    assert lm.stderr == [0.0] * 4


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "sedd", "ar"])
def test_a_figure_does_not_depend_on_the_requests_beside_it(place, objective):
    """Short and long continuations, with and without noise: batches of 1, of 5, another order."""
    generator = random.Random(3)
    pairs = [
        (stretch(generator, generator.randrange(1, 9)), stretch(generator, generator.randrange(1, 12)))
        for _ in range(12)
    ]
    lm = BlockDiffusionLM(str(place.folder / objective), device="cpu", batch_size=5)
    together = answers(lm, pairs)
    stderr, lm.batch_size = list(lm.stderr), 1
    alone = answers(lm, pairs)
    assert [value for value, _ in alone] == pytest.approx([value for value, _ in together], rel=1e-4)
    assert [same for _, same in alone] == [same for _, same in together]
    lm.batch_size = 5
    assert [value for value, _ in answers(lm, pairs[::-1])][::-1] == pytest.approx([v for v, _ in together], rel=1e-4)
    assert any(stderr) == (objective != "ar")
    if objective in ("bd3lm", "mdlm"):
        exact = {value for (_, c), value in zip(pairs, stderr, strict=True) if len(place.tokenizer.encode(c)) <= 4}
        assert exact == {0.0}


@torch.no_grad()
def test_noise_has_the_error_that_is_reported(place, caplog):
    lm = BlockDiffusionLM(str(place.folder / "mdlm"), device="cpu")
    context, continuation = "abcd", "efghijk"
    before, after = lm._encode_pair(context, continuation)
    exact = -bound_of(lm.model, torch.tensor([before + after]), len(before))
    values, errors = [], []
    with caplog.at_level("INFO", logger="bd3lm_scale"):
        for seed in range(24):
            lm.seed = seed * 1000
            values.append(answers(lm, [(context, continuation)])[0][0])
            errors += lm.stderr
    assert "1 of 1 from 8 noise draws, standard error" in caplog.text
    values = torch.tensor(values)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 24**0.5 + 1e-4
    assert float(values.std()) < 1.6 * (sum(e**2 for e in errors) / 24) ** 0.5


@torch.no_grad()
@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
def test_long_texts_are_scored_in_windows_each_token_once(place, objective):
    lm = BlockDiffusionLM(str(place.folder / objective), device="cpu")
    text = stretch(random.Random(5), 70)
    ids = (lm.prefix_token_id, *place.tokenizer.encode(text))
    pieces = lm.pieces(ids[:1], ids[1:])
    assert sum((after for _, after in pieces), ()) == ids[1:], "every token once, in order"
    assert all(len(before) + len(after) <= 24 and before for before, after in pieces)
    place_of = 0
    for before, after in pieces:
        assert ids[place_of + 1 - len(before) : place_of + 1] == before, "what precedes it is its context"
        place_of += len(after)
    assert len(pieces[-1][0]) + len(pieces[-1][1]) == 24, "the last window is full"
    total = lm.loglikelihood_rolling([request(text)], disable_tqdm=True)[0]
    if objective == "ar":
        expected = 0.0
        for before, after in pieces:
            log_p = lm.model(torch.tensor([before + after])).logits
            log_p[..., lm.model.config.mask_token_id] = float("-inf")
            log_p = log_p.log_softmax(-1)[0, len(before) - 1 : -1]
            expected += float(log_p.gather(1, torch.tensor(after)[:, None]).sum())
        assert total == pytest.approx(expected, rel=1e-4)
    assert lm.loglikelihood_rolling([request("")], disable_tqdm=True) == [0]
    context = tuple(range(5, 60))
    assert lm.pieces(context, (7, 8)) == [(context[-22:], (7, 8))], "as much context as fits"


def test_greedy_continuations_are_recognised(place):
    """What the model itself would write, left to right, is greedy; anything else is not."""
    lm = BlockDiffusionLM(str(place.folder / "trained"), device="cpu")
    found = answers(lm, [("cdefghijkl", "mnop"), ("cdefghijkl", "mnoz"), ("cdefghijkl", "qnop")])
    assert [same for _, same in found] == [True, False, False]


@pytest.mark.parametrize("objective", ["trained", "ar", "mdlm"])
def test_text_is_written_in_batches_and_cut_at_stops(place, objective):
    lm = BlockDiffusionLM(str(place.folder / objective), device="cpu", sampler="confidence", threshold=2.0)
    contexts = ["abcdefghij", "klm", "qrstuvwxyzabc", "", "uvwxy" * 9]
    greedy = {"max_gen_toks": 12, "do_sample": False, "until": []}
    together = lm.generate_until([request(text, greedy) for text in contexts], disable_tqdm=True)
    lm.batch_size = 1
    assert together == lm.generate_until([request(text, greedy) for text in contexts], disable_tqdm=True)
    lm.batch_size = 8
    if objective == "trained":
        assert together[0].startswith("klmnop")
        assert together[2].startswith("defgh")
    for until in (["m", "f"], "n", ["op", "zz"]):
        stops = [until] if isinstance(until, str) else until
        found = lm.generate_until([request(text, {**greedy, "until": until}) for text in contexts], disable_tqdm=True)
        for whole, part in zip(together, found, strict=True):
            end = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
            assert part == whole[:end]
    drawn = {"max_gen_toks": 6, "temperature": 1.0, "until": ["\n"]}
    mixed = [request(contexts[0], drawn), request(contexts[0], greedy), request(contexts[1], drawn)]
    assert lm.generate_until(mixed, disable_tqdm=True)[1] == together[0], "requests keep their own settings"
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until([request("ab", {**greedy, "num_beams": 3})], disable_tqdm=True)


def test_batches_take_an_eighth_of_the_passes_of_one_by_one(place, monkeypatch):
    """Passes through the attention of a layer, which do not depend on the machine as times do."""
    passes, attention = [0], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **options):
        passes[0] += 1
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    generator = random.Random(7)
    pairs = [(stretch(generator, 9), stretch(generator, 4)) for _ in range(128)]
    texts = [request(context, {"max_gen_toks": 12, "until": ["?"]}) for context, _ in pairs]
    lm = BlockDiffusionLM(str(place.folder / "bd3lm"), device="cpu")

    def score(some):
        answers(lm, some)

    def write(some):
        lm.generate_until(some, disable_tqdm=True)

    def passes_each(work, some, batch_size):
        lm.batch_size, passes[0] = batch_size, 0
        work(some)
        return passes[0] / len(some)

    for work, some in ((score, pairs), (write, texts)):
        alone, together = passes_each(work, some[:16], 1), passes_each(work, some, 64)
        assert alone > 8 * together > 0, (work.__name__, alone, together)


@pytest.mark.slow  # lm_eval reads the thousands of its own tasks each time
def test_the_command_takes_folders_runs_and_lm_evals_own_arguments(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks = ["--tasks", "alphabet", "--include_path", str(place.folder / "tasks"), "--device", "cpu"]
    assert main([str(place.folder / "trained"), *tasks, "--limit", "10", "--output_path", str(tmp_path / "out")]) == 0
    assert "|alphabet|" in capsys.readouterr().out
    assert list((tmp_path / "out").rglob("results*.json"))
    model = f"pretrained={place.folder / 'ar'},seed=3"
    assert main(["--model", "bd3lm", "--model_args", model, *tasks, "--limit", "4"]) == 0
    assert "|alphabet|" in capsys.readouterr().out
    run = make_run(tmp_path / "run", "bd3lm")
    assert main([str(run), *tasks, "--limit", "4", "--draws", "2", "--weights", "raw"]) == 0
    assert "|alphabet|" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing"), *tasks]) != 0
    assert "nothing" in capsys.readouterr().err


def test_mistakes_are_named(place):
    folder = str(place.folder / "bd3lm")
    for options, message in (({"dtype": "int8"}, "dtype"), ({"batch_size": 0}, "batch_size \\(0\\)")):
        with pytest.raises(ValueError, match=message):
            BlockDiffusionLM(folder, device="cpu", **options)
    broken = BlockDiffusionLM(folder, device="cpu")
    with torch.no_grad():
        broken.model.backbone.output_layer.linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        answers(broken, [("ab", "cd")])
