"""Training and evaluation on conversations: prompts stay clean, and answers alone are masked, scored and counted."""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import webdataset

from bd3lm_scale.config.load import load_config
from bd3lm_scale.data import tokenizing
from bd3lm_scale.data.batches import BatchPlan, BatchReader
from bd3lm_scale.data.prepare import prepare
from bd3lm_scale.data.stream import bytes_per_token, open_stream
from bd3lm_scale.data.tokenizer import load_tokenizer
from bd3lm_scale.data.tokenizing import Preparation
from bd3lm_scale.diffusion.noising import noise_rows
from bd3lm_scale.engine import build_engine
from bd3lm_scale.inference.sampling import main as sampling
from bd3lm_scale.model.denoiser import named_parameters
from bd3lm_scale.model.inference import CachedDecoder, FullDenoiser
from bd3lm_scale.parallel.mesh import init_mesh, shutdown
from bd3lm_scale.runtime.anomaly import AnomalyPolicy
from bd3lm_scale.training.step import noise_step, train_step
from bd3lm_scale.validation import validate
from bd3lm_scale.values import Cursor, Interval
from tests.data.preparing import load_tool
from tests.data.templates import CHATML, write_conversations, write_tokenizer
from tests.training_runs import CONFIG, WORDS, assert_same_run, losses_of, stream_of

