"""Kernels on live tensors beside their meaning in plain torch, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from graphs import only, program, with_sizes
from stq_compile import reference
from stq_compile.codegen.cpp.build import CompiledKernel, build
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.executable import Executable
from stq_compile.codegen.ir import Kernel
from stq_compile.codegen.lower import lower
from stq_compile.codegen.tabulate import tabulate
from stq_compile.compiler import Unit
from stq_compile.formats import FLOAT32, Format
from stq_compile.layout import unpack
from stq_compile.options import Rounding
from stq_compile.packed_state import PackedState
from stq_compile.passes.partition import partition
from stq_compile.passes.quantize import insert_quantize
from stq_compile.rounding import NEAREST, Noise, mixed_step, step_key, stream_id
from stq_compile.runtime import Bucket
from stq_compile.step_graph import Operand, Role, StepGraph
from zoo import BETAS, EPS, LR

SIZES = (1, 127, 128, 129, 1000, 4096 + 17, 9000)
"""Less than a block, whole blocks, tails; over 64 blocks together, so that two threads share."""
SEED = 7

Formats = Mapping[str, Format]
States = dict[str, Tensor]
Math = Callable[[Tensor, Tensor, States], tuple[Tensor, States]]
"""The optimizer's arithmetic: (param, grad, states) to new param and states."""


def sgd_math(p: Tensor, g: Tensor, s: States) -> tuple[Tensor, States]:
    m = s["momentum_buffer"] * 0.9 + g
    return p - m * LR, {"momentum_buffer": m}


def adam_math(p: Tensor, g: Tensor, s: States) -> tuple[Tensor, States]:
    m = s["exp_avg"] * BETAS[0] + g * (1 - BETAS[0])
    v = s["exp_avg_sq"] * BETAS[1] + g * g * (1 - BETAS[1])
    # torch's own float32 root is not always rounded correctly; the kernel's is.
    root = v.double().sqrt().float()
    return p - m / (root + EPS) * LR, {"exp_avg": m, "exp_avg_sq": v}


def quantized(unit: StepGraph, formats: Formats, rounding: Rounding) -> StepGraph:
    """The unit with its states in ``formats``, ready to be lowered."""
    packed = insert_quantize(program(unit), lambda o, _: formats.get(o.source.key), rounding)
    return only(partition(packed))


def kernel_of(unit: StepGraph, *, tables: bool = True) -> Kernel:
    kernel = lower(unit)
    return tabulate(kernel) if tables else kernel


def compiled(kernel: Kernel) -> CompiledKernel:
    return build(kernel.name, emit(kernel))


@dataclass
class Row:
    """One parameter's live tensors."""

    param: Tensor
    grad: Tensor
    states: dict[str, Tensor]


Bits = list[dict[str, Tensor]]
"""Per parameter: its values, and each state's codes and scale words."""


