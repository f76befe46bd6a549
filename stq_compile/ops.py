"""``stq::dequantize`` and ``stq::quantize``: the two nodes that the quantizing pass inserts.

They are real custom operators with fake kernels, so every graph between passes can be run
eagerly and compared with the one before it. Their meaning is `stq_compile.reference`; the code
generator expands them into kernel instructions and never calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stq_compile import reference
from stq_compile.formats import FORMATS
from stq_compile.packed_state import memory_order
from stq_compile.rounding import NEAREST, Noise


@torch.library.custom_op("stq::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scales: Tensor,
    normalizer: Tensor | None,
    format: str,
    size: list[int],
    stride: list[int],
) -> Tensor:
    """Decode to float32 of the given size and strides.

    ``normalizer`` is the decoded state whose root is the unit of a normalized format.
    """
    numel = torch.Size(size).numel()
    unit = None if normalizer is None else memory_order(normalizer)
    flat = reference.decode(codes, scales, FORMATS[format], numel, unit)
    return flat.as_strided(size, stride)


@dequantize.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    normalizer: Tensor | None,
    format: str,
    size: list[int],
    stride: list[int],
) -> Tensor:
    return codes.new_empty_strided(size, stride, dtype=torch.float32)


@torch.library.custom_op("stq::quantize", mutates_args=())
def quantize(
    x: Tensor, normalizer: Tensor | None, format: str, key: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Encode a dense float32 tensor; returns (codes, scale words).

    ``key`` is the int64 stream key of this step for stochastic rounding; None rounds to nearest.
    """
    unit = None if normalizer is None else memory_order(normalizer)
    noise = NEAREST if key is None else Noise(int(key) & ((1 << 64) - 1))
    return reference.encode(memory_order(x), FORMATS[format], noise, unit)


@quantize.register_fake
def _(
    x: Tensor, normalizer: Tensor | None, format: str, key: Tensor | None
) -> tuple[Tensor, Tensor]:
    codes, scales = reference.empty_buffers(FORMATS[format], x.numel())
    return x.new_empty(codes.shape, dtype=codes.dtype), x.new_empty(
        scales.shape, dtype=scales.dtype
    )
