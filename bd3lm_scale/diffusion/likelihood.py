"""From per-row losses to NELBO, perplexity, bits per token and per byte, with standard errors.

Two errors answer two questions. `stderr` says how the figure would move with other documents *and* other noise: rows
are clusters, nelbo is the ratio estimator sum(loss) / sum(tokens). `noise_stderr` says how it would move with
other noise on the same documents; it needs two draws per row. It ignores that times are stratified over rows,
which only lowers the error, so it is an upper bound (and 0 where the likelihood is exact).

Shapes: R rows, J noise draws of a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NUM_SUMS = 8


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
        num_rows, num_tokens: what was scored.
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
