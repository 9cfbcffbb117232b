"""Laws that hold for every sampler: batch invariance, prompts, ragged finish, stop rules, counters."""

import math

import numpy as np
import pytest
import torch

from bd3lm_scale.diffusion.samplers.analytic import sample_analytic
from bd3lm_scale.diffusion.samplers.ancestral import Ancestral
from bd3lm_scale.diffusion.samplers.autoregressive import sample_next_tokens
from bd3lm_scale.diffusion.samplers.blocks import BlockPlan, sample_blocks
from bd3lm_scale.diffusion.samplers.filtering import TokenFilter
from bd3lm_scale.diffusion.samplers.first_hitting import first_hitting
from bd3lm_scale.diffusion.samplers.mdlm import WindowDenoiser, window_plan
from bd3lm_scale.diffusion.samplers.parallel import Parallel
from bd3lm_scale.diffusion.samplers.request import FilledBlock, SampleRequest, position_uniforms
from bd3lm_scale.diffusion.samplers.reveal import reveal_steps
from bd3lm_scale.diffusion.samplers.sampler import get_sampler
from bd3lm_scale.diffusion.samplers.simplex import SimplexDiffusion
from bd3lm_scale.diffusion.samplers.stopping import StopRule, unigram_entropy
from bd3lm_scale.diffusion.schedule import get_schedule
from tests.diffusion.samplers.toys import MASK, VOCAB, ToyBlocks, encode

PROMPTS = ((1,), (), (0, 2, 1, 1, 0), (2, 2), (0, 1, 2, 0, 1, 2, 0, 1))


class ToySimplex(ToyBlocks):
    def denoise(self, simplex_BSV, time_B):
        return super().denoise(simplex_BSV[:, :, :MASK].argmax(-1)) + simplex_BSV


class ToyAnyLength:
    """A full denoiser of any length: logits from a running hash of the whole row, float64."""

    def denoise(self, tokens_BL, sigma_B=None, scored_BI=None):
        position = torch.arange(1, tokens_BL.shape[1] + 1, dtype=torch.float64)
        seen = ((tokens_BL + 1).double() * position.sqrt()).sum(-1)
        if sigma_B is not None:
            seen = seen + sigma_B.double()
        ids = torch.arange(VOCAB, dtype=torch.float64)
        logits = 2 * torch.sin(seen[:, None, None] * (ids + 1.3) + position[None, :, None])
        logits[:, :, MASK] = -math.inf
        if scored_BI is None:
            return logits
        return logits.gather(1, scored_BI[:, :, None].expand(-1, -1, VOCAB))


class ToyNext(ToyAnyLength):
    def __init__(self):
        self.context = None

    def feed(self, tokens_BT):
        self.context = tokens_BT if self.context is None else torch.cat([self.context, tokens_BT], dim=1)
        return self.denoise(self.context)[:, -1]

    def keep_rows(self, index):
        self.context = self.context[index]


def blocks_with(fill, make=lambda: ToyBlocks(block_size=3, spread=1.0)):
    return lambda request: sample_blocks(make(), fill, request, BlockPlan(3, 3))


SAMPLERS = {
    "first_hitting": blocks_with(first_hitting),
    "ancestral": blocks_with(Ancestral(4)),
    "confidence": blocks_with(Parallel("confidence", 0.5)),
    "entropy": blocks_with(Parallel("entropy", 0.8)),
    "simplex": blocks_with(SimplexDiffusion(5, VOCAB, 2.0), make=lambda: ToySimplex(block_size=3)),
    "mdlm": lambda request: sample_blocks(
        WindowDenoiser(ToyAnyLength(), 8), first_hitting, request, window_plan(request.length, 8)
    ),
    "sedd": lambda request: sample_analytic(ToyAnyLength(), request, get_schedule("loglinear"), steps=12),
    "ar": lambda request: sample_next_tokens(ToyNext(), request),
}


