"""What config.json says of the network beyond the published fields; the exported class compared with the table."""

from dataclasses import asdict
from typing import Any

import torch

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import BD3LMConfig
from bd3lm_scale.checkpoint.names import PREFIX, shape_problems, table
from bd3lm_scale.model.parameters import Architecture, Rope

MAX_PROBLEMS = 40
FIELDS = {
    "norm": "norm", "norm_eps": "norm_eps", "mlp": "mlp", "ffn_hidden_size": "ffn_hidden_size",
    "num_kv_heads": "n_kv_heads", "head_dim": "head_dim", "qk_norm": "qk_norm", "qkv_bias": "qkv_bias",
    "mlp_bias": "mlp_bias", "head_bias": "head_bias",
}  # fmt: skip
"""Our field -> the one in config.json."""


def variant_fields(arch: Architecture) -> dict[str, Any]:
    """Fields of config.json in which a network differs from the published one, which has none of them."""
    published = Architecture(arch.num_layers, arch.hidden_size, arch.num_heads, arch.cond_dim, arch.mlp_ratio, 1)
    found = {
        theirs: getattr(arch, ours)
        for ours, theirs in FIELDS.items()
        if getattr(arch, ours) not in (None, getattr(published, ours))
    }
    return found if arch.rope == published.rope else found | {"rope": asdict(arch.rope)}


def model_fields(hf_config: BD3LMConfig) -> dict[str, Any]:
    """The fields of `model` for them; null where config.json says what would be derived."""
    derived = {
        "ffn_hidden_size": hf_config.mlp_ratio * hf_config.hidden_dim,
        "num_kv_heads": hf_config.n_heads,
        "head_dim": hf_config.hidden_dim // hf_config.n_heads,
    }
    found = {ours: getattr(hf_config, theirs) for ours, theirs in FIELDS.items()}
    found |= {name: None for name, default in derived.items() if found[name] == default}
    found |= {f"rope_{name}": value for name, value in asdict(Rope(**hf_config.rope)).items()}
    # autoregressive models never have adaptive norms, whatever the field says
    return found | {"adaln": bool(hf_config.adaln) or hf_config.objective == "ar"}


def check_class(fields: dict[str, Any], arch: Architecture) -> None:
    """ValueError listing every parameter of the exported class that is not the table's."""
    from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM

    said = {name: value for name, value in fields.items() if name not in ("auto_map", "architectures")}
    with torch.device("meta"):
        model = BD3LM(BD3LMConfig(**said))
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if problems := shape_problems({PREFIX + entry.published: entry.shape for entry in table(arch)}, found):
        listed = "\n  ".join(problems[:MAX_PROBLEMS])
        raise ValueError(f"the exported class is not the network of the checkpoint:\n  {listed}")
