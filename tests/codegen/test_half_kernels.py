"""Kernels on 16-bit parameters beside the graph that they were made of, run eagerly: same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import cases
from graphs import only, program
from interpreter import executable, interpreted
from kernels import SEED
from stq_compile.codegen.cpp.build import build
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.lower import lower
from stq_compile.codegen.triton.emit import emit as emit_triton
from stq_compile.compiler import PARAM_PASSES, Unit
from stq_compile.formats import FORMATS
from stq_compile.options import ParamRounding
from stq_compile.packed_state import PackedState
from stq_compile.passes.partition import partition
from stq_compile.passes.quantize import insert_quantize
from stq_compile.passes.runner import run_passes
from stq_compile.rounding import mixed_step, signed64, step_key, stream_id
from stq_compile.runtime import Bucket
from stq_compile.step_graph import PARAM_ERROR, Operand, Role, StepGraph
from zoo import sgd

NUMEL = 5 * 128 + 77
STEP = 11
DTYPES = ("bfloat16", "float16")
ROUNDINGS: tuple[ParamRounding, ...] = ("nearest", "stochastic", "compensated")


def unit_of(dtype: torch.dtype, rounding: ParamRounding) -> StepGraph:
    """SGD with momentum at 8 bits on one 16-bit parameter, ready to be lowered."""
    unit = sgd()
    operands = tuple(
        replace(
            o,
            shape=(NUMEL,),
            stride=(1,),
            dtype=dtype if o.role in ("param", "grad") else o.dtype,
        )
        for o in unit.operands
    )
    for node in unit.placeholders:
        node.meta["example"] = torch.empty(NUMEL, device="meta")
    unit = unit.replace(instances=(replace(unit.instances[0], operands=operands),), widened=True)
    formats = {"momentum_buffer": FORMATS["softsign8"]}
    quantized = insert_quantize(
        run_passes(program(unit), PARAM_PASSES[rounding])[-1].program,
        lambda o, _: formats.get(o.source.key),
        "stochastic",
    )
    return only(partition(quantized))


class Live:
    """The tensors of one parameter; magnitudes down to denormals of float16."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(3)
        size = torch.exp2(torch.rand(NUMEL, generator=generator) * 30 - 20)
        self.param = (torch.randn(NUMEL, generator=generator) * size).to(dtype)
        self.grad = (torch.randn(NUMEL, generator=generator) * size).to(dtype)
        self.param[:4] = torch.tensor([0.0, -0.0, 1.0, -2.0])
        m = torch.randn(NUMEL, generator=generator) * size
        self.momentum = PackedState.pack(m, FORMATS["softsign8"])
        error = torch.rand(NUMEL, generator=generator) - 0.5
        self.error = PackedState.pack(error, FORMATS["ulp8"])

    def of(self, operand: Operand) -> Tensor | None:
        if operand.role is Role.PARAM:
            return self.param
        if operand.role is Role.GRAD:
            return self.grad
        return self.error if operand.source.key == PARAM_ERROR else self.momentum

    def value(self, operand: Operand) -> Tensor:
        """What the graph takes, where the kernel takes an address or a stream."""
        if operand.role is Role.KEY:
            stream = stream_id(operand.source.param, operand.source.key)
            return torch.tensor(signed64(step_key(SEED, STEP, stream)))
        held = self.of(operand)
        assert held is not None
        if isinstance(held, PackedState):
            buffers = held.packed
            return buffers.codes if operand.role is Role.CODES else buffers.scales
        return held.float()


def differing(dtype_name: str, rounding: ParamRounding, triton: bool) -> list[str]:
    """Which tensors a kernel leaves other than the graph does, NaNs and signs of zeros included."""
    dtype = getattr(torch, dtype_name)
    unit, live = unit_of(dtype, rounding), Live(dtype)
    inputs = [live.value(o).clone() for o in unit.operands]
    expected = dict(zip(unit.writes or (), unit.run(*inputs), strict=True))
    kernel = lower(unit)
    run = executable(emit_triton(kernel)) if triton else build(kernel.name, emit(kernel))
    bucket = Bucket(Unit(unit, kernel, run), live.of)
    bucket.fill((), {})
    bucket.launch(mixed_step(SEED, STEP))
    names = {o.name: o for o in unit.operands}
    found = []
    for name, value in expected.items():
        operand = names[name]
        if operand.role is Role.PARAM:
            same = torch.equal(live.param.view(torch.int16), value.to(dtype).view(torch.int16))
        else:
            same = torch.equal(live.value(operand), value)
        if not same:
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    cases(DTYPES, ROUNDINGS, few=[("bfloat16", "compensated"), ("float16", "stochastic")]),
)
def test_cpp_kernels(dtype: str, rounding: ParamRounding) -> None:
    assert differing(dtype, rounding, triton=False) == []


@pytest.mark.parametrize(
    ("dtype", "rounding"), cases(DTYPES, ROUNDINGS, few=[("bfloat16", "compensated")])
)
def test_triton_kernels(dtype: str, rounding: ParamRounding) -> None:
    """Triton's interpreter cuts bfloat16 off where compiled code rounds (`test_triton_aot`); what
    is on the grid already is the same either way."""
    cut = dtype == "bfloat16" and rounding == "nearest"
    assert interpreted(differing, dtype, rounding, True) == (["param_0"] if cut else [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_numbers_are_loaded_and_stored(dtype: str) -> None:
    """Parameters that a step leaves alone, over all 2^16 patterns; NaNs become quiet ones."""
    kind = getattr(torch, dtype)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(kind)
    unit, live = unit_of(kind, "nearest"), Live(kind)
    source = emit(lower(unit))
    assert f"stq::{dtype}* param_0" in source
    numel = every.numel()
    operands = tuple(
        replace(o, shape=(numel,)) if o.shape == (NUMEL,) else o for o in unit.operands
    )
    unit = unit.replace(instances=(replace(unit.instances[0], operands=operands),))
    live.param, live.grad = every.clone(), torch.zeros(numel, dtype=kind)
    live.momentum = PackedState.zeros_like(torch.empty(numel), FORMATS["softsign8"])
    bucket = Bucket(Unit(unit, lower(unit), build("all", source)), live.of)
    bucket.fill((), {})
    bucket.launch(mixed_step(SEED, STEP))
    number = ~every.isnan()
    assert torch.equal(live.param.view(torch.int16)[number], every.view(torch.int16)[number])
    assert bool(live.param[~number].isnan().all())
