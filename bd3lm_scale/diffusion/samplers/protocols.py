"""What a sampler needs of a network, and nothing more.

Logits are float (float64 in exact tests) with -inf at ids that are never text: the mask token and padding ids.

Shapes: B rows, S tokens in a block, T tokens of whole blocks, L tokens in a row, I positions per row the head is
evaluated at, V vocabulary.
"""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """Committed clean text of a batch of rows."""

    def commit(self, tokens_BT: Tensor) -> None:
        """Append clean tokens, one or several whole blocks."""
        ...

    def keep_rows(self, index: Tensor) -> None:
        """Go on with these rows only, in this order."""
        ...


class BlockDenoiser(Context, Protocol):
    """Block diffusion: predictions for one noisy block after the context."""

    def denoise(self, block_BS: Tensor, scored_BI: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of the block after the context, or (B, I, V) at `scored_BI`, positions in the block."""
        ...


class NextToken(Protocol):
    """Autoregression: feed tokens, get the distribution of the next one."""

    def feed(self, tokens_BT: Tensor) -> Tensor:
        """Append tokens; logits (B, V) after the last one."""
        ...

    def keep_rows(self, index: Tensor) -> None:
        """Go on with these rows only, in this order."""
        ...


class FullSequenceDenoiser(Protocol):
    """Full-sequence diffusion (MDLM, SEDD): no context, no state."""

    def denoise(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, scored_BI: Tensor | None = None) -> Tensor:
        """Logits (B, L, V), or (B, I, V) at positions `scored_BI`; sigma_B is the noise level, None for zero."""
        ...


class SimplexDenoiser(Context, Protocol):
    """SSD-LM: predictions for a block given as noisy points near the vocabulary simplex, after the context."""

    def denoise(self, simplex_BSV: Tensor, time_B: Tensor) -> Tensor:
        """Logits (B, S, V) from probabilities (B, S, V) at diffusion time in (0, 1]."""
        ...


class SimplexNetwork(Context, Protocol):
    """A block denoiser that also reads distributions over ids."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    def denoise_simplex(self, simplex_BSV: Tensor) -> Tensor:
        """Logits (B, S, V) of the block after the context."""
        ...
