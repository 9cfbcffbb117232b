"""Text generation of the exported BD3-LM models; depends on torch and transformers only.

Text is produced region by region, left to right: a region is a block of L' tokens (bd3lm) or a stretch of a sliding
window (mdlm, sedd). A region starts as masks and is unmasked by one of

    first_hitting   one token at a time in random order, as the continuous-time process would (Zheng et al. 2024)
    ancestral       num_steps steps; each unmasks every masked token with chance 1 / (steps left)
    confidence      every token whose best candidate has probability `threshold` at once, and at least the surest
    entropy         every token with at most `threshold` nats of entropy at once, and at least the surest

With fill=True the regions are those of the given text, and only its masks are open.

Shapes: B rows, L tokens of the longest row, N columns of the prompt as given, S tokens in a region, V ids including the
mask.
"""

import torch
from transformers import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

from .inputs_bd3lm import Alignment, checked_ids
from .likelihood_bd3lm import TIME_EPSILON, evaluating, sigma_of
from .progress_bd3lm import GenerateOutput, GenerationState, Region
from .settings_bd3lm import Settings, settings_of

__all__ = ["BlockGeneration", "Draws", "GenerateOutput", "Settings"]


class Draws:
    """Random draws of one `generate` call: float64, so that 0 has no weight that could be seen (2^-53)."""

    def __init__(self, settings, device):
        self.settings = settings
        self.generator = None
        if settings.seed is not None:
            self.generator = torch.Generator(device).manual_seed(settings.seed)

    def uniform(self, shape, device):
        """U[0, 1), 53 bits."""
        if torch.device(device).type == "mps":  # which has no float64
            return torch.rand(shape, generator=self.generator, device=device)
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)

    def one_of(self, is_candidate_BS):
        """Index (B,) of one True per row, uniformly; 0 where a row has none."""
        return torch.where(is_candidate_BS, self.uniform(is_candidate_BS.shape, is_candidate_BS.device), -1.0).argmax(1)

    def tokens(self, logits):
        """Draw ids from logits (..., V) after temperature, top-k and top-p; ValueError where none is finite."""
        self.check(logits)
        if not self.settings.do_sample or self.settings.temperature == 0:
            return logits.argmax(-1)
        return self.categorical(self.weights(logits))

    @staticmethod
    def check(logits):
        """ValueError for NaN or infinite logits, of which some id would win."""
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise ValueError("the model's logits are not finite: its weights or activations hold NaN or infinity")

    def weights(self, logits):
        """Probabilities (..., V) after all filters, float64."""
        filtered = self.filtered(logits)
        return (filtered.cpu() if filtered.device.type == "mps" else filtered).softmax(-1, dtype=torch.float64)

    def categorical(self, weight):
        """Draw ids in proportion to non-negative weights (..., V), float64, by the inverse of their running sum."""
        sums = weight.cumsum(-1)
        goal = self.uniform((*weight.shape[:-1], 1), weight.device) * sums[..., -1:]
        last = weight.shape[-1] - 1 - (weight > 0).flip(-1).int().argmax(-1)
        return torch.minimum(torch.searchsorted(sums, goal, right=True)[..., 0], last)

    def filtered(self, logits):
        """Logits with everything outside top-k and top-p at -inf; the best token always stays."""
        settings = self.settings
        if settings.do_sample and settings.temperature:
            logits = logits.float() / settings.temperature
        if settings.top_k:
            kth = logits.topk(min(settings.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if settings.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            is_out = ordered.softmax(-1, dtype=torch.float64).cumsum(-1) > settings.top_p
            is_out[..., 0] = False
            logits = logits.masked_fill(torch.zeros_like(is_out).scatter(-1, order, is_out), float("-inf"))
        return logits


class BlockGeneration:
    """`generate`; mixed into the model."""

    @torch.no_grad()
    def generate(
        self,
        input_ids=None,
        generation_config=None,
        attention_mask=None,
        token_type_ids=None,
        generator=None,
        stopping_criteria=None,
        streamer=None,
        **options,
    ):
        """Continue prompts, write from nothing, or fill masks.

        Args:
            input_ids: (B, N) prompts; default: one row with the token that training rows start with (bos_token_id of
                generation_config.json).
            generation_config: a GenerationConfig; what it leaves open the model's own decides.
            attention_mask: (B, N), 0 for padding at the left or right end; prompts may differ in length.
            token_type_ids: ignored (BERT tokenizers return them).
            generator: torch.Generator on the model's device, in place of `seed`.
            stopping_criteria: of transformers; asked for every new token, in order, once its block is written.
            streamer: of transformers; is given every new token, once its block is written.
            **options: fields of Settings, e.g. max_new_tokens, top_p, sampler, num_steps, seed, fill.

        Returns:
            int64 ids (B * num_return_sequences, N + new): the columns given, as they are, then the new tokens, filled
            up with pad_token_id. The length may exceed the model's context, a window of which slides along. With
            fill=True, or return_dict_in_generate, a GenerateOutput.

        Raises:
            ValueError: settings that cannot be obeyed, each by name; prompts that contain the mask (without fill).
        """
        input_ids = options.pop("inputs", None) if input_ids is None else input_ids
        if options.get("fill") and (options.get("max_new_tokens") or options.get("max_length")):
            raise ValueError("generate: fill=True adds no tokens; leave out max_new_tokens and max_length")
        settings = self._settings(generation_config, options)
        if settings.fill and (stopping_criteria or streamer is not None):
            raise ValueError(
                "generate: stopping_criteria and streamer follow text that grows; leave them out with fill"
            )
        device = self.backbone.vocab_embed.embedding.device
        if device.type == "meta":  # offloaded by accelerate, whose hooks move what a layer is given
            device = torch.device("cpu") if input_ids is None else input_ids.device
        draws = Draws(settings, device)
        draws.generator = generator if generator is not None else draws.generator
        criteria = self._criteria(stopping_criteria, settings)
        with evaluating(self):
            given_BN, rows = self._prompts(input_ids, attention_mask, settings, device)
            progress = GenerationState(given_BN, rows, settings, self.config, criteria, streamer)
            write = self._next_tokens if self.config.objective == "ar" else self._regions
            write(progress, settings, draws)
        return progress.output()

    def _settings(self, generation_config, options):
        return settings_of(self.generation_config, generation_config, options, self.config.objective)

    @staticmethod
    def _criteria(stopping_criteria, settings):
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if settings.max_time is not None:
            criteria.append(MaxTimeCriteria(max_time=settings.max_time))
        if settings.stop_strings:
            criteria.append(StopStringCriteria(tokenizer=settings.tokenizer, stop_strings=settings.stop_strings))
        return criteria

    def _prompts(self, input_ids, attention_mask, settings, device):
        """Checked prompts as given, repeated num_return_sequences times, and their Alignment."""
        config = self.config
        if input_ids is None:
            start = settings.bos_token_id
            input_ids = torch.zeros(1, 0, dtype=torch.long) if start is None else torch.tensor([[start]])
        input_ids = checked_ids(input_ids, config.vocab_size)
        pad, eos = settings.pad_token_id, settings.eos_token_id
        is_pad_an_eos = pad == eos or (isinstance(eos, list | tuple) and pad in eos)
        if attention_mask is None and pad is not None and not is_pad_an_eos and bool((input_ids == pad).any()):
            attention_mask = input_ids != pad  # as transformers does
        repeat = settings.num_return_sequences
        given_BN = input_ids.to(device).repeat_interleave(repeat, dim=0)
        if attention_mask is not None:
            attention_mask = attention_mask.to(device).repeat_interleave(repeat, dim=0)
        rows = Alignment(attention_mask, *given_BN.shape)
        is_mask_BN = given_BN == config.mask_token_id
        is_mask_BN = is_mask_BN if attention_mask is None else is_mask_BN & attention_mask.bool()
        if not settings.fill and bool(is_mask_BN.any()):
            raise ValueError(
                f"input_ids: a prompt may not contain the mask (id {config.mask_token_id}); "
                "generate(..., fill=True) puts text in its place"
            )
        if config.objective == "ar":
            first_B = torch.ones_like(given_BN[:, :1]) if rows.is_real_BL is None else rows.is_real_BL[:, :1]
            is_open_B = rows.start(is_mask_BN)[:, :1] if given_BN.shape[1] else first_B
            if not given_BN.shape[1] or not bool(first_B.all()) or bool(is_open_B.any()):
                raise ValueError(
                    "generate: an autoregressive model needs a first token in every row, or a bos_token_id"
                )
        return given_BN, rows

    # ---- autoregressive --------------------------------------------------------------------------------------------

    def _next_tokens(self, progress, settings, draws):
        tokens_BL = progress.tokens_BL
        cache = self.new_cache() if settings.use_cache else None
        first = progress.open_BL.int().argmax(1)[progress.open_BL.any(1)]
        for column in range(int(first.min()) if len(first) else tokens_BL.shape[1], tokens_BL.shape[1]):
            window = self.config.model_length
            seen = tokens_BL[:, (cache.num_tokens if cache is not None else max(0, column - window)) : column]
            hidden, cond = self.encode(seen, cache=cache, commit=True)
            logits_BV = self._without_mask(self.backbone.output_layer(hidden[-1][:, -1:], cond)[:, 0])
            here = Region(column, column + 1, 0)
            is_free_B1 = progress.free(here)
            logits_RV = logits_BV[is_free_B1[:, 0]]
            if len(logits_RV):
                progress.note(here, is_free_B1, logits_RV, draws.tokens(logits_RV))
            if progress.close(column + 1):
                break

    # ---- diffusion -------------------------------------------------------------------------------------------------

    def _region_list(self, first, length):
        """Regions that cover [first, length), `first` rounded down to a region's start."""
        context, size = self.config.model_length, self.config.attention_block
        if size is not None:
            window = context // size * size
            starts = range(first // size * size, length, size)
            return [Region(s, s + size, max(0, s + size - window)) for s in starts]
        stride = max(context // 2, 1)
        bounds = [(0, min(context, length))]
        while bounds[-1][1] < length:
            start = bounds[-1][1]
            bounds.append((start, min(start + stride, length)))
        return [Region(s, e, max(0, s + stride - context) if s else 0) for s, e in bounds if e > first]

    def _regions(self, progress, settings, draws):
        """Write region after region."""
        tokens_BL = progress.tokens_BL
        cache = self.new_cache() if settings.use_cache and self.config.attention_block is not None else None
        first = 0 if settings.fill else int(progress.prompt_B.min())
        for region in self._region_list(first, tokens_BL.shape[1]):
            is_free_BS = progress.free(region)
            if bool(is_free_BS.any()):
                if cache is not None and cache.num_tokens < region.start:  # the prompt, or the block just finished
                    done = tokens_BL[:, cache.num_tokens : region.start]
                    self.encode(done, self._sigma(torch.zeros(len(done))), cache=cache, commit=True)
                write = {
                    "first_hitting": self._first_hitting, "ancestral": self._ancestral, "analytic": self._analytic,
                }.get(settings.sampler, self._threshold)  # fmt: skip
                write(progress, is_free_BS, region, cache, settings, draws)
            if progress.close(region.stop):
                break

    def _sigma(self, time_B):
        return sigma_of(time_B) if self.config.time_conditioning else None

    def _logits(self, progress, region, cache, time_B, position_B=None):
        options = {} if progress.seen_BL is None else {"seen_BL": progress.seen_BL}
        return self._denoise(progress.tokens_BL, region, cache, time_B, position_B, **options)

    def _denoise(self, tokens_BL, region, cache, time_B, position_B=None, seen_BL=None):
        """Logits (B, S, V) in the region, or (B, V) at one position of it per row; the mask excluded."""
        start = region.window_start if cache is None else region.start
        here = slice(start, region.stop)
        seen = None if seen_BL is None else seen_BL[:, here]
        hidden, cond = self.encode(tokens_BL[:, here], self._sigma(time_B), seen, cache=cache)
        before = None if cache is None else cache.last
        h_BSD = self.predicting(hidden[-1], region.stop - start, before_B1D=before)[:, region.start - start :]
        if position_B is not None:
            h_BSD = h_BSD[torch.arange(len(position_B), device=h_BSD.device), position_B][:, None]
        logits = self._without_mask(self.backbone.output_layer(h_BSD, cond))
        return logits if position_B is None else logits[:, 0]

    def _without_mask(self, logits):
        mask = torch.tensor([self.config.mask_token_id], device=logits.device)
        return logits.index_fill(-1, mask, float("-inf"))

    def _first_hitting(self, progress, masked_BS, region, cache, settings, draws):
        device = masked_BS.device
        rows, column_S = torch.arange(len(masked_BS), device=device), torch.arange(masked_BS.shape[1], device=device)
        time_B = torch.ones(len(rows), device=device)
        while bool(masked_BS.any()):
            num_masked_B = masked_BS.sum(1).clamp(min=1)
            time_B = (time_B * draws.uniform(time_B.shape, device) ** (1 / num_masked_B)).float()
            position_B = draws.one_of(masked_BS)
            logits_BV = self._logits(progress, region, cache, time_B, position_B)
            due_BS = masked_BS & (column_S == position_B[:, None])
            logits_RV = logits_BV[masked_BS[rows, position_B]]
            progress.note(region, due_BS, logits_RV, draws.tokens(logits_RV))
            masked_BS = masked_BS & ~due_BS

    def _ancestral(self, progress, masked_BS, region, cache, settings, draws):
        for step in range(settings.num_steps):
            left = settings.num_steps - step
            # (t - s) / t on the grid t = left / steps, s = t - 1 / steps: the last step unmasks all that is left
            due_BS = masked_BS & (draws.uniform(masked_BS.shape, masked_BS.device) * left < 1)
            if not bool(due_BS.any()):
                continue  # nothing changes, so the network need not be asked
            time_B = torch.full((len(masked_BS),), left / settings.num_steps, device=masked_BS.device)
            logits_RV = self._logits(progress, region, cache, time_B)[due_BS]
            progress.note(region, due_BS, logits_RV, draws.tokens(logits_RV))
            masked_BS = masked_BS & ~due_BS

    def _threshold(self, progress, masked_BS, region, cache, settings, draws):
        """Confidence or entropy, of the model's own distribution, before any filter."""
        column_S = torch.arange(masked_BS.shape[1], device=masked_BS.device)
        while bool(masked_BS.any()):
            time_B = masked_BS.sum(1) / masked_BS.shape[1]
            logits_BSV = self._logits(progress, region, cache, time_B)
            log_p = logits_BSV.log_softmax(-1)
            if settings.sampler == "confidence":
                sure_BS, least = log_p.amax(-1).exp(), settings.threshold
            else:
                sure_BS = (log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
                least = -settings.threshold
            sure_BS = torch.where(masked_BS, sure_BS, float("-inf"))
            due_BS = masked_BS & ((sure_BS >= least) | (column_S == sure_BS.argmax(1, keepdim=True)))
            progress.note(region, due_BS, logits_BSV[due_BS], draws.tokens(logits_BSV[due_BS]))
            masked_BS = masked_BS & ~due_BS

    def _analytic(self, progress, masked_BS, region, cache, settings, draws):
        """SEDD's analytic sampler; the last step leaves no masks."""
        times = torch.linspace(1, 1e-5, settings.num_steps + 1, device=masked_BS.device)
        sigmas = -torch.log1p(-(1 - TIME_EPSILON) * times)
        for step in range(settings.num_steps + 1):
            if not bool(masked_BS.any()):
                return
            sigma = sigmas[step]
            time_B = torch.full((len(masked_BS),), float(-torch.expm1(-sigma)), device=masked_BS.device)
            logits_RV = self._logits(progress, region, cache, time_B)[masked_BS].double()
            draws.check(logits_RV)
            due_BS = masked_BS.clone()
            if step < settings.num_steps:
                total_R = (logits_RV.logsumexp(-1) - torch.log(torch.tensor(logits_RV.shape[-1] - 1.0))).exp()
                leave_R = total_R / torch.expm1(sigma) * torch.expm1(sigma - sigmas[step + 1]).double()
                is_due_R = draws.uniform(leave_R.shape, leave_R.device) < leave_R  # above 1: certainly
                due_BS[masked_BS] = is_due_R
                logits_RV = logits_RV[is_due_R]
            if len(logits_RV):
                progress.note(region, due_BS, logits_RV, draws.tokens(logits_RV))
            masked_BS = masked_BS & ~due_BS
