"""Losses and likelihood of the exported BD3-LM models; depends on torch and transformers only.

Shapes: B rows, L tokens in a row, N blocks in a row, V ids including the mask.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .inputs_bd3lm import Alignment, checked_ids

DRAWS = 8
"""Noise draws of `score` where it is not exact."""
EXACT_PASSES = 15
"""`score` is exact where so many passes over the text are enough: blocks of up to four tokens."""
TIME_EPSILON = 1e-3
SIGMA_MAX = 6.9078
"""-ln(1 - (1 - 1e-3)): the largest noise level of the loglinear schedule."""


@dataclass
class ScoreOutput(ModelOutput):
    """Likelihood of each row: nats are an upper bound of -log p (NELBO), -log p itself for ar and block size 1.

    Attributes:
        nats: (B,) sum over the row's scored tokens.
        num_tokens: (B,) scored tokens.
        nats_per_token: (B,).
        perplexity: (B,) exp(nats_per_token).
        token_nats: (B, L) the share of each token, averaged over the draws; 0 where not scored.
        nats_stderr: (B,) standard error of `nats` over the noise: 0 where no noise is left (every mask pattern was
            enumerated), nan with a single draw.
    """

    nats: torch.FloatTensor = None
    num_tokens: torch.LongTensor = None
    nats_per_token: torch.FloatTensor = None
    perplexity: torch.FloatTensor = None
    token_nats: torch.FloatTensor = None
    nats_stderr: torch.FloatTensor = None


@contextmanager
def evaluating(model):
    """Evaluation mode inside; afterwards, errors included, every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def sigma_of(mask_rate):
    """Noise level of a mask rate (loglinear schedule), -ln(1 - t), bounded."""
    return (-torch.log1p(-mask_rate)).clamp(max=SIGMA_MAX)


