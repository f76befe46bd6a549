"""The emitted Triton: deterministic, annotated, names of the graph, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_emit import MOMENTUM, PACKED, adamw
from test_kernel_numerics import FAMILIES, momenta
from test_triton_numerics import FEW

from graphs import program, with_sizes
from interpreter import interpreted, run_triton
from kernels import Rig, quantized, sgd_math
from stq_compile.codegen.ir import Builder, Kernel, KernelOperand, OperandKind
from stq_compile.codegen.lower import bytes_per_element, lower
from stq_compile.codegen.target import CPU, parse_target
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.kernel import tile_map, vectors_of
from stq_compile.compiler import lower_kernel
from stq_compile.errors import (
    InvalidKernelError,
    UnsupportedElementError,
    UnsupportedTargetError,
)
from stq_compile.formats import FLOAT32, FORMATS, Format
from stq_compile.packed_state import PackedState
from stq_compile.passes.partition import partition
from stq_compile.passes.quantize import insert_quantize
from stq_compile.step_graph import StepGraph
from zoo import ADAM_FACTS, adam, sgd


def kernel() -> Kernel:
    return lower(quantized(adamw(), PACKED, "stochastic"))


def test_every_line_of_the_graph_is_named_once() -> None:
    source = emit(kernel()).source
    for line in ("adam.py:418", "adam.py:448", "adam.py:471", "adam.py:489", "adam.py:524"):
        assert source.count(line) >= 1
    assert "exp_avg_0 softsign4, exp_avg_sq_0 adaptive_log3; 13.81 bytes per element" in source
    compile(source, "generated", "exec")


def test_the_same_kernel_gives_the_same_bytes() -> None:
    assert emit(kernel()) == emit(kernel())


def test_codes_are_stored_before_they_are_decoded() -> None:
    """What waits for a stored code keeps no register of the quantizer's."""
    formats = {"exp_avg": FORMATS["midrise4"], "exp_avg_sq": FORMATS["adaptive_log4"]}
    source = emit(lower(quantized(adam(ADAM_FACTS), formats, "stochastic"))).source
    stored = source.index("store_codes(exp_avg_sq_0_codes")
    decoded = source.index("exp_avg_sq_0_stored = ")
    assert stored < decoded


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_groups_stand_on_the_same_condition(family: str) -> None:
    """However many there are: LLVM would join them. `test_every_width_bit_for_bit` runs these."""
    source = emit(lower(quantized(momenta(family), FAMILIES[family], "stochastic"))).source
    groups = [line for line in source.splitlines() if line.startswith("    if ")]
    assert len(groups) == len(set(groups)) == len(re.findall("# Phase", source))
    assert all("borders" in line for line in groups)
    assert len(groups) > 6


def test_the_source_does_not_depend_on_the_tensors() -> None:
    few, many = (
        lower(quantized(with_sizes(sgd(), sizes), MOMENTUM, "nearest"))
        for sizes in ((7,), (5, 300, 20))
    )
    assert emit(few) == emit(many)


def test_operands_may_be_named_like_the_generated_code() -> None:
    keys = ["tl", "row", "class", "group", "p", "plane", "match", "count", "inside", "program"]
    operands = [KernelOperand(key, OperandKind.FLOATS, written=True) for key in keys]
    b = Builder("names", operands)
    for key in keys:
        b.store("store", key, b.op("mul", b.read("load", key), 2.0))
    compile(emit(b.kernel).source, "generated", "exec")


def test_tables_are_refused() -> None:
    with_tables = lower_kernel(quantized(sgd(), MOMENTUM, "nearest"), CPU)
    with pytest.raises(InvalidKernelError, match="no Triton form in the TABLE space"):
        emit(with_tables)


# The work of one launch. ----------------------------------------------------------------------


def test_every_block_is_in_one_tile() -> None:
    tiles = tile_map([1, 0, 128 * 64, 128 * 64 + 1], 32).tolist()
    assert tiles == [[0, 0], [2, 0], [2, 32], [3, 0], [3, 32], [3, 64]]
    assert tile_map([]).shape == (0, 2)


def test_indices_are_64_bits_wide() -> None:
    last = tile_map([2**31 + 1], 2**20)[-1]
    assert int(last[1]) * 128 == 2**31
    source = emit(kernel()).source
    assert "pointer(row, 2, tl.float32, first * 128, ALIGNMENT)" in source
    assert "program = tl.program_id(0).to(tl.int64)" in source


def test_wide_accesses_need_alignment() -> None:
    numels = np.array([64, 64, 65])
    addresses = np.array([[16, 4096], [16, 4], [16, 4096]])
    assert vectors_of(numels, addresses).tolist() == [4, 1, 1]


