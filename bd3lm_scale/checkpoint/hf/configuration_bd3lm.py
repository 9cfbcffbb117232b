"""Configuration of BD3-LM models in the Hugging Face format (field names of the published checkpoints)."""

from transformers import PretrainedConfig

NETWORK = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "mlp": "gelu",
    "ffn_hidden_size": None,
    "n_kv_heads": None,
    "head_dim": None,
    "qk_norm": False,
    "qkv_bias": False,
    "mlp_bias": True,
    "head_bias": True,
    "rope": None,
    "shift_targets": False,
}
"""Fields that published checkpoints do not have, with the published network's values."""


class BD3LMConfig(PretrainedConfig):
    """Sizes and objective of a block-diffusion language model, or of one of its baselines.

    Args:
        block_size: L', tokens denoised together.
        vocab_size: ids including the mask.
        model_length: L, the context length in tokens.
        cross_attn: the noisy tokens attend to the clean copy of earlier blocks (block diffusion).
        adaln: adaptive layer norm driven by the time embedding (false for autoregressive models).
        attn_backend: kept for compatibility; this code always uses PyTorch's scaled_dot_product_attention.
        causal: an autoregressive model.
        hidden_dim, cond_dim, n_blocks, n_heads, mlp_ratio, dropout: sizes of the transformer.
        time_conditioning: the noise level reaches the time embedding (zeros otherwise).
        var_min: sampling_eps_min and sampling_eps_max are stored beside the weights.
        sampling_eps_min, sampling_eps_max: the clipped interval that training times are drawn from.
        objective: bd3lm | mdlm | sedd | ar; derived from the fields above when absent (published checkpoints).
        mask_token_id: id of the mask; the last id when absent.
        ignore_bos: the first token is given: never noised, never scored.
        tied_head: the head's weight equals the embedding (it is stored twice all the same).
        norm, norm_eps: layernorm | rmsnorm, with a weight and no bias.
        mlp: gelu | swiglu; ffn_hidden_size: its inner width, mlp_ratio * hidden_dim when absent.
        n_kv_heads: heads of keys and values, shared by groups of query heads; n_heads when absent.
        head_dim: width of a head; hidden_dim / n_heads when absent.
        qk_norm: norm of every head's queries and keys before the rotation.
        qkv_bias, mlp_bias, head_bias: which linear layers have one.
        rope: theta of the rotary positions, and their scaling: none | linear (factor) | llama3 (factor,
            low_freq_factor, high_freq_factor, original_context_length).
        shift_targets: the prediction of a token is read one position before it (models converted from
            autoregressive ones); logits stand at the tokens they predict all the same.
    """

    model_type = "bd3lm"
    _auto_class = "AutoConfig"
    attribute_map = {  # noqa: RUF012  (the name and kind of attribute are prescribed by transformers)
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "model_length",
    }

    def __init__(
        self,
        block_size=1,
        vocab_size=50258,
        model_length=1024,
        cross_attn=True,
        adaln=True,
        attn_backend="sdpa",
        causal=False,
        hidden_dim=768,
        cond_dim=128,
        n_blocks=12,
        n_heads=12,
        dropout=0.1,
        time_conditioning=False,
        var_min=True,
        sampling_eps_min=1e-3,
        sampling_eps_max=0.999,
        mlp_ratio=4,
        objective=None,
        mask_token_id=None,
        ignore_bos=None,
        tied_head=False,
        **kwargs,
    ):
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.model_length = model_length
        self.cross_attn = cross_attn
        self.adaln = adaln
        self.attn_backend = attn_backend
        self.causal = causal
        self.hidden_dim = hidden_dim
        self.cond_dim = cond_dim
        self.n_blocks = n_blocks
        self.n_heads = n_heads
        self.dropout = dropout
        self.time_conditioning = time_conditioning
        self.var_min = var_min
        self.sampling_eps_min = sampling_eps_min
        self.sampling_eps_max = sampling_eps_max
        self.mlp_ratio = mlp_ratio
        self.objective = objective or self._derive_objective()
        self.mask_token_id = vocab_size - 1 if mask_token_id is None else mask_token_id
        self.ignore_bos = self.objective != "ar" if ignore_bos is None else ignore_bos
        self.tied_head = tied_head
        self._set_network({name: kwargs.pop(name, default) for name, default in NETWORK.items()})
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self._check()

    def _set_network(self, fields):
        """What differs from the published network; None is derived from other sizes."""
        if fields["head_dim"] is None and self.hidden_dim % self.n_heads:
            raise ValueError(f"hidden_dim ({self.hidden_dim}) is not a multiple of n_heads ({self.n_heads})")
        derived = {
            "ffn_hidden_size": self.mlp_ratio * self.hidden_dim,
            "n_kv_heads": self.n_heads,
            "head_dim": self.hidden_dim // self.n_heads,
            "rope": {},
        }
        for name, value in fields.items():
            setattr(self, name, derived[name] if value is None else value)
        self.rope = {"theta": 10000.0, "scaling": "none", **self.rope}

    def _derive_objective(self):
        """The published checkpoints do not name their objective, but these fields tell it."""
        if self.causal:
            return "ar"
        if self.cross_attn:
            return "bd3lm"
        return "sedd" if self.time_conditioning else "mdlm"

    def _check(self):
        if self.objective not in ("bd3lm", "mdlm", "sedd", "ar"):
            raise ValueError(f"objective ({self.objective}): unknown; use bd3lm, mdlm, sedd or ar")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) is not a multiple of n_kv_heads ({self.n_kv_heads})")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id ({self.mask_token_id}) is outside the vocabulary of {self.vocab_size} ids")

    @property
    def attention_block(self):
        """Tokens that see each other both ways: L' for bd3lm, 1 for ar; None: the whole sequence."""
        return {"bd3lm": self.block_size, "ar": 1}.get(self.objective)
