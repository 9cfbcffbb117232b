"""Token-by-token sampling from an autoregressive model, with the same filters, draws and stop rules as diffusion.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable

import numpy as np
import torch

from bd3lm_scale.diffusion.samplers.blocks import Batch
from bd3lm_scale.diffusion.samplers.filtering import draw_tokens, log_probabilities
from bd3lm_scale.diffusion.samplers.protocols import NextToken
from bd3lm_scale.diffusion.samplers.request import SampleRequest, SampleResult, position_uniforms
from bd3lm_scale.diffusion.samplers.sampler import OnProgress, SamplerSettings

_POSITIONS_DRAWN_TOGETHER = 64


def sample_next_tokens(
    model: NextToken, request: SampleRequest, on_progress: Callable[[int], object] | None = None
) -> SampleResult:
    """Sample a batch; what all prompts cover is fed at once, longer prompts are fed token by token.

    Raises:
        ValueError: an empty prompt (the model needs a first token; use the beginning-of-text token).
    """
    batch = Batch(request, request.length)
    shared = min(batch.num_given, request.length)
    if shared == 0:
        raise ValueError("prompts: an autoregressive model needs at least one token; start with the bos token")
    logits_BV = model.feed(_on_device(request, batch.tokens_BT[:, :shared]))
    batch.count_calls(1)
    which_BT = np.empty((len(request.prompts), 0))
    drawn_from = shared
    for position in range(shared, request.length):
        if position >= drawn_from + which_BT.shape[1]:
            drawn_from = position
            all_rows = np.arange(len(request.prompts))
            _, which_BT = position_uniforms(request, all_rows, position, _POSITIONS_DRAWN_TOGETHER)
        rows = batch.rows
        drawn_B = draw_tokens(logits_BV, which_BT[rows, position - drawn_from], request.token_filter).cpu().numpy()
        is_new_B = batch.is_open_BT[rows, position]
        if batch.log_prob_BT is not None:
            log_prob_B = log_probabilities(logits_BV, torch.as_tensor(drawn_B, device=logits_BV.device))
            batch.log_prob_BT[rows, position] = np.where(is_new_B, log_prob_B, 0.0)
        batch.tokens_BT[rows, position] = np.where(is_new_B, drawn_B, batch.tokens_BT[rows, position])
        batch.nfe_B[rows] += is_new_B
        if on_progress is not None:
            on_progress(int(is_new_B.sum()))
        going_on = batch.drop_finished(position, position + 1)
        if going_on is not None:
            if not going_on.size:
                break
            model.keep_rows(torch.as_tensor(going_on, device=request.device))
        if position + 1 < request.length:
            logits_BV = model.feed(_on_device(request, batch.tokens_BT[batch.rows, position : position + 1]))
            batch.count_calls(1)
    return batch.result()


def _on_device(request: SampleRequest, tokens: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(tokens, device=request.device)


def sample_ar(
    network: NextToken, request: SampleRequest, settings: SamplerSettings, on_progress: OnProgress = None
) -> SampleResult:
    """The sampler `ar`: no setting of the run matters to it."""
    return sample_next_tokens(network, request, on_progress)
