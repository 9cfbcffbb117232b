"""When a sample ends before its full length, decided per sample: end of text, or degenerate (low-entropy) text."""

from dataclasses import dataclass

import numpy as np

ENTROPY_WINDOW = 256
"""Tokens at the end of a sample whose entropy is watched (paper, App. C.5)."""


@dataclass(frozen=True)
class StopRule:
    """Checked after each block (AR: after each token).

    Attributes:
        eos_token_id: end just after the first such token that follows the prompt; None never does.
        min_entropy: end where the unigram entropy, in nats, of the last 256 tokens falls below this, and cut these
            tokens off; looked at only in samples longer than 256. None never does.
        end_of_turn: another token that ends a sample as EOS does.
    """

    eos_token_id: int | None = None
    min_entropy: float | None = None
    end_of_turn: int | None = None

    def check(self, tokens: np.ndarray, prompt_length: int, num_checked: int) -> tuple[str, int] | None:
        """(reason, final length) where the sample ends, None where it goes on.

        Args:
            tokens: (length so far,) ids.
            prompt_length: tokens of the prompt, which never end a sample.
            num_checked: tokens already searched for the end of text.
        """
        ends = [token for token in (self.eos_token_id, self.end_of_turn) if token is not None]
        if ends:
            first = max(prompt_length, num_checked)
            found = np.flatnonzero(np.isin(tokens[first:], ends))
            if found.size:
                return "eos", first + int(found[0]) + 1
        if self.min_entropy is None or len(tokens) <= ENTROPY_WINDOW:
            return None
        is_low = unigram_entropy(tokens[-ENTROPY_WINDOW:]) < self.min_entropy
        return ("low_entropy", max(prompt_length, len(tokens) - ENTROPY_WINDOW)) if is_low else None


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the frequencies of ids; 0 for an empty list."""
    if len(tokens) == 0:
        return 0.0
    _, counts = np.unique(np.asarray(tokens), return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())
