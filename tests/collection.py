"""Runs every optimizer of published collections that works eagerly, compiled, on a small MLP.

    python tests/collection.py                  # all of them, as a table
    python tests/collection.py --only Lamb --json out.json
    python tests/collection.py --library heavyball --library kron_torch
    python tests/collection.py --json out.json --resume   # goes on where a run was ended

For each: equality with eager at width 32, whether states are packed at width 8 and how far the
parameters are from eager's then, and how many graphs were compiled in 100 steps, as torch.compile
itself counts them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import pkgutil
import random
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import stq_compile as stq

Make = Callable[[nn.Module], Optimizer]

EQUAL_STEPS, PATH_STEPS, MANY_STEPS = 5, 20, 100
EQUAL, PATH, BITS, GRAPHS = 1e-4, 0.25, 12.0, 4
SHAKE = 1e-7  # about the last bit of a float32 number


@dataclass
class Result:
    """What was found of one optimizer; ``reason`` says why a requirement is not met."""

    library: str
    name: str
    eager: bool = True
    difference: float = float("nan")
    bits: float = float("nan")
    path: float = float("nan")
    graphs: int = -1
    note: str = ""
    seconds: float = 0.0  # of processor time, the compiler's included
    failures: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return self.difference <= EQUAL

    @property
    def packed(self) -> bool:
        return self.bits <= BITS and self.path <= PATH


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 80), nn.Tanh(), nn.Linear(80, 10)
    )


def closure_of(model: nn.Module, optimizer: Optimizer, step: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 64, generator=generator)
    y = (x[:, :10] + 0.3 * torch.randn(64, 10, generator=generator)).argmax(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward(create_graph=getattr(optimizer, "create_graph", False))
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, steps: int, style: str, start: int = 0) -> None:
    """``style``: how the optimizer wants to be called (``enabled``: with gradients and a closure
    that switches them on itself); schedule-free ones are told that it is training."""
    with contextlib.suppress(AttributeError):  # of a wrapper that hands it on, too
        optimizer.train()  # type: ignore[attr-defined]  # schedule-free ones have it
    for step in range(start, start + steps):
        closure = closure_of(model, optimizer, step)
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        if style == "closure":
            optimizer.step(closure)
        elif style == "enabled":
            closure()
            optimizer.step(torch.enable_grad()(closure))
        elif style == "graph":
            optimizer.zero_grad()
            optimizer.create_graph = True  # type: ignore[attr-defined]  # those that ask for it
            closure()
            optimizer.step()
        else:
            closure()
            optimizer.step()


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def states_of(optimizer: Optimizer) -> int:
    return sum(len(s) for s in optimizer.state.values() if isinstance(s, dict))


# The collections. ---------------------------------------------------------------------------


def ways_of(cls: Any) -> list[Make]:
    """Ways in which optimizers want to be made: the first one that works eagerly is taken."""

    def matrices(model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.ndim == 2]

    def by_kind(model: nn.Module) -> list[dict[str, Any]]:
        vectors = [p for p in model.parameters() if p.ndim < 2]
        return [
            {"params": matrices(model), "use_muon": True},
            {"params": vectors, "use_muon": False},
        ]

    adamw = torch.optim.AdamW
    return [
        lambda m: cls(m.parameters()),
        lambda m: cls(m.parameters(), lr=1e-3),
        lambda m: cls(matrices(m)),
        lambda m: cls(by_kind(m)),
        lambda m: cls(adamw(m.parameters(), lr=1e-3)),
        lambda m: cls(m.parameters(), adamw, lr=1e-3),
        lambda m: cls(m, adamw, lr=1e-3),
        lambda m: cls(m, lr=1e-3),
        lambda m: cls(m, m.parameters(), adamw, lr=1e-3),
        lambda m: cls([{"params": [*m.parameters()], "optimizer": adamw, "lr": 1e-3}]),
        lambda m: cls(m.parameters(), num_iterations=MANY_STEPS),
        lambda m: cls(m.parameters(), num_data=64),
    ]


LIBRARIES = (
    *("torch.optim", "torch_optimizer", "pytorch_optimizer", "timm.optim", "torchium.optimizers"),
    *("heavyball", "adv_optm", "optimi", "nadir", "transformers.optimization", "schedulefree"),
    *("lion_pytorch", "prodigyopt", "prodigyplus", "adam_mini", "kron_torch", "dadaptation"),
    *("madgrad", "came_pytorch", "adan_pytorch", "parameterfree", "dog", "grokadamw", "adamp"),
    *("adabelief_pytorch", "ranger_adabelief", "pytorch_ranger", "ranger21", "adabound", "SM3"),
    *("sophia_opt", "sgd_sai", "muon", "optimuon", "qhoptim.pyt", "fsgdm", "dolphinflow", "casmo"),
    *("agc_optims.optim", "HomOpt", "pytorch_lamb", "core_optimizer", "tadam"),
)
"""Modules whose optimizers are run, where they are installed."""


@cache
def load(library: str) -> dict[str, Any]:
    """What a library holds, by name.

    One that needs more than optimizers do (timm needs torchvision) is read file by file.
    """
    if library == "heavyball":  # tunes what it compiles for minutes, for each optimizer anew
        importlib.import_module("heavyball.utils").compile_mode = None
    try:
        return vars(importlib.import_module(library))
    except (ImportError, RuntimeError):
        found: dict[str, Any] = {}
        for file in _files_of(library):
            with contextlib.suppress(ImportError, RuntimeError):
                found |= vars(importlib.import_module(file))
        return found


def _files_of(library: str) -> Iterator[str]:
    """The modules of a package, importable without what the package itself imports."""
    parts = library.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        package = types.ModuleType(name)
        package.__spec__ = ModuleSpec(name, None, is_package=True)
        above = sys.modules[name.rpartition(".")[0]].__path__ if depth > 1 else sys.path
        package.__path__ = [str(Path(folder) / parts[depth - 1]) for folder in above]
        sys.modules[name] = package
    for module in pkgutil.iter_modules(sys.modules[library].__path__):
        yield f"{library}.{module.name}"


def makers(libraries: Sequence[str] = LIBRARIES) -> Iterator[tuple[str, str, list[Make]]]:
    """(library, name, ways to make it) of every optimizer of the libraries that are installed.

    Optimizers for several processes are left out, and torch's own that others hand on.
    """
    for library in libraries:
        if importlib.util.find_spec(library.partition(".")[0]) is None:
            continue
        for name, cls in sorted(load(library).items()):
            if not inspect.isclass(cls) or not issubclass(cls, Optimizer):
                continue
            if library == "torch.optim" or not cls.__module__.startswith("torch."):
                if library == "adam_mini":
                    yield library, name, [partial(_of_a_transformer, cls)]
                elif not name.startswith("Distributed"):
                    yield library, name, ways_of(cls)


def _of_a_transformer(cls: Any, model: nn.Module) -> Any:
    return cls(model.named_parameters(), dim=64, n_heads=4)


# One optimizer. -----------------------------------------------------------------------------


class TookTooLong(BaseException):
    """Not to be taken for an optimizer's own failure by ``except Exception``."""


