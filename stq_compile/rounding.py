"""Random bits for stochastic rounding, from a counter.

The bits of element ``e`` of block ``b`` depend on (seed, step, stream, b, e) alone, where the
stream is one state of one parameter. So they are the same on every backend, for every number of
threads and shards, and nothing has to be saved but the seed and the step.

A block hashes to a 64-bit key (splitmix64's finalizer: Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), and the two halves of the key, ``A`` (made odd) and
``B``, give the numbers of its elements by the multiply-add hash ``A e + B mod 2^32``
(Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer arithmetic
without primes", STACS 1996): uniform, and independent in pairs, which is what the variance of a sum
of rounding errors depends on. It costs one addition per element. `tests/test_rounding.py` states
and runs the statistical test.

From step to step the number of an element moves on by the golden ratio (a Kronecker sequence):
uniform at every step, and evenly spread over any few steps in a row. A state is rounded at every
step, and its errors add up over the steps that it remembers; numbers that are spread evenly round
up and down in turn, and the error that settles has 0.6 of the variance that independent numbers
leave (design/0010).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from stq_compile.formats import BLOCK, block_count

GOLDEN = 0x9E3779B97F4A7C15
MASK64 = (1 << 64) - 1
MASK32 = (1 << 32) - 1
UPPER = MASK64 ^ MASK32
ROTATION = 0x9E3779B9
"""2^32 over the golden ratio: how far the numbers of an element move on at every step."""


def mix64(x: int) -> int:
    """splitmix64's finalizer on a Python int."""
    x &= MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def stream_id(param_index: int, state: str) -> int:
    """Stream of one state of one parameter: independent of the order in which states appear."""
    return (param_index << 32) | zlib.crc32(state.encode())


def step_key(seed: int, step: int, stream: int) -> int:
    """64-bit key of one stream in one step: a hash above, the step's low 32 bits below."""
    mixed = mixed_step(seed, step)
    return (mix64((mixed & UPPER) ^ stream_key(stream)) & UPPER) | (mixed & MASK32)


def mixed_step(seed: int, step: int) -> int:
    """What all streams of a step have in common, as kernels take it."""
    return (mix64(seed + GOLDEN * ((step >> 32) + 1)) & UPPER) | (step & MASK32)


def stream_key(stream: int) -> int:
    """What all steps of a stream have in common, as kernels take it."""
    return mix64(stream * GOLDEN + 1)


def kernel_arguments(key: int) -> tuple[int, int]:
    """Mixed step and stream key with which a kernel draws what `step_key`'s result ``key`` draws.

    A kernel hashes the two itself, and the hash can be undone.
    """
    return key & MASK32, _unmixed(key & UPPER)


def _unmixed(x: int) -> int:
    """The inverse of `mix64`."""
    x = x ^ (x >> 31) ^ (x >> 62)
    x = (x * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK64
    x = x ^ (x >> 27) ^ (x >> 54)
    x = (x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK64
    return x ^ (x >> 30) ^ (x >> 60)


def signed64(x: int) -> int:
    """The same 64 bits as a signed integer, as tensors hold them."""
    return x - (1 << 64) if x >> 63 else x


@dataclass(frozen=True)
class Noise:
    """Where the random bits of one quantization come from; ``key is None`` means nearest.

    ``index`` says which blocks of the counter are used, int64 ``[blocks]``, where they are not
    consecutive.
    """

    key: int | None
    index: Tensor | None = None

    def uniform(
        self, first_block: int, blocks: int, device: torch.device | None = None
    ) -> Tensor | float:
        """Uniform numbers in [0, 1), float32 ``[blocks, 128]``, or 0.5 for nearest rounding."""
        if self.key is None:
            return 0.5
        return (self._bits(self.key, first_block, blocks, device) >> 8).float() * 2.0**-24

    def centered(
        self, first_block: int, blocks: int, device: torch.device | None = None
    ) -> Tensor | float:
        """Random integers in [-2^31, 2^31], float32 ``[blocks, 128]``, or 0 for nearest rounding.

        The same numbers as `uniform`, half a turn on, and cheaper in a kernel by a shift.
        """
        if self.key is None:
            return 0.0
        bits = self._bits(self.key, first_block, blocks, device)
        return ((bits ^ 0x80000000) - 0x80000000).float()

    def _bits(self, key: int, first_block: int, blocks: int, device: torch.device | None) -> Tensor:
        if self.index is None:
            return random_bits(key, first_block, blocks, device)
        return bits_of_blocks(key, self.index[first_block : first_block + blocks])

    def of_elements(
        self, numel: int, first_block: int = 0, device: torch.device | None = None
    ) -> Tensor:
        """`uniform`, float32 ``[numel]``; not for nearest rounding."""
        drawn = self.uniform(first_block, block_count(numel), device)
        assert isinstance(drawn, Tensor)
        return drawn.view(-1)[:numel]


NEAREST = Noise(None)


def random_bits(
    key: int, first_block: int, blocks: int, device: torch.device | None = None
) -> Tensor:
    """Random 32-bit integers, as int64 ``[blocks, 128]``, of blocks from ``first_block`` on."""
    index = torch.arange(first_block, first_block + blocks, dtype=torch.int64, device=device)
    return bits_of_blocks(key, index)


def bits_of_blocks(key: int, index: Tensor) -> Tensor:
    """`random_bits` of the blocks with the numbers ``index``, int64 ``[blocks]``."""
    block_key = _mix64((index + 1) * signed64(GOLDEN) + signed64(key & UPPER))[:, None]
    low, high = block_key & MASK32, _shift64(block_key, 32)
    element = torch.arange(BLOCK, dtype=torch.int64, device=index.device)
    return (element * (high | 1) + low + (key & MASK32) * ROTATION) & MASK32


def _shift64(x: Tensor, n: int) -> Tensor:
    """Logical right shift of 64-bit patterns held in int64."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift64(x, 30)) * signed64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift64(x, 27)) * signed64(0x94D049BB133111EB)
    return x ^ _shift64(x, 31)
