"""Runs a script that `stq_compile.failures` wrote: compiles its step again, kernels included."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer

from stq_compile.compiler import analyse, generate, generate_measuring, measuring_program
from stq_compile.errors import InvalidTargetError
from stq_compile.graph_text import parse_graph
from stq_compile.options import Options
from stq_compile.passes.measure import with_packed_normalizers
from stq_compile.session import Session
from stq_compile.step_graph import Instance, Operand, Program, Role, Source, StepGraph


def operand(
    name: str, role: str, param: int, param_name: str, key: str, shape: tuple[int, ...],
    stride: tuple[int, ...], dtype: torch.dtype, *, example: float | None = None,
    value: float | None = None, returned: int = -1, number: bool = False,
) -> tuple[Operand, float | None]:  # fmt: skip
    """One line of a script's ``OPERANDS``: an input of the graph, and the value of a scalar."""
    source = Source(param, param_name, key)
    made = Operand(
        name, Role(role), source, shape, stride, dtype, value=value, returned=returned,
        number=number,
    )  # fmt: skip
    return made, example


def reproduce(
    file: str,
    optimizer: str,
    operands: Sequence[tuple[Operand, float | None]],
    returns: tuple[int, ...],
    options: Mapping[str, Any],
    widths: Mapping[tuple[int, str], int],
) -> None:
    """Compile the step of a script again; raises what the compiler raises."""
    program = read_program(Path(file).read_text(), optimizer, operands, returns)
    checked = Options.from_dict(options)
    stand_in = _optimizer(optimizer, [o for o, _ in operands])
    session = Session(stand_in, checked)
    analysed = analyse(program, checked, session.dump.folder("analyse"))[-1].program
    session.plan_first(analysed)
    session.plan.update(widths)
    folder = session.dump.folder
    generate(analysed, session.format_of, checked, folder("generate"))
    if session.planner is not None:
        seen = with_packed_normalizers(analysed, checked.pins_wide)
        measured = measuring_program(seen, checked.rounding, folder("measure"))
        generate_measuring(measured, session.format_of, folder("generate_measuring"))


def read_program(
    text: str,
    optimizer: str,
    operands: Sequence[tuple[Operand, float | None]],
    returns: tuple[int, ...],
) -> Program:
    """The captured program of a script, equal to the one that was written."""
    graph = parse_graph(text, "step")
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, (made, example) in zip(placeholders, operands, strict=True):
        if example is None:
            node.meta["example"] = torch.empty_strided(
                made.shape, made.stride, dtype=made.dtype, device="meta"
            )
        else:
            node.meta["example"] = torch.tensor(example, dtype=made.dtype)
    instance = Instance(tuple(o for o, _ in operands), returns)
    return Program(optimizer, (StepGraph("step", graph, (instance,)),))


def run_script(file: Path) -> None:
    """Run a script as ``python FILE`` would; raises what the compiler raises.

    Raises:
        InvalidTargetError: the file cannot be read, or is no script of ours.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTargetError(target=file, reason=f"not readable: {error}") from error
    if "from stq_compile.repro import" not in text:
        raise InvalidTargetError(target=file, reason="it is no script that stq_compile wrote")
    argv = sys.argv
    sys.argv = [str(file)]
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv = argv


def _optimizer(name: str, operands: Sequence[Operand]) -> Optimizer:
    """An optimizer of that name with parameters and states of these shapes, without memory."""
    cls: type[Optimizer] = type(name, (Optimizer,), {})
    found = {o.source.param: o for o in operands if o.role is Role.PARAM}
    with FakeTensorMode():
        params = [
            torch.nn.Parameter(torch.empty(found[i].shape if i in found else (1,)))
            for i in range(max(found, default=0) + 1)
        ]
        named = [
            (found[i].source.name if i in found else f"absent{i}", p) for i, p in enumerate(params)
        ]
        made = cls(named, {})
        for o in operands:
            if o.role is Role.STATE and o.returned < 0:
                made.state[params[o.source.param]][o.source.key] = torch.empty(o.shape)
    return made