GPT2 = (
    *(50257 * 768, 1024 * 768, 768, 768),
    *(n for _ in range(12) for n in (*[768] * 6, 768 * 2304, 2304, 768 * 768)),
    *(n for _ in range(12) for n in (768 * 3072, 3072, 3072 * 768)),
)
"""The sizes of GPT-2's 148 parameters."""


def gpt2_units(format_of: Callable[[int, str], Format]) -> list[StepGraph]:
    """AdamW's template on GPT-2, divided by the formats of ``(tensor, state)``."""
    unit = with_sizes(adamw(), GPT2)
    packed = insert_quantize(
        program(unit), lambda o, _: format_of(o.source.param, o.source.key), "stochastic"
    )
    return list(partition(packed).units)


def launches(unit: StepGraph) -> int:
    """One for the scalars, one for each width of access that occurs."""
    sizes = [torch.Size(i.param.shape).numel() for i in unit.instances]
    return 1 + len({4 if n % 4 == 0 else 1 for n in sizes})


def test_gpt2_takes_four_launches() -> None:
    """Small tensors stay float32: two units, two launches each."""
    units = gpt2_units(lambda i, key: PACKED.get(key, FLOAT32) if GPT2[i] >= 4096 else FLOAT32)
    assert len(GPT2) == 148
    assert sum(len(u.instances) for u in units) == 148
    assert sum(launches(u) for u in units) == 4


def test_kernels_are_as_many_as_the_width_pairs_in_use() -> None:
    """Widths that differ from tensor to tensor: kernels are counted by pairs, not by tensors."""
    pairs = [(m, v) for m in (3, 4, 5) for v in (2, 3, 4)]

    def format_of(i: int, key: str) -> Format:
        if key == "step":
            return FLOAT32
        m, v = pairs[i % len(pairs)]
        return FORMATS[f"softsign{m}" if key == "exp_avg" else f"adaptive_log{v}"]

    sources = {emit(lower(unit)).source for unit in gpt2_units(format_of)}
    assert len(sources) == len(pairs)


# Element types. -------------------------------------------------------------------------------


def with_dtype(unit: StepGraph, dtype: torch.dtype) -> StepGraph:
    """Parameters and gradients with elements of ``dtype``."""
    instances = []
    for instance in unit.instances:
        operands = (
            replace(o, dtype=dtype) if o.role in ("param", "grad") else o for o in instance.operands
        )
        instances.append(replace(instance, operands=tuple(operands)))
    return unit.replace(instances=tuple(instances))


def check_dtype(name: str) -> int:
    """The largest distance from float32 arithmetic rounded once, in numbers of ``dtype``."""
    dtype = getattr(torch, name)
    rig = Rig(with_dtype(sgd(), dtype), MOMENTUM, "nearest", sizes=FEW)
    wanted = []
    for row in rig.rows:
        row.param, row.grad = row.param.to(dtype), row.grad.to(dtype)
        momentum = row.states["momentum_buffer"]
        assert isinstance(momentum, PackedState)
        states = {"momentum_buffer": momentum.dequantize()}
        wanted.append(sgd_math(row.param.float(), row.grad.float(), states)[0].to(dtype))
    run_triton(rig, 0)
    return max(
        int((row.param.view(torch.int16).int() - w.view(torch.int16).int()).abs().max())
        for row, w in zip(rig.rows, wanted, strict=True)
    )


def test_half_parameters_are_computed_in_float32_and_rounded_once() -> None:
    """The interpreter cuts float32 off to bfloat16; compiled code rounds (`test_triton_aot`)."""
    assert interpreted(check_dtype, "float16") == 0
    assert interpreted(check_dtype, "bfloat16") == 1


def test_half_parameters_move_fewer_bytes_and_doubles_are_refused() -> None:
    unit = quantized(with_dtype(sgd(), torch.bfloat16), MOMENTUM, "nearest")
    gpu = lower_kernel(unit, parse_target("cuda:90"))
    assert bytes_per_element(gpu) == pytest.approx(2 * 3 + 1 + 4 / 128)
    wide = quantized(with_dtype(sgd(), torch.float64), MOMENTUM, "nearest")
    with pytest.raises(UnsupportedElementError, match=r"param_0 .*float64.*cpu.*float32"):
        lower_kernel(wide)


# Targets. -------------------------------------------------------------------------------------


def test_a_target_says_what_it_can_do() -> None:
    gpu = parse_target("cuda:90")
    assert (gpu.tables, gpu.can_hold("bfloat16"), gpu.blocks_per_warp) == (False, True, 8)
    assert (CPU.tables, CPU.can_hold("float64"), CPU.is_gpu) == (True, False, False)
    assert parse_target("hip:gfx942").blocks_per_warp == 16


@pytest.mark.parametrize("name", ["cuda", "cuda:75", "tpu", "hip:gfx1100"])
def test_unknown_targets_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedTargetError, match="the targets are cpu, cuda:80"):
        parse_target(name)
