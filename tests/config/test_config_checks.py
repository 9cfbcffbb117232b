"""Checks between parts: every illegal layout is refused with a legal way out, every legal one passes."""

import itertools
import math
import re
from dataclasses import replace

import pytest

from bd3lm_scale.config.checks import check, num_micro_batches, padded_vocab_size, problems
from bd3lm_scale.config.fields import field_names, field_rules
from bd3lm_scale.config.load import from_dict, to_dict
from bd3lm_scale.config.resume import decay_news, keep_decay_steps, resume_differences
from bd3lm_scale.errors import ConfigError


def make(checked: bool = True, **dotted):
    """A small legal configuration with dotted fields (a__b=c) changed."""
    values = {"run_dir": "runs/x", "data": {"path": "data/x", "context_length": 64}, "precision": "fp32"}
    values["model"] = {"num_layers": 12, "hidden_size": 96, "num_heads": 12, "cond_dim": 32, "vocab_size": 200}
    values["train"] = {"global_batch_size": 8, "micro_batch_size": 1}
    for name, value in dotted.items():
        *sections, leaf = name.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    if checked:
        return from_dict(values)
    try:
        return from_dict(values)
    except ConfigError as error:
        return error.problems


TP, PP, VPP = (f"parallel__{kind}parallel_size" for kind in ("tensor_", "pipeline_", "virtual_pipeline_"))
SP = "parallel__sequence_parallel"

