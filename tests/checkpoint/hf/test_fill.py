"""generate(fill=True): text in place of masks, and how likely the model finds it."""

import pytest
import torch

from tests.checkpoint.hf.test_modeling import OBJECTIVES, make

MASK = 29


def masked(rows=3, length=10, slots=((2,), (5, 6), (1, 3, 8))):
    ids = torch.randint(2, 29, (rows, length), generator=torch.Generator().manual_seed(1))
    for row, columns in enumerate(slots):
        ids[row, list(columns)] = MASK
    return ids


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral", "confidence", "entropy"])
def test_masks_are_filled_and_everything_else_is_kept(objective, sampler):
    if objective == "sedd":
        sampler = "analytic"
    model, given = make(objective), masked()
    options = {"fill": True, "sampler": sampler, "num_steps": 4}
    found = model.generate(given, seed=1, **options)
    is_slot = given == MASK
    assert torch.equal(found.sequences[~is_slot], given[~is_slot])
    assert (found.sequences != MASK).all()
    assert (found.log_probs[~is_slot] == 0).all()
    assert (found.log_probs[is_slot] < 0).all()
    assert torch.equal(found.sequences, model.generate(given, seed=1, **options).sequences)
    many = model.generate(given, seed=1, num_return_sequences=3, **options)
    assert many.sequences.shape == (9, 10)


@torch.no_grad()
@pytest.mark.parametrize("objective", ["bd3lm", "mdlm", "ar"])
def test_one_open_slot_has_its_exact_conditional(objective):
    """One forward pass with that mask alone in its block says what its log-probability is."""
    model, given = make(objective), masked(rows=4, slots=((1,), (4,), (6,), (9,)))
    found = model.generate(given, fill=True, seed=1, temperature=0.7, top_k=12)
    for row, column in enumerate((1, 4, 6, 9)):
        text = given[row : row + 1]
        if objective == "bd3lm":
            block = column // 4 * 4 + 4
            text = torch.nn.functional.pad(text, (0, 2), value=MASK)[:, :block]  # blocks are whole
        if objective == "ar":
            logits = model(text).logits[0, column - 1]
        else:
            logits = model(text, sample_mode=True).logits[0, column]
        logits[MASK] = float("-inf")
        expected = logits.log_softmax(-1)[found.sequences[row, column]]
        torch.testing.assert_close(found.log_probs[row, column], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_several_slots_chain_the_samplers_own_steps():
    """Two slots of a block: the second one's log-probability is given the first, whichever was written first."""
    model, given = make("bd3lm"), masked(rows=1, slots=((5, 6),))
    found = model.generate(given.expand(8, -1), fill=True, seed=2)

    def log_p(text, column):
        logits = model(text[:, :8], sample_mode=True).logits[0, column]
        logits[MASK] = float("-inf")
        return logits.log_softmax(-1)

    for row in range(8):
        tokens = found.sequences[row : row + 1]
        chains = []
        for first, second in ((5, 6), (6, 5)):
            half = given.clone()
            half[0, first] = tokens[0, first]
            texts = {first: given, second: half}
            chains.append({column: float(log_p(text, column)[tokens[0, column]]) for column, text in texts.items()})
        here = {column: float(found.log_probs[row, column]) for column in (5, 6)}
        assert any(here == pytest.approx(chain, abs=1e-4) for chain in chains)


@pytest.mark.parametrize(("objective", "sees"), [("bd3lm", False), ("mdlm", True), ("sedd", True), ("ar", False)])
def test_how_far_the_right_context_counts(objective, sees):
    """bd3lm: inside the slot's block only; mdlm and sedd: everywhere; ar: nowhere."""
    model, given = make(objective), masked(rows=1, slots=((1,),))
    other = given.clone()
    other[0, 5] = (given[0, 5] + 3) % 29
    steps = {"num_steps": 2} if objective == "sedd" else {}
    both = [model.generate(ids, fill=True, do_sample=False, seed=1, **steps).log_probs[0, 1] for ids in (given, other)]
    assert (float((both[0] - both[1]).abs()) > 1e-6) == sees
    inside = given.clone()
    inside[0, 3] = (given[0, 3] + 3) % 29
    found = model.generate(inside, fill=True, do_sample=False, seed=1, **steps).log_probs[0, 1]
    assert (float((found - both[0]).abs()) > 1e-6) == (objective != "ar")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_is_left_alone_on_either_side(objective):
    model, given = make(objective), masked()
    options = {"fill": True, "seed": 1, "num_steps": 4, "do_sample": False}
    if objective == "mdlm":
        options["sampler"] = "confidence"
    alone = model.generate(given, **options)
    for left in (0, 2):
        pad = lambda x, value, left=left: torch.nn.functional.pad(x, (left, 2 - left), value=value)  # noqa: E731
        found = model.generate(pad(given, MASK), attention_mask=pad(torch.ones_like(given), 0), **options)
        here = slice(left, left + 10)
        is_padding = pad(torch.ones_like(given), 0) == 0
        assert (found.sequences[is_padding] == MASK).all()
        assert (found.log_probs[is_padding] == 0).all()
        if objective == "ar":
            assert torch.equal(found.sequences[:, here], alone.sequences)
        assert (found.sequences[:, here] != MASK).all()


def test_text_longer_than_the_context_is_filled_too():
    for objective in ("bd3lm", "mdlm"):
        model, given = make(objective), masked(rows=2, length=50, slots=((3, 20, 49), (16, 17, 33)))
        found = model.generate(given, fill=True, seed=1)
        assert (found.sequences != MASK).all()
        assert torch.equal(found.sequences[given != MASK], given[given != MASK])
    full = masked(rows=1, slots=())
    assert torch.equal(model.generate(full, fill=True).sequences, full), "nothing to fill"


def test_what_filling_cannot_do_is_refused():
    model, given = make("bd3lm"), masked()
    with pytest.raises(ValueError, match="fill=True adds no tokens"):
        model.generate(given, fill=True, max_new_tokens=4)
    with pytest.raises(ValueError, match="with fill"):
        model.generate(given, fill=True, stopping_criteria=[lambda *_: False])
    with pytest.raises(ValueError, match=r"fill=True\) puts text"):
        model.generate(given, max_new_tokens=4)
    first = given.clone()
    first[0, 0] = MASK
    with pytest.raises(ValueError, match="needs a first token"):
        make("ar").generate(first, fill=True)
