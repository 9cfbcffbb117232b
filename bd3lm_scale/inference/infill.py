"""Text with gaps as the sample command takes it: "text <mask:16> text"."""

import re
from collections.abc import Sequence

from bd3lm_scale.data.tokenizer import Tokenizer

_GAP = re.compile(r"<mask(?::(\d+))?>")


def parse_infill(text: str, tokenizer: Tokenizer, start: int) -> tuple[int, ...]:
    """Token ids with the mask at open places, behind the token that precedes documents in training.

    Each stretch of text between gaps is tokenized by itself.

    Args:
        text: `<mask:N>` stands for N tokens to write, `<mask>` for one.
        tokenizer: the model's.
        start: what precedes a document.

    Raises:
        ValueError: no gap, or one of no tokens.
    """
    parts = _GAP.split(text)  # text, N or None, text, N or None, ..., text
    gaps = [1 if number is None else int(number) for number in parts[1::2]]
    if not gaps or min(gaps) < 1:
        raise ValueError(
            f"--infill ({text!r}): nothing to fill in; write <mask:N>, N at least 1, where N tokens are missing"
        )
    ids = [start]
    for encoded, gap in zip(tokenizer.encode_batch(parts[::2]), [*gaps, 0], strict=True):
        ids += [*encoded, *[tokenizer.mask_token_id] * gap]
    return tuple(ids)


def check_infill(prompts: Sequence[tuple[int, ...]], objective: str, context_length: int) -> None:
    """ValueError for gaps the model cannot fill."""
    longest = max(map(len, prompts))
    if objective == "sedd" and longest > context_length:
        raise ValueError(
            f"--infill: {longest} tokens, but sedd has no way beyond its context of {context_length} tokens; "
            "use a shorter text"
        )
