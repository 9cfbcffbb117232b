"""Counter-based randomness: every draw is a pure function of a seed, a purpose and integer coordinates.

Nothing here has state, so nothing has to be saved: a resumed run, another layout or another rank that
names the same coordinates gets the same numbers (Philox-4x64, Salmon et al. 2011, as numpy ships it).
"""

import hashlib

import numpy as np

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 6


def derive_key(seed: int, purpose: str, *coordinates: int) -> int:
    """128-bit key for `purpose` at `coordinates`; different arguments give independent keys."""
    text = "/".join([str(int(seed)), purpose, *(str(int(c)) for c in coordinates)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def random_words(key: int, count: int, counter: int = 0) -> np.ndarray:
    """`count` uniform uint64 words of the stream `key`, starting at the 4-word group `counter`."""
    generator = np.random.Philox(key=[key & _MASK64, (key >> 64) & _MASK64], counter=[counter, 0, 0, 0])
    return generator.random_raw(count)


def uniforms(key: int, count: int, counter: int = 0) -> np.ndarray:
    """`count` float64 numbers in [0, 1), 53 bits each, of the stream `key`."""
    return (random_words(key, count, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix64(words: np.ndarray) -> np.ndarray:
    """Bijective scrambling of uint64 words (the finalizer of SplitMix64)."""
    words = words.astype(np.uint64, copy=True)
    with np.errstate(over="ignore"):
        words ^= words >> np.uint64(30)
        words *= np.uint64(0xBF58476D1CE4E5B9)
        words ^= words >> np.uint64(27)
        words *= np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
    return words


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each of `index`, in O(1) memory per index.

    A balanced Feistel network over the next even power of two, walked until it lands below `size`.

    Args:
        index: integers in [0, size), any shape.
        size: length of the permuted range, at least 1.
        key: from `derive_key`.
    """
    index = np.asarray(index, dtype=np.uint64)
    if size <= 1:
        return np.zeros_like(index, dtype=np.int64)
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    half, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    round_keys = random_words(key, _FEISTEL_ROUNDS)

    def shuffle(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & low
        for round_key in round_keys:
            with np.errstate(over="ignore"):
                mixed = mix64(right + round_key) & low
            left, right = right, left ^ mixed
        return (left << half) | right

    out = shuffle(index)
    outside = out >= np.uint64(size)
    while outside.any():
        out[outside] = shuffle(out[outside])
        outside = out >= np.uint64(size)
    return out.astype(np.int64)
