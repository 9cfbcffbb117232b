"""The BD3-LM diffusion transformer for Hugging Face transformers; depends on torch and transformers only.

Parameter names and the meaning of `timesteps` are those of the published BD3-LM checkpoints.

Shapes: B rows, L tokens in a row, N blocks in a row, S tokens in a block, P positions the transformer reads
(2L for [noisy ; clean], otherwise the tokens given), Q queries, J keys, D width, C conditioning width, H heads,
K head width, V ids including the mask.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_bd3lm import BD3LMConfig
from .generation_bd3lm import BlockGeneration
from .inputs_bd3lm import Alignment, checked_ids
from .layers_bd3lm import Backbone, Embedding, Norm, Rotary, ZeroLinear
from .likelihood_bd3lm import LikelihoodMixin

# named here because transformers 4.49 brings along only the files that this one imports
from .progress_bd3lm import GenerationState as _GenerationState  # noqa: F401
from .settings_bd3lm import Settings as _Settings  # noqa: F401
from .vocabulary_bd3lm import Vocabulary


class BlockCache:
    """Keys (after rotation) and values of the clean tokens of earlier blocks, one pair per layer.

    Holds at most window - S tokens, so that with the current block a window of context is attended to. Positions
    go on rising while old tokens fall out: attention depends on their differences only.
    """

    def __init__(self, num_layers, window, block_size):
        self.window = window
        self.block_size = block_size
        self.num_tokens = 0
        """Tokens committed so far, dropped ones included: the position of the next token."""
        self.last = None
        """(B, 1, D) last hidden state of the last committed token."""
        self.keys = [None] * num_layers
        self.values = [None] * num_layers

    @property
    def length(self):
        """Tokens held."""
        return 0 if self.keys[0] is None else self.keys[0].shape[2]

    def extend(self, layer, key_BHQK, value_BHQK, commit):
        """Held and new keys and values, (B, H, J, K) each; `commit` keeps the new ones."""
        if self.keys[layer] is not None:
            key_BHQK = torch.cat([self.keys[layer], key_BHQK], dim=2)
            value_BHQK = torch.cat([self.values[layer], value_BHQK], dim=2)
        if commit:
            kept = self.window - self.block_size
            start = max(key_BHQK.shape[2] - kept, 0)
            self.keys[layer], self.values[layer] = key_BHQK[:, :, start:], value_BHQK[:, :, start:]
        return key_BHQK, value_BHQK

    def keep_rows(self, index):
        """Go on with these rows (int64 indices or bool) only."""
        self.keys = [k[index.to(k.device)] for k in self.keys if k is not None] or self.keys
        self.values = [v[index.to(v.device)] for v in self.values if v is not None] or self.values
        self.last = None if self.last is None else self.last[index.to(self.last.device)]


def pair_visibility(length, block_size, device):
    """Bool (2L, 2L), True where [noisy ; clean] position q attends to j (paper, Section 3 and Appendix B.6)."""
    position = torch.arange(2 * length, device=device)
    half, block = position // length, (position % length) // block_size
    own_block = (half[:, None] == half) & (block[:, None] == block)
    earlier_clean = (half == 1) & (block < block[:, None])
    return own_block | earlier_clean


def window_visibility(query_Q, key_J, block_size, window=None):
    """Bool (Q, J): keys of the query's own and earlier blocks, at most `window` tokens back from its block's end."""
    block_end_Q = (query_Q // block_size + 1) * block_size
    visible = key_J < block_end_Q[:, None]
    return visible if window is None else visible & (key_J >= block_end_Q[:, None] - window)


class BD3LM(BlockGeneration, LikelihoodMixin, Vocabulary, PreTrainedModel, GenerationMixin):
    """Block-diffusion language model (bd3lm) and its baselines (mdlm, sedd, ar)."""

    config_class = BD3LMConfig
    base_model_prefix = "bd3lm"
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012  (prescribed by transformers)
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    _auto_class = "AutoModelForMaskedLM"  # save_pretrained copies this code (transformers 4 does not by itself)
    _stands_for_causal_lm = False

    def __init__(self, config):
        super().__init__(config)
        self.backbone = Backbone(config)
        if config.var_min:
            self.register_buffer("sampling_eps_min", torch.tensor(config.sampling_eps_min))
            self.register_buffer("sampling_eps_max", torch.tensor(config.sampling_eps_max))
        self._cache = None
        self.post_init()

    @classmethod
    def can_generate(cls):
        """`generate` is our own; transformers need only know that generation_config.json is to be read."""
        return True

    def _init_weights(self, module):
        """The paper's initialization: adaLN and head start at zero, everything else at torch's defaults."""
        if isinstance(module, nn.Linear):
            bound = 0.0 if isinstance(module, ZeroLinear) else module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, Embedding):
            bound = module.embedding.shape[1] ** -0.5
            nn.init.uniform_(module.embedding, -bound, bound)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Rotary) and not module.inv_freq.is_meta:
            module.inv_freq.copy_(module.frequencies("cpu"))

    # ---- key/value cache -------------------------------------------------------------------------------------------

    def new_cache(self):
        """An empty cache for `past_key_values`; the window is model_length."""
        if self.config.attention_block is None:
            raise ValueError(f"a {self.config.objective} model reads both ways: it has no key/value cache")
        return BlockCache(self.config.n_blocks, self.config.model_length, self.config.attention_block)

    def reset_kv_cache(self, eval_batch_size=None):
        """Start a cache kept by the model (the published interface): later sample_mode calls read and extend it."""
        self._cache = self.new_cache()

    def drop_kv_cache(self):
        """Go back to calls without a cache."""
        self._cache = None

    # ---- the network -----------------------------------------------------------------------------------------------

    def conditioning(self, timesteps, batch, device):
        """(B, C) from the noise level: zeros in its place without time conditioning, None without adaLN."""
        if not self.config.adaln:
            return None
        if not self.config.time_conditioning:
            sigma_B = torch.zeros(batch, device=device)
        elif timesteps is None:
            raise ValueError("this model is conditioned on the noise level: pass timesteps (sigma), shape (B,)")
        else:
            sigma_B = timesteps.to(device).float().reshape(batch, -1).mean(-1)
        return F.silu(self.backbone.sigma_map(sigma_B))

    def _is_pair(self, length, sample_mode):
        """Whether the input is [noisy ; clean]: said by sample_mode, else recognised by its length of 2L."""
        if self.config.objective != "bd3lm" or sample_mode:
            return False
        if sample_mode is None:
            return length == 2 * self.config.model_length
        if length % 2:
            raise ValueError(f"sample_mode=False reads [noisy ; clean]: {length} tokens are not two equal halves")
        return True

    def encode(self, given, timesteps=None, attention_mask=None, is_pair=False, cache=None, commit=False):
        """Hidden states of every layer and the conditioning vector; in pair mode of both halves.

        `given` holds ids (B, P) or their embeddings (B, P, D); padding is at the right end.
        """
        batch, length = given.shape[:2]
        device, block = given.device, self.config.attention_block
        cond_BC = self.conditioning(timesteps, batch, device)
        visible = None
        if is_pair:
            position_P = torch.arange(length // 2, device=device).repeat(2)
            visible = pair_visibility(length // 2, block, device)
        elif cache is not None:
            start = cache.num_tokens
            position_P = torch.arange(start, start + length, device=device)
            if attention_mask is not None:
                raise ValueError("attention_mask cannot be combined with a key/value cache: pass rows without padding")
            if length > block or length + cache.length > cache.window:
                key_J = torch.arange(start - cache.length, start + length, device=device)
                visible = window_visibility(position_P, key_J, block, cache.window)
        else:
            position_P = torch.arange(length, device=device)
            if block is not None:
                visible = window_visibility(position_P, position_P, block)
        if attention_mask is not None:
            real_B11J = attention_mask.bool().to(device)[:, None, None, :]
            if is_pair and real_B11J.shape[-1] * 2 == length:
                real_B11J = real_B11J.repeat(1, 1, 1, 2)
            # A padding position sees itself, so that no query is left without a key.
            itself = torch.eye(length, dtype=torch.bool, device=device)
            visible = (real_B11J if visible is None else visible & real_B11J) | itself
        hidden = self.backbone.encode(given, position_P, cond_BC, visible, cache=cache, commit=commit)
        if cache is not None and commit:
            cache.num_tokens += length
            cache.last = hidden[-1][:, -1:]
        return hidden, cond_BC

    def predicting(self, hidden_BPD, length, is_pair=False, before_B1D=None):
        """States (B, L, D) that predict the L tokens: their own, or with shift_targets those of the tokens before.

        In [noisy ; clean] the first token of a block has the clean one before it, and after a cache `before_B1D`, the
        state of the last cached token. A text's first token has none before it, is always given, and gets its own.
        """
        own_BLD = hidden_BPD[:, :length]
        if not self.config.shift_targets:
            return own_BLD
        before_B1D = own_BLD[:, :1] if before_B1D is None else before_B1D
        shifted_BLD = torch.cat([before_B1D, own_BLD[:, :-1]], dim=1)
        if not is_pair:
            return shifted_BLD
        is_first_L1 = torch.arange(length, device=own_BLD.device)[:, None] % self.config.block_size == 0
        return torch.where(is_first_L1, hidden_BPD[:, length:].roll(1, dims=1), shifted_BLD)

    def forward(
        self, input_ids=None, timesteps=None, attention_mask=None, labels=None, sample_mode=None, store_kv=None,
        past_key_values=None, mask_rate=None, generator=None, output_hidden_states=None, return_dict=None,
        inputs_embeds=None, output_attentions=None,
    ):  # fmt: skip
        """Logits, and the negative evidence lower bound (NELBO) when `labels` are given.

        Args:
            input_ids: (B, 2L) [noisy ; clean] as in training (bd3lm), or a plain sequence (B, P). A plain bd3lm
                sequence is block-causal: each block sees itself and the blocks before it, so earlier blocks should
                be clean and the last one noisy. mdlm and sedd see everything, ar is causal.
            timesteps: noise level sigma, (B,) or (B, n) (averaged); needed with time conditioning only.
            attention_mask: (B, L), 0 for padding at the left or right end: it is seen by no token and not scored, and
                blocks are counted from a row's first real token.
            labels: (B, L) clean text. input_ids is then the same text; noise is drawn here and `loss` is the NELBO
                in nats per scored token (ar: the exact cross-entropy). Tokens labelled -100 stay clean and unscored.
            sample_mode: True: a plain sequence even if 2L long; False: [noisy ; clean] whatever its length.
            store_kv: keep the given (clean) blocks in the cache.
            past_key_values: a cache from `new_cache()`; input_ids are then the tokens after the cached ones.
            mask_rate: with labels: input_ids is noisy already, each token masked with this probability;
                (B,) or (B, N), one per block.
            generator: torch.Generator for the noise.
            output_hidden_states, return_dict: as everywhere in transformers; with return_dict=False the bare logits
                (or (logits, hidden_states), or (loss, logits)) are returned, as the published code does.
            inputs_embeds: (B, P, D) in place of input_ids; with labels, of the clean text.
            output_attentions: only false: attention weights are never formed.

        Raises:
            ValueError: ids, masks or labels that no model could read, each named.
        """
        if output_attentions:
            raise ValueError("output_attentions (True): attention weights are never formed here; use False")
        given = self._given(input_ids, inputs_embeds)
        if labels is not None:
            labels, length = self._clean(labels), labels.shape[1]
        else:
            cache = past_key_values if past_key_values is not None else (self._cache if sample_mode else None)
            is_pair = cache is None and self._is_pair(given.shape[1], sample_mode)
            length = given.shape[1] // 2 if is_pair else given.shape[1]
        if attention_mask is not None and attention_mask.shape[1:] == (2 * length,):
            attention_mask = attention_mask[:, :length]  # the halves of [noisy ; clean] are padded alike
        rows = Alignment(attention_mask, len(given), length)
        if labels is not None:
            if mask_rate is not None and mask_rate.dim() == 2 and mask_rate.shape[1] == length:
                mask_rate = rows.start(mask_rate)
            loss, logits, hidden = self._labelled(
                rows.start(given), rows.start(labels), timesteps, rows.is_real_BL, mask_rate, generator
            )
        else:
            loss = None
            if self._stands_for_causal_lm and sample_mode is None and past_key_values is None and not store_kv:
                self._refuse_next_token_scoring(input_ids)
            before = None if cache is None else cache.last
            hidden, cond_BC = self.encode(rows.start(given), timesteps, rows.is_real_BL, is_pair, cache, bool(store_kv))
            logits = self.backbone.output_layer(self.predicting(hidden[-1], length, is_pair, before), cond_BC)
            hidden = [h[:, :length] for h in hidden]
        logits = rows.back(logits)
        hidden = tuple(rows.back(h) for h in hidden) if output_hidden_states else None
        if getattr(self.config, "return_dict", True) if return_dict is None else return_dict:
            return MaskedLMOutput(loss=loss, logits=logits, hidden_states=hidden)
        values = tuple(value for value in (loss, logits, hidden) if value is not None)
        return values if len(values) > 1 else logits

    def _given(self, input_ids, inputs_embeds):
        """Ids or embeddings, whichever was given; ids on a GPU are not looked at, which would wait for it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward: give input_ids or inputs_embeds, one of them")
        if inputs_embeds is not None:
            return inputs_embeds
        return checked_ids(input_ids, self.config.vocab_size) if self._may_look(input_ids) else input_ids

    def _clean(self, labels):
        if not self._may_look(labels):
            return labels
        return checked_ids(labels, self.config.vocab_size, "labels", self.config.mask_token_id, labels != -100)

    @staticmethod
    def _may_look(ids):
        return ids.device.type == "cpu" and not torch.compiler.is_compiling()

    def _refuse_next_token_scoring(self, input_ids):
        if (
            self.config.objective != "ar"
            and input_ids is not None
            and not (input_ids == self.config.mask_token_id).any()
        ):
            raise ValueError(
                f"a {self.config.objective} model's logits at a token do not predict the next one, and text without "
                "masks has nothing to predict: use model.score(ids) for likelihoods (labels=ids for a loss), "
                "model.generate(...) for text, or AutoModelForMaskedLM for the denoiser's logits"
            )


class BD3LMForCausalLM(BD3LM):
    """What AutoModelForCausalLM gives, so that pipeline("text-generation") works: BD3LM that refuses bare text.

    A program that expects next-token predictions would read its logits as such, without an error.
    """

    _auto_class = "AutoModelForCausalLM"
    _stands_for_causal_lm = True
