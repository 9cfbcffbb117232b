"""The oracle itself: it computes what the published model computes, and its two forms of training agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bd3lm_scale.config.schema import DiffusionConfig
from bd3lm_scale.diffusion.loss import num_loss_tokens, score_rows
from bd3lm_scale.diffusion.noising import given_noise
from bd3lm_scale.diffusion.process import make_process
from bd3lm_scale.diffusion.visibility import training_visibility
from tests.diffusion.heads import head_of
from tests.plain_dit import PlainDiT, block_diffusion_mask, random_parameters

FOLDER = Path(__file__).parents[1] / "goldens"


def published() -> dict[str, torch.Tensor]:
    weights = load_file(FOLDER / "hf_tiny" / "model.safetensors")
    return {n.removeprefix("backbone."): w for n, w in weights.items() if "inv_freq" not in n and "." in n}


@pytest.mark.parametrize("conditioned", [False, True])
def test_oracle_equals_the_published_model(conditioned):
    golden = np.load(FOLDER / "hf_tiny_goldens.npz")
    clean, noisy = torch.from_numpy(golden["x0"]), torch.from_numpy(golden["xt"])
    sigma = torch.from_numpy(golden["timesteps"])
    model = PlainDiT(published(), num_heads=4, time_conditioning=conditioned)
    tag = f"bs4_tc{int(conditioned)}"
    want = torch.from_numpy(golden[f"train_logits_{tag}"])
    torch.testing.assert_close(model.training_logits(noisy, clean, 4, sigma), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.two_pass_logits(noisy, clean, 4, sigma), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_two_passes_equal_one_in_logits_and_gradients(block_size):
    """Algorithm 1 of the paper is the oracle of the vectorized pass."""
    generator = torch.Generator().manual_seed(4)
    clean = torch.randint(0, 10, (3, 16), generator=generator)
    masked = torch.rand(3, 16, generator=generator) < 0.5
    noisy = torch.where(masked, 10, clean)
    results = []
    for form in ("training_logits", "two_pass_logits"):
        parameters = {n: p.requires_grad_() for n, p in random_parameters(11).items()}
        logits = getattr(PlainDiT(parameters, num_heads=4), form)(noisy, clean, block_size)
        nll = torch.nn.functional.cross_entropy(logits[..., :10].flatten(0, 1), clean.flatten(), reduction="none")
        loss = (nll * masked.flatten()).sum()
        results.append((loss.detach(), torch.autograd.grad(loss, list(parameters.values()))))
    (one, one_grads), (two, two_grads) = results
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert one > 1
    for a, b in zip(one_grads, two_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert sum(float(g.abs().max()) > 1e-3 for g in one_grads) > 20


def test_visibility_equals_the_three_published_parts():
    for length, block_size in ((16, 1), (16, 4), (16, 16), (12, 3)):
        visibility = training_visibility("bd3lm", length, block_size)
        index = torch.arange(2 * length)
        seen = visibility.may_see(index[:, None], index[None, :])
        assert torch.equal(seen, block_diffusion_mask(length, block_size))


def test_published_trajectory_is_reproduced():
    """8 AdamW steps with given rows, noise and times: losses, gradient norms, final weights and EMA."""
    golden = np.load(FOLDER / "traj_bd3lm_bs4.npz")
    weights = load_file(FOLDER / "traj_bd3lm_bs4.safetensors")

    def start(kind: str) -> dict[str, torch.Tensor]:
        return {
            n.removeprefix(f"{kind}."): w for n, w in weights.items() if n.startswith(f"{kind}.") and "inv_" not in n
        }

    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in start("init").items()}
    ema = {name: w.detach().clone() for name, w in parameters.items()}
    process = make_process(DiffusionConfig(block_size=4), 32, 100, 99)
    optimizer = torch.optim.AdamW(parameters.values(), lr=float(golden["lr"]), weight_decay=0.0)
    model = PlainDiT(parameters, num_heads=4)
    for step in range(8):
        clean, shown = torch.from_numpy(golden["x0"][step]), torch.from_numpy(golden["xt"][step])
        noisy = given_noise(clean, shown, torch.from_numpy(golden["t"][step])[:, ::4], process, training=True)
        noisy_BL = noisy.input_BP[:, :32]  # the first token, masked in some of the given rows, is kept clean
        head = head_of(model.training_logits(noisy_BL, clean, 4), noisy, 99)
        loss = score_rows(head, noisy, process).weighted_nll / num_loss_tokens(process, 4)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(0.9999, (2 + step) / (11 + step))
        for name, w in parameters.items():
            ema[name] -= (1 - decay) * (ema[name] - w.detach())
        assert loss.item() == pytest.approx(golden["loss"][step], rel=1e-4)
        assert float(norm) == pytest.approx(golden["grad_norm"][step], rel=1e-4)
    for kind, result in (("final", parameters), ("ema", ema)):
        for name, want in start(kind).items():
            torch.testing.assert_close(result[name].detach(), want, rtol=1e-4, atol=1e-4)
