"""Sampled frequencies against exact joints on networks small enough to enumerate (3 tokens, 2 blocks)."""

import itertools

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
from bd3lm_scale.diffusion.samplers.request import SampleRequest
from bd3lm_scale.diffusion.samplers.simplex import SimplexDiffusion, signal_share
from bd3lm_scale.diffusion.schedule import get_schedule
from tests.diffusion.samplers.toys import MASK, NUM_TOKENS, VOCAB, ToyBlocks, ToyFull, chi_square_p, encode, exact_joint

NUM_SAMPLES = 8_000
PLAN = BlockPlan(2, 2)


def request(length=4, count=NUM_SAMPLES, prompt=(), **kwargs):
    return SampleRequest(prompts=(prompt,) * count, length=length, mask_token_id=MASK, **kwargs)


def test_first_hitting_draws_from_the_exact_joint():
    toy = ToyBlocks()
    samples = sample_blocks(toy, first_hitting, request(), PLAN).tokens
    joint = exact_joint(toy, 2, steps=None)
    assert sum(joint.values()) == pytest.approx(1.0)
    assert len(joint) == 81
    assert chi_square_p(samples, joint) > 1e-3
    # the test has teeth: all tokens of a block at once is another distribution, and it is told apart
    assert chi_square_p(samples, exact_joint(toy, 2, steps=1)) < 1e-9


def test_first_hitting_with_nucleus_draws_from_the_exact_joint():
    toy = ToyBlocks()
    samples = sample_blocks(toy, first_hitting, request(token_filter=TokenFilter(nucleus_p=0.85)), PLAN).tokens
    joint = exact_joint(toy, 2, steps=None, nucleus_p=0.85)
    assert len(joint) < 81
    assert chi_square_p(samples, joint) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_ancestral_with_few_steps_draws_from_its_exact_joint(steps):
    toy = ToyBlocks()
    samples = sample_blocks(toy, Ancestral(steps), request(), PLAN).tokens
    assert chi_square_p(samples, exact_joint(toy, 2, steps=steps)) > 1e-3
    assert chi_square_p(samples, exact_joint(toy, 2, steps=None)) < 1e-6


def test_ancestral_with_many_steps_reaches_the_limit_and_is_first_hitting_draw_by_draw():
    toy = ToyBlocks()
    many = sample_blocks(toy, Ancestral(100_000), request(), PLAN).tokens
    assert chi_square_p(many, exact_joint(toy, 2, steps=None)) > 1e-3
    limit = sample_blocks(toy.fresh(), first_hitting, request(), PLAN).tokens
    assert np.mean([a == b for a, b in zip(many, limit, strict=True)]) > 0.999


@pytest.mark.parametrize("schedule", ["cosine", "square", "log"])
def test_every_schedule_reveals_at_the_rate_of_its_mask_rate(schedule):
    """P(revealed at the step t -> s) = p(t) - p(s), and the last step takes the rest."""
    sampler = Ancestral(4, get_schedule(schedule))
    uniform = (np.arange(100_000) + 0.5)[None, :] / 100_000
    share = np.bincount(sampler.cells(uniform)[0], minlength=4) / 100_000
    rates = get_schedule(schedule).mask_rate(torch.linspace(0, 1, 5, dtype=torch.float64)).numpy()
    rates[0], rates[-1] = 0.0, 1.0
    assert share == pytest.approx(np.diff(rates), abs=2e-5)


def test_prompts_condition_the_joint():
    """With tokens 0 and 1 of a prompt of three given, the rest follows the conditional table."""
    toy = ToyBlocks()
    samples = sample_blocks(toy, first_hitting, request(prompt=(2, 0, 1)), PLAN).tokens
    context, state = encode(torch.tensor([[2, 0]])).item(), encode(torch.tensor([[1, MASK]])).item()
    p = toy.table(context, state)[1].softmax(-1).tolist()
    assert chi_square_p(samples, {(2, 0, 1, t): p[t] for t in range(NUM_TOKENS)}) > 1e-3


@pytest.mark.parametrize("rule", ["confidence", "entropy"])
def test_parallel_decoding_draws_from_its_exact_joint(rule):
    """Which positions are taken together follows from the table; the tokens then follow the conditionals."""
    threshold = 0.6 if rule == "confidence" else 0.9
    toy = ToyBlocks(seed=3)
    samples = sample_blocks(toy, Parallel(rule, threshold), request(length=2), PLAN).tokens

    def sureness(p):
        return p.max() if rule == "confidence" else (p * np.log(p)).sum()

    def spread(state, mass, out):
        masked = [i for i in range(2) if state[i] == MASK]
        if not masked:
            out[state] = out.get(state, 0.0) + mass
            return out
        table = toy.table(1, encode(torch.tensor([state])).item())[:, :NUM_TOKENS].softmax(-1).numpy()
        sure = {i: sureness(table[i]) for i in masked}
        least = threshold if rule == "confidence" else -threshold
        taken = [i for i in masked if sure[i] >= least or sure[i] == max(sure.values())]
        for tokens in itertools.product(range(NUM_TOKENS), repeat=len(taken)):
            new = list(state)
            p = mass
            for i, t in zip(taken, tokens, strict=True):
                new[i] = t
                p *= table[i][t]
            spread(tuple(new), p, out)
        return out

    assert chi_square_p(samples, spread((MASK, MASK), 1.0, {})) > 1e-3