LENGTH, ROWS, BLOCK = 32, 8, 8


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Shards of conversations with long questions, so that some rows hold no answer."""
    folder, draw = tmp_path_factory.mktemp("answers"), np.random.default_rng(0)
    say = lambda low, high: " ".join(draw.choice(WORDS, draw.integers(low, high)))  # noqa: E731
    talks = [
        [
            message
            for _ in range(draw.integers(1, 4))
            for message in (
                {"role": "user", "content": say(1, 14)},
                {"role": "assistant", "content": say(2, 12)},
            )
        ]
        for _ in range(60)
    ]
    write_tokenizer(folder / "tokenizer")
    options = tokenizing.documents.Options(field="messages")
    corpus = (str(write_conversations(folder / "talk.jsonl", talks)),)
    task = Preparation(
        corpus, options=options, messages=True, validation_documents=6, shard_tokens=1024, chunk_tokens=256
    )
    prepare(task, str(folder / "tokenizer"), folder / "data", 0)
    return folder / "data"


def marked_rows(data: Path, split: str) -> dict[tuple, np.ndarray]:
    """The marks of every row, by its tokens, as the tars hold them."""
    rows = {}
    for shard in sorted((data / split).glob("*.tar")):
        samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
        tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
        marks = [np.zeros(len(sample["tokens.npy"]), bool) for sample in samples]
        for sample, mark in zip(samples, marks, strict=True):
            for start, stop in sample["targets.npy"]:
                mark[start:stop] = True
        for start in range(0, len(tokens) - LENGTH + 1, LENGTH):
            rows[tuple(tokens[start : start + LENGTH].tolist())] = np.concatenate(marks)[start : start + LENGTH]
    return rows


def marks_of(rows, known) -> torch.Tensor:
    return torch.from_numpy(np.stack([known[tuple(row)] for row in rows.tokens_BL.tolist()]))


def settings(data, *overrides):
    config = Path(data).parent / "tiny.yaml"
    config.write_text(CONFIG)
    return load_config(config, [f"data.path={data}", "run_dir=unused", "train.micro_batch_size=4", *overrides])


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_know_their_answers_and_how_many_the_whole_batch_has(answers, workers):
    known, config = marked_rows(answers, "train"), settings(answers)
    assert min(mark.sum() for mark in known.values()) == 0, "a row without an answer is among them"
    for rank, size in [(0, 1), (0, 3), (2, 3)][2 * workers :]:
        plan = BatchPlan(ROWS, 2, rank, size)
        with (
            BatchReader(open_stream(config.data, 3), BatchPlan(ROWS, ROWS), Cursor(1), 0, 1) as alone,
            BatchReader(open_stream(config.data, 3), plan, Cursor(1), workers, 1, True) as reader,
        ):
            for batch, (whole,) in itertools.islice(zip(reader, alone, strict=True), 5):
                marks = marks_of(whole, known)
                assert (whole.is_target_BL == marks).all()
                for rows in batch:
                    assert rows.targets == (int(marks.sum()), int(marks[:, 0].sum()))
                    assert (rows.is_target_BL[rows.is_real_B] == marks[rows.position_B[rows.is_real_B]]).all()
                    assert not rows.is_target_BL[~rows.is_real_B].any()


def token_losses(config, model, noisy) -> torch.Tensor:
    """-log p of every token given what the model may see of a noised row (AR: of the token that follows), (B, L)."""
    objective, clean = config.diffusion.objective, noisy.target_BL
    if objective == "mdlm":
        logits = FullDenoiser(model).denoise(noisy.input_BP)
        return -logits.log_softmax(2).gather(2, clean[:, :, None])[:, :, 0]
    decoder = CachedDecoder(model, config.block_size, len(clean), window=LENGTH)
    if objective == "ar":
        columns = [decoder.feed(noisy.input_BP[:, [place]]) for place in range(LENGTH)]
        return -torch.stack(columns, 1).log_softmax(2).gather(2, clean[:, :, None])[:, :, 0]
    found = []
    for start in range(0, LENGTH, BLOCK):
        logits = decoder.denoise(noisy.input_BP[:, start : start + BLOCK])
        found.append(-logits.log_softmax(2).gather(2, clean[:, start : start + BLOCK, None])[:, :, 0])
        decoder.commit(clean[:, start : start + BLOCK])
    return torch.cat(found, 1)


@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "ar"])
def test_the_loss_of_a_step_is_the_answers_loss_computed_by_hand(answers, objective):
    config = settings(answers, f"diffusion.objective={objective}")
    known, tokenizer = marked_rows(answers, "train"), load_tokenizer(answers / "tokenizer")
    engine = build_engine(config, init_mesh(config.parallel, "cpu"), tokenizer.vocab_size, tokenizer.mask_token_id)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in named_parameters(engine.chunks):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    with BatchReader(open_stream(config.data, 3), BatchPlan(ROWS, 4), Cursor(), 0, 1) as reader:
        batch = next(reader)
    interval = Interval(0.3, 0.8)
    noised = noise_step(engine, config, 0, batch, interval)
    total = count = num_scored = 0.0
    for rows, micro in zip(batch, noised.micro_batches, strict=True):
        noisy, marks = micro.noisy, marks_of(rows, known)
        plain = noise_rows(replace(rows, is_target_BL=None, targets=None), engine.process, seed=3, step=0,
                           global_batch_size=ROWS, interval=interval)  # fmt: skip
        if objective == "ar":
            weight, counted = marks.roll(-1, 1).double(), marks[:, 1:]
            weight[:, -1] = 0
        else:
            shown = noisy.input_BP[:, :LENGTH]
            is_masked = plain.is_scored_BL & marks
            assert (shown == torch.where(is_masked, tokenizer.mask_token_id, rows.tokens_BL)).all(), "prompts are clean"
            blocks = noisy.time_BN.repeat_interleave(LENGTH // noisy.time_BN.shape[1], dim=1)
            weight, counted = is_masked / blocks, marks
        num_scored += int((weight > 0).sum())
        total += float((weight * token_losses(config, engine.chunks[0], noisy)).sum())
        count += float(counted.sum())
    engine.chunks[0].train()
    report = train_step(engine, config, 0, noised, AnomalyPolicy(config.runtime)).report
    shutdown()
    assert num_scored > 20
    assert report.loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
def test_evaluation_counts_answers_only(answers, objective):
    config = settings(answers, f"diffusion.objective={objective}")
    tokenizer, known = load_tokenizer(answers / "tokenizer"), marked_rows(answers, "validation")
    mesh = init_mesh(config.parallel, "cpu")
    engine = build_engine(config, mesh, tokenizer.vocab_size, tokenizer.mask_token_id, for_training=False)
    stream = open_stream(config.data, config.seed, "validation")
    found = validate(engine, config, stream, draws=2, micro_batch_size=3).likelihood
    shutdown()
    assert found.num_rows == len(known)
    assert found.num_tokens == sum(mark[1:].sum() for mark in known.values())
    if objective == "ar":  # nothing is learnt yet: every id is as likely
        assert found.nelbo == pytest.approx(np.log(tokenizer.vocab_size - 1), rel=1e-5)
    assert found.stderr == pytest.approx(0, abs=1.0)
    assert bytes_per_token(config.data, "validation") is None


@pytest.mark.slow
def test_layouts_and_resumes_on_answers_are_the_run_of_one_process(trainer, answers, tmp_path, monkeypatch):
    data, steps = f"data.path={answers}", "train.steps=12"
    trainer.train(tmp_path / "one", data, steps)
    trainer.train(tmp_path / "workers", data, steps, "data.workers=2")
    assert_same_run(tmp_path / "workers", tmp_path / "one")
    layouts = {
        "tp2_pp2": ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"],
        "dp4": ["optim.zero_stage=3", "train.micro_batch_size=1"],
    }
    for name, overrides in layouts.items():
        trainer.train(tmp_path / name, data, steps, *overrides, world=4)
        assert stream_of(tmp_path / name) == stream_of(tmp_path / "one")
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    resumed = tmp_path / "resumed"
    trainer.train(resumed, data, steps, faults="kill@step=7:rank=0", expect=-9)
    trainer.train(resumed, data, steps)
    assert_same_run(resumed, tmp_path / "one")
    moved = tmp_path / "moved"
    trainer.train(moved, data, steps, faults="kill@step=7:rank=0", expect=-9)
    trainer.train(moved, data, steps, "parallel.tensor_parallel_size=2", world=2)
    assert stream_of(moved) == stream_of(tmp_path / "one")
    assert losses_of(moved) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert load_tokenizer(tmp_path / "one" / "tokenizer").chat_template == CHATML
    monkeypatch.setattr("sys.stdin", io.StringIO("a block\n"))
    assert sampling([str(tmp_path / "one"), "--chat", "--length", "24", "runtime.device=cpu"]) == 0
    record = json.loads(next((tmp_path / "one" / "samples").glob("*_chat.jsonl")).read_text())
    assert record["text"].endswith(record["messages"][-1]["content"] + "<|im_end|>" * (record["finish"] == "eos"))
    assert load_tool("convert_checkpoint").main(["to-hf", str(tmp_path / "one"), str(tmp_path / "hf")]) == 0
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    asked = exported.apply_chat_template(record["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert record["tokens"][1 : record["prompt_tokens"]] == asked, "behind EOS, which precedes a conversation"
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert exported.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]
