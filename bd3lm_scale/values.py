"""What flows between the packages: one frozen dataclass per arrow, tensors and integers only.

    Rows -> NoisyRows -> HeadRows -> LossSum -> StepReport, and StateSlice for what a checkpoint holds

Shapes: B rows in a micro-batch, L tokens in a row, N blocks in a row, S tokens in a block (L = N*S),
P positions the transformer reads ([noisy ; clean] without the last clean block: 2L - S; or L), R rows the head is
evaluated at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # plans and reports read intervals from here, and do without a library of 200 MB
    from torch import Tensor

CLEAN_VIEW = 0
PADDING = -1
"""Document number of positions that pad a row: nobody sees them, and they are neither masked nor counted."""


class Interval(NamedTuple):
    """Diffusion times are drawn uniformly from [low, high]; equal ends give that time everywhere."""

    low: float
    high: float

    def floored(self, time_epsilon: float) -> Interval:
        """The same without the times below `time_epsilon`, which are never drawn."""
        return Interval(max(self.low, time_epsilon), self.high)


@dataclass(frozen=True)
class Cursor:
    """Where training stands in the data: everything the sample order depends on besides seed and manifest.

    Attributes:
        step: optimizer steps done; the next global batch starts at sample data_offset + step * global_batch_size.
        data_offset: moved forward only when a bad stretch of data is skipped by a rollback.
        excluded_shards: names of shards found damaged, agreed by all ranks.
    """

    step: int = 0
    data_offset: int = 0
    excluded_shards: tuple[str, ...] = ()


class Targets(NamedTuple):
    """How many tokens of a global batch are to be predicted, known before any of them is read.

    Attributes:
        tokens: the targets.
        first: those of them that begin a document (AR never predicts these).
    """

    tokens: int
    first: int


@dataclass(frozen=True)
class Rows:
    """A micro-batch of packed token rows.

    Attributes:
        tokens_BL: int64 token ids.
        position_B: int64 index of each row in the global batch; >= global_batch_size marks a padding row.
        is_real_B: bool, False for padding rows: they carry no loss.
        document_BL: int64 number of each position's document in its row, from 0 on; PADDING: no document. Documents
            never see each other, and each begins at the start of a block. None: every row is one document.
        is_target_BL: bool, tokens to be predicted: only they are masked, weighted and counted; never True in padding.
            None: every token.
        targets: of the whole global batch that the rows belong to; None where every token of every row is one.
    """

    tokens_BL: Tensor
    position_B: Tensor
    is_real_B: Tensor
    document_BL: Tensor | None = None
    is_target_BL: Tensor | None = None
    targets: Targets | None = None


@dataclass(frozen=True)
class NoisyRows:
    """A micro-batch after noising: what the model reads and what its output is scored against.

    Attributes:
        input_BP: int64 ids, of which the transformer reads the first P: [noisy ; clean], noisy alone, or the text
            itself (AR).
        target_BL: int64 id that output position l is scored against.
        is_scored_BL: bool, where the head is evaluated (masked noisy tokens; AR: all but the last).
        weight_BL: float32 positive loss weight, 0 where not scored and in padding rows.
        counts_BL: bool, tokens that count in the evaluation denominator.
        time_BN: float64 diffusion time of each block (AR: zeros of shape (B, 1)).
        masked_count_BN: int64 tokens of each block that the noise masked, the row's first one and others that are no
            targets included even where they are shown clean.
        sigma_B: float32 noise level the network is conditioned on (zeros without time conditioning).
        position_B: int64 index of each row in the global batch.
        is_real_B: bool, False for padding rows.
        document_BL, is_target_BL: those of the rows.
    """

    input_BP: Tensor
    target_BL: Tensor
    is_scored_BL: Tensor
    weight_BL: Tensor
    counts_BL: Tensor
    time_BN: Tensor
    masked_count_BN: Tensor
    sigma_B: Tensor
    position_B: Tensor
    is_real_B: Tensor
    document_BL: Tensor | None = None
    is_target_BL: Tensor | None = None


@dataclass(frozen=True)
class Visibility:
    """Who may attend to whom, described per position (method: paper, Section 3 and App. B.6).

    Attributes:
        view_P: int64, 0 (CLEAN_VIEW) for clean tokens, 1, 2, ... for each noisy copy.
        segment_P: int64 document of the position; segments never see each other.
        block_P: int64 block of the position inside its segment.
        block_size: S, for implementations that work in chunks of whole blocks.
    """

    view_P: Tensor
    segment_P: Tensor
    block_P: Tensor
    block_size: int

    def first(self, count: int) -> Visibility:
        """That of the first `count` positions alone."""
        return Visibility(self.view_P[:count], self.segment_P[:count], self.block_P[:count], self.block_size)

    def may_see(self, query: Tensor, key: Tensor) -> Tensor:
        """True where position `query` attends to position `key` (index tensors that broadcast).

        Own block of one's own view (M_BD), and clean tokens of earlier blocks (M_OBC, M_BC).
        """
        same_segment = self.segment_P[query] == self.segment_P[key]
        block_q, block_k = self.block_P[query], self.block_P[key]
        view_k = self.view_P[key]
        own_block = (self.view_P[query] == view_k) & (block_q == block_k)
        earlier_clean = (view_k == CLEAN_VIEW) & (block_k < block_q)
        return same_segment & (own_block | earlier_clean)


@dataclass(frozen=True)
class HeadRows:
    """The head's output at the R scored rows: all any objective here needs, never the logits.

    Attributes:
        target_logit_R: float32 logit of the target id.
        logsumexp_R: float32 log-sum-exp over real ids, mask and padding ids excluded.
        index_R: int64 flat index b * L + l of the row; padding rows point at 0 and have is_real_R False.
        is_real_R: bool, False for rows that only pad R.
    """

    target_logit_R: Tensor
    logsumexp_R: Tensor
    index_R: Tensor
    is_real_R: Tensor


@dataclass(frozen=True)
class LossSum:
    """Sums over one micro-batch; divide by the global number of tokens, never by the micro-batch's.

    Attributes:
        weighted_nll: scalar, sum of weight * nll in nats (differentiable).
        block_loss_BN: detached float64 per-token mean loss of each block, for variance statistics.
        token_loss_BL: detached float64 loss at each position, for figures of documents.
    """

    weighted_nll: Tensor
    block_loss_BN: Tensor
    token_loss_BL: Tensor | None = None


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, equal on all ranks.

    `loss` is the global-batch mean in nats per token, `stream_hash` the order-free hash of the rows, masks
    and times it consumed, `tokens` the number of tokens seen since the start of the run.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    stream_hash: int
    clip_low: float
    clip_high: float
    was_skipped: bool = False


@dataclass(frozen=True)
class StateSlice:
    """A contiguous run of one parameter's state as one rank's optimizer owns it.

    The parameter (global_shape) is cut along shard_dim into shard_count tensor-parallel shards; the run is
    [start, stop) of the flattened shard number shard_index. Where it consists of parts that are cut each for itself
    (a gate and what it multiplies), a shard is its share of each, one after the other. The tensors are views of live
    memory, so a loader fills them in place.

    Attributes:
        name: global parameter name, e.g. "decoder.layers.3.mlp.linear_fc1.weight".
        global_shape: shape of the whole parameter.
        shard_dim: None for a parameter that tensor-parallel peers replicate (then shard_count is 1).
        shard_index, shard_count: which shard of how many.
        start, stop: flat range inside the shard.
        is_owner: False where a peer holds the same run and writes it.
        tensors: 1-D float32 tensors of stop - start elements: "master", "exp_avg", "exp_avg_sq", "ema".
        parts: sizes along shard_dim of the parts that are cut each for itself; empty: it is cut as one.
    """

    name: str
    global_shape: tuple[int, ...]
    shard_dim: int | None
    shard_index: int
    shard_count: int
    start: int
    stop: int
    is_owner: bool = True
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parts: tuple[int, ...] = ()