class LikelihoodMixin:
    """NELBO and cross-entropy; mixed into the model."""

    def cross_entropy(self, logits, target):
        """-log p(target), the mask excluded from the vocabulary (SUBS); float32, shape of target."""
        mask = torch.tensor([self.config.mask_token_id], device=logits.device)
        logits = logits.float().index_fill(-1, mask, float("-inf"))
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)

    def score_entropy(self, logits, target):
        """SEDD's absorbing score entropy times expm1(sigma), in which sigma cancels; float32, shape of target."""
        log_num_ids = math.log(self.config.vocab_size - 1)
        mask = torch.tensor([self.config.mask_token_id], device=logits.device)
        log_score = logits.float().index_fill(-1, mask, float("-inf")) - log_num_ids
        at_target = log_score.gather(-1, target[..., None])[..., 0]
        return log_score.logsumexp(-1).exp() - at_target - 1.0

    def draw_mask_rates(self, num_rows, length, generator=None, device=None):
        """(B, N) times, one per block, stratified over all blocks; the clipped interval applies in training."""
        config = self.config
        block = config.block_size if config.objective == "bd3lm" else length
        num_blocks = -(-length // block)
        low, high = TIME_EPSILON, 1.0
        if self.training and config.var_min:
            low, high = self.sampling_eps_min.to(device).float(), self.sampling_eps_max.to(device).float()
        elif block == 1:
            low = 1.0  # every token masked: the NELBO is exact
        count = num_rows * num_blocks
        where = generator.device if generator is not None else device
        strata = torch.randperm(count, generator=generator, device=where)
        uniform = (strata + torch.rand(1, generator=generator, device=where)) / count
        return (low + (high - low) * uniform.to(device)).view(num_rows, num_blocks)

    def _per_token(self, rate, length):
        """A rate per row (B,), block (B, N) or token, as (B, L)."""
        rate = rate.reshape(rate.shape[0], -1).float()
        if rate.shape[1] in (1, length):
            return rate.expand(-1, length)
        if rate.shape[1] != -(-length // self.config.block_size):
            raise ValueError(
                f"mask_rate {tuple(rate.shape)}: give one per row, one per block of {self.config.block_size} "
                f"or one per token for {length} tokens"
            )
        return rate.repeat_interleave(self.config.block_size, dim=1)[:, :length]

    def token_losses(self, noisy_BL, clean_BL, counts_BL, rate_BL, timesteps=None, attention_mask=None):
        """Weighted loss of every token (B, L) for given noise, and the logits (B, L, V)."""
        return self._denoising_losses(noisy_BL, clean_BL, counts_BL, rate_BL, timesteps, attention_mask)[:2]

    def _denoising_losses(self, noisy_BL, clean_BL, counts_BL, rate_BL, timesteps, attention_mask, embeds_BLD=None):
        """token_losses and the hidden states of every layer; embeds_BLD stand for the clean tokens."""
        config = self.config
        is_pair, length = config.objective == "bd3lm", noisy_BL.shape[1]
        is_mask_BL = noisy_BL == config.mask_token_id
        noisy, clean = noisy_BL, clean_BL
        if embeds_BLD is not None:
            mask_D = self.get_input_embeddings()(noisy_BL.new_tensor([config.mask_token_id]))[0]
            noisy, clean = torch.where(is_mask_BL[..., None], mask_D.to(embeds_BLD.dtype), embeds_BLD), embeds_BLD
        tokens = torch.cat([noisy, clean], dim=1) if is_pair else noisy
        if timesteps is None and config.time_conditioning:
            timesteps = sigma_of(rate_BL[:, 0])
        hidden, cond = self.encode(tokens, timesteps, attention_mask, is_pair)
        logits = self.backbone.output_layer(self.predicting(hidden[-1], length, is_pair), cond)
        hidden = [h[:, :length] for h in hidden]
        per_token = self.score_entropy if config.objective == "sedd" else self.cross_entropy
        loss_BL = per_token(logits, clean_BL)
        return torch.where(counts_BL & is_mask_BL, loss_BL / rate_BL, 0.0), logits, hidden

    def causal_losses(self, tokens, target_BL, counts_BL, attention_mask=None):
        """Autoregressive cross-entropy of every token (B, L), 0 for the first; logits (B, L, V); hidden states."""
        hidden, cond = self.encode(tokens, attention_mask=attention_mask)
        logits = self.backbone.output_layer(hidden[-1], cond)
        loss_BL = F.pad(self.cross_entropy(logits[:, :-1], target_BL[:, 1:]), (1, 0))
        return torch.where(counts_BL, loss_BL, 0.0), logits, hidden

    def _counted(self, labels, attention_mask):
        counts_BL = labels != -100
        if attention_mask is not None:
            counts_BL = counts_BL & attention_mask.bool()[:, : labels.shape[1]].to(labels.device)
        is_first = torch.arange(labels.shape[1], device=labels.device) == 0
        return counts_BL & ~is_first if self.config.ignore_bos or self.config.objective == "ar" else counts_BL

    def _labelled(self, given, labels, timesteps, attention_mask, mask_rate, generator):
        """Mean loss per scored token, logits and hidden states; `given` holds ids or embeddings. See `forward`."""
        length = labels.shape[1]
        embeds = given if given.is_floating_point() else None
        counts_BL = self._counted(labels, attention_mask)
        clean_BL = torch.where(labels == -100, 0 if embeds is not None else given[:, -length:], labels)
        if self.config.objective == "ar":
            loss_BL, logits, hidden = self.causal_losses(given, clean_BL, counts_BL, attention_mask)
        else:
            if mask_rate is None:
                rate = self.draw_mask_rates(labels.shape[0], length, generator, labels.device)
                noisy_BL = self._noised(clean_BL, counts_BL, self._per_token(rate, length), generator)
            elif embeds is None:
                rate, noisy_BL = mask_rate.to(labels.device), given[:, :length]
            else:
                raise ValueError("mask_rate: noise that is given must be given as input_ids, not as inputs_embeds")
            rate_BL = self._per_token(rate, length)
            loss_BL, logits, hidden = self._denoising_losses(
                noisy_BL, clean_BL, counts_BL, rate_BL, timesteps, attention_mask, embeds
            )
        return loss_BL.sum() / counts_BL.sum().clamp(min=1), logits, hidden

    def _noised(self, clean_BL, counts_BL, rate_BL, generator):
        where = generator.device if generator is not None else clean_BL.device
        uniform_BL = torch.rand(clean_BL.shape, generator=generator, device=where).to(clean_BL.device)
        return torch.where(counts_BL & (uniform_BL < rate_BL), self.config.mask_token_id, clean_BL)

    # ---- score -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, input_ids, attention_mask=None, labels=None, draws=None, seed=0):
        """Likelihood of each row in nats, with its standard error.

        It is exact for ar, and where enumerating the masks of a block takes at most EXACT_PASSES passes (`draws`, where
        given): then every pattern of masks is weighted as the bound does. Otherwise the number of masked tokens
        of each block is drawn, stratified over the draws, then which ones: the bound's expectation over times in
        closed form, so that only the choice of masks is left to chance.

        Args:
            input_ids: (B, L) clean text, at most model_length tokens, padded at the left or right end.
            attention_mask: (B, L), 0 for padding.
            labels: (B, L), -100 for tokens that are given, not scored (a prompt); default: all are scored.
            draws: noise draws per row; default: DRAWS.
            seed: of the noise; the same seed gives the same figures. A sequence, one per row, makes a row's figure
                independent of the rows beside it.

        Raises:
            ValueError: rows longer than the model's context or without a token to score, masks in the text.
        """
        rows, tokens_BL, counts_BL = self._to_score(input_ids, attention_mask, labels, draws)
        is_real_BL = rows.is_real_BL
        with evaluating(self):
            if self.config.objective == "ar":
                losses = [self._scored_losses(tokens_BL, tokens_BL, counts_BL, None, None, is_real_BL)]
                noise = [(None, None, None)]
            else:
                noise = self._mask_patterns(counts_BL, draws, seed)
                losses = []
                for is_masked_BL, rate_BL, time_B in noise:
                    noisy_BL = tokens_BL.masked_fill(is_masked_BL, self.config.mask_token_id)
                    sigma_B = sigma_of(time_B) if self.config.time_conditioning else None
                    losses.append(self._scored_losses(noisy_BL, tokens_BL, is_masked_BL, rate_BL, sigma_B, is_real_BL))
        return self._score_output(torch.stack(losses), noise[0][2] is None, counts_BL, rows)

    def _scored_losses(self, noisy_BL, clean_BL, where_BL, rate_BL, sigma_B, attention_mask):
        """token_losses (causal_losses for ar) of the tokens `where` alone, for which alone the head is computed."""
        is_causal, is_pair = self.config.objective == "ar", self.config.objective == "bd3lm"
        tokens = torch.cat([noisy_BL, clean_BL], dim=1) if is_pair else noisy_BL
        hidden, cond_BC = self.encode(tokens, sigma_B, attention_mask, is_pair)
        row_R, column_R = where_BL.nonzero(as_tuple=True)
        states_BLD = self.predicting(hidden[-1], clean_BL.shape[1], is_pair)
        h_R1D = states_BLD[row_R, column_R - int(is_causal)][:, None]
        logits_RV = self.backbone.output_layer(h_R1D, None if cond_BC is None else cond_BC[row_R])[:, 0]
        per_token = self.score_entropy if self.config.objective == "sedd" else self.cross_entropy
        loss_BL = torch.zeros(clean_BL.shape, device=logits_RV.device)
        loss_R = per_token(logits_RV, clean_BL[where_BL])
        loss_BL[where_BL] = loss_R if rate_BL is None else loss_R / rate_BL[where_BL]
        return loss_BL

    def _to_score(self, input_ids, attention_mask, labels, draws):
        """Aligned rows, their tokens and which of these are scored; ValueError for what cannot be scored."""
        config = self.config
        if draws is not None and (isinstance(draws, bool) or int(draws) != draws or draws < 1):
            raise ValueError(f"draws ({draws}): must be an integer of at least 1")
        input_ids = checked_ids(input_ids, config.vocab_size)
        if input_ids.shape[1] > config.model_length:
            raise ValueError(
                f"input_ids: {input_ids.shape[1]} tokens, but the model's context is {config.model_length}; "
                "split the text into rows of at most that many tokens"
            )
        rows = Alignment(attention_mask, *input_ids.shape)
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)}: give one per token, shape {tuple(input_ids.shape)}")
        is_real_BL = None if attention_mask is None else attention_mask.bool()
        checked_ids(input_ids, config.vocab_size, "input_ids", config.mask_token_id, is_real_BL)
        tokens_BL, labels = rows.start(input_ids), rows.start(input_ids if labels is None else labels)
        counts_BL = self._counted(labels, rows.is_real_BL)
        if bool((counts_BL & (labels != tokens_BL)).any()):
            raise ValueError("labels: use -100 for tokens that are given and the token itself for those to score")
        is_empty_B = ~counts_BL.any(1)
        if bool(is_empty_B.any()):
            given = (
                "a row's first token is given, not scored; " if config.ignore_bos or config.objective == "ar" else ""
            )
            raise ValueError(
                f"input_ids: rows {is_empty_B.nonzero().flatten().tolist()} have no token to score; {given}"
                "leave such rows out"
            )
        return rows, tokens_BL, counts_BL

    def _score_output(self, token_nats_JBL, is_exact, counts_BL, rows):
        total_BL = token_nats_JBL.sum(0) if is_exact else token_nats_JBL.mean(0)
        nats, num_tokens, draws = total_BL.sum(1), counts_BL.sum(1), len(token_nats_JBL)
        stderr = torch.zeros_like(nats) if is_exact else torch.full_like(nats, float("nan"))
        if not is_exact and draws > 1:
            stderr = token_nats_JBL.sum(2).std(0) / draws**0.5
        per_token = nats / num_tokens
        return ScoreOutput(
            nats=nats, num_tokens=num_tokens, nats_per_token=per_token, perplexity=per_token.exp(),
            token_nats=rows.back(total_BL), nats_stderr=stderr,
        )  # fmt: skip

    def _mask_patterns(self, counts_BL, draws, seed):
        """Patterns of masks with (masked (B, L), rate that divides the losses (B, L), time (B,)).

        Their losses are to be added where time is None (all patterns), averaged otherwise. In a block with c scored
        tokens the bound is the sum over all sets M of masked ones of (|M|-1)! (c-|M|)! / c! times their nats, since
        the integral of t^(k-1) (1-t)^(c-k) is that; equally c times the mean over k = 1 ... c of 1/k times the mean
        over sets of k. With a uniform key per token, the k smallest keys are such a set, and the k-th smallest is
        distributed as the time given k masks.
        """
        length = counts_BL.shape[1]
        size = self.config.block_size if self.config.objective == "bd3lm" else length
        counts_BNS = F.pad(counts_BL, (0, -length % size)).unflatten(1, (-1, size))
        num_BN1 = counts_BNS.sum(-1, keepdim=True)
        most = int(num_BN1.max())
        allowed = EXACT_PASSES if draws is None else draws
        per_token = lambda x: x.expand_as(counts_BNS).flatten(1)[:, :length]  # noqa: E731
        if not self.config.time_conditioning and most < 63 and 2**most - 1 <= allowed:
            place_BNS = (counts_BNS.cumsum(-1) - 1).clamp(min=0)
            patterns = []
            for number in range(1, 2**most):
                is_masked = counts_BNS & ((number >> place_BNS) % 2 == 1) & (number < 2**num_BN1)
                k = bin(number).count("1")
                ways = torch.tensor([math.comb(c, k) * k if c >= k else 1 for c in range(most + 1)])
                rate = ways.to(num_BN1.device)[num_BN1].float()  # 1 / ((k-1)! (c-k)! / c!)
                patterns.append((per_token(is_masked), per_token(rate), None))
            return patterns
        return [
            (per_token(is_masked), per_token(rate), time.to(counts_BL.device))
            for is_masked, rate, time in self._drawn_patterns(counts_BNS.cpu(), num_BN1.cpu(), draws or DRAWS, seed)
        ]

    def _drawn_patterns(self, counts_BNS, num_BN1, draws, seed):
        where_JBN, key_JBNS = self._uniforms(counts_BNS.shape, draws, seed)
        stratum_JBN = where_JBN.argsort(0)
        for j in range(draws):
            where_BN1 = ((stratum_JBN[j] + key_JBNS[j, ..., -1]) / draws)[..., None]
            k_BN1 = 1 + (where_BN1 * num_BN1).long().clamp(max=(num_BN1 - 1).clamp(min=0))
            key_BNS = key_JBNS[j, ..., :-1]
            ordered_BNS = key_BNS.masked_fill(~counts_BNS, 2.0).sort(-1).values
            time_BN1 = ordered_BNS.gather(-1, k_BN1 - 1)
            time_BN1 = torch.where(num_BN1 > 0, time_BN1, key_BNS[..., :1])
            rate_BN1 = k_BN1 / num_BN1.clamp(min=1)
            yield counts_BNS & (key_BNS <= time_BN1), rate_BN1.float(), time_BN1[:, 0, 0].float()

    def _uniforms(self, shape, draws, seed):
        """Uniform numbers per block (J, B, N) and per token, with one more per block, (J, B, N, S + 1), float64."""
        rows, blocks, size = shape
        rand = lambda generator, *s: torch.rand(*s, generator=generator, dtype=torch.float64)  # noqa: E731
        if not hasattr(seed, "__len__"):
            generator = torch.Generator().manual_seed(seed)
            return rand(generator, draws, rows, blocks), rand(generator, draws, rows, blocks, size + 1)
        if len(seed) != rows:
            raise ValueError(f"seed: {len(seed)} seeds for {rows} rows; give one for each, or a single one")
        where, keys = [], []
        most = 2 * self.config.model_length  # whatever the rows are padded to
        for own in seed:
            generator = torch.Generator().manual_seed(int(own))
            where.append(rand(generator, draws, most)[:, :blocks])
            inside = rand(generator, draws, most)[:, : blocks * size].unflatten(1, (blocks, size))
            keys.append(torch.cat([inside, rand(generator, draws, most)[:, :blocks, None]], dim=-1))
        return torch.stack(where, dim=1), torch.stack(keys, dim=1)