def request(prompts=PROMPTS, length=17, **kwargs):
    return SampleRequest(prompts=prompts, length=length, mask_token_id=MASK, **kwargs)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("eos", [None, 2])
def test_a_sample_does_not_depend_on_its_batch(name, eos):
    """Together or alone, in any order, with others that finish early: the same tokens, exactly, and the same NFE."""
    prompts = tuple(p or (1,) for p in PROMPTS) if name == "ar" else PROMPTS
    options = {"stop": StopRule(eos_token_id=eos), "token_filter": TokenFilter(nucleus_p=0.95), "seed": 5}
    together = SAMPLERS[name](request(prompts, **options))
    for order in ([4], [0], [2, 1], [3, 0, 1]):
        some = SAMPLERS[name](request(tuple(prompts[i] for i in order), sample_index=tuple(order), **options))
        for place, i in enumerate(order):
            assert some.tokens[place] == together.tokens[i]
            assert some.finish[place] == together.finish[i]
            assert some.nfe[place] == together.nfe[i]
    if eos is None:
        assert set(map(len, together.tokens)) == {17}
        assert len(set(together.tokens)) == len(prompts)
    else:
        assert "eos" in together.finish
        assert len(set(map(len, together.tokens))) > 1, "no ragged finish: the test lost its point"


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_start_with_their_prompts_and_hold_no_mask(name):
    prompts = tuple(p or (1,) for p in PROMPTS)
    result = SAMPLERS[name](request(prompts, seed=2))
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens[: len(prompt)] == prompt
        assert MASK not in tokens
    other = SAMPLERS[name](request(prompts, seed=3))
    assert other.tokens != result.tokens, "the seed has no effect"


@pytest.mark.parametrize("name", ["first_hitting", "ancestral", "confidence", "entropy", "simplex", "ar"])
def test_a_shorter_sample_is_a_prefix_of_a_longer_one(name):
    prompts = ((1,), (2, 0))
    longer = SAMPLERS[name](request(prompts, length=20))
    shorter = SAMPLERS[name](request(prompts, length=13))
    assert [t[:13] for t in longer.tokens] == list(shorter.tokens)


@pytest.mark.parametrize("name", SAMPLERS)
def test_progress_adds_up_to_the_new_tokens(name, monkeypatch):
    made = []
    prompts = tuple(p or (1,) for p in PROMPTS)
    calls = {
        "mdlm": lambda r: sample_blocks(
            WindowDenoiser(ToyAnyLength(), 8), first_hitting, r, window_plan(17, 8), made.append
        ),
        "sedd": lambda r: sample_analytic(ToyAnyLength(), r, get_schedule("loglinear"), 12, made.append),
        "ar": lambda r: sample_next_tokens(ToyNext(), r, made.append),
    }
    default = lambda r: sample_blocks(ToyBlocks(3), first_hitting, r, BlockPlan(3, 3), made.append)  # noqa: E731
    calls.get(name, default)(request(prompts))
    assert sum(made) == sum(17 - len(p) for p in prompts)


def test_end_of_text_ends_a_sample_just_after_its_first_one_behind_the_prompt():
    rule = StopRule(eos_token_id=9)
    tokens = np.array([9, 1, 9, 4, 9, 9, 3])
    assert rule.check(tokens, prompt_length=3, num_checked=0) == ("eos", 5)
    assert rule.check(tokens, prompt_length=1, num_checked=0) == ("eos", 3)
    assert rule.check(tokens, prompt_length=1, num_checked=5) == ("eos", 6)
    assert rule.check(tokens[:4], prompt_length=3, num_checked=0) is None
    assert StopRule().check(tokens, 0, 0) is None
    assert StopRule(eos_token_id=9, end_of_turn=4).check(tokens, 3, 0) == ("eos", 4), "either ends a sample"
    assert StopRule(eos_token_id=9, end_of_turn=3).check(tokens, 3, 0) == ("eos", 5)
    assert StopRule(end_of_turn=3).check(tokens, 3, 0) == ("eos", 7)


