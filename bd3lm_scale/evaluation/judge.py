"""Generative perplexity: how likely another language model finds sampled text.

The judge is any causal model in a local Hugging Face folder (or cache). A text longer than the judge's context is
scored in windows (paper, Section 6.2): the first one whole, each later one moved by `stride` tokens and scored on its
last `stride` targets, so every target is scored once with at least context - stride tokens before it.

Shapes: W windows in a batch, C tokens in a window, V vocabulary of the judge.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bd3lm_scale.diffusion.samplers.stopping import unigram_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class JudgeMissing(ValueError):
    """The judge is not on this machine."""


@dataclass(frozen=True)
class Judge:
    """A causal language model and its tokenizer.

    Attributes:
        name: what it was loaded from.
        model: returns an object with `logits` (W, C, V).
        encode: text to ids; special tokens in the text become special ids.
        eos_token, eos_token_id: end of text; such targets are not scored.
        max_context: most tokens the model can read.
        device: where the model is.
    """

    name: str
    model: Any
    encode: Callable[[str], list[int]]
    eos_token: str | None
    eos_token_id: int | None
    max_context: int
    device: torch.device


@dataclass(frozen=True)
class JudgedText:
    """One text as the judge sees it.

    Attributes:
        num_tokens: ids of the judge, after truncation.
        num_scored: targets scored.
        nll: their summed negative log-likelihood in nats.
        entropy: unigram entropy of the ids in nats.
    """

    num_tokens: int
    num_scored: int
    nll: float
    entropy: float

    @property
    def perplexity(self) -> float:
        """exp of the mean nll; nan where nothing was scored."""
        return math.exp(self.nll / self.num_scored) if self.num_scored else math.nan


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a text, of which the targets [first_target, stop) are scored."""

    start: int
    stop: int
    first_target: int


def load_judge(name: str, device: torch.device | str = "cpu", precision: str = "fp32") -> Judge:
    """Load a judge from a folder or the local Hugging Face cache, never from the network, never unpickling.

    Raises:
        JudgeMissing: it is not on this machine; the message has the command that fetches it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            name, local_files_only=True, use_safetensors=True, dtype=DTYPES[precision]
        )
    except (OSError, ValueError) as problem:
        raise JudgeMissing(missing_message(name, problem)) from problem
    limits = [getattr(model.config, key, None) for key in ("max_position_embeddings", "n_positions")]
    return Judge(
        name=name,
        model=cast(nn.Module, model).eval().to(device),
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        max_context=min([limit for limit in limits if limit] or [2**31]),
        device=torch.device(device),
    )


def missing_message(name: str, problem: Exception) -> str:
    """What to do about a judge that cannot be loaded."""
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    if Path(name).exists():
        return (
            f"judge ({name}): the folder is there but does not load ({reason}); "
            "it needs config.json, tokenizer files and model.safetensors"
        )
    folder = Path(name).name
    return (
        f"judge ({name}): not on this machine and nothing is downloaded here; run\n"
        f"    hf download {name} --include '*.json' '*.txt' 'model*.safetensors' --local-dir {folder}\n"
        f"where there is internet, copy the folder, and pass --judge {folder}"
    )


def windows(num_tokens: int, context: int, stride: int) -> list[Window]:
    """The windows of one text; together they score targets 1 ... num_tokens - 1 once each."""
    if not 0 < stride < context:
        raise ValueError(f"--stride ({stride}): must be at least 1 and below --context ({context})")
    out = [Window(0, min(context, num_tokens), 1)]
    while out[-1].stop < num_tokens:
        start, scored = out[-1].start + stride, out[-1].stop
        out.append(Window(start, min(start + context, num_tokens), scored))
    return out


@torch.inference_mode()
def judge_texts(
    judge: Judge,
    texts: Sequence[str],
    *,
    max_tokens: Sequence[int | None] | None = None,
    context: int = 1024,
    stride: int = 512,
    batch_size: int = 4,
    on_progress: Callable[[int], object] = lambda done: None,
) -> list[JudgedText]:
    """Score each text.

    Args:
        judge: the model.
        texts: what to score.
        max_tokens: truncate each text to so many ids of the judge; None keeps all.
        context: window length in the judge's ids, at most judge.max_context.
        stride: how far windows move.
        batch_size: windows per forward pass.
        on_progress: told the number of windows done in each pass.
    """
    if context > judge.max_context:
        raise ValueError(f"--context ({context}): judge {judge.name} reads at most {judge.max_context} tokens")
    limits = max_tokens or [None] * len(texts)
    ids = [np.array(judge.encode(text)[:limit], dtype=np.int64) for text, limit in zip(texts, limits, strict=True)]
    todo = [(i, w) for i, tokens in enumerate(ids) if len(tokens) > 1 for w in windows(len(tokens), context, stride)]
    # windows of one length together: little padding, and a short text never pays for a long one
    todo.sort(key=lambda item: item[1].stop - item[1].start)
    nll, scored = np.zeros(len(ids)), np.zeros(len(ids), dtype=np.int64)
    for first in range(0, len(todo), batch_size):
        group = todo[first : first + batch_size]
        for (i, _), (loss, count) in zip(group, _score(judge, ids, group), strict=True):
            nll[i] += loss
            scored[i] += count
        on_progress(len(group))
    return [
        JudgedText(len(tokens), int(scored[i]), float(nll[i]), unigram_entropy(tokens)) for i, tokens in enumerate(ids)
    ]


def _score(judge: Judge, ids: list[np.ndarray], group: list[tuple[int, Window]]) -> Iterator[tuple[float, int]]:
    """Summed nll and number of the scored targets of each window."""
    width = max(window.stop - window.start for _, window in group)
    tokens_WC = torch.zeros(len(group), width, dtype=torch.int64)
    for place, (i, window) in enumerate(group):
        tokens_WC[place, : window.stop - window.start] = torch.from_numpy(ids[i][window.start : window.stop])
    # causal attention: padding on the right reaches no scored position, so no attention mask is needed
    logits_WCV: Tensor = judge.model(input_ids=tokens_WC.to(judge.device)).logits
    for place, (_, window) in enumerate(group):
        first, last = window.first_target - window.start, window.stop - window.start
        targets = tokens_WC[place, first:last].to(judge.device)
        loss = functional.cross_entropy(logits_WCV[place, first - 1 : last - 1].float(), targets, reduction="none")
        counts = torch.ones_like(targets, dtype=torch.bool)
        if judge.eos_token_id is not None:
            counts = targets != judge.eos_token_id
        yield float(loss.double()[counts].sum()), int(counts.sum())
