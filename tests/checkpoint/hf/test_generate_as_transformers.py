"""generate() as its users know it from transformers: what comes back, settings obeyed or refused, streams and stops."""

import re

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bd3lm_scale.checkpoint.hf.generation_bd3lm import Draws
from bd3lm_scale.checkpoint.hf.settings_bd3lm import SAMPLERS, Settings
from tests.checkpoint.hf.test_modeling import NETWORK, OBJECTIVES, make

FILLS_IN_DEFAULTS = GenerationConfig().do_sample is not None
"""transformers 4: a GenerationConfig knows no unset fields."""


def prompts(batch=2, length=6):
    return torch.randint(2, 29, (batch, length), generator=torch.Generator().manual_seed(1))


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 7, 49_999])
def test_what_has_no_weight_to_speak_of_is_never_drawn(place):
    """1e-12 outside one token: 20,000 draws of a large vocabulary give it 20,000 times."""
    logits = torch.full((50_000,), -12 * 2.302585 - 10.8198)  # 50,000 of them weigh 1e-12
    logits[place] = 0.0
    draws = Draws(Settings(seed=1), "cpu")
    for _ in range(4):
        # one row of running sums serves all: what differs is the number drawn
        weight = draws.weights(logits).expand(1, -1)
        sums = weight.cumsum(-1)
        goal = draws.uniform((1, 5000), "cpu") * sums[:, -1:]
        assert (torch.searchsorted(sums, goal, right=True) == place).all()
    assert (draws.tokens(logits.expand(400, -1)) == place).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_generated_text_holds_no_junk(objective):
    model, steps = make(objective), {"num_steps": 40} if objective == "sedd" else {}
    with torch.no_grad():
        model.backbone.output_layer.linear.weight.zero_()
        model.backbone.output_layer.linear.bias.fill_(-30.0)
        model.backbone.output_layer.linear.bias[17] = 0.0  # 29 e^-30 = 3e-12 outside token 17
    ids = model.generate(prompts(256), max_new_tokens=12, seed=3, stop_at_eos=False, **steps)
    assert (ids[:, 6:] == 17).all()


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2.0**-53])
def test_the_extremes_of_a_draw_are_tokens_with_weight(uniform):
    draws = Draws(Settings(), "cpu")
    draws.uniform = lambda shape, device: torch.full(shape, uniform, dtype=torch.float64)
    weight = torch.tensor([[0.0, 0.0, 2.0, 0.0, 1.0, 0.0], [0.0, 3.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert draws.categorical(weight).tolist() == [4 if uniform > 0.9 else 2, 1]


def test_uniform_numbers_have_53_bits():
    """Of numbers with 24 bits one in 2^24 is 0, where a token of any weight would be first."""
    numbers = Draws(Settings(seed=4), "cpu").uniform((1000,), "cpu")
    assert ((numbers * 2.0**24) % 1 != 0).sum() > 990


def test_draws_follow_their_weights():
    weight = torch.tensor([0.1, 0.0, 0.55, 0.05, 0.3], dtype=torch.float64)
    found = torch.bincount(Draws(Settings(seed=2), "cpu").categorical(weight.expand(20_000, -1)), minlength=5)
    assert int(found[1]) == 0
    here = weight > 0
    chi_square = ((found[here] - 20_000 * weight[here]) ** 2 / (20_000 * weight[here])).sum()
    assert float(chi_square) < 16.3, "3 degrees of freedom, p = 0.001"


# ---- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_new_tokens_follow_the_columns_given(objective, side):
    """Rows of 2, 5 and 6 tokens: nobody loses text to `out[:, input_ids.shape[1]:]`, and padding stays where it was."""
    model, given = make(objective, block_size=1), prompts(3)
    lengths, is_real = (2, 5, 6), torch.zeros(3, 6, dtype=torch.long)
    for row, length in enumerate(lengths):
        here = slice(0, length) if side == "right" else slice(6 - length, 6)
        is_real[row, here] = 1
    options = {"max_new_tokens": 9, "do_sample": False, "stop_at_eos": False, "num_steps": 1, "sampler": None}
    if objective == "mdlm":
        options["sampler"] = "ancestral"  # in one step, so that no order is random
    ids = model.generate(given, attention_mask=is_real, **options)
    assert torch.equal(ids[:, :6], given)
    assert ids.shape == (3, 15)
    for row in range(3):
        text = given[row : row + 1, is_real[row].bool()]
        alone = model.generate(text, **options)
        if objective != "sedd":  # which draws when it reveals
            assert torch.equal(ids[row, 6:], alone[0, text.shape[1] :]), row
        assert 29 not in ids[row, 6:].tolist()
    twice = model.generate(given, attention_mask=is_real, num_return_sequences=2, **options)
    assert torch.equal(twice[:, :6], given.repeat_interleave(2, dim=0))


def test_rows_that_end_early_are_filled_up():
    model, given = make("bd3lm"), prompts(3)
    with torch.no_grad():
        model.backbone.output_layer.linear.bias[1] += 1.0
    is_real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    ids = model.generate(given, attention_mask=is_real, max_new_tokens=60, seed=1)
    for row in ids[:, 6:].tolist():
        end = row.index(1)
        assert set(row[end:]) == {1}
    assert max(row.index(1) for row in ids[:, 6:].tolist()) == ids.shape[1] - 7, "no column is padding alone"


def test_padding_is_recognised_where_it_cannot_be_an_end():
    model, given = make("bd3lm", block_size=1), prompts(2)
    model.generation_config.pad_token_id = 0
    given[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    ids = model.generate(given, **options)
    assert torch.equal(ids[0, 6:], model.generate(given[:1, 3:], **options)[0, 3:])
    given[0, 4] = 0
    with pytest.raises(ValueError, match="padding between their tokens"):
        model.generate(given, **options)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["bd3lm", "ar", "mdlm"])
def test_any_of_several_eos_ends_a_row(objective):
    model, given = make(objective), prompts(8)
    with torch.no_grad():
        model.backbone.output_layer.linear.bias[[5, 9]] += 1.5
    for eos in ([5, 9], [9, 5], [9]):
        for options in (
            {"eos_token_id": eos},
            {"generation_config": GenerationConfig(eos_token_id=eos, do_sample=True)},
        ):
            ids = model.generate(given, max_new_tokens=40, seed=1, pad_token_id=0, **options)
            new = ids[:, 6:].tolist()
            ends = [min((row.index(e) for e in eos if e in row), default=len(row)) for row in new]
            assert min(ends) < 40
            for row, end in zip(new, ends, strict=True):
                assert set(row[end + 1 :]) <= {0}, (eos, row)
    assert {row[end] for row, end in zip(new, ends, strict=True) if end < len(row)} == {9}


def test_lengths_of_a_generation_config_are_obeyed():
    model, given = make("bd3lm"), prompts()
    width = lambda **options: model.generate(given, seed=1, stop_at_eos=False, **options).shape[1]  # noqa: E731
    assert width(generation_config=GenerationConfig(max_length=30)) == 30
    assert width(generation_config=GenerationConfig(max_length=9, do_sample=True)) == 9
    assert width(generation_config=GenerationConfig(max_new_tokens=5)) == 11
    assert width(generation_config=GenerationConfig(max_new_tokens=5), max_new_tokens=3) == 9
    assert width(generation_config=GenerationConfig(max_new_tokens=5), max_length=8) == 8
    model.generation_config.max_new_tokens = 4
    assert width() == 10
    assert width(max_length=12) == 12
    assert width(generation_config=GenerationConfig(max_length=30)) == 30
    model.generation_config.max_new_tokens, model.generation_config.max_length = None, 13
    assert width() == 13
    is_real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    assert width(max_length=10, attention_mask=is_real) == 10


def test_what_a_passed_configuration_leaves_open_the_models_own_decides():
    model = make("bd3lm")
    for name, value in {"sampler": "ancestral", "num_steps": 3, "temperature": 0.5, "top_k": 7}.items():
        setattr(model.generation_config, name, value)
    said = model._settings(GenerationConfig(temperature=0.8, do_sample=True, top_k=9), {})
    assert (said.sampler, said.num_steps, said.temperature, said.top_k) == ("ancestral", 3, 0.8, 9)
    assert said.eos_token_id == 1
    assert model._settings(GenerationConfig(do_sample=False, max_new_tokens=4), {}).do_sample is False
    copy = GenerationConfig.from_dict(model.generation_config.to_dict())
    assert vars(model._settings(copy, {})) == vars(model._settings(None, {})), "pipelines pass such copies"


REFUSED = {
    "num_beams": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3, "min_length": 9,
    "typical_p": 0.5, "epsilon_cutoff": 0.1, "bad_words_ids": [[3]], "suppress_tokens": [4], "penalty_alpha": 0.6,
    "forced_eos_token_id": 1, "num_beam_groups": 2, "length_penalty": 2.0, "min_p": 0.1, "guidance_scale": 1.5,
    "output_scores": True, "prompt_lookup_num_tokens": 3, "cache_implementation": "static",
    "sequence_bias": {(3,): 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name):
    model, given = make("bd3lm"), prompts()
    options = {name: REFUSED[name]}
    extra = {"num_beams": 2, "diversity_penalty": 0.5} if name == "num_beam_groups" else {}
    with pytest.raises(ValueError, match=f"{name} .*not supported"):
        model.generate(given, max_new_tokens=4, **options)
    config = GenerationConfig(max_new_tokens=4, **options, **extra)
    with pytest.raises(ValueError, match=f"{name} .*not supported"):
        model.generate(given, generation_config=config)
    for key, value in options.items():
        setattr(model.generation_config, key, value)
    with pytest.raises(ValueError, match=f"{name} .*not supported"):
        model.generate(given, max_new_tokens=4)


def test_what_asks_for_nothing_is_accepted():
    model, given = make("bd3lm"), prompts()
    expected = model.generate(given, max_new_tokens=6, seed=1)
    nothing = {
        "num_beams": 1, "repetition_penalty": 1.0, "min_length": 0, "bad_words_ids": None, "output_scores": False,
        "logits_processor": [], "stopping_criteria": StoppingCriteriaList(), "streamer": None, "synced_gpus": False,
        "assistant_model": None, "top_k": 0, "use_cache": True, "length_penalty": 1.0, "early_stopping": False,
    }  # fmt: skip
    assert torch.equal(model.generate(inputs=given, max_new_tokens=6, seed=1, **nothing), expected)
    config = GenerationConfig(max_new_tokens=6, do_sample=True, num_beams=1, repetition_penalty=1.0, top_k=0)
    assert torch.equal(model.generate(given, config, seed=1), expected)


BAD = {
    "temperature": [-0.1, float("nan"), float("inf"), "warm"], "top_p": [0.0, -1.0, 1.01, float("nan")],
    "top_k": [-1, 2.5, True, float("inf")], "max_new_tokens": [0, -3, 1.5, True], "num_steps": [0],
    "num_return_sequences": [0],
    "max_length": [6, 3, "9", 7.5], "seed": ["a", 2**64, 0.5], "eos_token_id": [[1, "a"], 0.5], "pad_token_id": ["x"],
    "do_sample": ["no"], "use_cache": [3], "threshold": [float("nan")], "max_time": [0.0],
    "sampler": ["best", "analytic"],
    "stop_strings": ["x"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_values_out_of_range_are_named(name, value):
    model = make("bd3lm").train()
    with pytest.raises(ValueError, match=re.escape(f"{name} ({value})")):
        model.generate(prompts(), **{"max_new_tokens": None if name == "max_length" else 4, name: value})
    assert model.training


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)num_beams.*temperature.*top_p"):
        make("bd3lm").generate(prompts(), num_beams=4, temperature=-1, top_p=2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_broken_weights_are_an_error_not_text(objective, do_sample):
    model = make(objective).train()
    with torch.no_grad():
        model.backbone.output_layer.linear.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.generate(prompts(), max_new_tokens=4, do_sample=do_sample, num_steps=4)
    assert model.training, "the mode survives errors"


def test_prompts_that_cannot_be_read_are_refused():
    model = make("bd3lm")
    given = prompts()
    expected = model.generate(given, max_new_tokens=5, seed=1)
    assert torch.equal(model.generate(given.int(), max_new_tokens=5, seed=1), expected)
    for bad, message in ((given.float(), "token ids are integers"), (given + 100, "outside the vocabulary")):
        with pytest.raises(ValueError, match=message):
            model.generate(bad, max_new_tokens=4)
    with pytest.raises(ValueError, match="padding between"):
        model.generate(given, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6]), max_new_tokens=4)
    with pytest.raises(ValueError, match="first token in every row"):
        make("ar").generate(given, attention_mask=torch.tensor([[0] * 6, [1] * 6]), max_new_tokens=4)


@pytest.mark.parametrize("sampler", SAMPLERS["bd3lm"])
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm"])
def test_every_sampler_writes_text_and_greedy_needs_no_draws(objective, sampler):
    model = make(objective)
    options = {"max_new_tokens": 14, "sampler": sampler, "num_steps": 4, "stop_at_eos": False, "threshold": 0.3}
    assert int(model.generate(prompts(), seed=1, **options)[:, 6:].max()) < 29
    if sampler in ("confidence", "entropy"):
        greedy = [model.generate(prompts(), seed=seed, do_sample=False, **options) for seed in (1, 2)]
        assert torch.equal(*greedy)
        every = model.generate(
            prompts(), do_sample=False, **{**options, "threshold": 0.0 if sampler == "confidence" else 99}
        )
        once = model.generate(prompts(), do_sample=False, **{**options, "sampler": "ancestral", "num_steps": 1})
        assert torch.equal(every, once), "a threshold that all pass is one step"


# ---- streams and stops -----------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


class EndsAt(StoppingCriteria):
    """Ends a row once it holds one of these tokens after the prompt; remembers what it was shown."""

    def __init__(self, tokens, columns):
        self.tokens, self.columns, self.widths = torch.tensor(tokens), columns, []

    def __call__(self, input_ids, scores, **_):
        self.widths.append(input_ids.shape[1])
        return torch.isin(input_ids[:, self.columns :], self.tokens).any(1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_streamer_is_given_the_prompt_and_every_new_token_once(objective):
    model, given, seen = make(objective), prompts(3), Recorder()
    is_real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1] * 6])
    ids = model.generate(given, attention_mask=is_real, streamer=seen, max_new_tokens=21, seed=1, num_steps=4)
    assert torch.equal(seen.values[0], given)
    assert torch.equal(torch.stack(seen.values[1:], dim=1), ids[:, 6:])
    assert seen.ended == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_criterion_ends_a_row_at_the_token_that_meets_it(objective):
    """As with eos: the same text up to that token, which block it lies in makes no difference."""
    model, given = make(objective), prompts(4)
    is_real = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1] * 6, [0, 1, 1, 1, 1, 1]])
    if objective == "ar" or NETWORK:  # where a row that has ended takes no more draws from the others
        is_real = torch.ones_like(given)
    options = {"attention_mask": is_real, "max_new_tokens": 21, "seed": 1, "num_steps": 4, "pad_token_id": 0}
    free = model.generate(given, stop_at_eos=False, **options)
    ends, end = [4, 11, 20, 8], EndsAt([4, 11, 20, 8], 6)
    by_criterion = model.generate(given, stop_at_eos=False, stopping_criteria=[end], **options)
    by_eos = model.generate(given, eos_token_id=ends, **options)
    assert torch.equal(by_criterion, by_eos)
    assert end.widths == list(range(7, 7 + len(end.widths))), "token by token"
    assert not torch.equal(by_criterion, free[:, : by_criterion.shape[1]]), "something was ended"


