"""Networks other than the paper's DiT, for the laws that hold of every one. Each is small: width 64, 4 query heads.

`decoder` is what is trained today: RMS norms, SwiGLU, grouped heads, norms of queries and keys, no adaptive norms.
`mixed` takes the other choices: adaptive norms with SwiGLU, one head of keys and values for all, biases everywhere.
"""

DECODER = {
    "norm": "rmsnorm", "norm_eps": 1e-6, "mlp": "swiglu", "ffn_hidden_size": 96, "num_kv_heads": 2, "head_dim": 24,
    "qk_norm": True, "mlp_bias": False, "head_bias": False, "adaln": False, "tie_embeddings": True,
    "rope_theta": 500.0, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context_length": 16,
}  # fmt: skip
MIXED = {
    "mlp": "swiglu", "ffn_hidden_size": 80, "num_kv_heads": 1, "qk_norm": True, "qkv_bias": True, "norm_eps": 1e-3,
    "rope_scaling": "linear", "rope_factor": 2.0,
}  # fmt: skip
VARIANTS = {"decoder": DECODER, "mixed": MIXED}


def overrides(variant: str) -> list[str]:
    """A variant as `a.b=c` arguments."""
    return [f"model.{name}={str(value).lower()}" for name, value in VARIANTS[variant].items()]
