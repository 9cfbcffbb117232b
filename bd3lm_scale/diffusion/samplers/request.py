"""What is asked of a sampler and what it gives back.

Shapes: B samples, S positions of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.diffusion.samplers.filtering import TokenFilter
from bd3lm_scale.diffusion.samplers.stopping import StopRule
from bd3lm_scale.rng import derive_key, uniforms

_WORDS_PER_POSITION = 4  # one Philox counter per position, so a draw depends on nothing but its position


@dataclass(frozen=True)
class SampleRequest:
    """One batch of samples.

    Attributes:
        prompts: tokens that each sample starts with, of any lengths; () is an empty prompt.
        length: tokens of a finished sample, prompt included.
        mask_token_id: the mask.
        seed: of the whole sampling run.
        sample_index: number of each sample in that run. Draws depend on (seed, sample_index, position) only, so a
            sample is the same in any batch.
        token_filter: nucleus, top-k, temperature.
        stop: when a sample ends before `length`.
        device: where the network's inputs go.
        infill: prompts are whole samples; their masks are written and everything else is kept. A block sees what
            is given before it and in it only.
        on_text: told the new tokens of the first sample so far, each time some are added.
    """

    prompts: tuple[tuple[int, ...], ...]
    length: int
    mask_token_id: int
    seed: int = 1
    sample_index: tuple[int, ...] = ()
    token_filter: TokenFilter = field(default_factory=TokenFilter)
    stop: StopRule = field(default_factory=StopRule)
    device: torch.device | str = "cpu"
    infill: bool = False
    on_text: Callable[[tuple[int, ...]], object] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: none given; use one per sample (an empty one is allowed)")
        if not self.sample_index:
            object.__setattr__(self, "sample_index", tuple(range(len(self.prompts))))
        if len(self.sample_index) != len(self.prompts):
            raise ValueError(
                f"sample_index: {len(self.sample_index)} numbers for {len(self.prompts)} prompts; give one for each"
            )
        longest = max(len(prompt) for prompt in self.prompts)
        if self.infill and self.stop != StopRule():
            raise ValueError("stop: infilled text has the length it is given; use no stop rule")
        if self.infill and any(len(prompt) != self.length for prompt in self.prompts):
            raise ValueError(f"prompts: text with masks to fill must have the sample's length ({self.length} tokens)")
        if not self.infill and longest >= self.length:
            raise ValueError(
                f"sampling.length ({self.length}): a prompt has {longest} tokens, which leaves nothing to sample; "
                "use a greater length or a shorter prompt"
            )
        if not self.infill and any(self.mask_token_id in prompt for prompt in self.prompts):
            raise ValueError(f"prompts: token {self.mask_token_id} is the mask; a prompt holds text only")

    def start_tokens(self, padded_length: int) -> np.ndarray:
        """int64 (B, padded_length): the prompts, then masks."""
        tokens = np.full((len(self.prompts), padded_length), self.mask_token_id, dtype=np.int64)
        for row, prompt in enumerate(self.prompts):
            tokens[row, : len(prompt)] = prompt
        return tokens

    def prompt_length(self) -> np.ndarray:
        """int64 (B,)."""
        return np.array([len(prompt) for prompt in self.prompts], dtype=np.int64)

    def open_places(self, tokens_BT: np.ndarray) -> np.ndarray:
        """bool (B, T): where text is to be written, given the start tokens. Infilled text ends where it is given."""
        place_T = np.arange(tokens_BT.shape[1])
        if self.infill:
            return (tokens_BT == self.mask_token_id) & (place_T < self.length)
        return place_T >= self.prompt_length()[:, None]


@dataclass(frozen=True)
class SampleResult:
    """Finished samples, in the order of the request.

    Attributes:
        tokens: each sample's ids, prompt included; they differ in length where samples stopped early.
        finish: why each one ended: length | eos | low_entropy.
        nfe: number of function evaluations as the literature counts them: updates that changed the sample. Tokens that
            are cut off, behind the length or the end of text, are no part of it.
        forward_calls: calls of the network made while the sample was in the batch, commits included.
        log_probs: of infilled text: the network's own log-probability (no temperature, no filter) of each token when it
            was written, 0 where the text was given; None otherwise.
    """

    tokens: tuple[tuple[int, ...], ...]
    finish: tuple[str, ...]
    nfe: tuple[int, ...]
    forward_calls: tuple[int, ...]
    log_probs: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class BlockTask:
    """One block to fill.

    Attributes:
        tokens_BS: int64, the block with prompt tokens pinned and masks elsewhere, on the network's device.
        is_masked_BS: bool, where it is to be filled.
        when_BS: float64 uniforms in [0, 1): when each position is revealed; time runs from 1 down to 0.
        which_BS: float64 uniforms: which token it becomes.
        keys: one key per row for samplers that need more randomness.
        token_filter: how distributions are cut.
        log_prob_BS: float64, where the log-probability of what is written is noted; None: nowhere.
    """

    tokens_BS: Tensor
    is_masked_BS: np.ndarray
    when_BS: np.ndarray
    which_BS: np.ndarray
    keys: tuple[int, ...]
    token_filter: TokenFilter
    log_prob_BS: np.ndarray | None = None


@dataclass(frozen=True)
class FilledBlock:
    """A block without masks.

    Attributes:
        tokens_BS: int64.
        updates_B: updates that changed each row.
        forward_calls: calls of the network.
        step_BS: int64, the update that wrote each position, -1 where none did; None: every update changes them all.
    """

    tokens_BS: Tensor
    updates_B: np.ndarray
    forward_calls: int
    step_BS: np.ndarray | None = None

    def updates_of(self, place: int, kept: int) -> int:
        """Updates of a row that changed one of its first `kept` positions."""
        if self.step_BS is None:
            return int(self.updates_B[place]) if kept > 0 else 0
        step_S = self.step_BS[place, : max(kept, 0)]
        return len(np.unique(step_S[step_S >= 0]))


def position_uniforms(
    request: SampleRequest, rows: np.ndarray, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(when, which), float64 (len(rows), count): the two draws of each position start ... start + count - 1."""
    draws = np.stack(
        [
            uniforms(sample_key(request, row), _WORDS_PER_POSITION * count, counter=start).reshape(count, -1)
            for row in rows.tolist()
        ]
    )
    return draws[:, :, 0], draws[:, :, 1]


def sample_key(request: SampleRequest, row: int, *coordinates: int) -> int:
    """Key of everything random in one sample."""
    return derive_key(request.seed, "sample", request.sample_index[row], *coordinates)
