"""One meaning on every instruction set, and a comparison that sees what is wrong.

Kernels are compiled by g++ directly, with the build's own flags and some more.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
from test_kernel_numerics import MOMENTS, adam_rig

from kernels import Rig, compiled, differing, sgd_math
from stq_compile.codegen.cpp.build import FLAGS, INCLUDE, CompiledKernel, load
from stq_compile.codegen.cpp.emit import emit
from stq_compile.formats import FORMATS
from stq_compile.options import Rounding
from zoo import sgd

LEVELS = {
    "avx2": ("-mno-avx512f",),
    "portable": ("-mno-avx512f", "-mno-avx2", "-mno-fma"),
}
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86 compilers")


def by_hand(source: str, folder: Path, *flags: str) -> CompiledKernel:
    """Compile without the build's cache, choice of instruction set and optimization."""
    text, library = folder / "kernel.cpp", folder / "kernel.so"
    text.write_text(source)
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++20", "-O0", "-march=native", *FLAGS, *flags, "-fPIC", "-shared"]
    subprocess.run([*command, str(text), "-o", str(library)], check=True)
    return load("by_hand", source, library)


@x86
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("first", "second", "rounding"), [MOMENTS[0], MOMENTS[2], MOMENTS[5]])
def test_instruction_sets_agree_bit_for_bit(
    first: str, second: str, rounding: Rounding, level: str, tmp_path: Path
) -> None:
    rig = adam_rig(first, second, rounding)
    start = rig.bits()
    kernels = compiled(rig.kernel), by_hand(emit(rig.kernel), tmp_path, *LEVELS[level])
    results = [rig.after(kernel, start) for kernel in kernels]
    assert not differing(*results)
    assert differing(start, results[0])


# Faults. --------------------------------------------------------------------------------------

MUTANTS = {
    "a packed plane's shift": (r"\(high << 4\)", "(high << 5)"),
    "an unpacked plane's byte": (r"pair\[plane - 4\]", "pair[7 - plane]"),
    "a constant of the random bits": (r"\(key >> 32\)", "(key >> 31)"),
    "the block's counter": (r"static_cast<uint64_t>\(block \+ 1\)", "static_cast<uint64_t>(block)"),
    "the shift of the scale": (r"(momentum_buffer_0_word <<) 16", r"\1 15"),
    "the rounding of the scale": (r"(_absmax\S* \+) 65535", r"\1 32767"),
    "the zero level": (r"(iota\(\) -) 7", r"\1 6"),
    "the number of valid elements": (r"iota\(\) < count", "iota() <= count"),
    "the learning rate": (r"\* 0\.01f", "* 0.0100001f"),
}
"""A pattern that is found once in the source, and what takes its place."""


def whole_source(rig: Rig) -> str:
    """Kernel and run-time library in one text."""
    library = (INCLUDE / "stq_kernel.h").read_text().replace("#pragma once", "")
    return emit(rig.kernel).replace('#include "stq_kernel.h"', library)


@pytest.fixture(scope="module")
def rig() -> Rig:
    formats = {"momentum_buffer": FORMATS["softsign4"]}
    return Rig(sgd(), formats, "stochastic", sizes=(1, 127, 129, 1000))


def differences(rig: Rig, source: str, folder: Path) -> list[str]:
    """What a step of a kernel changes otherwise than the reference; the rig stays as it was."""
    start, expected = rig.bits(), rig.expected(sgd_math, 3)
    rig.run(by_hand(source, folder), 3)
    found = differing(rig.bits(), expected)
    rig.load(start)
    return found


def test_the_unchanged_source_differs_in_nothing(rig: Rig, tmp_path: Path) -> None:
    assert not differences(rig, whole_source(rig), tmp_path)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_sees_a_fault_in(name: str, rig: Rig, tmp_path: Path) -> None:
    mutant, count = re.subn(*MUTANTS[name], whole_source(rig))
    assert count == 1, "the fault must be one change"
    assert differences(rig, mutant, tmp_path)