def eager_way(ways: list[Make]) -> tuple[Make, str] | None:
    """The first way to make and call the optimizer that runs eagerly and moves the parameters."""
    for make in ways:
        for style in ("plain", "closure", "enabled", "graph"):
            model = make_model()
            before = vector(model)
            try:
                optimizer = make(model)
                train(model, optimizer, 3, style)
                if torch.equal(before, vector(model)):  # a warm-up
                    train(model, optimizer, PATH_STEPS - 3, style, 3)
            except Exception:  # whatever it raises: not the way to call this optimizer
                continue
            after = vector(model)
            if torch.isfinite(after).all() and not torch.equal(before, after):
                return make, style
    return None


def run_one(
    library: str, name: str, ways: list[Make], many: bool = True, trace: bool = False
) -> Result:
    result = Result(library, name)
    start = processor_time()
    found = eager_way(ways)
    if found is None:
        result.eager = False
        return result
    make, style = found
    initial = vector(make_model())
    references = {}
    eager = make_model()
    optimizer = make(eager)
    for steps in (EQUAL_STEPS, PATH_STEPS):
        train(
            eager,
            optimizer,
            steps - (EQUAL_STEPS if references else 0),
            style,
            EQUAL_STEPS if references else 0,
        )
        references[steps] = vector(eager)
    stateless = not any(
        isinstance(v, Tensor) and v.numel() >= 4096 for v in tensors(optimizer.state)
    )

    with attempt(result, "width 32", trace):
        model = make_model()
        compiled = stq.compile(make(model), precision=32)
        train(model, compiled, EQUAL_STEPS, style)
        reference = references[EQUAL_STEPS]
        result.difference = float((vector(model) - reference).norm() / reference.norm())
        if not result.equal:
            itself = shaken(make, style, EQUAL_STEPS, reference)
            result.failures.append(
                f"width 32: differs by {result.difference:.1e}; eager, begun {SHAKE:g} away, "
                f"by {float(itself / reference.norm()):.1e}"
            )
    torch._dynamo.reset()
    with attempt(result, "width 8", trace):
        model = make_model()
        counters.clear()
        compiled = stq.compile(make(model), precision=8)
        train(model, compiled, PATH_STEPS, style)
        reference = references[PATH_STEPS]
        result.path = float((vector(model) - reference).norm() / (reference - initial).norm())
        report = stq.report(compiled)
        result.bits = 0.0 if stateless else report.bits_per_element
        result.note = report.note
        if not result.packed:
            itself = shaken(make, style, PATH_STEPS, reference) / (reference - initial).norm()
            result.failures.append(
                f"width 8: {result.bits:.1f} bits, path {result.path:.2f}; eager's own, begun "
                f"{SHAKE:g} away: {float(itself):.2f}"
            )
        if many:
            train(model, compiled, MANY_STEPS - PATH_STEPS, style, PATH_STEPS)
        result.graphs = counters["stats"]["unique_graphs"]
        if result.graphs > GRAPHS:
            result.failures.append(f"{result.graphs} graphs in {MANY_STEPS} steps")
    torch._dynamo.reset()
    result.seconds = processor_time() - start
    return result


