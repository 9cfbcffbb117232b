"""From per-row losses to NELBO, perplexity, bits per token and per byte, with standard errors.

Two errors answer two questions. `stderr` says how the figure would move with other documents *and* other noise: rows
are clusters, nelbo is the ratio estimator sum(loss) / sum(tokens). `noise_stderr` says how it would move with
other noise on the same documents; it needs two draws per row. It ignores that times are stratified over rows,
which only lowers the error, so it is an upper bound (and 0 where the likelihood is exact).

In packed rows documents are the clusters: a document that is cut into pieces counts once.

Shapes: R rows, J noise draws of a row, D documents, K documents of a row, B rows in a micro-batch, L tokens in a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.rng import derive_key, random_words
from bd3lm_scale.values import LossSum, NoisyRows

_NUM_SUMS = 8
_RESAMPLES = 1000


@dataclass(frozen=True)
class Likelihood:
    """A likelihood estimate.

    Attributes:
        nelbo: nats per token (an upper bound on the NLL; exact for AR and for blocks of one token).
        ppl: exp(nelbo).
        bits_per_token: nelbo / ln 2.
        bits_per_byte: nats / (ln 2 * bytes), None where the bytes of the text are not known.
        stderr: of nelbo, over rows; nan for a single row.
        noise_stderr: of nelbo, over noise draws on the same rows; None with one draw.
        num_rows, num_tokens: what was scored; of packed rows num_rows is the number of documents.
    """

    nelbo: float
    ppl: float
    bits_per_token: float
    bits_per_byte: float | None
    stderr: float
    noise_stderr: float | None
    num_rows: int
    num_tokens: int

    @property
    def ppl_stderr(self) -> float:
        """Standard error of ppl to first order: ppl * stderr."""
        return self.ppl * self.stderr


@dataclass(frozen=True)
class LikelihoodSums:
    """Additive statistics of scored rows: add them over micro-batches, all-reduce `as_tensor()` over ranks.

    Attributes:
        sums: float64 (8,): rows, sum x, sum n, sum x^2, sum x n, sum n^2, sum of var_j(x)/J, rows with one draw;
            x is a row's loss in nats averaged over its draws, n its number of scored tokens.
    """

    sums: Tensor

    @staticmethod
    def empty() -> "LikelihoodSums":
        """Nothing scored yet."""
        return LikelihoodSums(torch.zeros(_NUM_SUMS, dtype=torch.float64))

    @staticmethod
    def of_rows(loss_RJ: Tensor, tokens_R: Tensor) -> "LikelihoodSums":
        """Statistics of rows.

        Args:
            loss_RJ: total loss in nats of each row under each of its J noise draws; (R,) is one draw.
            tokens_R: number of tokens that each row's loss is over.
        """
        loss_RJ = loss_RJ.detach().double().cpu()
        loss_RJ = loss_RJ[:, None] if loss_RJ.dim() == 1 else loss_RJ  # R may be 0: a batch of padding rows
        n_R = tokens_R.double().cpu()
        draws = loss_RJ.shape[1]
        x_R = loss_RJ.mean(1)
        noise = loss_RJ.var(1).sum() / draws if draws > 1 else torch.zeros((), dtype=torch.float64)
        single = float(len(n_R) if draws == 1 else 0)
        fields = [float(len(n_R)), x_R.sum(), n_R.sum(), (x_R * x_R).sum(), (x_R * n_R).sum(), (n_R * n_R).sum(), noise]
        return LikelihoodSums(torch.stack([torch.as_tensor(f, dtype=torch.float64) for f in [*fields, single]]))

    def __add__(self, other: "LikelihoodSums") -> "LikelihoodSums":
        return LikelihoodSums(self.sums + other.sums)

    def as_tensor(self) -> Tensor:
        """The float64 sums; equal-length, so ranks can add them."""
        return self.sums

    def estimate(self, num_bytes: int | None = None) -> Likelihood:
        """The likelihood of everything added.

        Args:
            num_bytes: UTF-8 bytes of the scored text, for bits per byte.

        Raises:
            ValueError: nothing was scored.
        """
        rows, x, n, xx, xn, nn, noise, single = self.sums.tolist()
        if n <= 0:
            raise ValueError("no tokens were scored: the validation set is empty; give it at least one row")
        nelbo = x / n
        residual = max(0.0, xx - 2.0 * nelbo * xn + nelbo * nelbo * nn)
        return Likelihood(
            nelbo=nelbo,
            ppl=math.exp(nelbo) if nelbo < 700 else math.inf,
            bits_per_token=nelbo / math.log(2),
            bits_per_byte=None if num_bytes is None else x / (math.log(2) * num_bytes),
            stderr=math.sqrt(residual * rows / (rows - 1)) / n if rows > 1 else math.nan,
            noise_stderr=None if single else math.sqrt(noise) / n,
            num_rows=int(rows),
            num_tokens=int(n),
        )


class DocumentSums:
    """Losses of whole documents, whose pieces may lie in several rows; add `as_tensor` over ranks.

    Attributes:
        nats_DJ: float64, loss of each document under each noise draw.
        tokens_D: float64, tokens that it is over; 0: the document was not scored.
    """

    def __init__(self, num_documents: int, draws: int) -> None:
        self.nats_DJ = torch.zeros(num_documents, draws, dtype=torch.float64)
        self.tokens_D = torch.zeros(num_documents, dtype=torch.float64)

    def add(self, noisy: NoisyRows, losses: Sequence[LossSum], number_BK: Tensor) -> None:
        """Add a micro-batch.

        Args:
            noisy: under any of the draws.
            losses: under each of them.
            number_BK: int64 number in the split of each document of each row.
        """
        assert noisy.document_BL is not None, "rows of a stream have no documents"
        here_BL = (noisy.document_BL >= 0) & noisy.is_real_B[:, None]
        number = number_BK.gather(1, noisy.document_BL.clamp(min=0))[here_BL]
        self.tokens_D.index_add_(0, number, noisy.counts_BL[here_BL].double())
        for draw, loss in enumerate(losses):
            assert loss.token_loss_BL is not None
            self.nats_DJ[:, draw].index_add_(0, number, loss.token_loss_BL.cpu()[here_BL])

    def as_tensor(self) -> Tensor:
        """Everything, float64 and flat."""
        return torch.cat([self.tokens_D, self.nats_DJ.flatten()])

    def filled(self, sums: Tensor) -> "DocumentSums":
        """The same with what `as_tensor` gave, summed over ranks."""
        out = DocumentSums(*self.nats_DJ.shape)
        out.tokens_D, nats = sums[: len(self.tokens_D)], sums[len(self.tokens_D) :]
        out.nats_DJ = nats.reshape(self.nats_DJ.shape)
        return out

    def estimate(self) -> Likelihood:
        """The likelihood, documents as clusters. ValueError where nothing was scored."""
        scored = self.tokens_D > 0
        return LikelihoodSums.of_rows(self.nats_DJ[scored], self.tokens_D[scored]).estimate()

    def bootstrap(self, seed: int) -> tuple[float, float, float]:
        """(standard error, 2.5% and 97.5% quantile) of the nelbo over documents drawn anew, with replacement."""
        scored = self.tokens_D > 0
        nats, tokens = self.nats_DJ[scored].mean(1).numpy(), self.tokens_D[scored].numpy()
        count, found = len(tokens), np.empty(_RESAMPLES)
        for number in range(_RESAMPLES):
            words = random_words(derive_key(seed, "document bootstrap", number), count)
            drawn = (words % np.uint64(count)).astype(np.int64)
            found[number] = nats[drawn].sum() / tokens[drawn].sum()
        low, high = np.quantile(found, [0.025, 0.975])
        return float(found.std(ddof=1)), float(low), float(high)
