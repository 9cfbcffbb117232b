"""The numbers torch.rand draws on the CPU, from any place of the sequence on.

On a seeded generator, element i of torch.rand is the low 24 bits of word i of MT19937 (Matsumoto and Nishimura 1998)
times 2^-24. Its state after n words is a linear function over GF(2) of the state before: far places are reached by the
polynomial x^n modulo the generator's characteristic polynomial, without drawing what lies between.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_WORDS, _MIDDLE, _TWIST = 624, 397, 0x9908B0DF
_DEGREE = 19937
_DISCARD_AT_ONCE = 2**20
_JUMP_FROM = 2**24
"""Words from which a jump is cheaper than drawing them."""


class UniformStream:
    """Equal to torch.rand on a CPU generator with this seed, read from wherever one wants.

    Args:
        seed: as for torch.Generator.manual_seed, which uses its low 32 bits.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed & 0xFFFFFFFF
        self._restart()

    def seek(self, position: int) -> None:
        """Stand before element `position`."""
        if position < self._position:
            self._restart()
        distance = position - self._position
        if distance >= _JUMP_FROM:
            self._jump(distance)
            return
        self._position = position
        while distance:
            skipped = min(distance, _DISCARD_AT_ONCE)
            self._generator.random_raw(skipped, output=False)
            distance -= skipped

    def draw(self, count: int) -> Tensor:
        """The next `count` numbers, float32 in [0, 1)."""
        words = self._generator.random_raw(count).astype(np.uint32)
        self._position += count
        return torch.from_numpy((words & np.uint32(0xFFFFFF)).astype(np.float32)).mul_(2.0**-24)

    def _restart(self) -> None:
        self._generator = np.random.MT19937()
        self._generator.state = {"bit_generator": "MT19937", "state": {"key": _key(self._seed), "pos": _WORDS}}
        self._position = 0

    def _jump(self, distance: int) -> None:
        """Add up the states that the polynomial names; the sequence is first read to its next whole state."""
        inside = _WORDS - self._generator.state["state"]["pos"]
        self._generator.random_raw(inside, output=False)
        self._position += inside
        polynomial = _power_of_x(distance - inside)
        blocks = [self._generator.state["state"]["key"]]
        for _ in range(-(-_DEGREE // _WORDS)):
            self._generator.random_raw(_WORDS, output=False)
            blocks.append(self._generator.state["state"]["key"])
        words = np.concatenate(blocks)
        key = np.zeros(_WORDS, dtype=np.uint32)
        for i in _exponents(polynomial):
            key ^= words[i : i + _WORDS]
        self._generator.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": _WORDS}}
        self._position += distance - inside


def _key(seed: int) -> np.ndarray:
    """MT19937's state for a 32-bit seed (its authors' init_genrand)."""
    key = [seed]
    for i in range(1, _WORDS):
        key.append((1812433253 * (key[-1] ^ (key[-1] >> 30)) + i) & 0xFFFFFFFF)
    return np.array(key, dtype=np.uint32)


@lru_cache(maxsize=1)
def _characteristic() -> list[int]:
    """Exponents of the characteristic polynomial below its degree (Matsumoto and Nishimura 1998, Section 3.2)."""
    found = 1
    for i in range(31):
        found = (found << (_WORDS - 1)) ^ (found << (_MIDDLE - 1)) ^ (_TWIST >> i & 1)
    return _exponents((found << _WORDS) ^ (found << _MIDDLE) ^ (_TWIST >> 31))[:-1]


@lru_cache(maxsize=256)
def _power_of_x(n: int) -> int:
    """x^n modulo the characteristic polynomial, by squaring. Places repeat: layers have the same shapes."""
    bits = f"{n:b}"
    found = 1 << int(bits[:14], 2)  # below the degree
    for bit in bits[14:]:
        found = _reduced(int(f"{found:b}", 4))  # the square over GF(2) has a zero between any two bits
        if bit == "1":
            found = _reduced(found << 1)
    return found


def _reduced(polynomial: int) -> int:
    while high := polynomial >> _DEGREE:
        polynomial ^= high << _DEGREE
        for i in _characteristic():
            polynomial ^= high << i
    return polynomial


def _exponents(polynomial: int) -> list[int]:
    return [i for i, bit in enumerate(reversed(f"{polynomial:b}")) if bit == "1"]