# what is wrong -> the field that is named, and a remedy the message must contain and that must work
REFUSED = [
    ({"optim__zero_stage": 0}, "optim.zero_stage", {"optim__zero_stage": 1}, "use 1"),
    ({"optim__zero_stage": 4}, "optim.zero_stage", {"optim__zero_stage": 3}, "use 3"),
    ({"optim__zero_stage": 3, PP: 2}, "optim.zero_stage", {"optim__zero_stage": 1}, "zero_stage=1"),
    ({"optim__zero_stage": 3, PP: 2}, "optim.zero_stage", {PP: 1}, "pipeline_parallel_size=1"),
    ({"optim__zero_stage": 2, PP: 2}, "optim.zero_stage", {"parallel__experimental": True}, "experimental=true"),
    (
        {"optim__zero_stage": 2, PP: 2, "parallel__experimental": True, "model__tie_embeddings": True},
        "optim.zero_stage",
        {"optim__zero_stage": 1},
        "zero_stage=1",
    ),
    ({TP: 5}, "parallel.tensor_parallel_size", {TP: 4}, "use 4"),
    ({TP: 12}, "parallel.tensor_parallel_size", {TP: 4}, "use 4"),  # divides heads and width, not the vocabulary
    ({PP: 5}, "parallel.pipeline_parallel_size", {PP: 4}, "pipeline_parallel_size=4"),
    ({PP: 5}, "parallel.pipeline_parallel_size", {"model__num_layers": 15}, "num_layers=10 or 15"),
    ({PP: 4, VPP: 2}, "parallel.pipeline_parallel_size", {PP: 3}, "pipeline_parallel_size=3"),
    ({VPP: 2}, "parallel.virtual_pipeline_parallel_size", {VPP: None}, "use null"),
    ({SP: True}, "parallel.sequence_parallel", {SP: False}, "use false"),
    ({"model__attention": "flex"}, "model.attention", {"model__attention": "auto"}, "use auto"),
    ({"model__attention": "flex"}, "model.attention", {"model__num_heads": 6}, "fewer heads"),
    (
        {"data__context_length": 1, "diffusion__block_size": 1},
        "data.context_length",
        {"diffusion__ignore_bos": False},
        "at least 2",
    ),
    (
        {SP: True, TP: 4, "data__context_length": 66, "diffusion__block_size": 1, "diffusion__objective": "mdlm"},
        "parallel.sequence_parallel",
        {"data__context_length": 68},
        "context_length=64 or 68",
    ),
    ({PP: 2, "model__cond_dim": 97}, "model.cond_dim", {"model__cond_dim": 96}, "at most that"),
    ({"diffusion__block_size": 48}, "diffusion.block_size", {"diffusion__block_size": 32}, "use 32"),
    ({"model__num_heads": 11}, "model.num_heads", {"model__num_heads": 12}, "use 12"),
    ({"model__num_heads": 32}, "model.num_heads", {"model__hidden_size": 128}, "multiple of 64"),
    ({"model__num_heads": 11}, "model.num_heads", {"model__head_dim": 8}, "set model.head_dim"),
    ({"model__head_dim": 7}, "model.head_dim", {"model__head_dim": 8}, "use 8"),
    ({"model__num_kv_heads": 5}, "model.num_kv_heads", {"model__num_kv_heads": 4}, "use 4"),
    ({TP: 4, "model__ffn_hidden_size": 90}, "parallel.tensor_parallel_size", {TP: 2}, "model.ffn_hidden_size 90"),
    ({TP: 4, "model__num_kv_heads": 6}, "parallel.tensor_parallel_size", {TP: 2}, "use one of 1, 2"),
    (
        {"model__rope_scaling": "llama3", "model__rope_high_freq_factor": 1},
        "model.rope_high_freq_factor",
        {"model__rope_high_freq_factor": 4},
        "4.0",
    ),
    (
        {"diffusion__objective": "sedd", "model__adaln": False},
        "model.adaln",
        {"model__adaln": True},
        "use true",
    ),
    (
        {"diffusion__time_conditioning": True, "model__adaln": False},
        "diffusion.time_conditioning",
        {"diffusion__time_conditioning": False},
        "use null or false",
    ),
    ({"data__path": None}, "data.path", {"data__path": "d"}, "tools/prepare_data.py"),
    ({"data__mixture": [{"path": "a"}]}, "data.path", {"data__path": None}, "one of the two"),
    ({"data__path": None, "data__mixture": [{"path": "a", "weight": 0}]}, "data.mixture[0].weight", None, "(0, inf)"),
    (
        {"data__stream_text": True, "data__tokenizer": "t"},
        "data.stream_text",
        {"train__exact_resume": False},
        "exact_resume=false",
    ),
    ({"data__stream_text": True, "train__exact_resume": False}, "data.tokenizer", {"data__tokenizer": "t"}, "folder"),
    (
        {"diffusion__clip_low": 0.8, "diffusion__clip_high": 0.4},
        "diffusion.clip_low",
        {"diffusion__clip_low": 0.3},
        "at most 0.4",
    ),
    ({"diffusion__clip_low": 1.0}, "diffusion.clip_low", {"diffusion__block_size": 1}, "block_size 1"),
    (
        {"diffusion__clip_low": 0.5, "diffusion__clip_high": 0.5},
        "diffusion.clip_low",
        {"diffusion__clip_low": 0.4},
        "below",
    ),
    ({"diffusion__clip_high": 0.0005}, "diffusion.clip_high", {"diffusion__clip_high": 1}, "use for example 1"),
    ({"diffusion__clip_search": {"widths": []}}, "diffusion.clip_search.widths", None, "enabled=false"),
    ({"diffusion__clip_search": {"widths": [0.5, 1.5]}}, "diffusion.clip_search.widths", None, "(0, 1]"),
    (
        {"diffusion__objective": "sedd", "diffusion__time_conditioning": False},
        "diffusion.time_conditioning",
        {"diffusion__time_conditioning": None},
        "use null",
    ),
    (
        {"diffusion__objective": "ar", "diffusion__time_conditioning": True},
        "diffusion.time_conditioning",
        {"diffusion__time_conditioning": None},
        "use null",
    ),
    (
        {"diffusion__objective": "ar", "data__context_length": 1},
        "data.context_length",
        {"data__context_length": 2},
        "2",
    ),
    (
        {"diffusion__objective": "ar", "diffusion__resample": True},
        "diffusion.resample",
        {"diffusion__resample": False},
        "false",
    ),
    (
        {"diffusion__block_size": 4, "diffusion__resample": True, "diffusion__clip_high": 0.2},
        "diffusion.resample",
        {"diffusion__clip_high": 0.5},
        "another clip interval",
    ),
    (
        {"diffusion__block_size": 4, "diffusion__resample": None, "diffusion__clip_high": 0.2},
        "diffusion.resample",
        {"diffusion__block_size": 8},
        "another clip interval",
    ),
    (
        {"diffusion__mask_counts": "stratified", "diffusion__resample": True},
        "diffusion.mask_counts",
        {"diffusion__resample": False},
        "resample=false",
    ),
    (
        {"diffusion__mask_counts": "stratified", "diffusion__objective": "ar"},
        "diffusion.mask_counts",
        {"diffusion__mask_counts": "binomial"},
        "binomial",
    ),
    (
        {"diffusion__mask_counts": "stratified", "diffusion__objective": "sedd"},
        "diffusion.mask_counts",
        {"diffusion__mask_counts": "binomial"},
        "binomial",
    ),
    (
        {"diffusion__mdlm_loss_scale": True},
        "diffusion.mdlm_loss_scale",
        {"diffusion__mdlm_loss_scale": False},
        "false",
    ),
    (
        {"model__attention": "flex", "model__num_heads": 6, "runtime__device": "cpu"},
        "model.attention",
        {"model__attention": "auto"},
        "auto",
    ),
    ({"train__compile": True, "runtime__device": "cpu"}, "train.compile", {"train__compile": False}, "false"),
    (
        {"optim__decay_steps": 100},
        "optim.decay_steps",
        {"optim__schedule": "cosine"},
        "use null, or optim.schedule=cosine",
    ),
    ({"optim__min_lr": 1.0}, "optim.min_lr", {"optim__min_lr": 3e-4}, "at most 0.0003"),
    ({"sampling__sampler": "ar"}, "sampling.sampler", {"sampling__sampler": "first_hitting"}, "first_hitting"),
    (
        {"diffusion__objective": "ar", "sampling__sampler": "analytic"},
        "sampling.sampler",
        {"sampling__sampler": "ar"},
        "ar",
    ),
    (
        {"sampling__sampler": "confidence", "sampling__threshold": 2.0},
        "sampling.threshold",
        {"sampling__threshold": 0.5},
        "(0, 1]",
    ),
    ({"sampling__window": 40}, "sampling.window", {"sampling__window": 48}, "use 32 or 48"),
    ({"checkpoint__keep_every": 1500}, "checkpoint.keep_every", {"checkpoint__keep_every": 2000}, "use 1000 or 2000"),
]


