"""``stq``: look into a compiled step."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from torch.optim import Optimizer

from stq_compile import api
from stq_compile.backend import session_of
from stq_compile.codegen.target import parse_target
from stq_compile.compiled_step import CompiledStep
from stq_compile.errors import InvalidTargetError, StqError
from stq_compile.kernels import kernel_rows
from stq_compile.passes.runner import Stage
from stq_compile.step_graph import StepGraph

app = typer.Typer(
    no_args_is_help=True,
    help="Look into a compiled optimizer step. Example: stq facts AdamW",
    rich_markup_mode=None,
)
console = Console()

TARGET_HELP = (
    "a class of torch.optim (AdamW), or module:callable or file.py:callable that returns an "
    "optimizer; gradients that are missing are made up"
)
MACHINE_HELP = "cpu, cuda:80, cuda:90, cuda:100 or hip:gfx942; no GPU is needed"
Target = Annotated[str, typer.Argument(help=TARGET_HELP)]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Precision = Annotated[int, typer.Option(help="bits of every state")]


@app.command()
def trace(target: Target, precision: Precision = 4, as_json: Json = False) -> None:
    """Print the captured step graph, every input with its role and source."""
    with _errors():
        _show(_compiled(target, precision).stages[0], as_json)


@app.command()
def passes(target: Target, precision: Precision = 4, as_json: Json = False) -> None:
    """List the passes: graphs, nodes and time after each."""
    with _errors():
        stages = _compiled(target, precision).stages
        rows = [
            {
                "name": s.name,
                "graphs": len(s.program.units),
                "nodes": s.program.nodes,
                "milliseconds": round(s.seconds * 1e3, 2),
            }
            for s in stages
        ]
        if as_json:
            print(json.dumps({"passes": rows}))
            return
        table = Table(title=f"passes on {target}")
        for name in rows[0]:
            table.add_column(name, justify="left" if name == "name" else "right")
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)


@app.command()
def show(
    target: Target,
    after: Annotated[str, typer.Option(help="name of a pass; see `stq passes`")],
    precision: Precision = 4,
    as_json: Json = False,
) -> None:
    """Print the step graphs after a pass, as Python."""
    with _errors():
        stages = {s.name: s for s in _compiled(target, precision).stages}
        if after not in stages:
            raise InvalidTargetError(
                target=after, reason=f"no such pass; the passes are {', '.join(stages)}"
            )
        _show(stages[after], as_json)


@app.command()
def facts(target: Target, as_json: Json = False) -> None:
    """List what the graph proves about each state."""
    with _errors():
        rows = [
            _fact_row(unit, key)
            for unit in _compiled(target, 32).program.units
            for key in unit.facts.recurrences
        ]
        if as_json:
            print(json.dumps({"facts": rows}))
            return
        table = Table(title=f"states of {target}")
        for name in rows[0] if rows else ("no states",):
            table.add_column(name, overflow="fold", no_wrap=name in ("state", "recurrence"))
        for row in rows:
            table.add_row(*("" if v is None else str(v) for v in row.values()))
        console.print(table)


def _fact_row(unit: StepGraph, key: str) -> dict[str, Any]:
    recurrence = unit.facts.recurrences[key]
    decay = recurrence.decay
    if decay is not None:
        decay = f"{recurrence.value:g}" if decay.is_number else f"({decay})"
    return {
        "state": key,
        "sign": ">= 0" if key in unit.facts.nonnegative else "any",
        "recurrence": f"s' = {decay} s + ..." if decay is not None else "not affine in s",
        "kind": recurrence.kind,
        "amplification": str(round(recurrence.amplification, 2)),
        "in units of": unit.facts.normalizers.get(key),
        "stays fp32": unit.facts.fragile.get(key),
    }


@app.command()
def kernels(
    target: Target,
    precision: Precision = 4,
    machine: Annotated[str, typer.Option("--target", help=MACHINE_HELP)] = "cpu",
    as_json: Json = False,
) -> None:
    """Print the generated code of every kernel, and what it needs of a GPU."""
    with _errors():
        made_for = parse_target(machine)
        rows = kernel_rows(_compiled(target, precision), made_for)
        if as_json:
            print(json.dumps({"kernels": rows}))
            return
        for row in rows:
            source = str(row.pop("source"))
            language = "python" if made_for.is_gpu else "cpp"
            console.print(Syntax(source, language, word_wrap=False))
            if made_for.is_gpu:
                console.print(_facts_table(row))


def _facts_table(row: dict[str, Any]) -> Table:
    """The static report of one kernel."""
    table = Table(title=str(row["name"]), show_header=False)
    for name, value in row.items():
        table.add_row(name.replace("_", " "), "" if value is None else str(value))
    return table


def _show(stage: Stage, as_json: bool) -> None:
    text = str(stage.program)
    if as_json:
        print(json.dumps({"pass": stage.name, "optimizer": stage.program.optimizer, "graph": text}))
    else:
        console.print(Syntax(text, "python", word_wrap=False))


def _compiled(target: str, precision: int) -> CompiledStep:
    """Run one step of the target with packed states, and return what was compiled for it."""
    optimizer = _optimizer(target)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
    api.compile(optimizer, precision=precision)
    optimizer.step()
    optimizer.step()  # a state that the first step creates is an input of the second
    session = session_of(optimizer)
    assert session is not None
    return max(session.compiled, key=lambda step: step.number)


def _optimizer(target: str) -> Optimizer:
    made = _callable(target)()
    if not isinstance(made, Optimizer):
        raise InvalidTargetError(
            target=target, reason=f"it returns a {type(made).__name__}, not an optimizer"
        )
    return made


def _callable(target: str) -> Callable[[], Any]:
    place, _, name = target.rpartition(":")
    if not place:
        cls = getattr(torch.optim, target.removeprefix("torch.optim."), None)
        if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
            raise InvalidTargetError(target=target, reason="torch.optim has no such optimizer")
        make: Callable[..., Any] = cls
        return lambda: make([torch.nn.Parameter(torch.ones(128, 64))])
    try:
        module = (
            _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
        found: Callable[[], Any] = getattr(module, name)
    except Exception as error:  # whatever the user's module raises is its own business
        raise InvalidTargetError(
            target=target, reason=f"{type(error).__name__}: {error}"
        ) from error
    return found


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _errors() -> Iterator[None]:
    """Our own errors as one line on standard error, and exit code 2."""
    try:
        yield
    except StqError as error:
        typer.echo(f"stq: {error}", err=True)
        raise typer.Exit(2) from error