@pytest.mark.parametrize("name", ["first_hitting", "mdlm", "ar"])
@pytest.mark.parametrize("length", [10, 11, 12])
def test_what_lies_behind_the_length_is_not_part_of_a_sample(name, length):
    """Blocks are rounded up: an end of text in the tail neither ends the sample nor lengthens it."""
    text = [0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0]
    runs = {  # whole blocks that cover the length, the last one ending in id 2 wherever it is beyond the length
        "first_hitting": lambda r, write: sample_blocks(ToyBlocks(3), write, r, BlockPlan(3, 3)),
        "mdlm": lambda r, write: sample_blocks(WindowDenoiser(ToyAnyLength(), 8), write, r, window_plan(r.length, 8)),
        "ar": lambda r, _: sample_next_tokens(Fixed(text), r),
    }
    places = []

    def write(_, task):
        start = len(places)
        places.extend(range(start, start + task.tokens_BS.shape[1]))
        block = [text[p] if p < length else 2 for p in places[start:]]
        return FilledBlock(torch.tensor([block]), np.array([1]), 1)

    result = runs[name](request(((),) if name != "ar" else ((0,),), length=length, stop=StopRule(2, 0.1)), write)
    assert result.tokens == (tuple(text[:length]),)
    assert result.finish == ("length",)
    if name == "first_hitting":
        assert len(places) == 12


class Fixed(ToyNext):
    """A model that is certain of one text, and of the end of text behind it."""

    def __init__(self, text):
        self.text, self.done = [*text, *[2] * 12], 0

    def feed(self, tokens_BT):
        self.done += tokens_BT.shape[1]
        logits = torch.full((len(tokens_BT), VOCAB), -math.inf)
        logits[:, self.text[self.done]] = 0.0
        return logits


def test_low_entropy_of_the_last_256_tokens_ends_a_sample_and_is_cut_off():
    rule = StopRule(min_entropy=4.0)
    rich, poor = np.arange(300), np.full(256, 7)
    assert rule.check(np.concatenate([rich, poor]), 1, 0) == ("low_entropy", 300)
    assert rule.check(np.concatenate([rich, poor]), 400, 0) == ("low_entropy", 400), "a prompt is never cut"
    assert rule.check(np.concatenate([poor, rich]), 1, 0) is None
    assert rule.check(poor, 1, 0) is None, "not more than 256 tokens yet"
    assert unigram_entropy(np.arange(256)) == pytest.approx(math.log(256))
    assert unigram_entropy(np.array([])) == 0.0


def test_a_degenerate_sampler_is_stopped_by_the_entropy_rule():
    class Stuck(ToyBlocks):
        def denoise(self, block_BS, scored_BI=None):
            logits = torch.full((len(block_BS), scored_BI.shape[1], VOCAB), -math.inf)
            logits[:, :, 0] = 0.0
            return logits

    result = sample_blocks(
        Stuck(), first_hitting, request(((1,),), length=600, stop=StopRule(min_entropy=1.0)), BlockPlan(4, 4)
    )
    assert result.finish == ("low_entropy",)
    assert len(result.tokens[0]) == 260 - 256
    assert result.nfe == (259,)


def test_first_hitting_counts_as_the_paper_does_and_as_the_network_does():
    """256 tokens from a bos token in blocks of 16: NFE 255; 255 denoising calls and 15 commits, no last commit."""
    toy = ToyAnyLength()

    class Network(WindowDenoiser):
        calls = 0

        def denoise(self, block_BS, scored_BI=None):
            assert scored_BI.shape == (len(block_BS), 1), "the head runs on one row per sequence"
            Network.calls += 1
            return super().denoise(block_BS, scored_BI)

        def commit(self, tokens_BT):
            Network.calls += 1
            super().commit(tokens_BT)

    prompts = ((1,), (1,) * 40)
    result = sample_blocks(Network(toy, 32), first_hitting, request(prompts, length=256), BlockPlan(16, 16))
    assert result.nfe == (255, 216)
    assert result.forward_calls == (270, 270)
    assert Network.calls == 270


