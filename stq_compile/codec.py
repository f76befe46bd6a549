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

from stq_compile import matrices, reference
from stq_compile.codegen.backend import backend_of
from stq_compile.codegen.executable import Executable
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.reencode import KEY, NEW, OLD, UNIT, reencode_kernel
from stq_compile.codegen.target import Target
from stq_compile.compiler import compile_kernels, for_target
from stq_compile.formats import CONSTANT, FLOAT32, Format
from stq_compile.options import Rounding
from stq_compile.rounding import Noise, kernel_arguments, signed64
from stq_compile.step_graph import CPU
from stq_compile.storage import REFERENCE, Codec, PackedStorage

Way = tuple[Format, Format]
"""From a format, to a format; one of them is float32."""
Kind = tuple[Way, torch.device]
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
    device: torch.device = CPU

    @property
    def computes(self) -> bool:
        """Whether there are values to convert."""
        return self.old != self.new


class CompiledCodec:
    """The kernels that were built so far; a `stq_compile.storage.Codec`."""

    def __init__(self, rounding: Rounding) -> None:
        self.rounding = rounding
        self.kernels: dict[Kind, tuple[Kernel, Executable]] = {}
        self._converted: Counter[tuple[Format, torch.device]] = Counter()

    def prepare(self, conversions: Sequence[Conversion]) -> Codec:
        """What is to make these changes, with all kernels built before a state is touched.

        A changed normalizer changes the states in its units too, so that all states of a
        parameter count as changed if one of them is.
        """
        changed = {c.param for c in conversions if c.computes}
        made = [c for c in conversions if c.param in changed]
        if sum(c.numel for c in made) < WORTH_BUILDING:
            return REFERENCE
        for device in dict.fromkeys(c.device for c in made):
            mine = [c for c in made if c.device == device]
            formats = {f: None for c in mine for f in (c.old, c.new)}
            self.build(formats, {c.new: None for c in mine}, device)
        return self

    def amortized(self, states: Iterable[PackedStorage]) -> Codec:
        """What is to decode and encode these states in a step that runs outside of kernels.

        The kernels of a format are built once the reference has done as much work as building
        them is: in all, no more than twice the time of whichever would have been the better.
        """
        for state in states:
            self._converted[state.format.coded, state.device] += state.numel
        for (format, device), numel in self._converted.items():
            if numel >= WORTH_BUILDING:
                self.build([format], [format], device)
        return self

    def build(
        self, decoded: Iterable[Format], encoded: Iterable[Format], device: torch.device = CPU
    ) -> None:
        """Build the kernels that are missing."""
        ways = [(f.coded, FLOAT32) for f in decoded] + [(FLOAT32, f.coded) for f in encoded]
        kinds = [(way, device) for way in dict.fromkeys(ways) if _has_kernel(way)]
        missing = [kind for kind in kinds if kind not in self.kernels]
        if not missing:
            return
        target = backend_of(device).target(device)
        kernels = [_kernel(way, self.rounding, target) for way, _ in missing]
        built = compile_kernels(kernels, device)
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
        if format.whole:
            return matrices.encode(x, format, lambda part, coded: self.encode(part, coded, noise))
        format = format.coded
        way = (FLOAT32, format)
        other_rounding = (noise.key is None) != (self.rounding == "nearest")
        if (way, x.device) not in self.kernels or other_rounding:
            return reference.encode(x, format, noise, normalizer, first_block)
        made = reference.empty_buffers(format, x.numel(), x.device)
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
        if format.whole:
            return matrices.decode(codes, scales, format, numel, self.decode)
        format = format.coded
        way = (format, FLOAT32)
        if (way, codes.device) not in self.kernels:
            return reference.decode(codes, scales, format, numel, normalizer)
        values = torch.empty(numel, device=codes.device)
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
        kernel, compiled = self.kernels[way, old[0].device]
        step, stream = (0, 0) if key is None else kernel_arguments(key)
        tensors = (*old, *new, normalizer)
        fields = {
            name: 0 if t is None else t.data_ptr() for name, t in zip(BUFFERS, tensors, strict=True)
        }
        fields[KEY] = signed64(stream)
        numel = (old if way[0] == FLOAT32 else new)[0].numel()
        row = [*(fields[o.name] for o in kernel.operands), numel, first_block]
        compiled.bind(np.array([row], dtype=np.int64))(step)


def _kernel(way: Way, rounding: Rounding, target: Target) -> Kernel:
    normalized = any(format.normalized for format in way)
    return for_target(reencode_kernel(*way, rounding, FLOAT32 if normalized else None), target)


def _has_kernel(way: Way) -> bool:
    """Not where nothing is to be computed."""
    return not {CONSTANT, FLOAT32}.issuperset(way)