class Rig:
    """Random parameters of several sizes, with packed states, and a kernel to step them."""

    def __init__(
        self,
        unit: StepGraph,
        formats: Formats,
        rounding: Rounding,
        *,
        normalizers: Mapping[str, str] | None = None,
        sizes: Sequence[int] = SIZES,
        tables: bool = True,
    ) -> None:
        self.formats = formats
        self.rounding: Rounding = rounding
        self.normalizers = normalizers or {}
        self.graph = quantized(with_sizes(unit, sizes), formats, rounding)
        self.kernel = kernel_of(self.graph, tables=tables)
        self.rows = [self._row(i, n) for i, n in enumerate(sizes)]

    def _row(self, i: int, numel: int) -> Row:
        generator = torch.Generator().manual_seed(100 + i)
        param, grad = torch.randn(2, numel, generator=generator)
        row = Row(param, grad, {})
        # Normalizers first: a normalized state is encoded in their units.
        for key in sorted(self.formats, key=lambda k: k in self.normalizers):
            format = self.formats[key]
            values = torch.randn(numel, generator=generator) * 0.3
            values = values if format.signed else values * values
            if key in self.normalizers.values():
                values = values.abs()
            if format == FLOAT32:
                row.states[key] = values
                continue
            unit = row.states.get(self.normalizers.get(key, ""))
            packed = unit.packed if isinstance(unit, PackedState) else None
            row.states[key] = PackedState.pack(
                values, format, normalizer=packed, rounding=self.rounding
            )
        return row

    def run(self, kernel: Executable, step: int, threads: int = 1) -> None:
        """One step of every tensor through the runtime's table."""
        bucket = Bucket(Unit(self.graph, self.kernel, kernel), self._resolve)
        with torch_threads(threads):
            bucket.fill((), {})
            bucket.launch(mixed_step(SEED, step))

    def _resolve(self, operand: Operand) -> Tensor:
        row = self.rows[operand.source.param]
        if operand.role is Role.PARAM:
            return row.param
        return row.grad if operand.role is Role.GRAD else row.states[operand.source.key]

    def bits_live(self) -> Bits:
        """Everything that a step reads or writes: the tensors themselves."""
        found = []
        for row in self.rows:
            named = {"param": row.param, "grad": row.grad}
            for key, state in row.states.items():
                named |= _live(key, state)
            found.append(named)
        return found

    def bits(self) -> Bits:
        """A copy of everything that a step may write."""
        found = []
        for row in self.rows:
            named = {"param": row.param.clone()}
            for key, state in row.states.items():
                named |= _buffers(key, state)
            found.append(named)
        return found

    def load(self, bits: Bits) -> None:
        """Put everything back as it was when ``bits`` was taken."""
        for row, saved in zip(self.rows, bits, strict=True):
            row.param.copy_(saved["param"])
            for key, state in row.states.items():
                for name, buffer in _live(key, state).items():
                    buffer.copy_(saved[name])

    def after(self, kernel: Executable, start: Bits, threads: int = 1) -> Bits:
        """What two steps make of ``start``."""
        self.load(start)
        for step in range(2):
            self.run(kernel, step, threads)
        return self.bits()

    def expected(self, math: Math, step: int) -> Bits:
        """What the step must give: decode, float32 arithmetic, encode, all in plain torch."""
        return [self._expected_row(i, row, math, step) for i, row in enumerate(self.rows)]

    def _expected_row(self, i: int, row: Row, math: Math, step: int) -> dict[str, Tensor]:
        old = {
            k: s.dequantize() if isinstance(s, PackedState) else s for k, s in row.states.items()
        }
        param, new = math(row.param, row.grad, old)
        named = {"param": param}
        stored: States = {}
        for key in sorted(self.formats, key=lambda k: k in self.normalizers):
            format, noise = self.formats[key], NEAREST
            if self.rounding == "stochastic":
                noise = Noise(step_key(SEED, step, stream_id(i, key)))
            unit = stored.get(self.normalizers.get(key, ""))
            before = _live(key, row.states[key])[f"{key} scales"]
            codes, scales = reference.encode(new[key], format, noise, unit, before=before)
            stored[key] = reference.decode(codes, scales, format, param.numel(), unit)
            named |= {f"{key} codes": codes, f"{key} scales": scales}
        return named


def _live(key: str, state: Tensor) -> dict[str, Tensor]:
    if not isinstance(state, PackedState):
        return {f"{key} codes": state, f"{key} scales": torch.empty(0, dtype=torch.int16)}
    return {f"{key} codes": state.packed.codes, f"{key} scales": state.packed.scales}


def _buffers(key: str, state: Tensor) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in _live(key, state).items()}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differing(left: Bits, right: Bits) -> list[str]:
    """Which buffers differ in any bit, as ``"<tensor> <buffer>"``; NaNs are compared as bits."""
    return [
        f"{i} {name}"
        for i, (a, b) in enumerate(zip(left, right, strict=True))
        for name in a
        if not torch.equal(_raw(a[name]), _raw(b[name]))
    ]


def _raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x


def codes_of(codes: Tensor, format: Format) -> Tensor:
    """One code per element, with padding, as int64."""
    if format.kind == "bfloat16":
        return codes.long() & 0xFFFF
    return unpack(codes, format.width).view(-1).long()


def run_compiled(unit: StepGraph, inputs: Mapping[str, Tensor], *, tables: bool = True) -> States:
    """One step of a unit of one instance, by its kernel; all inputs as they are afterwards."""
    live = {name: value.clone() for name, value in inputs.items()}
    kernel = kernel_of(unit, tables=tables)
    bucket = Bucket(Unit(unit, kernel, compiled(kernel)), lambda o: live[o.name])
    bucket.fill((), {})
    bucket.launch(0)
    return live