def test_ancestral_runs_the_network_only_where_something_is_revealed():
    """Rows need not be at the same time: the calls per block are the most non-empty steps of any row."""
    toy = ToyBlocks(block_size=8)
    result = sample_blocks(toy, Ancestral(4), request(((1,),) * 6, length=32), BlockPlan(8, 8))
    denoising = [c for c in toy.calls if c[0] != "commit"]
    assert len(denoising) <= 4 * 4
    assert max(result.nfe) <= len(denoising) == result.forward_calls[0] - 3
    one = sample_blocks(toy.fresh(), Ancestral(1), request(((1,),) * 6, length=32), BlockPlan(8, 8))
    assert one.nfe == (4,) * 6


def test_parallel_decoding_saves_calls_and_threshold_zero_takes_one_call_per_block():
    make = lambda: ToyBlocks(block_size=6, spread=4.0)  # noqa: E731
    plan = BlockPlan(6, 6)
    calls = {
        threshold: sample_blocks(make(), Parallel("confidence", threshold), request(((1,),), length=60), plan).nfe[0]
        for threshold in (0.0, 0.7, 1.1)
    }
    assert calls[0.0] == 10
    assert calls[1.1] == 59
    assert calls[0.0] < calls[0.7] < calls[1.1]


def test_blocks_that_all_prompts_cover_are_committed_at_once():
    toy = ToyBlocks(block_size=2)
    prompts = ((0, 1, 2, 0, 1), (2, 2, 2, 2, 0, 1, 0))
    sample_blocks(toy, first_hitting, request(prompts, length=10), BlockPlan(2, 2))
    assert toy.calls[0] == ("commit", (2, 4))
    assert [c for c in toy.calls if c[0] == "commit"][1:] == [("commit", (2, 2))] * 2
    assert toy.context[:, :5].tolist() == [[0, 1, 2, 0, 1], [2, 2, 2, 2, 0]]


def test_mdlm_beyond_its_context_moves_by_half_a_context():
    seen = []

    class Spy(ToyAnyLength):
        def denoise(self, tokens_BL, sigma_B=None, scored_BI=None):
            seen.append(tokens_BL.clone())
            return super().denoise(tokens_BL, sigma_B, scored_BI)

    plan = window_plan(20, 8)
    assert plan.edges(20) == [0, 8, 12, 16, 20]
    result = sample_blocks(WindowDenoiser(Spy(), 8), first_hitting, request(((1,),), length=20), plan)
    assert all(tokens.shape[1] == 8 for tokens in seen)
    third = seen[7 + 4]  # first call of the third window
    assert third[0].tolist() == [*result.tokens[0][8:12], *[MASK] * 4]
    assert result.forward_calls == (19,), "committing costs nothing without a cache"
    assert window_plan(5, 8).edges(5) == [0, 5]


def test_draws_depend_on_the_position_alone():
    asked = request(((), ()), length=40)
    when, which = position_uniforms(asked, np.array([0, 1]), 0, 40)
    for start, count in ((0, 1), (7, 5), (16, 16)):
        part = position_uniforms(asked, np.array([1]), start, count)
        assert (part[0][0] == when[1, start : start + count]).all()
        assert (part[1][0] == which[1, start : start + count]).all()
    everything = np.concatenate([when, which]).ravel()
    assert len(np.unique(everything)) == everything.size