def test_autoregressive_sampling_draws_from_the_chain_rule():
    toy = ToyBlocks(block_size=1)

    class Chain:
        def __init__(self):
            self.context = torch.zeros(NUM_SAMPLES, 0, dtype=torch.int64)

        def feed(self, tokens_BT):
            self.context = torch.cat([self.context, tokens_BT], dim=1)
            return torch.stack([toy.table(code, 0)[0] for code in encode(self.context).tolist()])

        def keep_rows(self, index):
            self.context = self.context[index]

    samples = sample_next_tokens(Chain(), request(length=4, prompt=(1,))).tokens
    joint = {}
    for tail in itertools.product(range(NUM_TOKENS), repeat=3):
        p, text = 1.0, (1,)
        for token in tail:
            p *= toy.table(encode(torch.tensor([text])).item(), 0)[0].softmax(-1)[token].item()
            text = (*text, token)
        joint[text] = p
    assert chi_square_p(samples, joint) > 1e-3


def test_mdlm_draws_from_the_joint_its_posterior_belongs_to():
    toy = ToyFull(length=3)
    samples = sample_blocks(WindowDenoiser(toy, 3), first_hitting, request(length=3), window_plan(3, 3)).tokens
    assert chi_square_p(samples, {k: toy.joint[k] for k in itertools.product(range(3), repeat=3)}) > 1e-3


def test_sedd_analytic_draws_from_the_joint_its_scores_belong_to():
    """An exact score network (Z = 1) and many steps give the data distribution; few steps give ancestral's."""
    toy = ToyFull(length=2)
    joint = {k: toy.joint[k] for k in itertools.product(range(3), repeat=2)}
    schedule = get_schedule("loglinear", mdlm_loss_scale=True)
    samples = sample_analytic(toy, request(length=2, count=5000), schedule, steps=150).tokens
    assert chi_square_p(samples, joint) > 1e-3

    independent = {(a, b): toy.joint.sum(1)[a] * toy.joint.sum(0)[b] for a in range(3) for b in range(3)}
    steps = 3
    two_steps = {k: (1 - 1 / steps) * joint[k] + independent[k] / steps for k in joint}  # both in one step: 1 in T
    samples = sample_analytic(toy, request(length=2, count=8000), get_schedule("loglinear"), steps=steps).tokens
    assert chi_square_p(samples, two_steps) > 1e-3
    assert chi_square_p(samples, independent) < 1e-6


def test_sedd_reveals_in_proportion_to_the_total_score():
    """Hazard (p(t) - p(s)) / p(t) * Z: with Z = 1/2 and T = 4, prod(1 - Z r_k) of the masks are left."""
    toy = ToyFull(length=1, z=0.5)
    sample_analytic(toy, request(length=1, count=8000), get_schedule("loglinear"), steps=4)
    left = np.array([masks for _, masks in toy.calls]) / 8000
    hazards = 0.5 * np.array([1 / 4, 1 / 3, 1 / 2, 1.0])
    assert left == pytest.approx(np.append(1.0, np.cumprod(1 - hazards)), abs=0.02)
    sigmas = [sigma[0] for sigma, _ in toy.calls]
    assert sigmas == sorted(sigmas, reverse=True)
    assert len(sigmas) == 5, "T steps and the final denoising one"


@pytest.mark.parametrize("projection", ["sampling", "greedy", "multi_hot"])
def test_ssd_lm_with_the_exact_posterior_draws_from_the_exact_chain(projection):
    """Blocks of one token and the true posterior p(x | noisy point): every step leaves the marginal as it is."""
    toy = ToyBlocks(block_size=1, spread=1.0)
    sampler = SimplexDiffusion(steps=6, vocab_size=VOCAB, scale=2.0, projection=projection)

    class Posterior(ToyBlocks):
        def denoise(self, simplex_BSV, time_B):
            context = [1] * len(simplex_BSV) if self.context is None else encode(self.context).tolist()
            prior_BSV = torch.stack([self.table(c, 0) for c in context])
            signal = signal_share(time_B[0].item())
            slope = 2 * signal**0.5 / ((1 - signal) * sampler.scale)
            return prior_BSV + slope * simplex_BSV.log().clamp(min=-1e6)

    network = Posterior(block_size=1, spread=1.0)
    samples = sample_blocks(network, sampler, request(length=2, count=2500), BlockPlan(1, 1)).tokens
    joint = {}
    for a, b in itertools.product(range(NUM_TOKENS), repeat=2):
        first = toy.table(1, 0)[0].softmax(-1)[a].item()
        joint[a, b] = first * toy.table(encode(torch.tensor([[a]])).item(), 0)[0].softmax(-1)[b].item()
    p_value = chi_square_p(samples, joint)
    if projection == "sampling":
        assert p_value > 1e-3
    else:
        assert p_value < 1e-6, "the sharpening projections are other distributions, and the test can tell"
