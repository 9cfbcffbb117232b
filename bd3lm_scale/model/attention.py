"""Attention under a visibility description, without ever needing the P x P mask.

Three implementations of one rule (values.Visibility.may_see), equal up to rounding:
    dense    SDPA with the whole boolean mask: the oracle
    chunked  SDPA per run of whole blocks, each seeing only the key range it may see: for CPU
    flex     FlexAttention with a cached block mask: for CUDA

Shapes: B rows, H query heads, G heads of keys and values (H unless grouped), K head width, P positions, Q queries of a
chunk, J keys, T new tokens in cached decoding.
Megatron hands over tensors as (P, B, H, K).
"""

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from bd3lm_scale.config.checks import MIN_FLEX_WIDTH
from bd3lm_scale.model.document_attention import DocumentPattern
from bd3lm_scale.model.tiles import Chunk, flex_block_mask, plan_chunks
from bd3lm_scale.values import CLEAN_VIEW, Visibility

_CHUNK = 128
_FLEX_TILE = 128
_MAX_GRAPHS = 64
_KEPT_PATTERNS = 4


class AttentionPattern:
    """A visibility prepared for one of the implementations; shared by all layers.

    Args:
        visibility: positions as (view, segment, block).
        backend: auto | dense | chunked | flex; auto is flex on CUDA, except for narrow heads.
    """

    def __init__(self, visibility: Visibility, backend: str = "auto") -> None:
        self.visibility = visibility
        self.backend = backend
        self.num_positions = visibility.view_P.numel()
        self._on_device: dict[Any, Any] = {}
        self._packed: OrderedDict[bytes, DocumentPattern] = OrderedDict()
        view, segment, block = visibility.view_P, visibility.segment_P, visibility.block_P
        # every position sees every other (MDLM, SEDD); ordinary causal attention (AR)
        self.is_full = all(bool((t == t[0]).all()) for t in (view, segment, block))
        one_text = bool((segment == segment[0]).all()) and bool((view == CLEAN_VIEW).all())
        self.is_causal = one_text and bool((block == torch.arange(self.num_positions)).all())

    def prepare(self, num_queries: int, head_width: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make what `attend` would make when it is first called."""
        kind = self._kind(num_queries, head_width, device)
        if kind == "dense":
            self.dense(device)
        elif kind == "flex":
            self._block_mask(device, num_queries)
        elif kind == "chunked":
            self._chunks(device, dtype)

    def attend(self, query_PBHK: Tensor, key_PBHK: Tensor, value_PBHK: Tensor, num_queries: int) -> Tensor:
        """Attention output (num_queries, B, H * K) of the first `num_queries` positions."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_PBHK[:num_queries], key_PBHK, value_PBHK))
        kind = self._kind(num_queries, query.shape[3], query.device)
        if kind == "whole":
            out = _attention(query, key, value, is_causal=not self.is_full)
        elif kind == "dense":
            out = _attention(query, key, value, attn_mask=self.dense(query.device)[:num_queries])
        elif kind == "flex":
            out = self._flex(query, key, value, num_queries)
        else:
            out = self._chunked(query, key, value, num_queries)
        return out.permute(2, 0, 1, 3).reshape(num_queries, query.shape[0], -1)

    @torch.compiler.disable(recursive=True)
    def attend_documents(
        self, query_PBHK: Tensor, key_PBHK: Tensor, value_PBHK: Tensor, num_queries: int, document_BL: Tensor
    ) -> Tensor:
        """`attend` in rows of several documents, given on the CPU."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_PBHK[:num_queries], key_PBHK, value_PBHK))
        pattern, kind = (
            self._of_documents(document_BL),
            self._kind(num_queries, query.shape[3], query.device, is_packed=True),
        )
        if kind == "dense":
            out = pattern.dense(query, key, value, num_queries)
        elif kind == "flex":
            out = pattern.flex(query, key, value, num_queries, _FLEX_TILE, _compiled_flex())
        else:
            out = pattern.chunked(query, key, value, num_queries, _CHUNK)
        return out.permute(2, 0, 1, 3).reshape(num_queries, query.shape[0], -1)

    def _of_documents(self, document_BL: Tensor) -> DocumentPattern:
        """Prepared by the first layer that asks, and again after so many other micro-batches."""
        # a function of the documents, so that recomputation, which comes later, finds its own micro-batch's
        key = document_BL.numpy().tobytes()
        if key in self._packed:
            self._packed.move_to_end(key)
        else:
            self._packed[key] = DocumentPattern(self.visibility, document_BL, _attention)
            if len(self._packed) > _KEPT_PATTERNS:
                self._packed.popitem(last=False)
        return self._packed[key]

    def _kind(self, num_queries: int, head_width: int, device: torch.device, is_packed: bool = False) -> str:
        """dense | chunked | flex, or whole: torch's own kernels suffice for rows of one document."""
        if not is_packed and (self.is_full or (self.is_causal and num_queries == self.num_positions)):
            return "whole"
        if self.backend != "auto":
            return self.backend
        return "flex" if device.type == "cuda" and head_width >= MIN_FLEX_WIDTH else "chunked"

    def dense(self, device: torch.device) -> Tensor:
        """The whole boolean (P, P) mask, True where attention is allowed."""
        key = ("dense", device)
        if key not in self._on_device:
            index = torch.arange(self.num_positions)
            self._on_device[key] = self.visibility.may_see(index[:, None], index[None, :]).to(device)
        return self._on_device[key]

    def _chunked(self, query: Tensor, key: Tensor, value: Tensor, num_queries: int) -> Tensor:
        pieces = []
        for chunk in self._chunks(query.device, query.dtype):
            if chunk.start >= num_queries:
                break
            ranges = [slice(start, stop) for start, stop in chunk.keys]
            if len(ranges) == 1:
                keys, values = key[:, :, ranges[0]], value[:, :, ranges[0]]
            else:
                keys = torch.cat([key[:, :, r] for r in ranges], dim=2)
                values = torch.cat([value[:, :, r] for r in ranges], dim=2)
            queries = query[:, :, chunk.start : chunk.stop]
            pieces.append(_attention(queries, keys, values, attn_mask=chunk.bias))
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def _chunks(self, device: torch.device, dtype: torch.dtype) -> list[Chunk]:
        """Runs of whole blocks of about 128 queries, each with the key ranges it may see."""
        cache_key = ("chunks", device, dtype)
        if cache_key not in self._on_device:
            size = self.visibility.block_size
            runs = self._runs(max(size, _CHUNK // size * size))
            self._on_device[cache_key] = plan_chunks(self.visibility, runs, dtype, device)
        return self._on_device[cache_key]

    def _runs(self, length: int) -> list[tuple[int, int]]:
        """Query ranges of at most `length` that never cross from one view into the next."""
        view = self.visibility.view_P
        borders = [0, *(torch.nonzero(view[1:] != view[:-1]).flatten() + 1).tolist(), self.num_positions]
        return [
            (start, min(start + length, stop))
            for begin, stop in itertools.pairwise(borders)
            for start in range(begin, stop, length)
        ]

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, num_queries: int) -> Tensor:
        block_mask = self._block_mask(query.device, num_queries)
        grouped = query.shape[1] != key.shape[1]
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        return flex(query, key, value, block_mask=block_mask, enable_gqa=grouped)

    def _block_mask(self, device: torch.device, num_queries: int) -> Any:
        cache_key = ("flex", device, num_queries)
        if cache_key not in self._on_device:
            self._on_device[cache_key] = flex_block_mask([self.visibility], num_queries, _FLEX_TILE, device)
        return self._on_device[cache_key]


def _attention(query_BHQK: Tensor, key_BGJK: Tensor, value_BGJK: Tensor, **options: Any) -> Tensor:
    """SDPA; each head of keys and values serves a group of H / G query heads in turn."""
    grouped = query_BHQK.shape[1] != key_BGJK.shape[1]
    return F.scaled_dot_product_attention(query_BHQK, key_BGJK, value_BGJK, enable_gqa=grouped, **options)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    # One graph per shape, mode and model chunk; beyond the limit torch would build the whole score matrix instead.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    return torch.compile(flex_attention, dynamic=False)


@dataclass
class LayerCache:
    """Rotated keys and values of one layer's clean tokens, with the block each belongs to.

    Attributes:
        key_BHTK, value_BHTK: preallocated; the first `length` tokens are filled.
        block_T: absolute block number of each cached token.
        window_blocks: how many blocks, its own included, a query sees back; None: all.
        commits: whether the next call's tokens stay in the cache.
    """

    key_BHTK: Tensor
    value_BHTK: Tensor
    block_T: Tensor
    length: int = 0
    window_blocks: int | None = None
    commits: bool = False
    query_block_T: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def extend(self, key_BHTK: Tensor, value_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Context plus the new tokens, and the mask (None: all seen).

        Earlier blocks and the own block are seen (the rule for one view), as far back as the window reaches.
        """
        # before anything is written: what is returned are views of the buffers
        self._evict()
        new, end = key_BHTK.shape[2], self.length + key_BHTK.shape[2]
        self._reserve(end)
        self.key_BHTK[:, :, self.length : end] = key_BHTK
        self.value_BHTK[:, :, self.length : end] = value_BHTK
        self.block_T[self.length : end] = self.query_block_T
        key, value, block = self.key_BHTK[:, :, :end], self.value_BHTK[:, :, :end], self.block_T[:end]
        distance = self.query_block_T[:, None] - block[None, :]
        allowed = distance >= 0
        if self.window_blocks is not None:
            allowed &= distance < self.window_blocks
        if self.commits:
            self.length = end
        if new == 0 or bool(allowed.all()):
            return key, value, None
        return key, value, allowed

    def _reserve(self, needed: int) -> None:
        have = self.key_BHTK.shape[2]
        if needed <= have:
            return
        extra = max(needed - have, have)
        self.key_BHTK = F.pad(self.key_BHTK, (0, 0, 0, extra))
        self.value_BHTK = F.pad(self.value_BHTK, (0, 0, 0, extra))
        self.block_T = F.pad(self.block_T, (0, extra))

    def _evict(self) -> None:
        """Drop blocks that no new or later query will see, once half of the buffer is full."""
        if self.window_blocks is None or self.length < max(1, self.key_BHTK.shape[2] // 2):
            return
        oldest = int(self.query_block_T[0]) + 1 - self.window_blocks
        gone = int((self.block_T[: self.length] < oldest).sum())
        if gone == 0:
            return
        kept = self.length - gone
        for buffer in (self.key_BHTK, self.value_BHTK):
            buffer[:, :, :kept] = buffer[:, :, gone : self.length].clone()
        self.block_T[:kept] = self.block_T[gone : self.length].clone()
        self.length = kept


class BlockAttention(nn.Module):
    """Megatron's core attention slot: training under a pattern, or decoding with a cache.

    The pattern is set once by the denoiser; `num_queries` below P limits the output to the first rows (the last
    layer's clean rows serve as keys and values only).
    """

    def __init__(self, config: Any, layer_number: int, **_: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.pattern: AttentionPattern | None = None
        self.num_queries: int | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | LayerCache | None = None, **_: Any
    ) -> Tensor:
        """(P, B, H, K), (P, B, G, K) twice -> (queries, B, H * K).

        Where Megatron has a mask, a cache or the documents (B, L) of packed rows.
        """
        if isinstance(attention_mask, LayerCache):
            return self._decode(attention_mask, query, key, value)
        assert self.pattern is not None, "the denoiser sets the visibility before the first forward"
        num_queries = self.num_queries or query.shape[0]
        if attention_mask is None:
            return self.pattern.attend(query, key, value, num_queries)
        return self.pattern.attend_documents(query, key, value, num_queries, attention_mask)

    @staticmethod
    def _decode(cache: LayerCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query_BHTK, key_BHTK, value_BHTK = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        keys, values, mask = cache.extend(key_BHTK.to(cache.key_BHTK.dtype), value_BHTK.to(cache.value_BHTK.dtype))
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        out = _attention(query_BHTK, keys, values, attn_mask=mask)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