def test_reveal_steps_take_every_masked_position_once_in_falling_order():
    cells = np.array([[3, 1, 3, 0, 2], [5, 5, 5, 5, 5], [0, 1, 2, 3, 4]])
    is_masked = np.array([[1, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=bool)
    steps = [
        [sorted(i[r].tolist()) for i, r in zip(s.index_BI, s.is_real_BI, strict=True)]
        for s in reveal_steps(cells, is_masked)
    ]
    assert steps == [[[0, 2], [0, 1, 2, 3, 4], []], [[4], [], []], [[1], [], []]]


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match=r"sampling\.length \(4\): a prompt has 4 tokens"):
        request(((0, 1, 2, 0),), length=4)
    with pytest.raises(ValueError, match="is the mask"):
        request(((0, MASK),))
    with pytest.raises(ValueError, match="needs at least one token"):
        sample_next_tokens(ToyNext(), request(((),)))
    with pytest.raises(ValueError, match=r"sampling\.steps"):
        Ancestral(0)
    with pytest.raises(ValueError, match=r"sampling\.sampler"):
        get_sampler("luck")
    with pytest.raises(ValueError, match="one for each"):
        request(sample_index=(1,))
    assert encode(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [1, 1]


class _Sure:
    """Every toy's answer: token 1, with 1e-12 on the others together."""

    def _sure(self, shape):
        logits = torch.full((*shape, VOCAB), math.log(0.5e-12))
        logits[..., 1], logits[..., MASK] = 0.0, -math.inf
        return logits


class SureBlocks(_Sure, ToyBlocks):
    def denoise(self, block_BS, scored_BI=None):
        return self._sure((block_BS if scored_BI is None else scored_BI).shape)


class SureAnyLength(_Sure, ToyAnyLength):
    def denoise(self, tokens_BL, sigma_B=None, scored_BI=None):
        return self._sure((tokens_BL if scored_BI is None else scored_BI).shape)


class SureNext(_Sure, ToyNext):
    def feed(self, tokens_BT):
        return self._sure(tokens_BT.shape[:1])


class SureSimplex(_Sure, ToySimplex):
    def denoise(self, simplex_BSV, time_B):
        return self._sure(simplex_BSV.shape[:2])


@pytest.mark.parametrize("cut", [{}, {"nucleus_p": 1 - 1e-15}, {"top_k": 3}])
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_has_no_weight_to_speak_of_is_never_written(name, cut):
    """20,000 tokens over all cases; with draws of 24 bits, one in 838 of such would be another token."""
    make = lambda: SureBlocks(block_size=3)  # noqa: E731
    run = {
        "mdlm": lambda r: sample_blocks(WindowDenoiser(SureAnyLength(), 8), first_hitting, r, window_plan(r.length, 8)),
        "sedd": lambda r: sample_analytic(SureAnyLength(), r, get_schedule("loglinear"), steps=12),
        "ar": lambda r: sample_next_tokens(SureNext(), r),
        "simplex": blocks_with(SimplexDiffusion(2, VOCAB, 2.0), lambda: SureSimplex(block_size=3)),
        "ancestral": blocks_with(Ancestral(4), make),
        "confidence": blocks_with(Parallel("confidence", 0.5), make),
        "entropy": blocks_with(Parallel("entropy", 0.8), make),
    }.get(name, blocks_with(first_hitting, make))
    result = run(request(((2,),) * 60, length=15, token_filter=TokenFilter(**cut)))
    assert {token for tokens in result.tokens for token in tokens[1:]} == {1}


@pytest.mark.parametrize("name", ["first_hitting", "ancestral", "confidence", "entropy", "simplex", "mdlm"])
def test_tokens_that_are_cut_off_are_no_part_of_nfe(name):
    """Length 13 in blocks of 3: the last block is filled for its first token, whose updates alone count."""
    prompts, seen = ((1,), (2, 0)), []

    def watched(fill):
        def run(denoiser, task):
            filled = fill(denoiser, task)
            seen.append(filled)
            return filled

        return run

    fills = {
        "first_hitting": first_hitting, "ancestral": Ancestral(4), "confidence": Parallel("confidence", 1.1),
        "entropy": Parallel("entropy", -1.0), "simplex": SimplexDiffusion(5, VOCAB, 2.0), "mdlm": first_hitting,
    }  # fmt: skip
    if name == "mdlm":
        run = lambda r: sample_blocks(WindowDenoiser(ToyAnyLength(), 8), fills[name], r, window_plan(r.length, 8))  # noqa: E731
    else:
        toy = ToySimplex if name == "simplex" else ToyBlocks
        run = blocks_with(watched(fills[name]), lambda: toy(block_size=3))
    whole, cut = run(request(prompts, length=15)), run(request(prompts, length=13))
    if name in ("first_hitting", "mdlm"):
        assert cut.nfe == (12, 11), "one update per token kept"
        assert whole.nfe == (14, 13)
    elif name == "simplex":
        assert cut.nfe == whole.nfe, "each update changes all of the block"
    else:
        last = seen[-1]
        for row in range(2):
            assert cut.nfe[row] == whole.nfe[row] - len(set(last.step_BS[row].tolist())) + 1
        assert min(cut.nfe) < min(whole.nfe)


def test_tokens_behind_the_end_of_text_are_no_part_of_nfe():
    prompts, stop = ((1,),) * 12, StopRule(eos_token_id=2)
    result = SAMPLERS["first_hitting"](request(prompts, length=30, stop=stop))
    assert "eos" in result.finish
    assert any(len(tokens) % 3 for tokens in result.tokens), "some end inside a block"
    assert result.nfe == tuple(len(tokens) - 1 for tokens in result.tokens)


# ---- text with gaps --------------------------------------------------------------------------------------------------

GAPS = ((1, MASK, 0, 2, 1, MASK, MASK, 0), (2, 0, 1, MASK, MASK, MASK, 1, MASK), (0, 1, 1, 2, 2, 0, MASK, 1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_gaps_are_written_and_the_rest_is_kept(name):
    result = SAMPLERS[name](request(GAPS, length=8, infill=True, seed=4))
    for given, tokens, log_probs in zip(GAPS, result.tokens, result.log_probs, strict=True):
        assert MASK not in tokens
        assert len(tokens) == 8
        for place in range(8):
            if given[place] == MASK:
                assert log_probs[place] < 0.0 or name == "simplex"
            else:
                assert (tokens[place], log_probs[place]) == (given[place], 0.0)
    for place in (2, 0):
        alone = SAMPLERS[name](request((GAPS[place],), length=8, infill=True, seed=4, sample_index=(place,)))
        assert alone.tokens[0] == result.tokens[place]
        assert alone.log_probs[0] == pytest.approx(result.log_probs[place])
    if name == "first_hitting":
        assert result.nfe == (3, 4, 1)


def test_gaps_follow_the_exact_conditional_of_their_block():
    """One gap in a block of two: what is behind it counts, and its log-probability is that of the table."""
    toy, gap = ToyBlocks(), (2, 0, MASK, 1)
    result = sample_blocks(
        toy, first_hitting, request((gap,) * 4_000, length=4, infill=True, token_filter=TokenFilter(temperature=1.0)),
        BlockPlan(2, 2),
    )  # fmt: skip
    context, state = encode(torch.tensor([[2, 0]])).item(), encode(torch.tensor([[MASK, 1]])).item()
    law = toy.table(context, state)[0].softmax(-1)
    found = np.bincount([tokens[2] for tokens in result.tokens], minlength=3)[:3]
    expected = law[:3].numpy() * 4_000
    assert ((found - expected) ** 2 / expected).sum() < 13.8, "2 degrees of freedom, p = 0.001"
    for tokens, log_probs in zip(result.tokens[:50], result.log_probs[:50], strict=True):
        assert log_probs[2] == pytest.approx(float(law[tokens[2]].log()))


def test_gaps_that_cannot_be_filled_are_refused():
    with pytest.raises(ValueError, match="must have the sample's length"):
        request(GAPS, length=9, infill=True)
    with pytest.raises(ValueError, match="use no stop rule"):
        request(GAPS, length=8, infill=True, stop=StopRule(eos_token_id=2))
    with pytest.raises(ValueError, match="needs at least one token"):
        SAMPLERS["ar"](request(((MASK, 1),), length=2, infill=True))
