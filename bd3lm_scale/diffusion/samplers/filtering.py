"""From logits to a token: temperature, top-k, nucleus, greedy; one uniform number per token.

The nucleus p is the paper's: tokens in order of probability (equal ones in order of id) are kept while their
cumulative probability is at most p, so the token that crosses p is dropped; the most likely token is always kept;
what is kept is renormalized. (Holtzman et al. and most libraries keep the crossing token too.) Order of filters:
temperature, top-k, nucleus of the renormalized rest.

Only values are sorted, never (value, id) pairs, and a token is found from its rank: sorting floats in numpy is an
order of magnitude cheaper than an argsort, and cheaper still than a filtered copy of the distribution.

Shapes: R rows (one per token to draw), V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenFilter:
    """How a distribution is cut before a token is drawn.

    Attributes:
        nucleus_p: in (0, 1]; 1 keeps everything.
        top_k: keep the k most likely; None keeps all.
        temperature: divides the logits; 0 always takes the most likely token.
    """

    nucleus_p: float = 1.0
    top_k: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.nucleus_p <= 1.0:
            raise ValueError(f"sampling.nucleus_p ({self.nucleus_p}): not in (0, 1]; 1 keeps every token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling.top_k ({self.top_k}): must be at least 1; null keeps every token")
        if not self.temperature >= 0.0:
            raise ValueError(f"sampling.temperature ({self.temperature}): negative; 0 is greedy, 1 leaves logits alone")

    @property
    def is_greedy(self) -> bool:
        """Whether draws do not matter."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def factor(self) -> float:
        """Of the logits: 1 / temperature, or the largest that float32 can work with, where nothing changes any more."""
        return min(1.0 / self.temperature, 1e20)

    @property
    def cuts(self) -> bool:
        """Whether any token is dropped."""
        return self.nucleus_p < 1.0 or self.top_k is not None


def draw_tokens(logits_RV: Tensor, uniform_R: np.ndarray, token_filter: TokenFilter) -> Tensor:
    """One token per row of the filtered distribution, int64 (R,) on the device of the logits.

    Args:
        logits_RV: -inf where a token is impossible.
        uniform_R: float64 in [0, 1), one per row; a row's token is a function of its logits and its number alone.
        token_filter: how the distribution is cut.

    Raises:
        ValueError: a row has no finite logit or holds NaN.
    """
    if not torch.isfinite(logits_RV.amax(dim=-1)).all():
        raise ValueError("the model's logits are not finite: its weights or activations hold NaN or infinity")
    if token_filter.is_greedy:
        return logits_RV.argmax(dim=-1)
    if logits_RV.device.type == "cpu":
        values = logits_RV.detach()
        rows = (values if values.dtype == torch.float64 else values.float()).numpy()
        tokens = [_draw_one(row, u, token_filter) for row, u in zip(rows, uniform_R, strict=True)]
        return torch.tensor(tokens, dtype=torch.int64)
    return draw_tokens_batched(logits_RV, torch.as_tensor(uniform_R, device=logits_RV.device), token_filter)


def _draw_one(logits_V: np.ndarray, uniform: float, token_filter: TokenFilter) -> int:
    """One row in numpy: everything stays in the processor's cache."""
    weight_V = np.exp((logits_V - logits_V.max()) * logits_V.dtype.type(token_filter.factor))
    if not token_filter.cuts:
        sums = np.cumsum(weight_V, dtype=np.float64)
        return int(min(np.searchsorted(sums, uniform * sums[-1], side="right"), np.flatnonzero(weight_V)[-1]))
    falling = np.sort(weight_V)[::-1]
    sums = np.cumsum(falling[: token_filter.top_k], dtype=np.float64)
    if token_filter.nucleus_p < 1.0:
        num_kept = max(1, int(np.searchsorted(sums, token_filter.nucleus_p * sums[-1], side="right")))
        sums = sums[:num_kept]
    rank = min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), len(sums) - 1)
    # the rank-th largest value, then its place among equal values in order of id
    value = falling[rank]
    before = rank
    while before and falling[before - 1] == value:
        before -= 1
    return int(np.flatnonzero(weight_V == value)[rank - before])


def draw_tokens_batched(logits_RV: Tensor, uniform_R: Tensor, token_filter: TokenFilter) -> Tensor:
    """`draw_tokens` in torch operations, for accelerators: the same tokens for the same draws."""
    kept_RV, ids_RV = _kept_weights(logits_RV, token_filter)
    sums_RV = kept_RV.cumsum(dim=-1)
    goal_R1 = (uniform_R.double() * sums_RV[:, -1])[:, None]
    rank_R1 = torch.searchsorted(sums_RV, goal_R1, right=True)
    last_R1 = (kept_RV > 0).sum(dim=-1, keepdim=True) - 1
    return ids_RV.gather(1, torch.minimum(rank_R1, last_R1)).squeeze(1)


def _kept_weights(logits_RV: Tensor, token_filter: TokenFilter) -> tuple[Tensor, Tensor]:
    """Unnormalized float64 probabilities in falling order, 0 where dropped, and the ids they belong to."""
    values = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    weight_RV = ((values - values.amax(dim=-1, keepdim=True)) * token_filter.factor).exp()
    falling_RV, ids_RV = torch.sort(weight_RV, dim=-1, descending=True, stable=True)
    falling_RV = falling_RV.double()
    if token_filter.top_k is not None:
        falling_RV[:, token_filter.top_k :] = 0.0
    if token_filter.nucleus_p < 1.0:
        sums_RV = falling_RV.cumsum(dim=-1)
        is_kept_RV = sums_RV <= token_filter.nucleus_p * sums_RV[:, -1:]
        is_kept_RV[:, 0] = True
        falling_RV = falling_RV * is_kept_RV
    return falling_RV, ids_RV


def log_probabilities(logits_RV: Tensor, tokens_R: Tensor) -> np.ndarray:
    """float64 (R,): log-probability of each row's token under its logits, before any filter."""
    return logits_RV.double().log_softmax(dim=-1).gather(1, tokens_R[:, None])[:, 0].cpu().numpy()


def filtered_probabilities(logits_RV: Tensor, token_filter: TokenFilter) -> Tensor:
    """The distribution that `draw_tokens` draws from, float64 (R, V)."""
    if token_filter.is_greedy:
        return torch.nn.functional.one_hot(logits_RV.argmax(dim=-1), logits_RV.shape[-1]).double()
    kept_RV, ids_RV = _kept_weights(logits_RV, token_filter)
    out_RV = torch.zeros_like(kept_RV).scatter_(1, ids_RV, kept_RV)
    return out_RV / out_RV.sum(dim=-1, keepdim=True)
