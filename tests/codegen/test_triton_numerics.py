"""Triton kernels under the interpreter against the reference and the C++ kernels, bit for bit.

The promise is codes equal in 99.5% of the elements and never off by more than a level. A quotient
or root of the graph is within 2 ulps on a GPU and exact in the interpreter; all else is one IEEE
operation on both, so here every bit is equal.
"""

from __future__ import annotations

import pytest
import torch
from test_kernel_numerics import (
    FAMILIES,
    MOMENTS,
    ROUNDINGS,
    adam_rig,
    assert_codes_agree,
    assert_padding_is_zero,
    momenta,
    momenta_math,
)

from interpreter import interpreted, run_triton, submit
from kernels import SEED, SIZES, Rig, adam_math, compiled, differing, sgd_math
from stq_compile.codegen.ir import OperandKind
from stq_compile.codegen.lower import lower
from stq_compile.codegen.triton.emit import emit
from stq_compile.codegen.triton.kernel import TritonKernel
from stq_compile.compiler import Unit
from stq_compile.formats import FLOAT32, FORMATS
from stq_compile.options import Rounding
from stq_compile.rounding import mixed_step, signed64
from stq_compile.runtime import Bucket
from stq_compile.step_graph import StepGraph
from zoo import adagrad, adamax, amsgrad, lion, rmsprop, sgd

FEW = (129, 1000, 4096 + 17)
"""Tails of one and of many elements, a size that is no multiple of 4, over two tiles of a GPU."""
WIDTHS = (2, 3, 4, 5, 6, 8, 16)
STEPS = 2


def check_family(family: str, rounding: Rounding, sizes: tuple[int, ...]) -> list[str]:
    rig = Rig(momenta(family), FAMILIES[family], rounding, sizes=sizes)
    wrong = []
    for step in range(STEPS):
        expected = rig.expected(momenta_math, step)
        run_triton(rig, step)
        wrong += differing(rig.bits(), expected)
        assert_padding_is_zero(rig.bits(), rig.formats)
    return wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_bit_for_bit(family: str) -> None:
    """All widths of a family in one kernel, several odd sizes in one launch."""
    assert not interpreted(check_family, family, "stochastic", FEW)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_width_on_all_sizes(family: str, rounding: Rounding) -> None:
    assert not interpreted(check_family, family, rounding, SIZES)


def check_moments(
    first: str, second: str, rounding: Rounding, sizes: tuple[int, ...] = FEW
) -> list[str]:
    """The promise of the reference, and what differs from the C++ kernel."""
    rig = adam_rig(first, second, rounding, sizes)
    start = rig.bits()
    for step in range(STEPS):
        expected = rig.expected(adam_math, step)
        run_triton(rig, step)
        assert_codes_agree(rig.bits(), expected, rig.formats)
        assert_padding_is_zero(rig.bits(), rig.formats)
    mine = rig.bits()
    rig.load(start)
    kernel = compiled(rig.kernel)
    for step in range(STEPS):
        rig.run(kernel, step)
    return differing(mine, rig.bits())


@pytest.mark.parametrize("moments", [MOMENTS[0], MOMENTS[2], MOMENTS[4]])
def test_two_moments(moments: tuple[str, str, Rounding]) -> None:
    assert not interpreted(check_moments, *moments)


@pytest.mark.slow
def test_every_pair_of_widths() -> None:
    """49 kernels: AdamW's two moments at every pair of widths."""
    pairs = [(_signed(m), _nonnegative(v)) for m in WIDTHS for v in WIDTHS]
    results = {pair: submit(check_moments, *pair, "stochastic", (129, 1000)) for pair in pairs}
    assert not {pair: r.result() for pair, r in results.items() if r.result()}


def _signed(width: int) -> str:
    return {2: "midrise2", 3: "midrise3", 16: "bfloat16"}.get(width, f"softsign{width}")


def _nonnegative(width: int) -> str:
    return "bfloat16" if width == 16 else f"adaptive_log{width}"


OPTIMIZERS = {
    "sgd": (sgd, {"momentum_buffer": "softsign4"}),
    "12 bits": (sgd, {"momentum_buffer": "softsign12"}),
    "lion": (lion, {"exp_avg": "softsign5"}),
    "adagrad": (adagrad, {"sum": "adaptive_log4"}),
    "adamax": (adamax, {"exp_avg": "softsign4", "exp_inf": "adaptive_log3"}),
    "amsgrad": (
        amsgrad,
        {"exp_avg": "softsign4", "exp_avg_sq": "adaptive_log4", "max_exp_avg_sq": "adaptive_log8"},
    ),
    "rmsprop": (
        lambda: rmsprop(centered=False),
        {"square_avg": "adaptive_log3", "momentum_buffer": "softsign6"},
    ),
    "rmsprop centered": (
        lambda: rmsprop(centered=True),
        {"grad_avg": "softsign8", "momentum_buffer": "bfloat16"},
    ),
}
"""The unit, and the formats of its states; states that are not named stay float32."""


def check_optimizer(name: str, rounding: Rounding) -> list[str]:
    """What differs between the Triton and the C++ kernel after two steps."""
    make, formats = OPTIMIZERS[name]
    unit: StepGraph = make()
    keys = [o.source.key for o in unit.operands if o.role == "state" and o.shape != ()]
    chosen = {k: FORMATS[formats[k]] if k in formats else FLOAT32 for k in keys}
    results = []
    for triton in (True, False):
        rig = Rig(unit, chosen, rounding, sizes=FEW[:2])
        for row in rig.rows:
            row.states["step"] = torch.tensor(3.0)
        kernel = None if triton else compiled(rig.kernel)
        for step in range(STEPS):
            if kernel is None:
                run_triton(rig, step)
            else:
                rig.run(kernel, step)
        results.append(rig.bits())
    return differing(*results)


def test_every_optimizer_has_the_bits_of_the_cpp_kernel() -> None:
    results = {name: submit(check_optimizer, name, "stochastic") for name in OPTIMIZERS}
    assert not {name: r.result() for name, r in results.items() if r.result()}


# Beyond 2^31 elements. ------------------------------------------------------------------------

FAR = 1 << 24
"""Blocks before the tile: 2^31 elements."""


def check_far_tile() -> list[str]:
    """One tensor as the end of one of 2^31 elements more, which nothing touches."""
    rig = Rig(sgd(), {"momentum_buffer": FORMATS["softsign4"]}, "stochastic", sizes=(1000,))
    expected = rig.expected(sgd_math, 3)
    emitted = emit(lower(rig.graph))
    bucket = Bucket(Unit(rig.graph, rig.kernel, compiled(rig.kernel)), rig._resolve)
    bucket.fill((), {})
    table = torch.from_numpy(bucket.table)
    count = len(rig.kernel.operands)
    sizes = {OperandKind.FLOATS: 4 * 128, OperandKind.CODES: 16 * 4, OperandKind.WORDS: 2}
    for i, operand in enumerate(rig.kernel.operands):
        table[0, i] -= FAR * sizes.get(operand.kind, 0)
    table[0, count] += FAR * 128
    table[0, count + 1] -= FAR
    kernel = TritonKernel.of(emitted)
    slots = kernel.new_slots(1, table.device)
    kernel.scalars(table, slots, torch.tensor([signed64(mixed_step(SEED, 3))]))
    kernel.update(table, slots, torch.tensor([[0, FAR]]), vector=1, blocks=8)
    return differing(rig.bits(), expected)


def test_addresses_are_right_beyond_two_to_the_31_elements() -> None:
    assert not interpreted(check_far_tile)
