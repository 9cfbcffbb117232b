"""Decoding with the trained model: blocks after cached clean context, next tokens, whole sequences.

The cache holds rotated keys and values of clean blocks only; a call computes queries of the current block only. With a
sliding window, evicted context lives on in the cached states of what saw it; `recompute_window` forgets it instead.

Shapes: B rows, S tokens in a block, T tokens of a call, I scored positions, L tokens, V ids.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bd3lm_scale.model.attention import LayerCache
from bd3lm_scale.model.denoiser import Denoiser

_FIRST_CAPACITY = 256


class CachedDecoder:
    """Sequences written block by block: the BlockDenoiser (bd3lm) and NextToken (ar) of the samplers.

    Args:
        model: a whole model (one pipeline stage) in evaluation mode.
        block_size: S; 1 for ar.
        batch_size: B.
        window: tokens of context attended to, the current block included; None: no limit.
        cache_dtype: dtype of cached keys and values.
        recompute_window: beyond the window, recompute it from its tokens at positions 0, 1, ... instead of keeping
            cached states at absolute positions, as the default and the published sampler do.
        use_cache: False recomputes the whole context at every call (an oracle; slow).
    """

    def __init__(
        self,
        model: Denoiser,
        block_size: int,
        batch_size: int,
        window: int | None = None,
        cache_dtype: torch.dtype = torch.float32,
        recompute_window: bool = False,
        use_cache: bool = True,
    ) -> None:
        if window is not None and (window < block_size or window % block_size):
            raise ValueError(f"sampling.window ({window}): use a multiple of the block size {block_size}")
        self.model, self.block_size = model.eval(), block_size
        self.window, self.recompute_window, self.use_cache = window, recompute_window, use_cache
        self.cache_dtype = cache_dtype
        self.device = model.embedding.weight.device
        self.context_BT = torch.zeros(batch_size, 0, dtype=torch.int64, device=self.device)
        self.num_forwards = 0
        self._start = 0
        self._last_1BD: Tensor | None = None  # states of the last committed token
        self._reset_caches()

    @property
    def length(self) -> int:
        """Committed tokens per row."""
        return self.context_BT.shape[1]

    @torch.no_grad()
    def denoise(self, block_BS: Tensor, scored_BI: Tensor | None = None) -> Tensor:
        """Logits of the noisy current block after the committed context, at all or the given positions.

        Returns:
            float32 (B, S, V), or (B, I, V) for int64 scored_BI; mask and padding ids are -inf.
        """
        if not self.use_cache:
            self._rebuild()
        hidden_SBD = self._run(block_BS, commits=False)
        if self.model.config.shift_targets:
            hidden_SBD = _shifted(hidden_SBD, self._last_1BD)
        return self._logits(hidden_SBD, scored_BI)

    @torch.no_grad()
    def commit(self, tokens_BT: Tensor) -> None:
        """Append clean tokens, a multiple of S, to the context."""
        if tokens_BT.shape[1] % self.block_size:
            raise ValueError(f"{tokens_BT.shape[1]} tokens are not whole blocks of {self.block_size}")
        tokens_BT = tokens_BT.to(self.device)
        self.context_BT = torch.cat([self.context_BT, tokens_BT], dim=1)
        if not self.use_cache:
            return
        if self._forgets():
            self._rebuild()
        else:
            self._run(tokens_BT, commits=True)

    @torch.no_grad()
    def feed(self, tokens_BT: Tensor) -> Tensor:
        """Append tokens of an autoregressive model; float32 logits (B, V) of what follows the last one."""
        tokens_BT = tokens_BT.to(self.device)
        self.context_BT = torch.cat([self.context_BT, tokens_BT], dim=1)
        if self.use_cache and not self._forgets():
            hidden = self._run(tokens_BT, commits=True)
        else:
            hidden = self._rebuild(keep=self.window or self.length)
        return self._logits(hidden[-1:], None)[:, 0]

    def keep_rows(self, index: Tensor | Sequence[int]) -> None:
        """Drop all rows but these."""
        index = torch.as_tensor(index, dtype=torch.int64, device=self.device)
        self.context_BT = self.context_BT[index]
        if self._last_1BD is not None:
            self._last_1BD = self._last_1BD[:, index]
        for cache in self.caches:
            cache.key_BHTK, cache.value_BHTK = cache.key_BHTK[index], cache.value_BHTK[index]

    def _forgets(self) -> bool:
        """Whether the window has to move by recomputation."""
        return self.recompute_window and self.window is not None and self.length + self.block_size > self.window

    def _rebuild(self, keep: int | None = None) -> Tensor:
        """Recompute the caches from tokens; returns the hidden states of what was recomputed (T, B, D).

        Tokens keep their absolute positions, unless the window is recomputed: then it starts at position 0.
        """
        self._reset_caches()
        context = self.context_BT
        if self.recompute_window and self.window is not None:
            context = context[:, -min(self.length, keep or self.window - self.block_size) :]
        self._start = 0
        if context.shape[1] == 0:
            return torch.zeros(0, device=self.device)
        return self._run(context, commits=True)

    def _reset_caches(self) -> None:
        config, blocks = self.model.config, None if self.window is None else self.window // self.block_size
        heads = max(1, config.architecture.kv_heads // config.tensor_model_parallel_size)
        batch, capacity = self.context_BT.shape[0], max(_FIRST_CAPACITY, self.block_size)
        if self.window is not None:
            capacity = 2 * self.window
        shape = (batch, heads, capacity, config.head_width)
        self.caches = [
            LayerCache(
                torch.zeros(shape, dtype=self.cache_dtype, device=self.device),
                torch.zeros(shape, dtype=self.cache_dtype, device=self.device),
                torch.zeros(capacity, dtype=torch.int64, device=self.device),
                window_blocks=blocks,
            )
            for _ in self.model.decoder.layers
        ]

    def _run(self, tokens_BT: Tensor, commits: bool) -> Tensor:
        """Hidden states (T, B, D) of tokens placed after the context."""
        self.num_forwards += 1
        tokens_BT = tokens_BT.to(self.device)
        position = torch.arange(self._start, self._start + tokens_BT.shape[1], device=self.device)
        for cache in self.caches:
            cache.query_block_T, cache.commits = position // self.block_size, commits
        sigma_B = torch.zeros(len(tokens_BT), device=self.device)
        hidden = _decode(self.model, tokens_BT, position, sigma_B, self.caches)
        if commits:
            self._start += tokens_BT.shape[1]
            self._last_1BD = hidden[-1:]
        return hidden

    def _logits(self, hidden_TBD: Tensor, scored_BI: Tensor | None) -> Tensor:
        sigma_B = torch.zeros(hidden_TBD.shape[1], device=self.device)
        return _score(self.model, hidden_TBD, scored_BI, self.model.condition(sigma_B))


class FullDenoiser:
    """Whole noisy sequences (mdlm, sedd): every position sees every other."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model.eval()
        self.device = model.embedding.weight.device
        self.num_forwards = 0

    @torch.no_grad()
    def denoise(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, scored_BI: Tensor | None = None) -> Tensor:
        """float32 logits (B, L, V) or (B, I, V); mask and padding ids are -inf."""
        self.num_forwards += 1
        tokens_BL = tokens_BL.to(self.device)
        sigma_B = torch.zeros(len(tokens_BL), device=self.device) if sigma_B is None else sigma_B.to(self.device)
        position = torch.arange(tokens_BL.shape[1], device=self.device)
        hidden = _decode(self.model, tokens_BL, position, sigma_B)
        if self.model.config.shift_targets:
            hidden = _shifted(hidden, None)
        return _score(self.model, hidden, scored_BI, self.model.condition(sigma_B))


