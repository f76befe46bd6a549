"""What kernels are made for: a `Target` answers "can you ...?", and no pass asks which it is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from stq_compile.codegen.ir import Kernel, OperandKind
from stq_compile.errors import (
    UnsupportedElementError,
    UnsupportedTargetError,
)

KNOWN = ("cpu", "cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
"""Targets that the tests compile for."""


@dataclass(frozen=True)
class Target:
    """A code generator and the machine that it generates for.

    Attributes:
        tables: whether decoding by a table in registers is cheaper than by arithmetic.
        dtypes: the element types of parameters and gradients that kernels load and store.
        lanes: threads of a warp; 0 where there are no warps.
    """

    name: str
    tables: bool
    dtypes: frozenset[str] = field(default_factory=frozenset)
    lanes: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.lanes > 0

    @property
    def blocks_per_warp(self) -> int:
        """Blocks of 16 lanes a plane that give every thread 4 neighbouring lanes."""
        return self.lanes // 4

    def can_hold(self, dtype: str) -> bool:
        """Whether parameters and gradients may have elements of ``dtype``."""
        return dtype in self.dtypes

    def check(self, kernel: Kernel) -> None:
        """Raises `UnsupportedElementError` if an operand's elements cannot be reached."""
        for o in kernel.operands:
            if o.kind is OperandKind.FLOATS and not self.can_hold(o.dtype):
                raise UnsupportedElementError(
                    kernel=kernel.name,
                    operand=o.name,
                    dtype=o.dtype,
                    target=self.name,
                    valid=", ".join(sorted(self.dtypes)),
                )


_FLOATS = frozenset(("float32", "bfloat16", "float16"))
CPU = Target("cpu", tables=True, dtypes=_FLOATS)


def parse_target(text: str) -> Target:
    """A target from its name: ``cpu``, ``cuda:90`` (compute capability), ``hip:gfx942``."""
    if text == "cpu":
        return CPU
    cuda = re.fullmatch(r"cuda:(\d{2,3})", text)
    if cuda and int(cuda[1]) >= 80:
        return Target(text, tables=False, dtypes=_FLOATS, lanes=32)
    if cuda:
        raise UnsupportedTargetError(
            target=text, reason="compute capability below 8.0", valid=", ".join(KNOWN)
        )
    if re.fullmatch(r"hip:gfx9\w+", text):
        return Target(text, tables=False, dtypes=_FLOATS, lanes=64)
    raise UnsupportedTargetError(
        target=text, reason="not cpu, cuda:<capability> or hip:gfx9..", valid=", ".join(KNOWN)
    )
