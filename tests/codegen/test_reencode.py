"""The kernel that changes a state's format, by both emitters, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interpreter import executable, interpreted
from kernels import SEED, compiled
from stq_compile import reference
from stq_compile.codegen.reencode import reencode_kernel
from stq_compile.codegen.tabulate import tabulate
from stq_compile.codegen.triton.emit import emit
from stq_compile.formats import FORMATS
from stq_compile.options import Rounding
from stq_compile.rounding import NEAREST, Noise, mixed_step, step_key, stream_key

CHANGES = [
    ("softsign4", "softsign8"),
    ("softsign8", "softsign3"),
    ("adaptive_log4", "adaptive_log2"),
    ("adaptive_log3", "bfloat16"),
    ("bfloat16", "softsign5"),
    ("float32", "adaptive_log6"),
    ("softsign4", "float32"),
    ("softsign4", "midrise3"),
    ("midrise3", "softsign4"),
]
SIZES = (1, 129, 1000)
STEP, STREAM = 5, 77


def changed(old: str, new: str, rounding: Rounding, target: str) -> list[str]:
    """Which buffers differ from decoding and encoding by the reference, for tensors of SIZES."""
    first, last = FORMATS[old], FORMATS[new]
    normalized = first.normalized or last.normalized
    unit_format = FORMATS["adaptive_log4"] if normalized else None
    kernel = reencode_kernel(first, last, rounding, unit_format)
    runner = compiled(tabulate(kernel)) if target == "cpu" else executable(emit(kernel))
    noise = NEAREST if rounding == "nearest" else Noise(step_key(SEED, STEP, STREAM))
    rows, live, wanted = [], [], []
    for numel in SIZES:
        x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        x = x if first.signed and last.signed else x * x
        unit, buffers = None, dict[str, Tensor]()
        if unit_format is not None:
            codes, scales = reference.encode(x * x + 0.1, unit_format, NEAREST)
            unit = reference.decode(codes, scales, unit_format, numel)
            buffers |= {"normalizer_codes": codes, "normalizer_scales": scales}
        codes, scales = reference.encode(x, first, NEAREST, unit if first.normalized else None)
        value = reference.decode(codes, scales, first, numel, unit if first.normalized else None)
        buffers |= {"old_codes": codes, "old_scales": scales}
        made = reference.empty_buffers(last, numel)
        buffers |= dict(zip(("new_codes", "new_scales"), made, strict=True))
        wanted.append(reference.encode(value, last, noise, unit if last.normalized else None))
        key = np.array([stream_key(STREAM)], dtype=np.uint64).view(np.int64)
        fields = [
            int(key[0]) if o.name == "key" else buffers[o.name].data_ptr() for o in kernel.operands
        ]
        rows.append([*fields, numel, 0])
        live.append(buffers)
    table = np.array(rows, dtype=np.int64)
    runner.bind(table)(mixed_step(SEED, STEP))
    return [
        f"{numel} {name}"
        for numel, buffers, expected in zip(SIZES, live, wanted, strict=True)
        for name, e in zip(("new_codes", "new_scales"), expected, strict=True)
        if not torch.equal(buffers[name], e)
    ]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_the_cpp_kernel_has_the_bits_of_the_reference(
    old: str, new: str, rounding: Rounding
) -> None:
    assert not changed(old, new, rounding, "cpu")


def all_changes() -> dict[tuple[str, str], list[str]]:
    return {pair: changed(*pair, "stochastic", "gpu") for pair in CHANGES}


def test_the_triton_kernel_has_the_bits_of_the_reference() -> None:
    assert not {pair: wrong for pair, wrong in interpreted(all_changes).items() if wrong}


def test_no_more_bytes_move_than_the_two_formats_have() -> None:
    kernel = reencode_kernel(FORMATS["softsign4"], FORMATS["softsign3"], "nearest")
    assert kernel.summary.endswith("0.91 bytes per element")