def shaken(make: Make, style: str, steps: int, reference: Tensor) -> Tensor:
    """How far from ``reference`` the eager optimizer ends that begins a last bit away."""
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + SHAKE * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    train(model, make(model), steps, style)
    return (vector(model) - reference).norm()


def processor_time() -> float:
    """Seconds of this process and of those that it started; other jobs on the machine add none."""
    return sum(os.times()[:4])


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner)


@contextlib.contextmanager
def attempt(result: Result, what: str, trace: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if trace:
            traceback.print_exc()
        text = f"{type(error).__name__}: {error}".strip().split("\n")
        result.failures.append(f"{what}: {' '.join(text)[:300]}")


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises `TookTooLong` after so many seconds of this process's own processor time.

    Again and again: what is raised in a finalizer is lost.
    """

    def expired(*_: object) -> None:
        raise TookTooLong

    signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(
    only: Annotated[str, typer.Option(help="part of a name, or library.name")] = "",
    out: Annotated[Path | None, typer.Option("--json", help="where to write the rows")] = None,
    resume: Annotated[bool, typer.Option(help="keep the rows of an earlier run")] = False,
    many: Annotated[bool, typer.Option(help="run 100 steps to count graphs")] = True,
    library: Annotated[list[str] | None, typer.Option(help="module; all by default")] = None,
    trace: bool = False,
    limit: Annotated[int, typer.Option(help="seconds of processor time for one optimizer")] = 120,
) -> None:
    """Run the collections and print what was found."""
    console = Console(width=180)
    rows: list[Result] = []
    if resume and out is not None and out.exists():
        rows = [Result(**row) for row in json.loads(out.read_text())]
    known = {(row.library, row.name) for row in rows}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def save(more: Sequence[Result] = ()) -> None:
        if out is not None:
            out.write_text(json.dumps([asdict(r) for r in (*rows, *more)], indent=1))

    for module, name, ways in makers(library or LIBRARIES):
        if only not in f"{module}.{name}" or (module, name) in known:
            continue
        save([Result(module, name, failures=["the process ended"])])
        try:
            with (
                warnings.catch_warnings(),
                contextlib.redirect_stdout(io.StringIO() if not trace else console.file),
                limited(limit),
            ):
                warnings.simplefilter("ignore")
                row = run_one(module, name, ways, many, trace)
        except TookTooLong:
            row = Result(module, name, failures=[f"more than {limit} s"])
        except (KeyboardInterrupt, SystemExit):
            save()
            raise
        rows.append(row)
        save()
        mark = "-" if not row.eager else "ok" if not row.failures else "FAIL"
        numbers = f"{row.difference:.1e} {row.bits:5.2f} {row.path:.3f} {row.graphs:2}"
        line = f"{mark:5}{module}.{name}  {numbers}  {row.seconds:.0f}s  {row.note[:90]}"
        console.print(" ".join([line, *row.failures]).replace("\n", " "), highlight=False)
    console.print(summary(rows))


def summary(rows: list[Result]) -> Table:
    table = Table("library", "work eagerly", "equal at 32", "packed at 8", "few graphs")
    for library in [*dict.fromkeys(r.library for r in rows), "all"]:
        mine = [r for r in rows if r.eager and library in (r.library, "all")]
        few = [r for r in mine if 0 <= r.graphs <= GRAPHS]
        table.add_row(
            library,
            *map(
                str, (len(mine), sum(r.equal for r in mine), sum(r.packed for r in mine), len(few))
            ),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