def test_time_is_a_criterion():
    ids = make("bd3lm").generate(prompts(), max_new_tokens=4000, max_time=0.05, seed=1, stop_at_eos=False)
    assert 6 < ids.shape[1] < 4006


def test_an_output_with_names_holds_the_models_own_log_probabilities():
    model, given = make("ar"), prompts(3)
    options = {"max_new_tokens": 7, "seed": 1, "temperature": 0.5, "top_p": 0.9, "stop_at_eos": False}
    found = model.generate(given, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, model.generate(given, **options))
    assert (found.log_probs[:, :6] == 0).all()
    torch.testing.assert_close(-found.log_probs[:, 6:], model.score(found.sequences).token_nats[:, 6:])


@pytest.mark.parametrize("temperature", [1e-8, 1e-40, 1e-300, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature):
    draws, logits = Draws(Settings(temperature=temperature, seed=1), "cpu"), torch.randn(50, 30)
    assert torch.equal(draws.tokens(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"max_time": 0.1}, {"stop_strings": ["a"], "tokenizer": object()}, {"stopping_criteria": [print]},
        {"max_length": 40}, {"generation_config": GenerationConfig(max_new_tokens=4)},
        {"generation_config": GenerationConfig(max_length=40)},
    ],
)  # fmt: skip
def test_filling_refuses_what_only_growing_text_has(options):
    given = prompts()
    given[:, 2:4] = 29
    with pytest.raises(ValueError, match=r"leave (it|them) out"):
        make("bd3lm").generate(given, fill=True, **options)


def test_ids_may_be_tensors_and_rows_must_be_there():
    model, given = make("bd3lm"), prompts()
    options = {"max_new_tokens": 12, "seed": 1}
    several = model.generate(given, eos_token_id=torch.tensor([3, 4]), **options)
    assert torch.equal(several, model.generate(given, eos_token_id=[3, 4], **options))
    with pytest.raises(ValueError, match="there is no row"):
        model.generate(given[:0], **options)
