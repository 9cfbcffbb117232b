"""The check at the end of a conversion: the native model and the Hugging Face class on the same random tokens.

The two share no code: Megatron's layers on one side, the exported class on the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bd3lm_scale.checkpoint.hf.configuration_bd3lm import BD3LMConfig
from bd3lm_scale.checkpoint.hf.decoders import KINDS
from bd3lm_scale.checkpoint.hf.export import config_fields, kind_of, published_tensor
from bd3lm_scale.checkpoint.hf.importing import hf_config_of, read_config, read_json
from bd3lm_scale.checkpoint.hf.modeling_bd3lm import BD3LM
from bd3lm_scale.checkpoint.names import PREFIX, Architecture, rotary_frequencies, table
from bd3lm_scale.checkpoint.reader import CheckpointReader
from bd3lm_scale.config.schema import RunConfig
from bd3lm_scale.inference.loading import load_model
from bd3lm_scale.model.inference import CachedDecoder, FullDenoiser

TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""Largest difference allowed, as a share of the logits' standard deviation (at least 1)."""
ROWS, MAX_TOKENS = 2, 128


@dataclass(frozen=True)
class Comparison:
    """Largest difference between two models' logits, and the spread of the logits themselves."""

    difference: float
    spread: float
    num_logits: int

    def fits(self, dtype: str) -> bool:
        """Whether the difference is rounding."""
        return self.difference <= TOLERANCE[dtype] * max(1.0, self.spread)

    def __str__(self) -> str:
        return (
            f"largest difference of {self.num_logits:,} logits on random input: {self.difference:.3g} "
            f"(standard deviation of the logits {self.spread:.3g})"
        )


def compare(checkpoint: Path, model: "BD3LM | PlainDecoder", weights: str) -> Comparison:
    """Compare a native checkpoint with a model of the exported class, both in float32 on the CPU.

    Args:
        checkpoint: native checkpoint folder.
        model: the exported class or a decoder of transformers, float32.
        weights: "ema" or "raw", of the checkpoint.
    """
    overrides = ["precision=fp32", "runtime.device=cpu", "model.attention=dense", "sampling.window=null"]
    loaded = load_model(checkpoint, overrides, weights=weights)
    config = loaded.config
    tokens_BL = random_tokens(config, loaded.reader.meta)
    native = native_logits(loaded.engine.chunks[0], config, tokens_BL)
    mask = loaded.reader.meta["mask_token_id"]
    exported = exported_logits(model.eval(), config, tokens_BL)
    exported = exported.index_fill(-1, torch.tensor([mask]), float("-inf"))[..., : native.shape[-1]]
    is_finite = native.isfinite()
    if not bool((is_finite == exported.isfinite()).all()):
        raise ValueError("the two models disagree on which ids are possible: mask id or vocabulary differ")
    native, exported = native[is_finite], exported[is_finite]
    return Comparison(float((native - exported).abs().max()), float(native.std()), native.numel())


def random_tokens(config: RunConfig, meta: dict) -> Tensor:
    """(B, L) ids without the mask; for diffusion objectives the last block, or every other token, is masked."""
    size = config.block_size
    length = min(config.data.context_length, max(MAX_TOKENS, 2 * size))
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, meta["vocab_size"] - 1, (ROWS, length), generator=generator)
    tokens_BL += (tokens_BL >= meta["mask_token_id"]).long()
    if config.diffusion.objective == "bd3lm":
        tokens_BL = tokens_BL[:, : max(length // size, 1) * size]
        tokens_BL[:, -size:] = meta["mask_token_id"]
    elif config.diffusion.objective != "ar":
        tokens_BL[:, ::2] = meta["mask_token_id"]
    return tokens_BL


@torch.no_grad()
def native_logits(model, config: RunConfig, tokens_BL: Tensor) -> Tensor:
    """Logits of the last block (bd3lm), of the next token (ar) or of every position, mask and padding at -inf."""
    if config.diffusion.objective in ("mdlm", "sedd"):
        return FullDenoiser(model).denoise(tokens_BL, torch.full((len(tokens_BL),), 0.5))
    decoder = CachedDecoder(model, config.block_size, len(tokens_BL))
    if config.diffusion.objective == "ar":
        return decoder.feed(tokens_BL)
    context_BT = tokens_BL[:, : -config.block_size]
    if context_BT.shape[1]:
        decoder.commit(context_BT)
    return decoder.denoise(tokens_BL[:, -config.block_size :])


@torch.no_grad()
def exported_logits(model: "BD3LM | PlainDecoder", config: RunConfig, tokens_BL: Tensor) -> Tensor:
    """The same logits from the exported class."""
    is_conditioned = config.diffusion.objective in ("mdlm", "sedd")
    sigma_B = torch.full((len(tokens_BL),), 0.5 if is_conditioned else 0.0)
    logits = model(tokens_BL, sigma_B, sample_mode=True, return_dict=True).logits
    if is_conditioned:
        return logits
    return logits[:, -1] if config.diffusion.objective == "ar" else logits[:, -config.block_size :]


def load_exported(folder: Path) -> BD3LM:
    """A Hugging Face folder in our own class (code in the folder is not run), float32."""
    model = BD3LM.from_pretrained(folder, config=hf_config_of(folder, read_config(folder)), local_files_only=True)
    return model.float().eval()


class PlainDecoder(nn.Module):
    """A decoder of transformers, called as the exported class is; ids that it lacks are impossible."""

    def __init__(self, decoder: Any, vocab_size: int) -> None:
        super().__init__()
        self.decoder, self.vocab_size = decoder, vocab_size

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor, **_: Any) -> Any:
        """An object with `logits`."""
        out = self.decoder(tokens_BL)
        missing = self.vocab_size - out.logits.shape[-1]
        out.logits = nn.functional.pad(out.logits, (0, missing), value=float("-inf"))
        return out


def load_decoder(folder: Path, vocab_size: int) -> PlainDecoder:
    """A Llama or Qwen folder in transformers' own class (code in the folder is not run), float32."""
    kind = read_json(folder / "config.json")["model_type"]
    name = next(name for name, other in KINDS.items() if other == kind)
    decoder = getattr(transformers, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return PlainDecoder(decoder.float(), vocab_size).eval()


def from_published_weights(reader: CheckpointReader, config: RunConfig, weights: str) -> BD3LM:
    """The exported class with a native checkpoint's weights, for sources that are not Hugging Face folders."""
    fields = config_fields(config, reader.meta, "fp32", None)
    model = BD3LM(BD3LMConfig(**{k: v for k, v in fields.items() if k not in ("auto_map", "architectures")}))
    arch, kind = Architecture.of(config, reader.meta["vocab_size"]), kind_of(reader, weights)
    state = {PREFIX + e.published: published_tensor(reader, e, arch, kind) for e in table(arch)}
    state[f"{PREFIX}rotary_emb.inv_freq"] = rotary_frequencies(arch)
    model.load_state_dict(state, strict=False)
    return model
