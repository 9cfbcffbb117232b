"""Text generation of the exported BD3-LM models; depends on torch only.

Text is produced region by region, left to right: a region is a block of L' tokens (bd3lm) or a stretch of a sliding
window (mdlm, sedd). A region starts as masks and is unmasked by one of

    first_hitting   one token at a time in random order, as the continuous-time process would (Zheng et al. 2024)
    ancestral       num_steps steps; each unmasks every masked token with chance 1 / (steps left)

Shapes: B rows, L tokens of the longest row, S tokens in a region, V ids including the mask.
"""

from dataclasses import dataclass, fields

import torch

from .likelihood_bd3lm import TIME_EPSILON, sigma_of

SAMPLERS = ("first_hitting", "ancestral")
"""Of block diffusion and MDLM; sedd has its analytic sampler, ar goes token by token."""


@dataclass
class Settings:
    """What `generate` takes besides the prompt; defaults come from generation_config.json.

    Attributes:
        max_new_tokens: tokens added to each prompt.
        max_length: in its place, prompt and new tokens together.
        num_return_sequences: samples per prompt.
        do_sample: false takes the most likely token (temperature 0).
        temperature, top_k, top_p: top_p keeps the tokens whose cumulative probability does not exceed it.
        sampler: first_hitting | ancestral (sedd has its analytic sampler, ar goes token by token).
        num_steps: steps per region of ancestral and sedd.
        use_cache: keep keys and values of finished blocks (bd3lm, ar).
        stop_at_eos: a row ends after its first new EOS.
        eos_token_id, bos_token_id, pad_token_id: default: the generation config's.
        seed: of the draws; None draws from torch's global generator.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    num_return_sequences: int = 1
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    sampler: str = "first_hitting"
    num_steps: int = 128
    use_cache: bool = True
    stop_at_eos: bool = True
    eos_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    seed: int | None = None


@dataclass
class Region:
    """Tokens [start, stop) decoded together, seen from window_start on."""

    start: int
    stop: int
    window_start: int


class Draws:
    """Random draws of one `generate` call."""

    def __init__(self, settings, device):
        self.settings = settings
        self.generator = None
        if settings.seed is not None:
            self.generator = torch.Generator(device).manual_seed(settings.seed)

    def uniform(self, shape, device):
        """U[0, 1)."""
        return torch.rand(shape, generator=self.generator, device=device)

    def one_of(self, is_candidate_BS):
        """Index (B,) of one True per row, uniformly; 0 where a row has none."""
        return torch.where(is_candidate_BS, self.uniform(is_candidate_BS.shape, is_candidate_BS.device), -1.0).argmax(1)

    def tokens(self, logits):
        """Draw ids from logits (..., V) after temperature, top-k and top-p."""
        if not self.settings.do_sample or self.settings.temperature == 0:
            return logits.argmax(-1)
        return self.categorical(self.filtered(logits).softmax(-1, dtype=torch.float64))

    def categorical(self, weight):
        """Draw ids in proportion to non-negative weights (..., V), float64: an exponential race."""
        race = -torch.log1p(-self.uniform(weight.shape, weight.device).to(weight.dtype))
        return (weight / race.clamp(min=1e-300)).argmax(-1)

    def filtered(self, logits):
        """Logits with everything outside top-k and top-p at -inf; the best token always stays."""
        logits = logits.float() / self.settings.temperature
        if self.settings.top_k:
            kth = logits.topk(min(self.settings.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if self.settings.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            is_out = ordered.softmax(-1).cumsum(-1) > self.settings.top_p
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
        **options,
    ):
        """Continue prompts, or write from nothing.

        Args:
            input_ids: (B, n) prompts; default: one row that starts with BOS.
            generation_config: a GenerationConfig in place of the model's.
            attention_mask: (B, n), 0 for padding; prompts may differ in length, padded left or right.
            token_type_ids: ignored (BERT tokenizers return them).
            generator: torch.Generator on the model's device, in place of `seed`.
            **options: fields of Settings, e.g. max_new_tokens, top_p, sampler, num_steps, seed.

        Returns:
            int64 ids (B * num_return_sequences, n + new): prompt and new tokens. When rows differ in length, each
            starts at column 0 and is filled up with pad_token_id. The length may exceed the model's context, a
            window of which slides along.

        Raises:
            ValueError: unknown options, or prompts that contain the mask.
        """
        settings = self._settings(generation_config or self.generation_config, options)
        device = self.backbone.vocab_embed.embedding.device
        if device.type == "meta":  # offloaded by accelerate, whose hooks move what a layer is given
            device = torch.device("cpu") if input_ids is None else input_ids.device
        draws = Draws(settings, device)
        draws.generator = generator if generator is not None else draws.generator
        was_training = self.training
        self.eval()
        tokens_BL, prompt_B, total_B = self._layout(input_ids, attention_mask, settings, device)
        if self.config.objective == "ar":
            tokens_BL = self._next_tokens(tokens_BL, prompt_B, total_B, settings, draws)
        else:
            tokens_BL = self._regions(tokens_BL, prompt_B, total_B, settings, draws)
        self.train(was_training)
        return self._trimmed(tokens_BL, prompt_B, total_B, settings)

    def _settings(self, generation_config, options):
        known = {field.name for field in fields(Settings)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"generate: unknown options {unknown}; known are {sorted(known)}")
        # transformers 4 fills in defaults of its own (top_k 50, max_length 20): only what was set counts
        said = generation_config.to_diff_dict()
        said.pop("max_length", None)
        if "max_length" in options:
            said.pop("max_new_tokens", None)
        values = {**said, **{name: value for name, value in options.items() if value is not None}}
        settings = Settings(**{name: value for name, value in values.items() if name in known and value is not None})
        if isinstance(settings.eos_token_id, list):
            settings.eos_token_id = settings.eos_token_id[0]
        if settings.sampler not in SAMPLERS:
            raise ValueError(f"sampler ({settings.sampler}): unknown; use {' or '.join(SAMPLERS)}")
        if settings.num_steps < 1:
            raise ValueError(f"num_steps ({settings.num_steps}): must be at least 1")
        return settings

    def _layout(self, input_ids, attention_mask, settings, device):
        """Rows with the prompt at their start and masks after it; prompt and final lengths (B,)."""
        if input_ids is None:
            bos = settings.bos_token_id
            input_ids = torch.full((1, 0 if bos is None else 1), -1 if bos is None else bos)
            if bos is None and self.config.objective == "ar":
                raise ValueError("generate: an autoregressive model needs a prompt or a bos_token_id")
        input_ids = input_ids.to(device).repeat_interleave(settings.num_return_sequences, dim=0)
        if attention_mask is None:
            is_prompt = torch.ones_like(input_ids, dtype=torch.bool)
        else:
            is_prompt = attention_mask.to(device).bool().repeat_interleave(settings.num_return_sequences, dim=0)
        mask = self.config.mask_token_id
        if (input_ids[is_prompt] == mask).any():
            raise ValueError(f"input_ids: a prompt may not contain the mask (id {mask})")
        prompt_B = is_prompt.sum(1)
        if settings.max_length is not None:
            total_B = torch.full_like(prompt_B, settings.max_length).clamp(min=prompt_B)
        else:
            total_B = prompt_B + (settings.max_new_tokens or self.config.model_length)
        length = int(total_B.max())
        if self.config.objective == "bd3lm":  # whole blocks: what lies beyond the end stays masked
            length = -(-length // self.config.block_size) * self.config.block_size
        tokens_BL = torch.full((len(prompt_B), length), mask, device=device)
        column = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
        first_B1 = (
            torch.where(is_prompt, column, input_ids.shape[1]).amin(1, keepdim=True) if column.numel() else column
        )
        rows = torch.arange(len(prompt_B), device=device)[:, None].expand_as(input_ids)
        tokens_BL[rows[is_prompt], (column - first_B1)[is_prompt]] = input_ids[is_prompt]
        return tokens_BL, prompt_B, total_B

    def _trimmed(self, tokens_BL, prompt_B, total_B, settings):
        """Cut each row at its end, the first new EOS included, and fill up with padding."""
        column = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        end_B = total_B
        if settings.stop_at_eos and settings.eos_token_id is not None:
            is_eos = (tokens_BL == settings.eos_token_id) & (column >= prompt_B[:, None])
            first_B = torch.where(is_eos, column, tokens_BL.shape[1]).amin(1)
            end_B = torch.minimum(end_B, first_B + 1)
        pad = settings.pad_token_id if settings.pad_token_id is not None else settings.eos_token_id
        tokens_BL = torch.where(column < end_B[:, None], tokens_BL, 0 if pad is None else pad)
        return tokens_BL[:, : int(end_B.max())]

    def _has_ended(self, tokens_BS, column_S, prompt_B, settings):
        """Rows (B,) with an EOS among these columns, the prompt's aside."""
        if not settings.stop_at_eos or settings.eos_token_id is None:
            return torch.zeros_like(prompt_B, dtype=torch.bool)
        return ((tokens_BS == settings.eos_token_id) & (column_S >= prompt_B[:, None])).any(1)

    # ---- autoregressive --------------------------------------------------------------------------------------------

    def _next_tokens(self, tokens_BL, prompt_B, total_B, settings, draws):
        done = int(prompt_B.min())
        cache = self.new_cache() if settings.use_cache else None
        has_ended_B = torch.zeros_like(prompt_B, dtype=torch.bool)
        for column in range(done, tokens_BL.shape[1]):
            window = self.config.model_length
            seen = tokens_BL[:, (cache.num_tokens if cache is not None else max(0, column - window)) : column]
            hidden, cond = self.encode(seen, cache=cache, commit=True)
            logits_BV = self._without_mask(self.backbone.output_layer(hidden[-1][:, -1:], cond)[:, 0])
            is_free_B = (column >= prompt_B) & (column < total_B) & ~has_ended_B
            tokens_BL[:, column] = torch.where(is_free_B, draws.tokens(logits_BV), tokens_BL[:, column])
            one = slice(column, column + 1)
            has_ended_B |= self._has_ended(
                tokens_BL[:, one], torch.tensor(column, device=prompt_B.device), prompt_B, settings
            )
            if bool((has_ended_B | (column + 1 >= total_B)).all()):
                break
        return tokens_BL

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

    def _regions(self, tokens_BL, prompt_B, total_B, settings, draws):
        """Decode region after region; `tokens_BL` is filled in place."""
        cache = self.new_cache() if settings.use_cache and self.config.attention_block is not None else None
        column_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        has_ended_B = torch.zeros_like(prompt_B, dtype=torch.bool)
        for region in self._region_list(int(prompt_B.min()), tokens_BL.shape[1]):
            if cache is not None and cache.num_tokens < region.start:  # the prompt, or the block just finished
                done = tokens_BL[:, cache.num_tokens : region.start]
                self.encode(done, self._sigma(torch.zeros(len(done))), cache=cache, commit=True)
            column_S = column_L[region.start : region.stop]
            tokens_BS = tokens_BL[:, region.start : region.stop]
            is_free_BS = (column_S >= prompt_B[:, None]) & (column_S < total_B[:, None]) & ~has_ended_B[:, None]
            unmask = self._analytic if self.config.objective == "sedd" else getattr(self, "_" + settings.sampler)
            unmask(tokens_BL, tokens_BS, is_free_BS, region, cache, settings, draws)
            has_ended_B |= self._has_ended(tokens_BS, column_S, prompt_B, settings)
            if bool((has_ended_B | (region.stop >= total_B)).all()):
                break
        return tokens_BL

    def _sigma(self, time_B):
        return sigma_of(time_B) if self.config.time_conditioning else None

    def _denoise(self, tokens_BL, region, cache, time_B, position_B=None):
        """Logits (B, S, V) in the region, or (B, V) at one position of it per row; the mask excluded."""
        start = region.window_start if cache is None else region.start
        hidden, cond = self.encode(tokens_BL[:, start : region.stop], self._sigma(time_B), cache=cache)
        h_BSD = hidden[-1][:, region.start - start :]
        if position_B is not None:
            h_BSD = h_BSD[torch.arange(len(position_B), device=h_BSD.device), position_B][:, None]
        logits = self._without_mask(self.backbone.output_layer(h_BSD, cond))
        return logits if position_B is None else logits[:, 0]

    def _without_mask(self, logits):
        mask = torch.tensor([self.config.mask_token_id], device=logits.device)
        return logits.index_fill(-1, mask, float("-inf"))

    def _first_hitting(self, tokens_BL, tokens_BS, is_free_BS, region, cache, settings, draws):
        rows = torch.arange(len(tokens_BS), device=tokens_BS.device)
        time_B = torch.ones(len(rows), device=tokens_BS.device)
        masked_BS = is_free_BS.clone()
        while bool(masked_BS.any()):
            num_masked_B = masked_BS.sum(1).clamp(min=1)
            time_B = time_B * draws.uniform(time_B.shape, time_B.device) ** (1 / num_masked_B)
            position_B = draws.one_of(masked_BS)
            drawn_B = draws.tokens(self._denoise(tokens_BL, region, cache, time_B, position_B))
            is_due_B = masked_BS[rows, position_B]
            tokens_BS[rows, position_B] = torch.where(is_due_B, drawn_B, tokens_BS[rows, position_B])
            masked_BS[rows, position_B] = False

    def _ancestral(self, tokens_BL, tokens_BS, is_free_BS, region, cache, settings, draws):
        masked_BS = is_free_BS.clone()
        for step in range(settings.num_steps):
            left = settings.num_steps - step
            # (t - s) / t on the grid t = left / steps, s = t - 1 / steps: the last step unmasks all that is left
            due_BS = masked_BS & (draws.uniform(masked_BS.shape, masked_BS.device) * left < 1)
            if not bool(due_BS.any()):
                continue  # nothing changes, so the network need not be asked
            time_B = torch.full((len(tokens_BS),), left / settings.num_steps, device=tokens_BS.device)
            drawn_BS = draws.tokens(self._denoise(tokens_BL, region, cache, time_B))
            tokens_BS.copy_(torch.where(due_BS, drawn_BS, tokens_BS))
            masked_BS &= ~due_BS

    def _analytic(self, tokens_BL, tokens_BS, is_free_BS, region, cache, settings, draws):
        """SEDD's analytic sampler; the last step leaves no masks."""
        masked_BS = is_free_BS.clone()
        times = torch.linspace(1, 1e-5, settings.num_steps + 1, device=tokens_BS.device)
        sigmas = -torch.log1p(-(1 - TIME_EPSILON) * times)
        for step in range(settings.num_steps + 1):
            if not bool(masked_BS.any()):
                return
            sigma = sigmas[step]
            time_B = torch.full((len(tokens_BS),), float(-torch.expm1(-sigma)), device=tokens_BS.device)
            logits = self._denoise(tokens_BL, region, cache, time_B).double()
            share = draws.filtered(logits).softmax(-1, dtype=torch.float64)
            total = (logits.logsumexp(-1) - torch.log(torch.tensor(logits.shape[-1] - 1.0))).exp() / torch.expm1(sigma)
            if step < settings.num_steps:
                growth = torch.expm1(sigma - sigmas[step + 1]).double()
                stay_BS = (1 - growth * total).clamp(min=0)
                leave = share * (growth * total)[..., None]
                leave[..., self.config.mask_token_id] = stay_BS
                drawn_BS = draws.categorical(leave)
            else:
                drawn_BS = draws.categorical(share)
            tokens_BS.copy_(torch.where(masked_BS, drawn_BS, tokens_BS))
            masked_BS &= tokens_BS == self.config.mask_token_id
