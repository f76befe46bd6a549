"""``stq::dequantize`` and ``stq::quantize``: the two nodes that the quantizing pass inserts.

They are real custom operators with fake kernels, so every graph between passes can be run
eagerly and compared with the one before it. Their meaning is `stq_compile.reference`; the code
generator expands them into kernel instructions and never calls them.

``stq::settled_error``, ``stq::factors`` and ``stq::sums`` are what a measuring graph consists of;
their meaning is `stq_compile.error_law`.

``stq::with_error``, ``stq::round_param`` and ``stq::param_error`` read and write parameters of 16
bits; their meaning is `stq_compile.halves`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stq_compile import error_law, halves, reference
from stq_compile.formats import FORMATS
from stq_compile.halves import HALVES
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
    x: Tensor,
    normalizer: Tensor | None,
    format: str,
    key: Tensor | None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode a dense float32 tensor; returns (codes, scale words).

    ``key`` is the int64 stream key of this step for stochastic rounding; None rounds to nearest.
    ``before`` are the scale words that the state was read with, which `reference.encode` takes.
    """
    unit = None if normalizer is None else memory_order(normalizer)
    noise = NEAREST if key is None else Noise(int(key) & ((1 << 64) - 1))
    return reference.encode(memory_order(x), FORMATS[format], noise, unit, before=before)


@quantize.register_fake
def _(
    x: Tensor,
    normalizer: Tensor | None,
    format: str,
    key: Tensor | None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    codes, scales = reference.empty_buffers(FORMATS[format], x.numel())
    return x.new_empty(codes.shape, dtype=codes.dtype), x.new_empty(
        scales.shape, dtype=scales.dtype
    )


@torch.library.custom_op("stq::with_error", mutates_args=())
def with_error(param: Tensor, error: Tensor, dtype: str) -> Tensor:
    """The value of a compensated parameter of type ``dtype``, float32."""
    return halves.with_error(param.float(), error, HALVES[dtype])


@torch.library.custom_op("stq::round_param", mutates_args=())
def round_param(x: Tensor, dtype: str, key: Tensor | None) -> Tensor:
    """Float32 ``x`` on the grid of ``dtype``, float32; ``key`` as of `quantize`."""
    half = HALVES[dtype]
    if key is None:
        return halves.rounded(x, half, None)
    flat = memory_order(x)
    noise = Noise(int(key) & ((1 << 64) - 1)).of_elements(flat.numel())
    return halves.rounded(flat, half, noise).as_strided(x.size(), x.stride())


@torch.library.custom_op("stq::param_error", mutates_args=())
def param_error(x: Tensor, rounded: Tensor, dtype: str) -> Tensor:
    """What rounding ``x`` to ``rounded`` left, in ulps."""
    return halves.error_of(x, rounded, HALVES[dtype])


@with_error.register_fake
def _(param: Tensor, error: Tensor, dtype: str) -> Tensor:
    return torch.empty_like(param, dtype=torch.float32)


@round_param.register_fake
def _(x: Tensor, dtype: str, key: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@param_error.register_fake
def _(x: Tensor, rounded: Tensor, dtype: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("stq::settled_error", mutates_args=())
def settled_error(
    old: Tensor,
    new: Tensor,
    normalizer: Tensor | None,
    format: str,
    persistence: Tensor,
    rounding: str,
) -> Tensor:
    """Root mean square error that ``format`` leaves in each element of a state."""
    unit = None if normalizer is None else memory_order(normalizer)
    flat = error_law.settled_error(
        memory_order(old), memory_order(new), unit, FORMATS[format], persistence, rounding
    )
    return flat.as_strided(new.size(), new.stride())


@settled_error.register_fake
def _(
    old: Tensor,
    new: Tensor,
    normalizer: Tensor | None,
    format: str,
    persistence: Tensor,
    rounding: str,
) -> Tensor:
    return torch.empty_like(new)


@torch.library.custom_op("stq::range_end", mutates_args=())
def range_end(old: Tensor) -> Tensor:
    """The end of its block's range, for elements that are there or below; 0 for all others."""
    return error_law.range_end(memory_order(old)).clone().as_strided(old.size(), old.stride())


@range_end.register_fake
def _(old: Tensor) -> Tensor:
    return torch.empty_like(old)


@torch.library.custom_op("stq::factors", mutates_args=())
def factors(old: Tensor, new: Tensor, grad: Tensor) -> list[Tensor]:
    """What the planner wants to know about a state, element by element."""
    flat = error_law.factors(memory_order(old), memory_order(new), memory_order(grad))
    return [value.clone().as_strided(new.size(), new.stride()) for value in flat]


@factors.register_fake
def _(old: Tensor, new: Tensor, grad: Tensor) -> list[Tensor]:
    return [torch.empty_like(new) for _ in error_law.FACTORS]


@torch.library.custom_op("stq::sums", mutates_args=())
def sums(values: list[Tensor], names: str) -> Tensor:
    """Sums over all elements, float64 ``[len(values)]``; ``names``, separated by spaces,
    say what each one is."""
    return error_law.sums(values)


@sums.register_fake
def _(values: list[Tensor], names: str) -> Tensor:
    return values[0].new_empty(len(values), dtype=torch.float64)