def _shifted(hidden_TBD: Tensor, before_1BD: Tensor | None) -> Tensor:
    """States that predict these tokens where targets are shifted: of the token before each.

    A text's first token has none before it, and is always given; it gets its own.
    """
    return torch.cat([hidden_TBD[:1] if before_1BD is None else before_1BD, hidden_TBD[:-1]])


def _decode(
    model: Denoiser, tokens_BT: Tensor, position_T: Tensor, sigma_B: Tensor, caches: list[LayerCache] | None = None
) -> Tensor:
    return model.decoder(
        hidden_states=model.embed(tokens_BT),
        attention_mask=cast(Any, caches),
        context=model.condition(sigma_B),
        context_mask=None,
        rotary_pos_emb=model.rotary(position_T),
    )


def _score(model: Denoiser, hidden_TBD: Tensor, scored_BI: Tensor | None, conditioning_BC: Tensor | None) -> Tensor:
    """Head logits at all positions or the given ones."""
    hidden_BTD = hidden_TBD.transpose(0, 1)
    if scored_BI is not None:
        index = scored_BI.to(hidden_BTD.device)[:, :, None].expand(-1, -1, hidden_BTD.shape[2])
        hidden_BTD = hidden_BTD.gather(1, index)
    batch, places, width = hidden_BTD.shape
    rows_RC = None if conditioning_BC is None else conditioning_BC.repeat_interleave(places, dim=0)
    logits = model.head.full_logits(hidden_BTD.reshape(-1, width), rows_RC, model.tied_weight())
    return logits.reshape(batch, places, -1)
