"""Faults in the Triton emitter and its library: the comparison with the reference sees each.

A fault is a change of the text of the library, as if it had been written so, or of the emitter's
expressions. The kernel is SGD's, with 4-bit momentum.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from interpreter import executable, submit
from kernels import Rig, differing, sgd_math
from stq_compile.codegen.lower import lower
from stq_compile.codegen.triton import library
from stq_compile.codegen.triton.emit import emit
from stq_compile.formats import FORMATS
from zoo import sgd

LIBRARY = "stq_compile.codegen.triton.library"

FAULTS = {
    "the packing order": ("byte |= code << (BITS * k)", "byte |= code << (BITS * k - 1)"),
    "an unpacked plane's byte": ("BITS * (p // BITS)", "BITS * (p % 2)"),
    "the random counter": ("(block + 1).to(tl.uint64)", "block.to(tl.uint64)"),
    "the turn of a step": (" + key.to(tl.uint32) * 0x9E3779B9", ""),
    "the random lane": ("(lane + 16 * p).to(tl.uint32)", "(lane + 15 * p).to(tl.uint32)"),
    "a constant of the random bits": ("(mixed >> 32)", "(mixed >> 31)"),
    "the elements that exist": ("numel - first * 128, BLOCKS", "numel - 1 - first * 128, BLOCKS"),
    "the quotient's last step": ("return tl.fma(tl.fma(-b, q, a), y, q)", "return q * 1.0000002"),
    "the shift of the scale": ("momentum_buffer_0_word << 16", "momentum_buffer_0_word << 15"),
    "the rounding of the scale": ("_absmax + 65535", "_absmax + 32767"),
    "the zero level": ("momentum_buffer_0_code - 7", "momentum_buffer_0_code - 6"),
    "the blocks that exist": (
        "present = local * 128 < count",
        "present = local * 128 < count - 64",
    ),
    "the tensor of a tile": ("index = tl.load(tiles + 2 * program)", "index = program * 0"),
    "the learning rate": ("* 0.01 ", "* 0.0100001 "),
}
"""What stands once in the library or in the generated module, and what takes its place."""


def differences(name: str) -> list[str]:
    """What one step changes otherwise than the reference."""
    formats = {"momentum_buffer": FORMATS["softsign4"]}
    rig = Rig(sgd(), formats, "stochastic", sizes=(129, 1000, 1028))
    expected = rig.expected(sgd_math, 3)
    right = emit(lower(rig.graph))
    before = Path(library.__file__).read_text()
    old, new = FAULTS.get(name, ("", ""))
    places = (before + right.source).count(old) if old else 1
    assert places == 1, f"{old!r} stands {places} times"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "faulty_library.py"
        file.write_text(before.replace(old, new) if old else before)
        spec = importlib.util.spec_from_file_location("faulty_library", file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["faulty_library"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["faulty_library"])
        source = right.source.replace(old, new) if old else right.source
        source = source.replace(LIBRARY, "faulty_library")
        # The name makes the text, and so the module, one of its own.
        rig.run(executable(replace(right, source=f"# {name}\n{source}")), 3)
        del sys.modules["faulty_library"]
    return differing(rig.bits(), expected)


@pytest.fixture(scope="module")
def results() -> dict[str, list[str]]:
    """All faults at once, since processes share them."""
    started = {name: submit(differences, name) for name in ("", *FAULTS)}
    return {name: future.result() for name, future in started.items()}


def test_without_a_fault_nothing_differs(results: dict[str, list[str]]) -> None:
    assert not results[""]


@pytest.mark.parametrize("name", FAULTS)
def test_the_comparison_sees_a_fault_in(name: str, results: dict[str, list[str]]) -> None:
    assert results[name]
