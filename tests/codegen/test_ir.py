"""The kernel IR: what the builder makes, and what the verifier sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kernels import kernel_of, quantized
from stq_compile.codegen.ir import (
    Builder,
    Kernel,
    KernelOperand,
    OperandKind,
    Space,
    Type,
    Value,
)
from stq_compile.codegen.verify import verify_kernel
from stq_compile.errors import InvalidKernelError
from stq_compile.formats import FORMATS
from zoo import ADAM_FACTS, adam

OPERANDS = (
    KernelOperand("p", OperandKind.FLOATS, written=True),
    KernelOperand("g", OperandKind.FLOATS),
    KernelOperand("codes", OperandKind.CODES, written=True, width=4),
    KernelOperand("scales", OperandKind.WORDS, written=True),
    KernelOperand("k", OperandKind.SCALAR, written=True),
)


def good() -> Builder:
    """A kernel with all spaces, a reduction, a table and every kind of store."""
    b = Builder("good", OPERANDS)
    k = b.op("add", b.read("load_scalar", "k"), 1.0, name="k_new")
    scale = b.op("from_bits", b.op("shift_left", b.read("load_word", "scales", name="word"), 16))
    code = b.read("unpack", "codes", width=4, name="code")
    iota = b.read("iota")
    table = b.op("mul", b.op("to_float", iota), scale, name="table")
    m = b.op("lookup", table, code, name="m")
    m.space = Space.ELEMENT
    p = b.op("sub", b.read("load", "p"), b.op("mul", m, k), name="p_new")
    top = b.reduce("block_max", b.op("bits_of", p), name="top")
    b.store("store", "p", p)
    b.store("pack", "codes", b.op("int_and", b.op("to_int", p), 15, name="code_new"), width=4)
    b.store("store_word", "scales", top)
    b.store("store_scalar", "k", k)
    return b


def test_a_good_kernel_passes() -> None:
    verify_kernel(good().kernel)


@pytest.mark.parametrize("tables", [True, False])
def test_lowered_kernels_pass(tables: bool) -> None:
    formats = {"exp_avg": FORMATS["midrise2"], "exp_avg_sq": FORMATS["adaptive_log3"]}
    verify_kernel(kernel_of(quantized(adam(ADAM_FACTS), formats, "stochastic"), tables=tables))


def value(kernel: Kernel, name: str) -> Value:
    return next(v for v in kernel.body if v.name == name)


def insert(kernel: Kernel, before: str, *arguments: Any, **changes: Any) -> None:
    """A new operation ``(opcode, args, space, type)`` in front of the one named."""
    opcode, args, space, type_ = arguments
    new = Value("new", opcode, args, space, type_, **changes)
    kernel.body.insert(kernel.body.index(value(kernel, before)), new)


def use_before_definition(k: Kernel) -> None:
    k.body.remove(value(k, "m"))


def foreign_value(k: Kernel) -> None:
    stranger = Value("stranger", "load", (), Space.ELEMENT, Type.FLOAT, "g")
    value(k, "p_new").args = (stranger, 1.0)


def unknown_operand(k: Kernel) -> None:
    value(k, "word").operand = "nothing"


def unknown_opcode(k: Kernel) -> None:
    value(k, "table").opcode = "multiply"


def too_few_arguments(k: Kernel) -> None:
    value(k, "p_new").args = value(k, "p_new").args[:1]


def wrong_type(k: Kernel) -> None:
    value(k, "p_new").args = (value(k, "code"), 1.0)


def fraction_for_an_integer(k: Kernel) -> None:
    value(k, "code_new").args = (value(k, "code_new").args[0], 1.5)


def wrong_space(k: Kernel) -> None:
    value(k, "p_new").space = Space.BLOCK


def reduction_of_a_block_value(k: Kernel) -> None:
    value(k, "top").args = (value(k, "word"),)


def store_of_a_higher_space(k: Kernel) -> None:
    value(k, "store_word_scales").args = (value(k, "code"),)


def second_store(k: Kernel) -> None:
    k.body.append(Value("again", "store", (1.0,), Space.ELEMENT, Type.NONE, "p"))


def store_to_an_input(k: Kernel) -> None:
    value(k, "store_p").operand = "g"


def read_after_store(k: Kernel) -> None:
    late = value(k, "code")
    again = Value("late", "unpack", (), Space.ELEMENT, Type.INT, "codes", late.width)
    k.body.append(again)


def reduction_that_stays_an_element(k: Kernel) -> None:
    value(k, "top").space = Space.ELEMENT
    k.body.remove(value(k, "store_word_scales"))


def read_in_another_space(k: Kernel) -> None:
    value(k, "word").space = Space.TENSOR
    for name in ("shift_left", "from_bits"):
        value(k, name).space = Space.TENSOR


def table_used_without_lookup(k: Kernel) -> None:
    """16 values, one per code, mistaken for 16 elements."""
    value(k, "p_new").args = (value(k, "table"), value(k, "m"))


def lookup_by_a_block_value(k: Kernel) -> None:
    m = value(k, "m")
    m.args = (m.args[0], value(k, "word"))


def lookup_in_elements(k: Kernel) -> None:
    insert(k, "m", "load", (), Space.ELEMENT, Type.FLOAT, operand="g")
    m = value(k, "m")
    m.args = (value(k, "new"), m.args[1])


def unpacking_another_width(k: Kernel) -> None:
    value(k, "code").width = 3


def packing_another_width(k: Kernel) -> None:
    value(k, "pack_codes").width = 8


def load_of_packed_codes(k: Kernel) -> None:
    """Floats read from memory that holds 4-bit codes."""
    value(k, "p_1").operand = "codes"


def two_values_of_one_name(k: Kernel) -> None:
    value(k, "table").name = "m"


DEFECTS: dict[str, tuple[Callable[[Kernel], None], str]] = {
    "use before definition": (use_before_definition, "argument m is not defined"),
    "a value of another kernel": (foreign_value, "argument stranger is not defined"),
    "unknown operand": (unknown_operand, "no operand nothing"),
    "unknown opcode": (unknown_opcode, "unknown opcode"),
    "too few arguments": (too_few_arguments, "1 arguments for 2"),
    "wrong type": (wrong_type, "argument code is int, expected float"),
    "a fraction for an integer": (fraction_for_an_integer, "literal 1.5 is not a whole number"),
    "wrong space": (wrong_space, "space BLOCK for arguments in ELEMENT"),
    "reduction of a block value": (reduction_of_a_block_value, "a reduction takes elements"),
    "store of a higher space": (store_of_a_higher_space, "stores a ELEMENT value"),
    "second store": (second_store, "second store to p"),
    "store to an input": (store_to_an_input, "operand g is not declared as written"),
    "read after store": (read_after_store, "reads codes after it was stored"),
    "reduction that stays an element": (reduction_that_stays_an_element, ""),
    "read in another space": (read_in_another_space, ""),
    "table used without lookup": (table_used_without_lookup, ""),
    "lookup by a block value": (lookup_by_a_block_value, ""),
    "lookup in elements": (lookup_in_elements, ""),
    "unpacking another width": (unpacking_another_width, ""),
    "packing another width": (packing_another_width, ""),
    "load of packed codes": (load_of_packed_codes, ""),
    "two values of one name": (two_values_of_one_name, ""),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_the_verifier_sees(name: str) -> None:
    """The error names kernel and operation; where a message is given here, it says that too."""
    kernel = good().kernel
    damage, message = DEFECTS[name]
    damage(kernel)
    with pytest.raises(InvalidKernelError, match=rf"kernel good, \w+ = \w+: .*{message}"):
        verify_kernel(kernel)


# The builder. ---------------------------------------------------------------------------------


def test_equal_operations_are_made_once() -> None:
    b = Builder("k", OPERANDS)
    g = b.read("load", "g")
    assert b.read("load", "g") is g
    assert b.op("mul", g, 2.0) is b.op("mul", g, 2.0)
    assert b.op("mul", g, 2.0) is not b.op("mul", g, 3.0)
    assert b.op("add", g, 1.0) is not b.op("mul", g, 1.0)
    assert len(b.kernel.body) == 5


def test_literals_of_other_types_or_signs_are_other_operations() -> None:
    b = Builder("k", OPERANDS)
    g = b.read("load", "g")
    assert b.op("add", g, 1.0) is not b.op("add", g, True)
    assert b.op("mul", g, 0.0) is not b.op("mul", g, -0.0)


def test_the_space_of_an_operation_is_the_highest_of_its_arguments() -> None:
    b = Builder("k", OPERANDS)
    scalar, block, element = b.read("argument", "k"), b.read("valid_count"), b.read("load", "g")
    assert b.op("add", scalar, 1.0).space is Space.TENSOR
    assert b.op("add", scalar, block).space is Space.BLOCK
    assert b.op("add", block, element).space is Space.ELEMENT
    assert b.reduce("block_sum", element).space is Space.BLOCK


def test_names_are_unique_and_never_an_operands() -> None:
    b = Builder("k", OPERANDS)
    g = b.read("load", "g")
    names = [b.op("add", g, float(i), name="g").name for i in range(3)]
    names += [b.op("add", g, 9.0, name="g_1").name, g.name]
    assert len(set(names) | {o.name for o in OPERANDS}) == len(names) + len(OPERANDS)


def test_rename_touches_only_the_newest_value() -> None:
    b = Builder("k", OPERANDS)
    g = b.read("load", "g", name="first")
    h = b.op("neg", g, name="second")
    b.rename(g, "other")
    b.rename(h, "grad_negated")
    b.rename(1.0, "constant")
    assert [v.name for v in b.kernel.body] == ["first", "grad_negated"]


def test_operations_carry_the_origin_of_their_time() -> None:
    b = Builder("k", OPERANDS)
    b.origin = "one"
    g = b.read("load", "g")
    b.origin = "two"
    assert [b.read("load", "g").origin, b.op("neg", g).origin] == ["one", "two"]


def test_a_kernel_prints_space_operation_and_origin() -> None:
    b = Builder("k", OPERANDS)
    b.origin = "mul_1  adam.py:3 x * 2"
    code = b.read("unpack", "codes", width=4, name="code")
    b.op("shift_left", code, 2, name="twice")
    first, *lines = str(b.kernel).splitlines()
    assert first == "kernel k(floats p, floats g, codes codes, words scales, scalar k)"
    assert lines == [
        "  element code = unpack(codes, width=4)  # mul_1  adam.py:3 x * 2",
        "  element twice = shift_left(code, 2)  # mul_1  adam.py:3 x * 2",
    ]