@pytest.mark.parametrize(("wrong", "field", "remedy", "words"), REFUSED, ids=lambda v: str(v)[:60])
def test_every_refusal_names_the_field_and_a_remedy_that_works(wrong, field, remedy, words):
    found = make(checked=False, **wrong)
    assert isinstance(found, list), "this configuration should be refused"
    assert len(found) == 1, found
    assert re.match(rf"{re.escape(field)} \(.*\): .+; .*use ", found[0]), found[0]
    assert words in found[0]
    if remedy is not None:
        assert not problems(make(**{**wrong, **remedy}))


def changed(name, value):
    """What is found wrong when one dotted field of a legal configuration has this value."""
    return make(checked=False, **{name.replace(".", "__"): value})


def ends_of(rule):
    """(outside, inside) for each finite end of a field's interval, as near to it as its kind allows."""
    for end, side in zip(rule.interval[1:-1].split(", "), (-1, 1), strict=True):
        if end in ("inf", "-inf"):
            continue
        value = rule.kind(end)
        step = 1 if rule.kind is int else 1e-9 * max(1.0, abs(value))
        is_closed = rule.interval[0 if side < 0 else -1] in "[]"
        yield (value + side * step, value) if is_closed else (value, value - side * step)


def test_numbers_are_checked_at_the_ends_of_their_intervals():
    checked = 0
    for name in field_names():
        rule = field_rules()[name]
        for outside, inside in ends_of(rule) if rule.interval else ():
            refusal = rf"{re.escape(name)} \(.*\): must lie in {re.escape(rule.interval)}; use "
            lines = changed(name, outside)
            assert isinstance(lines, list), (name, outside)
            assert sum(re.match(refusal, line) is not None for line in lines) == 1, lines
            lines = changed(name, inside)
            assert not isinstance(lines, list) or not [line for line in lines if re.match(refusal, line)], lines
            checked += 1
    assert checked > 100


