"""Tables that are computed once: found by data flow, and the same bits (`test_kernel_numerics`)."""

from __future__ import annotations

import pytest

from kernels import Rig
from stq_compile.codegen.cpp.emit import emit
from stq_compile.codegen.hoist import MASK, hoist
from stq_compile.codegen.ir import Builder, Kernel, KernelOperand, OperandKind, Space
from stq_compile.formats import FORMATS
from zoo import ADAM_FACTS, adam, sgd


def kernel(first: str, second: str) -> Kernel:
    formats = {"exp_avg": FORMATS[first], "exp_avg_sq": FORMATS[second]}
    normalizers = {"exp_avg": "exp_avg_sq"}
    return Rig(adam(ADAM_FACTS), formats, "stochastic", normalizers=normalizers).kernel


@pytest.mark.parametrize(("second", "tables"), [("adaptive_log3", 1), ("adaptive_log8", 2)])
def test_the_range_of_a_block_decides_about_its_tables(second: str, tables: int) -> None:
    """Of the state as it was and as it is stored; more than 4 bits have a table of each half."""
    found = hoist(kernel("midrise4", second))
    assert len(found) == 2
    for group in found:
        assert group.key.space is Space.BLOCK
        assert (group.key.opcode, group.key.args[1]) == ("int_and", MASK)
        assert len(group.tables) >= tables
        known = {id(group.key)}
        for v in group.body:  # in order, and from nothing else
            inputs = [a for a in v.args if not isinstance(a, float | int)]
            assert all(id(a) in known or a.opcode == "iota" for a in inputs), v.name
            known.add(id(v))
        assert {id(t) for t in group.tables} <= known


def test_nothing_is_hoisted_where_there_is_no_range() -> None:
    plain = Rig(sgd(), {"momentum_buffer": FORMATS["softsign4"]}, "stochastic").kernel
    assert not hoist(plain)
    assert "struct Tables" not in emit(plain)


def test_what_depends_on_more_than_the_key_stays() -> None:
    """A table times the block's scale is made block by block, from the one that is looked up."""
    b = Builder("k", [KernelOperand("x_scales", OperandKind.WORDS)])
    word = b.read("load_word", "x_scales")
    key = b.op("int_and", word, MASK)
    codes = b.op("to_float", b.read("iota"))
    table = b.op("mul", codes, b.op("to_float", key))
    scaled = b.op("mul", table, b.op("to_float", word))
    b.store("store_word", "x_scales", b.op("int_add", key, 1))
    (group,) = hoist(b.kernel)
    assert group.tables == [table]
    assert scaled not in group.body


def test_the_source_makes_them_once() -> None:
    source = emit(kernel("midrise4", "adaptive_log3"))
    head, _, tile = source.partition("STQ_INLINE void tile")
    assert "static const Tables tables;" in head
    assert tile.count(" = tables.") == 2
    assert "stq::floor(exp_avg_sq_0_add" in head
    assert "stq::floor(exp_avg_sq_0_add" not in tile
