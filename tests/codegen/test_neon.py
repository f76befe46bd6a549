"""The C++ of a kernel means the same on aarch64: compiled for NEON, run in an emulator.

Needs ``pip install -e '.[neon]'``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_kernel_numerics import adam_rig

from kernels import compiled, differing
from stq_compile.options import Rounding

pytest.importorskip("unicorn")
pytest.importorskip("ziglang")
pytest.importorskip("elftools")

from aarch64 import cross_compiled

SIZES = (1, 127, 128, 129, 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "rounding"),
    [
        ("midrise4", "adaptive_log3", "stochastic"),
        ("midrise8", "adaptive_log8", "stochastic"),
        ("midrise5", "adaptive_log6", "nearest"),
        ("bfloat16", "adaptive_log2", "stochastic"),
    ],
)
def test_neon_gives_the_bits_of_this_machine(
    first: str, second: str, rounding: Rounding, tmp_path: Path
) -> None:
    rig = adam_rig(first, second, rounding, SIZES)
    start = rig.bits()
    here, there = compiled(rig.kernel), cross_compiled(rig.kernel, tmp_path)
    assert there.row_bytes == here.row_bytes
    assert there.vector_products() > 100
    results = [rig.after(kernel, start) for kernel in (here, there)]
    assert not differing(*results)
    assert differing(start, results[0])
