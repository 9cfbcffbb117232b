"""Losses and likelihood of the exported BD3-LM models; depends on torch and transformers only.

Shapes: B rows, L tokens in a row, N blocks in a row, V ids including the mask.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

TIME_EPSILON = 1e-3
SIGMA_MAX = 6.9078
"""-ln(1 - (1 - 1e-3)): the largest noise level of the loglinear schedule."""


@dataclass
class ScoreOutput(ModelOutput):
    """Likelihood of each row: nats are an upper bound of -log p (NELBO), exact for ar and block size 1.

    Attributes:
        nats: (B,) sum over the row's scored tokens.
        num_tokens: (B,) scored tokens.
        nats_per_token: (B,).
        perplexity: (B,) exp(nats_per_token).
        token_nats: (B, L) the share of each token, averaged over the draws; 0 where not scored.
    """

    nats: torch.FloatTensor = None
    num_tokens: torch.LongTensor = None
    nats_per_token: torch.FloatTensor = None
    perplexity: torch.FloatTensor = None
    token_nats: torch.FloatTensor = None


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
        config = self.config
        is_pair = config.objective == "bd3lm"
        tokens = torch.cat([noisy_BL, clean_BL], dim=1) if is_pair else noisy_BL
        if timesteps is None and config.time_conditioning:
            timesteps = sigma_of(rate_BL[:, 0])
        hidden, cond = self.encode(tokens, timesteps, attention_mask, is_pair)
        logits = self.backbone.output_layer(hidden[-1][:, : noisy_BL.shape[1]], cond)
        scored_BL = counts_BL & (noisy_BL == config.mask_token_id)
        per_token = self.score_entropy if config.objective == "sedd" else self.cross_entropy
        loss_BL = per_token(logits, clean_BL)
        return torch.where(scored_BL, loss_BL / rate_BL, 0.0), logits

    def causal_losses(self, tokens_BL, target_BL, counts_BL, attention_mask=None):
        """Autoregressive cross-entropy of every token (B, L), 0 for the first, and the logits (B, L, V)."""
        hidden, cond = self.encode(tokens_BL, attention_mask=attention_mask)
        logits = self.backbone.output_layer(hidden[-1], cond)
        loss_BL = F.pad(self.cross_entropy(logits[:, :-1], target_BL[:, 1:]), (1, 0))
        return torch.where(counts_BL, loss_BL, 0.0), logits

    def _counted(self, labels, attention_mask):
        counts_BL = labels != -100
        if attention_mask is not None:
            counts_BL = counts_BL & attention_mask.bool()[:, : labels.shape[1]].to(labels.device)
        is_first = torch.arange(labels.shape[1], device=labels.device) == 0
        return counts_BL & ~is_first if self.config.ignore_bos or self.config.objective == "ar" else counts_BL

    def _labelled(self, input_ids, labels, timesteps, attention_mask, mask_rate, generator):
        """Mean loss per scored token and the logits; see `forward`."""
        length = labels.shape[1]
        counts_BL = self._counted(labels, attention_mask)
        clean_BL = torch.where(labels == -100, input_ids[:, -length:], labels)
        if self.config.objective == "ar":
            loss_BL, logits = self.causal_losses(input_ids, clean_BL, counts_BL, attention_mask)
        else:
            if mask_rate is None:
                rate = self.draw_mask_rates(labels.shape[0], length, generator, labels.device)
                noisy_BL = self._noised(clean_BL, counts_BL, self._per_token(rate, length), generator)
            else:
                rate, noisy_BL = mask_rate.to(labels.device), input_ids[:, :length]
            rate_BL = self._per_token(rate, length)
            loss_BL, logits = self.token_losses(noisy_BL, clean_BL, counts_BL, rate_BL, timesteps, attention_mask)
        return loss_BL.sum() / counts_BL.sum().clamp(min=1), logits

    def _noised(self, clean_BL, counts_BL, rate_BL, generator):
        where = generator.device if generator is not None else clean_BL.device
        uniform_BL = torch.rand(clean_BL.shape, generator=generator, device=where).to(clean_BL.device)
        return torch.where(counts_BL & (uniform_BL < rate_BL), self.config.mask_token_id, clean_BL)

    @torch.no_grad()
    def score(self, input_ids, attention_mask=None, labels=None, draws=1, seed=0):
        """Likelihood of each row in nats: a Monte-Carlo NELBO (exact for ar and block size 1).

        Args:
            input_ids: (B, L) clean text, at most model_length tokens, padded on the right.
            attention_mask: (B, L), 0 for padding.
            labels: (B, L), -100 for tokens that are given, not scored (a prompt); default: all are scored.
            draws: noise draws per row; their times are stratified together.
            seed: of the noise; the same seed gives the same figures.

        Raises:
            ValueError: rows longer than the model's context.
        """
        batch, length = input_ids.shape
        if length > self.config.model_length:
            raise ValueError(
                f"input_ids: {length} tokens, but the model's context is {self.config.model_length}; "
                "split the text into rows of at most that many tokens"
            )
        was_training = self.training
        self.eval()
        counts_BL = self._counted(input_ids if labels is None else labels, attention_mask)
        if self.config.objective == "ar":
            total_BL, _ = self.causal_losses(input_ids, input_ids, counts_BL, attention_mask)
        else:
            generator = torch.Generator().manual_seed(seed)
            rate = self.draw_mask_rates(draws * batch, length, generator, input_ids.device)
            total_BL = 0.0
            for rate_BN in rate.view(draws, batch, -1):
                rate_BL = self._per_token(rate_BN, length)
                noisy_BL = self._noised(input_ids, counts_BL, rate_BL, generator)
                total_BL += self.token_losses(noisy_BL, input_ids, counts_BL, rate_BL, None, attention_mask)[0]
            total_BL = total_BL / draws
        self.train(was_training)
        nats, num_tokens = total_BL.sum(1), counts_BL.sum(1)
        per_token = nats / num_tokens.clamp(min=1)
        return ScoreOutput(
            nats=nats, num_tokens=num_tokens, nats_per_token=per_token, perplexity=per_token.exp(), token_nats=total_BL
        )
