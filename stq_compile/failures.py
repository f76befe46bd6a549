"""A failure inside the compiler becomes a script that shows it again, named in the error.

The script holds the captured graph, the geometry of its inputs, the values of its scalars (learning
rates, step counters), the options and the widths: no element of a parameter, gradient or state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from torch import fx
from torch._inductor.exc import CppCompileError

from stq_compile.dump import dump_root
from stq_compile.errors import (
    InternalError,
    InvalidGraphError,
    InvalidKernelError,
    StqError,
    first_line,
    is_out_of_memory,
)
from stq_compile.options import Options
from stq_compile.step_graph import Operand, Program, StepGraph, print_graph

LOG = logging.getLogger(__name__)


class Situation(Protocol):
    """What a program is compiled under."""

    @property
    def options(self) -> Options: ...
    @property
    def plan(self) -> Mapping[tuple[int, str], int]: ...


@contextmanager
def reporting_defects(situation: Situation, program: Program) -> Iterator[None]:
    """Turn a defect of the compiler into an `InternalError` that names a script showing it.

    Args:
        situation: options, and the widths in force.
        program: the captured step, before any pass.
    """
    try:
        yield
    except Exception as error:
        if not is_defect(error):
            raise
        reason = first_line(error)
        LOG.error("%s: the compiler failed: %s", program.optimizer, reason)
        raise InternalError(
            optimizer=program.optimizer, reason=reason, repro=_written(situation, program, reason)
        ) from error


def is_defect(error: Exception) -> bool:
    """Whether an exception is the compiler's fault, not the user's or the machine's."""
    if isinstance(error, (InvalidGraphError, InvalidKernelError)):
        return True
    if isinstance(error, StqError):
        return isinstance(error.__cause__, CppCompileError)
    return not (isinstance(error, OSError) or is_out_of_memory(error))


def _written(situation: Situation, program: Program, reason: str) -> str:
    """Write the script; says where it is, or why there is none."""
    try:
        text = repro_script(program, situation.options, situation.plan, reason)
        folder = dump_root() or _private_folder()
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        file = folder / f"repro_{program.optimizer}_{digest}.py"
        file.write_text(text)
    except Exception as error:  # the failure itself matters more
        return f" (no script that shows it could be written: {error})"
    return f" with {file}, which shows it without your data: stq repro {file}"


@lru_cache(maxsize=1)
def _private_folder() -> Path:
    """Of this process and this user alone (mode 0700): what lies there is going to be run."""
    return Path(tempfile.mkdtemp(prefix="stq_repro_"))


def repro_script(
    program: Program, options: Options, plan: Mapping[tuple[int, str], int], reason: str
) -> str:
    """A Python script that compiles a captured program again; see `stq_compile.repro`."""
    (unit,) = program.units
    changed = {
        f.name: getattr(options, f.name)
        for f in dataclasses.fields(options)
        if getattr(options, f.name) != f.default
    }
    operands = "\n".join(f"    {_operand(o, n)}," for o, n in _rows(unit))
    return f'''"""stq_compile failed on this step. Run `stq repro FILE`, or this file.

{_harmless(reason)}
"""

import torch

from stq_compile.repro import operand, reproduce

OPTIMIZER = {program.optimizer!r}
OPTIONS = {changed!r}
WIDTHS = {dict(plan)!r}
RETURNS = {unit.instances[0].returns!r}

OPERANDS = [  # name, role, number and name of the parameter, key, shape, strides, dtype
{operands}
]


{print_graph(unit)}


if __name__ == "__main__":
    reproduce(__file__, OPTIMIZER, OPERANDS, RETURNS, OPTIONS, WIDTHS)
'''


def _rows(unit: StepGraph) -> Iterator[tuple[Operand, fx.Node]]:
    return zip(unit.operands, unit.placeholders, strict=True)


def _operand(o: Operand, node: fx.Node) -> str:
    values: list[object] = [o.name, str(o.role), o.source.param, o.source.name, o.source.key]
    text = ", ".join(map(repr, [*values, o.shape, o.stride, o.dtype]))
    example = node.meta["example"]
    if example.ndim == 0 and example.device.type != "meta":
        text += f", example={example.item()!r}"
    for name, default in (("value", None), ("returned", -1), ("number", False)):
        if getattr(o, name) != default:
            text += f", {name}={getattr(o, name)!r}"
    return f"operand({text})"


def _harmless(text: str) -> str:
    """Text that may stand in a docstring."""
    return text.replace("\\", "\\\\").replace('"""', "'''")