def test_every_shown_choice_is_legal_and_a_typo_names_its_neighbor():
    together = {
        "sampling.sampler": {"ar": ("diffusion__objective", "ar"), "analytic": ("diffusion__objective", "sedd")},
        "model.attention": {"flex": ("model__num_heads", 6)},
    }
    named = [name for name in field_names() if field_rules()[name].choices]
    assert {"precision", "diffusion.schedule", "sampling.sampler", "optim.schedule"} <= set(named)
    for name in named:
        choices = field_rules()[name].choices
        for choice in choices:
            extra = together.get(name, {}).get(choice)
            make(**{name.replace(".", "__"): choice, **(dict([extra]) if extra else {})})
        found = changed(name, choices[0] + "x")
        assert len(found) == 1, found
        assert f"use {choices[0]}" in found[0]


@pytest.mark.parametrize(("groups", "sizes"), [(12, [1, 2, 4]), (6, [1, 2]), (4, [1, 2, 4]), (3, [1]), (1, [1, 2, 4])])
def test_ranks_hold_whole_groups_of_heads_or_share_one(groups, sizes):
    found = {size: make(checked=False, model__num_kv_heads=groups, **{TP: size}) for size in (1, 2, 4)}
    assert [size for size, config in found.items() if not isinstance(config, list)] == sizes


def test_shared_groups_of_heads_must_be_cut_evenly():
    """8 queries, a key and a value of width 2: 20 rows, which 8 ranks cannot share."""
    heads = {"model__num_heads": 8, "model__head_dim": 2, "model__num_kv_heads": 1}
    (line,) = make(checked=False, **heads, **{TP: 8})
    assert line.endswith("cannot share model.num_kv_heads 1 heads of keys and values; use one of 1, 2, 4")
    assert not isinstance(make(checked=False, **heads, **{TP: 4}), list)


