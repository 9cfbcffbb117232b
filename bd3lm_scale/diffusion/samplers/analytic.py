"""The analytic sampler of SEDD (Lou et al. 2024) for absorbing diffusion: T steps and a final denoising one.

With scores s_y = exp(logit_y) / ((V - 1) (e^sigma - 1)) the update from t to s reveals a masked token with probability
(e^dsigma - 1) * sum_y s_y and then takes y in proportion to s_y. In mask rates p = 1 - e^-sigma the first factor is

    (p(t) - p(s)) / p(t) * Z,     Z = sum_y exp(logit_y) / (V - 1)

so an exact network (Z = 1) makes it ancestral sampling. A probability above 1, where the learned Z is too large, means
certainty. A filter cuts the choice of y and leaves Z alone.

Shapes: B rows, L tokens, I masked positions (padded to the widest row), V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.diffusion.samplers.blocks import Batch
from bd3lm_scale.diffusion.samplers.protocols import FullSequenceDenoiser
from bd3lm_scale.diffusion.samplers.request import BlockTask, SampleRequest, SampleResult, position_uniforms
from bd3lm_scale.diffusion.samplers.reveal import Reveal, pack_positions, write_tokens
from bd3lm_scale.diffusion.samplers.sampler import OnProgress, SamplerSettings
from bd3lm_scale.diffusion.schedule import Schedule

LAST_TIME = 1e-5
"""Where the T steps end and the final denoising step begins."""


def sample_analytic(
    denoiser: FullSequenceDenoiser,
    request: SampleRequest,
    schedule: Schedule,
    steps: int,
    on_progress: Callable[[int], object] | None = None,
) -> SampleResult:
    """Sample a batch of whole sequences.

    The network is told its time, so it runs in each of the T steps and NFE is T; the final denoising step is not
    counted, as in the publication.

    A position is revealed when its survival probability, the product of the 1 - reveal probabilities so far, falls
    to its uniform number or below: the same process as a coin per step, with one draw per position.

    Raises:
        ValueError: steps below 1.
    """
    if steps < 1:
        raise ValueError(f"sampling.steps ({steps}): must be at least 1")
    batch = Batch(request, request.length)
    when_BL, which_BL = position_uniforms(request, batch.rows, 0, request.length)
    is_masked_BL = batch.is_open_BT.copy()
    tokens_BL = torch.as_tensor(batch.tokens_BT, device=request.device)
    task = BlockTask(tokens_BL.clone(), is_masked_BL, when_BL, which_BL, (), request.token_filter, batch.log_prob_BT)
    survival_BL = np.ones(when_BL.shape)
    times = torch.linspace(1.0, LAST_TIME, steps + 1, dtype=torch.float64)
    rates = [*schedule.mask_rate(times).tolist(), 0.0]
    sigmas = schedule.sigma(times).tolist()
    for step, sigma in enumerate(sigmas):
        if not is_masked_BL.any():
            break
        masked = pack_positions(is_masked_BL)
        logits_BIV = denoiser.denoise(
            task.tokens_BS,
            torch.full((len(masked.index_BI),), sigma, dtype=torch.float32, device=request.device),
            torch.as_tensor(masked.index_BI, device=request.device),
        )
        share = 1.0 - rates[step + 1] / rates[step]
        hit_BI = masked.is_real_BI.copy()
        if step < steps:
            hit_BI &= _reveals(logits_BIV, share, masked, survival_BL, when_BL)
        write_tokens(task.tokens_BS, logits_BIV, Reveal(masked.index_BI, hit_BI), task)
        rows, columns = np.nonzero(hit_BI)
        is_masked_BL[rows, masked.index_BI[rows, columns]] = False
        batch.count_calls(1)
        batch.nfe_B += (step < steps) & masked.is_real_BI.any(axis=1)
        if on_progress is not None:
            on_progress(int(hit_BI.sum()))
    batch.tokens_BT[:] = task.tokens_BS.cpu().numpy()
    batch.drop_finished(0, request.length)
    return batch.result()


def _reveals(
    logits_BIV: Tensor, share: float, masked: Reveal, survival_BL: np.ndarray, when_BL: np.ndarray
) -> np.ndarray:
    """Which masked positions are revealed now; survival probabilities are updated in place."""
    num_ids_BI = torch.isfinite(logits_BIV).sum(dim=-1)
    log_z_BI = logits_BIV.double().logsumexp(dim=-1) - num_ids_BI.double().log()
    probability_BI = np.minimum(1.0, share * log_z_BI.exp().cpu().numpy())
    rows, columns = np.nonzero(masked.is_real_BI)
    places = masked.index_BI[rows, columns]
    survival_BL[rows, places] *= 1.0 - probability_BI[rows, columns]
    hit_BI = np.zeros(masked.is_real_BI.shape, dtype=bool)
    hit_BI[rows, columns] = when_BL[rows, places] >= survival_BL[rows, places]
    return hit_BI


def sample_sedd(
    network: FullSequenceDenoiser, request: SampleRequest, settings: SamplerSettings, on_progress: OnProgress = None
) -> SampleResult:
    """The sampler `analytic`."""
    return sample_analytic(network, request, settings.schedule, settings.steps, on_progress)
