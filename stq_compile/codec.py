"""`CompiledCodec`: decodes and encodes tiles of a state by kernels, for changes of its format.

A kernel for every pair of formats would have to be built when the pair occurs; with a normalizer
that changes as well there are thousands. In their place stand two kernels for each format, one
that decodes it into float32 and one that encodes it, both built the first time that the format
occurs; a tile of values goes from one to the other through the cache.

The bits are those of `stq_compile.reference`, which therefore does the work where there is too
little of it for a kernel to be worth building.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stq_compile import reference
from stq_compile.codegen.cpp.build import CompiledKernel
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.reencode import KEY, NEW, OLD, UNIT, reencode_kernel
from stq_compile.codegen.tabulate import tabulate
from stq_compile.codegen.verify import verify_kernel
from stq_compile.compiler import compile_kernels
from stq_compile.formats import CONSTANT, FLOAT32, Format
from stq_compile.options import Rounding
from stq_compile.rounding import Noise, kernel_arguments, signed64
from stq_compile.storage import REFERENCE, Codec, PackedStorage

Way = tuple[Format, Format]
"""From a format, to a format; one of them is float32."""
Buffers = tuple[Tensor, Tensor | None]
"""Codes and scales."""

BUFFERS = (f"{OLD}_codes", f"{OLD}_scales", f"{NEW}_codes", f"{NEW}_scales", f"{UNIT}_codes")

WORTH_BUILDING = 1 << 20
"""Elements to be converted below which the reference is sooner done than a kernel is built: it
takes some 0.1 microseconds for each, and a kernel half a second."""


@dataclass(frozen=True)
class Conversion:
    """The change of format of a state that has values; the old and the new one may be the same."""

    param: int
    numel: int
    old: Format
    new: Format

    @property
    def computes(self) -> bool:
        """Whether there are values to convert."""
        return self.old != self.new


class CompiledCodec:
    """The kernels that were built so far; a `stq_compile.storage.Codec`."""

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding
        self.kernels: dict[Way, tuple[Kernel, CompiledKernel]] = {}
        self._converted: Counter[Format] = Counter()

    def prepare(self, conversions: Sequence[Conversion]) -> Codec:
        """What is to make these changes, with all kernels built before a state is touched.

        A changed normalizer changes the states in its units too, so that all states of a
        parameter count as changed if one of them is.
        """
        changed = {c.param for c in conversions if c.computes}
        made = [c for c in conversions if c.param in changed]
        if sum(c.numel for c in made) < WORTH_BUILDING:
            return REFERENCE
        formats = {f: None for c in made for f in (c.old, c.new)}
        self.build(formats, {c.new: None for c in made})
        return self

    def amortized(self, states: Iterable[PackedStorage]) -> Codec:
        """What is to decode and encode these states in a step that runs outside of kernels.

        The kernels of a format are built once the reference has done as much work as building
        them is: in all, no more than twice the time of whichever would have been the better.
        """
        for state in states:
            self._converted[state.format] += state.numel
        worth = [f for f, numel in self._converted.items() if numel >= WORTH_BUILDING]
        self.build(worth, worth)
        return self

    def build(self, decoded: Iterable[Format], encoded: Iterable[Format]) -> None:
        """Build the kernels that are missing."""
        ways = [(format, FLOAT32) for format in decoded] + [(FLOAT32, f) for f in encoded]
        missing = [w for w in dict.fromkeys(ways) if _has_kernel(w) and w not in self.kernels]
        kernels = [_kernel(way, self.rounding) for way in missing]
        built = compile_kernels(kernels)
        self.kernels |= dict(zip(missing, zip(kernels, built, strict=True), strict=True))

    def encode(
        self,
        x: Tensor,
        format: Format,
        noise: Noise,
        normalizer: Tensor | None = None,
        first_block: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`reference.encode`."""
        way = (FLOAT32, format)
        other_rounding = (noise.key is None) != (self.rounding == "nearest")
        if way not in self.kernels or other_rounding:
            return reference.encode(x, format, noise, normalizer, first_block)
        made = reference.empty_buffers(format, x.numel())
        self._run(way, (x, None), made, normalizer, noise.key, first_block)
        return made

    def decode(
        self,
        codes: Tensor,
        scales: Tensor,
        format: Format,
        numel: int,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        """`reference.decode`."""
        way = (format, FLOAT32)
        if way not in self.kernels:
            return reference.decode(codes, scales, format, numel, normalizer)
        values = torch.empty(numel)
        self._run(way, (codes, scales), (values, None), normalizer)
        return values

    def _run(
        self,
        way: Way,
        old: Buffers,
        new: Buffers,
        normalizer: Tensor | None,
        key: int | None = None,
        first_block: int = 0,
    ) -> None:
        kernel, compiled = self.kernels[way]
        step, stream = (0, 0) if key is None else kernel_arguments(key)
        tensors = (*old, *new, normalizer)
        fields = {
            name: 0 if t is None else t.data_ptr() for name, t in zip(BUFFERS, tensors, strict=True)
        }
        fields[KEY] = signed64(stream)
        numel = (old if way[0] == FLOAT32 else new)[0].numel()
        row = [*(fields[o.name] for o in kernel.operands), numel, first_block]
        table = np.array(row, dtype=np.int64)
        compiled.run(table.ctypes.data, 1, step, torch.get_num_threads())


def _kernel(way: Way, rounding: Rounding) -> Kernel:
    normalized = any(format.normalized for format in way)
    kernel = tabulate(reencode_kernel(*way, rounding, FLOAT32 if normalized else None))
    verify_kernel(kernel)
    return kernel


def _has_kernel(way: Way) -> bool:
    """Not where nothing is to be computed."""
    return not {CONSTANT, FLOAT32}.issuperset(way)
