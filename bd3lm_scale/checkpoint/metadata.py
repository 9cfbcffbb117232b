"""The record (`meta`) of checkpoints that are made from other formats, as training writes it for its own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bd3lm_scale.config.load import to_dict
from bd3lm_scale.config.schema import RunConfig

BERT_MASK = {30522: 103, 28996: 103}
"""Vocabulary size of BERT's tokenizers (uncased, cased) -> id of [MASK], which is not the last one."""
MASK_OVERRIDE = "mask_token_id="
UNKNOWN_DATA = "data"
"""data.path in the record of a converted checkpoint, whose training data is not known."""


def weights_meta(config: RunConfig, vocab_size: int, mask_token_id: int, source: str) -> dict[str, Any]:
    """The record of a weights-only checkpoint at step 0.

    Args:
        config: what the weights were trained with, as far as it is known.
        vocab_size: ids including the mask, without padding.
        mask_token_id: id of the mask.
        source: name of what was converted.
    """
    return {
        "step": 0,
        "tokens": 0,
        "optimizer_step": 0,
        "cursor": {"step": 0, "data_offset": 0, "excluded_shards": []},
        "clip": {"low": config.diffusion.clip_low, "high": config.diffusion.clip_high},
        "config": to_dict(config),
        "contents": "weights",
        "layout": {},
        "versions": {"torch": torch.__version__},
        "vocab_size": vocab_size,
        "mask_token_id": mask_token_id,
        "source": source,
    }


def default_mask_id(vocab_size: int) -> int:
    """The mask of published checkpoints, which do not name it: BERT's, otherwise the last id."""
    return BERT_MASK.get(vocab_size, vocab_size - 1)


def split_mask_override(overrides: Sequence[str]) -> tuple[int | None, list[str]]:
    """`mask_token_id=N` apart from the overrides of the configuration."""
    own = [text for text in overrides if text.startswith(MASK_OVERRIDE)]
    rest = [text for text in overrides if text not in own]
    return (int(own[-1].removeprefix(MASK_OVERRIDE)) if own else None), rest


def shortest(value: Tensor) -> float:
    """0.001 for the float32 0.0010000000474974513: the decimal a person wrote, equal in float32."""
    return float(str(np.float32(value.float().item())))
