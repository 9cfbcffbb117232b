"""SSD-LM (Han et al. 2022, arXiv 2210.17432): Gaussian diffusion on the vocabulary simplex, block by block.

Tokens are points of {-K, +K}^V. A block starts as Gaussian noise of scale K; each of T steps reads the softmax of the
noisy point, projects the predicted distribution back to almost-one-hot points and noises these to the next level
(Algorithm 2 of the paper). The last step's draw gives the tokens.

`sampling.sampler=simplex` runs it on a block-diffusion model: the network reads each position's mean embedding under
its distribution, as SSD-LM's does. A model trained by masking has never seen such mixtures.

Shapes: B rows, S tokens in a block, R = B*S, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.diffusion.samplers.blocks import BlockPlan, sample_blocks
from bd3lm_scale.diffusion.samplers.filtering import draw_tokens, filtered_probabilities
from bd3lm_scale.diffusion.samplers.protocols import SimplexDenoiser, SimplexNetwork
from bd3lm_scale.diffusion.samplers.request import BlockTask, FilledBlock, SampleRequest, SampleResult
from bd3lm_scale.diffusion.samplers.sampler import OnProgress, SamplerSettings
from bd3lm_scale.rng import derive_key, uniforms

PROJECTIONS = ("sampling", "multi_hot", "greedy")
_COSINE_OFFSET = 0.008


@dataclass(frozen=True)
class SimplexDiffusion:
    """The SSD-LM sampler of one block; use it as the `fill` of `sample_blocks`.

    Attributes:
        steps: T.
        vocab_size: V.
        scale: K.
        projection: sampling (a token drawn from the filtered distribution), multi_hot (every token the filter keeps) or
            greedy (the most likely one).
    """

    steps: int
    vocab_size: int
    scale: float = 5.0
    projection: str = "sampling"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling.steps ({self.steps}): must be at least 1")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection ({self.projection}): unknown; use one of {', '.join(PROJECTIONS)}")

    def __call__(self, denoiser: SimplexDenoiser, task: BlockTask) -> FilledBlock:
        """Fill a block; prompt tokens inside it stay, noised like the rest in what the network reads."""
        device = task.tokens_BS.device
        is_pinned_BS = torch.as_tensor(~task.is_masked_BS, device=device)
        tokens_BS = task.tokens_BS
        point_BSV = self.points(torch.where(is_pinned_BS, tokens_BS, 0))
        for step in range(self.steps, 0, -1):
            signal = signal_share(step / self.steps)
            noise_BSV = self._noise(task, step, device)
            noisy_BSV = math.sqrt(signal) * point_BSV + math.sqrt(1.0 - signal) * self.scale * noise_BSV
            time_B = torch.full((len(tokens_BS),), step / self.steps, dtype=torch.float64, device=device)
            logits_RV = denoiser.denoise(noisy_BSV.softmax(dim=-1), time_B).flatten(0, 1)
            drawn_BS = draw_tokens(logits_RV, self._uniforms(task, step), task.token_filter).reshape(tokens_BS.shape)
            tokens_BS = torch.where(is_pinned_BS, task.tokens_BS, drawn_BS)
            point_BSV = torch.where(
                is_pinned_BS[:, :, None], self.points(tokens_BS), self._project(logits_RV, tokens_BS, task)
            )
        updates_B = np.where(task.is_masked_BS.any(axis=1), self.steps, 0)
        return FilledBlock(tokens_BS, updates_B, self.steps)

    def points(self, tokens_BS: Tensor) -> Tensor:
        """Almost-one-hot points: +K at the token, -K elsewhere, float64 (B, S, V)."""
        return (torch.nn.functional.one_hot(tokens_BS, self.vocab_size).double() * 2.0 - 1.0) * self.scale

    def _project(self, logits_RV: Tensor, drawn_BS: Tensor, task: BlockTask) -> Tensor:
        if self.projection == "sampling":
            return self.points(drawn_BS)
        if self.projection == "greedy":
            return self.points(logits_RV.argmax(dim=-1).reshape(drawn_BS.shape))
        is_kept_RV = filtered_probabilities(logits_RV, task.token_filter) > 0.0
        return ((is_kept_RV.double() * 2.0 - 1.0) * self.scale).reshape(*drawn_BS.shape, self.vocab_size)

    def _noise(self, task: BlockTask, step: int, device: torch.device) -> Tensor:
        """Standard normal (B, S, V), a function of each row's key and the step."""
        shape = (task.is_masked_BS.shape[1], self.vocab_size)
        generators = [np.random.Philox(key=_two_words(derive_key(key, "noise", step))) for key in task.keys]
        noise = np.stack([np.random.Generator(bits).standard_normal(shape) for bits in generators])
        return torch.as_tensor(noise, device=device)

    def _uniforms(self, task: BlockTask, step: int) -> np.ndarray:
        """One number per position and step, (R,)."""
        count = task.is_masked_BS.shape[1]
        return np.concatenate([uniforms(derive_key(key, "token", step), count) for key in task.keys])


class _WithoutTime:
    """The SimplexDenoiser of a network that is not told the time."""

    def __init__(self, network: SimplexNetwork) -> None:
        self.network = network
        self.commit, self.keep_rows = network.commit, network.keep_rows

    def denoise(self, simplex_BSV: Tensor, time_B: Tensor) -> Tensor:
        return self.network.denoise_simplex(simplex_BSV)


def sample_simplex(
    network: SimplexNetwork, request: SampleRequest, settings: SamplerSettings, on_progress: OnProgress = None
) -> SampleResult:
    """The sampler `simplex`."""
    fill = SimplexDiffusion(settings.steps, network.vocab_size)
    plan = BlockPlan(settings.block_size, settings.block_size, settings.commit_runs_network)
    return sample_blocks(_WithoutTime(network), fill, request, plan, on_progress)


def signal_share(time: float) -> float:
    """The cosine schedule of Nichol & Dhariwal: share of the variance that is signal, 1 at time 0 and 0 at time 1."""
    if time >= 1.0:
        return 0.0

    def raw(t: float) -> float:
        return math.cos((t + _COSINE_OFFSET) / (1.0 + _COSINE_OFFSET) * math.pi / 2) ** 2

    return raw(time) / raw(0.0)


def _two_words(key: int) -> list[int]:
    return [key & ((1 << 64) - 1), key >> 64]