def is_legal(tensor, stages, chunks, zero, world):
    """The rules of the layouts, written again independently: 12 heads, width 96, 256 vocabulary rows, 12 layers."""
    if zero == 0 or 12 % tensor or 96 % tensor or 256 % tensor or 12 % (stages * (chunks or 1)):
        return False
    if (stages > 1 and zero > 1) or (chunks and stages == 1) or world % (tensor * stages):
        return False
    micro_batches = math.ceil(8 / (world // (tensor * stages)))
    return not chunks or micro_batches % stages == 0


def test_the_checks_accept_exactly_the_legal_layouts():
    legal = 0
    for tensor, stages, chunks, zero in itertools.product(range(1, 7), range(1, 7), (None, 2, 3), range(4)):
        changes = {TP: tensor, PP: stages, VPP: chunks, "optim__zero_stage": zero}
        config = make(checked=False, **changes)
        for world in (1, 2, 3, 4, 6, 8, 12, 16):
            refused = isinstance(config, list) or bool(problems(config, world))
            assert refused != is_legal(tensor, stages, chunks, zero, world), (changes, world)
            legal += not refused
    assert legal > 50


@pytest.mark.parametrize("world", [1, 3, 4, 6, 10, 12])
def test_a_world_that_does_not_fit_is_answered_with_a_layout_that_does(world):
    config = make(**{TP: 4, PP: 3})
    if world == 12:
        assert problems(config, world) == []
        return
    (line,) = problems(config, world)
    tensor, stages = (int(n) for n in re.findall(r"parallel_size=(\d+)", line))
    assert problems(make(**{TP: tensor, PP: stages}), world) == []
    processes = [int(n) for n in re.search(r"use ([\d or]+) processes", line)[1].split(" or ")]
    assert all(problems(config, n) == [] for n in processes)


def test_interleaving_asks_for_micro_batches_in_multiples_of_the_stages():
    changes = {PP: 2, VPP: 3, "train__global_batch_size": 10, "train__micro_batch_size": 2}
    (line,) = problems(make(**changes), world_size=4)
    assert line.startswith("parallel.virtual_pipeline_parallel_size (3): ")
    micro = int(re.search(r"micro_batch_size=(\d+)", line)[1])
    assert problems(make(**{**changes, "train__micro_batch_size": micro}), world_size=4) == []
    for size in re.search(r"global_batch_size=([\d or]+)", line)[1].split(" or "):
        assert problems(make(**{**changes, "train__global_batch_size": int(size)}), world_size=4) == []


def test_a_batch_that_does_not_divide_is_legal():
    config = make(train__global_batch_size=7, train__micro_batch_size=2)
    assert problems(config, world_size=3) == []
    assert num_micro_batches(config, 3) == 2


def test_the_tokenizer_decides_the_vocabulary():
    assert problems(make(), vocab_size=200) == []
    assert problems(make(model__vocab_size=None), vocab_size=201) == []
    (line,) = problems(make(), vocab_size=201)
    assert re.match(r"model.vocab_size \(200\): .*use 201", line)
    with pytest.raises(ConfigError, match="use 201"):
        check(make(), vocab_size=201)
    assert [padded_vocab_size(n) for n in (1, 128, 129, 50258)] == [128, 128, 256, 50304]


def test_resume_may_change_the_layout_and_nothing_that_is_learned():
    saved = to_dict(make())
    may = make(**{TP: 2, PP: 2, "train__steps": 5, "train__micro_batch_size": 4, "run_dir": "elsewhere",
                  "data__path": "d",
                  "checkpoint__every_steps": 7, "logging__wandb": "offline", "runtime__on_nan": "stop",
                  "optim__zero_stage": 1, "model__attention": "dense", "evaluation__rows": None})  # fmt: skip
    assert resume_differences(saved, may) == []
    forbidden = {"seed": 2, "precision": "bf16", "diffusion__block_size": 4, "optim__lr": 1e-5, "model__dropout": 0.5,
                 "train__global_batch_size": 16, "data__context_length": 32, "optim__ema_decay": 0.5,
                 "data__shuffle_window": 3, "diffusion__clip_search": {"apply": False}}  # fmt: skip
    for name, value in forbidden.items():
        lines = resume_differences(saved, make(**{name: value}))
        assert [line.startswith(name.replace("__", ".")) for line in lines] == [True], lines
    assert len(resume_differences(saved, make(**forbidden))) == len(forbidden)


def test_a_prolonged_cosine_goes_on_along_the_curve_it_started_on():
    first = keep_decay_steps(make(optim__schedule="cosine", optim__warmup_steps=10, train__steps=100), None)
    assert first.optim.decay_steps == 100
    assert decay_news(first, None) == []
    saved = to_dict(first)
    longer = make(optim__schedule="cosine", optim__warmup_steps=10, train__steps=300)
    kept = keep_decay_steps(longer, saved)
    assert kept.optim.decay_steps == 100
    assert resume_differences(saved, kept) == []
    (news,) = decay_news(kept, saved)
    assert "ends at step 100" in news
    assert "optim.decay_steps=300" in news
    again = keep_decay_steps(make(optim__schedule="cosine", optim__warmup_steps=10, train__steps=400), to_dict(kept))
    assert again.optim.decay_steps == 100, "the first start decides, however often the run is prolonged"
    stretched = keep_decay_steps(replace(longer, optim=replace(longer.optim, decay_steps=300)), saved)
    assert stretched.optim.decay_steps == 300
    assert resume_differences(saved, stretched) == []
    assert decay_news(stretched, saved) == [
        "the learning rate's cosine ended at step 100 and ends at step 300 from now on"
    ]
    del saved["optim"]["decay_steps"]  # a checkpoint of an earlier version ended its cosine at train.steps
    assert keep_decay_steps(longer, saved).optim.decay_steps == 100
    assert keep_decay_steps(make(train__steps=100), None).optim.decay_steps is None, "a constant rate has no end"


def test_resume_compares_with_checkpoints_of_other_versions():
    saved = to_dict(make())
    del saved["optim"]["beta1"]  # a field that was added later had its default then
    assert resume_differences(saved, make()) == []
    assert len(resume_differences(saved, make(optim__beta1=0.5))) == 1
    saved["optim"]["momentum"] = 0.5  # a field that is gone now: what it did is unknown
    assert resume_differences(saved, make())[0].startswith("optim.momentum (null): ")
