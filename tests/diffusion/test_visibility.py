"""The visibility rule equals the published mask and reduces to the known special cases."""

from pathlib import Path

import numpy as np
import torch

from bd3lm_scale.diffusion.visibility import training_visibility

GOLDENS = Path(__file__).parents[1] / "goldens" / "hf_tiny_goldens.npz"


def dense(visibility):
    index = torch.arange(len(visibility.view_P))
    return visibility.may_see(index[:, None], index[None, :])


def test_block_diffusion_mask_is_the_published_one():
    mask = torch.from_numpy(np.load(GOLDENS)["train_mask_bs4_tc0"])
    assert torch.equal(dense(training_visibility("bd3lm", 32, 4)), mask)


def test_special_cases():
    assert dense(training_visibility("mdlm", 16, 4)).all()
    assert dense(training_visibility("sedd", 16, 4)).all()
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    assert torch.equal(dense(training_visibility("ar", 16, 4)), causal)
    clean_half = dense(training_visibility("bd3lm", 16, 1))[16:, 16:]
    assert torch.equal(clean_half, causal)
    noisy_half = dense(training_visibility("bd3lm", 16, 16))[:16]
    assert noisy_half[:, :16].all()
    assert not noisy_half[:, 16:].any()
