"""Networks small enough to enumerate: 3 tokens and the mask, random conditional tables in float64.

Shapes: B rows, S tokens in a block, I scored positions, V = 4 ids, C tokens of context.
"""

import itertools
import math

import numpy as np
import torch
from scipy import stats

NUM_TOKENS = 3
MASK = 3
VOCAB = 4


def encode(tokens: torch.Tensor) -> torch.Tensor:
    """Rows of ids as one number each."""
    code = torch.ones(len(tokens), dtype=torch.int64)  # the leading 1 tells () from (0,) from (0, 0)
    for column in range(tokens.shape[1]):
        code = (code * VOCAB + tokens[:, column]) % (2**61 - 1)  # long contexts wrap into a hash
    return code


class ToyBlocks:
    """A block denoiser whose conditionals are an arbitrary table of (context, block state)."""

    def __init__(self, block_size: int = 2, seed: int = 0, spread: float = 1.5) -> None:
        self.block_size, self.seed, self.spread = block_size, seed, spread
        self.context = None
        self.calls: list[tuple] = []
        self._tables: dict[tuple[int, int], torch.Tensor] = {}

    def fresh(self) -> "ToyBlocks":
        return ToyBlocks(self.block_size, self.seed, self.spread)

    def table(self, context: int, state: int) -> torch.Tensor:
        """(S, V) logits of one state."""
        key = (context, state)
        if key not in self._tables:
            rng = np.random.default_rng([self.seed, context, state])
            logits = rng.normal(size=(self.block_size, VOCAB)) * self.spread
            logits[:, MASK] = -np.inf
            self._tables[key] = torch.tensor(logits)
        return self._tables[key]

    def denoise(self, block_BS, scored_BI=None):
        context = torch.ones(len(block_BS), dtype=torch.int64) if self.context is None else encode(self.context)
        self.calls.append((tuple(block_BS.shape), None if scored_BI is None else tuple(scored_BI.shape)))
        pairs = zip(context.tolist(), encode(block_BS).tolist(), strict=True)
        logits_BSV = torch.stack([self.table(c, s) for c, s in pairs])
        if scored_BI is None:
            return logits_BSV
        return logits_BSV.gather(1, scored_BI[:, :, None].expand(-1, -1, VOCAB))

    def commit(self, tokens_BT):
        self.calls.append(("commit", tuple(tokens_BT.shape)))
        self.context = tokens_BT if self.context is None else torch.cat([self.context, tokens_BT], dim=1)

    def keep_rows(self, index):
        if self.context is not None:
            self.context = self.context[index]


class ToyFull:
    """A full-sequence denoiser: the exact posterior of a random joint over L tokens, scaled so that Z is `z`."""

    def __init__(self, length: int = 2, seed: int = 0, z: float = 1.0) -> None:
        rng = np.random.default_rng([seed, 99])
        self.length, self.z = length, z
        self.joint = rng.dirichlet(np.ones(NUM_TOKENS**length) * 0.7).reshape((NUM_TOKENS,) * length)
        self.calls: list[tuple] = []

    def conditional(self, tokens: tuple[int, ...], position: int) -> np.ndarray:
        """p(token at position | the unmasked tokens)."""
        index = tuple(slice(None) if t == MASK else slice(t, t + 1) for t in tokens)
        mass = self.joint[index]
        other = tuple(d for d in range(self.length) if d != position)
        marginal = mass.sum(axis=other)
        return marginal / marginal.sum()

    def denoise(self, tokens_BL, sigma_B=None, scored_BI=None):
        self.calls.append((None if sigma_B is None else sigma_B.tolist(), (tokens_BL == MASK).sum().item()))
        batch, length = tokens_BL.shape
        logits = np.full((batch, length, VOCAB), -np.inf)
        cache = {}
        for b, row in enumerate(map(tuple, tokens_BL.tolist())):
            if row not in cache:
                cache[row] = [
                    np.log(self.conditional(row, p)) if row[p] == MASK else np.zeros(NUM_TOKENS) for p in range(length)
                ]
            logits[b, :, :NUM_TOKENS] = cache[row]
        logits_BLV = torch.tensor(logits) + math.log(NUM_TOKENS * self.z)
        if scored_BI is None:
            return logits_BLV
        return logits_BLV.gather(1, scored_BI[:, :, None].expand(-1, -1, VOCAB))


def oracle_filter(logits, nucleus_p=1.0, top_k=None, temperature=1.0) -> np.ndarray:
    """The documented filter, in float64 and one row at a time: sort by (probability, id) and count."""
    logits = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(logits - logits.max())
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    total = math.fsum(p[i] for i in order)
    kept, sum_so_far = [], 0.0
    for i in order:
        sum_so_far += p[i]
        if kept and nucleus_p < 1.0 and sum_so_far / total > nucleus_p:
            break
        kept.append(i)
    out = np.zeros(len(p))
    out[kept] = p[kept]
    return out / out.sum()


def exact_joint(toy: ToyBlocks, num_blocks: int, steps: int | None, nucleus_p: float = 1.0) -> dict[tuple, float]:
    """Probability of every sequence under T-step ancestral sampling; steps None is first hitting."""
    out = {(): 1.0}
    for _ in range(num_blocks):
        longer: dict[tuple, float] = {}
        for context, mass in out.items():
            for block, p in _block_distribution(toy, context, steps, nucleus_p).items():
                longer[context + block] = longer.get(context + block, 0.0) + mass * p
        out = longer
    return out


def _block_distribution(toy, context, steps, nucleus_p):
    size = toy.block_size
    if steps is None:
        patterns = list(itertools.permutations(range(size)))
    else:
        patterns = list(itertools.product(range(steps), repeat=size))
    out: dict[tuple, float] = {}
    for cells in patterns:
        states = {(MASK,) * size: 1.0 / len(patterns)}
        for cell in sorted(set(cells), reverse=True):
            states = _reveal(toy, context, states, [i for i in range(size) if cells[i] == cell], nucleus_p)
        for block, mass in states.items():
            out[block] = out.get(block, 0.0) + mass
    return out


def _reveal(toy, context, states, positions, nucleus_p):
    context_code = encode(torch.tensor([context], dtype=torch.int64)).item()
    out: dict[tuple, float] = {}
    for state, mass in states.items():
        logits = toy.table(context_code, encode(torch.tensor([state])).item())
        rows = [oracle_filter(logits[i].numpy(), nucleus_p) for i in positions]
        for tokens in itertools.product(range(NUM_TOKENS), repeat=len(positions)):
            p = mass * math.prod(row[token] for row, token in zip(rows, tokens, strict=True))
            if p > 0.0:
                block = list(state)
                for i, token in zip(positions, tokens, strict=True):
                    block[i] = token
                out[tuple(block)] = out.get(tuple(block), 0.0) + p
    return out


def chi_square_p(samples, joint: dict[tuple, float]) -> float:
    """p-value of the samples under the joint; outcomes expected less than 5 times are pooled."""
    counts: dict[tuple, int] = {}
    for sample in samples:
        counts[sample] = counts.get(sample, 0) + 1
    impossible = set(counts) - {k for k, v in joint.items() if v > 0.0}
    assert not impossible, f"sampled outcomes of probability 0: {sorted(impossible)[:5]}"
    keys = [k for k in joint if joint[k] > 0.0]
    expected = np.array([joint[k] for k in keys]) * len(samples)
    observed = np.array([counts.get(k, 0) for k in keys])
    rare = expected < 5.0
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    return float(stats.chisquare(observed, expected).pvalue)
