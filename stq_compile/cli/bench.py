"""``stq bench``: packed steps beside stock ones, on this machine."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from stq_compile.cli.common import console, print_json, progress, verb

if TYPE_CHECKING:
    from stq_compile.benchmarks.growth import Point
    from stq_compile.benchmarks.measure import FirstStep, Timing

app = typer.Typer()


@app.command()
@verb
def bench(
    as_json: bool,
    model: Annotated[str, typer.Option(help="Parameter shapes: gpt2, gpt2-medium, vit-b, ...")] = (
        "gpt2"
    ),
    optimizer: Annotated[
        str, typer.Option(help="adamw, sgd, rmsprop, adagrad, lion or adafactor.")
    ] = "adamw",
    rounds: Annotated[int, typer.Option(help="Rounds; medians are given.", min=1)] = 9,
    threads: Annotated[int | None, typer.Option(help="Threads; by default torch's choice.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")] = "cpu",
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="Add for-loop, Inductor, torchao and bitsandbytes, where installed."
        ),
    ] = False,
    first: Annotated[
        bool, typer.Option("--first", help="Add first steps of new processes, and peak memory.")
    ] = False,
    growth: Annotated[
        bool, typer.Option("--growth", help="Add cost by parameters, tensors and threads.")
    ] = False,
    most: Annotated[
        int, typer.Option(help="Parameters that --growth goes up to.", min=1_000_000)
    ] = 100_000_000,
    picture: Annotated[
        Path | None, typer.Option(help="Save a picture of the times (needs matplotlib).")
    ] = None,
) -> None:
    """Time packed steps beside stock ones, in turns, in one process.

    Times are medians over rounds, in nanoseconds per parameter; ratios to the first row are medians
    of the rounds' ratios. Bytes are those that a step has to move per parameter, and their rate is
    given as a share of what the memory does in a copy or an update in place.

    Examples: [bold]stq bench[/bold]; [bold]stq bench --model vit-b --optimizer sgd[/bold];
    [bold]stq bench --peers --first --picture bench.png[/bold];
    [bold]stq bench --device cuda --peers[/bold]
    """
    import torch

    from stq_compile.architectures import MODELS
    from stq_compile.benchmarks.contenders import FAMILIES, contenders
    from stq_compile.benchmarks.measure import compare, first_steps, memory_bandwidth
    from stq_compile.errors import InvalidOptionError

    for name, value, valid in (("model", model, MODELS), ("optimizer", optimizer, FAMILIES)):
        if value not in valid:
            reason = f"it is none of {', '.join(valid)}"
            raise InvalidOptionError(name=name, value=value, reason=reason)
    if not FAMILIES[optimizer].available:
        package = FAMILIES[optimizer].module
        reason = f"the package {package} is not installed; `pip install 'stq_compile[bench]'`"
        raise InvalidOptionError(name="optimizer", value=optimizer, reason=reason)
    _check_device(device, first or growth)
    if threads is not None:
        torch.set_num_threads(threads)
    shapes = MODELS[model]()
    with progress("measuring the memory") as bar:

        def told(text: str) -> None:
            bar.update(bar.task_ids[0], description=text)

        bandwidth = memory_bandwidth(device=device)
        timings = compare(
            list(shapes.values()),
            list(contenders(optimizer, peers=peers)),
            rounds=rounds, bandwidth=bandwidth, device=device, told=told,
        )  # fmt: skip
        starts = []
        if first:
            names = [timings[0].name, next(t.name for t in timings if t.name.startswith("stq"))]
            starts = first_steps(shapes, optimizer, names, told)
        curves = _curves(optimizer, list(shapes.values()), most, rounds, told) if growth else {}
    machine = {
        "machine": _machine(device),
        "torch": torch.__version__,
        "memory_bandwidth": bandwidth,
    }
    numel = sum(torch.Size(s).numel() for s in shapes.values())
    title = f"{optimizer} on {model}: {numel / 1e6:.1f} M parameters"
    if picture is not None:
        from stq_compile.benchmarks.picture import draw

        draw(f"{title}, {machine['machine']}", timings, picture)
    if as_json:
        print_json(
            {
                "model": model, "optimizer": optimizer, "rounds": rounds, **machine,
                "timings": [asdict(t) for t in timings],
                "first_steps": [asdict(s) for s in starts],
                "growth": {k: [asdict(p) for p in points] for k, points in curves.items()},
            }
        )  # fmt: skip
        return
    _print(title, machine, timings, starts, curves)


def _curves(
    optimizer: str, shapes: list[tuple[int, ...]], most: int, rounds: int, told: Any
) -> dict[str, list[Point]]:
    """Of the first packed contender."""
    import torch

    from stq_compile.benchmarks.contenders import contenders
    from stq_compile.benchmarks.growth import Point, by_parameters, by_tensors, by_threads

    ours = next(c for c in contenders(optimizer) if c.ours)
    told("growth with parameters")
    found = {"ns per parameter, by parameters": by_parameters(ours, most, rounds)}
    told("growth with tensors")
    found["us per further tensor, by tensors"] = by_tensors(ours, 1000, rounds)
    told("growth with threads")
    by_count = by_threads(shapes, lambda: [ours], sorted({1, torch.get_num_threads()}), rounds)
    points = [Point(count, ns) for count, (ns,) in by_count.items()]
    return {**found, "ns per parameter, by threads": points}


def _check_device(device: str, on_cpu: bool) -> None:
    """Raises `InvalidOptionError` where nothing can be measured on a device."""
    import torch

    from stq_compile.errors import InvalidOptionError

    reason = ""
    if device not in ("cpu", "cuda"):
        reason = "it is neither cpu nor cuda"
    elif device == "cuda" and not torch.cuda.is_available():
        reason = "torch finds no GPU on this machine"
    elif device == "cuda" and on_cpu:
        reason = "--first and --growth measure the CPU"
    if reason:
        raise InvalidOptionError(name="device", value=device, reason=reason)


def _machine(device: str) -> str:
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _print(
    title: str,
    machine: dict[str, Any],
    timings: list[Timing],
    starts: list[FirstStep],
    curves: dict[str, list[Point]],
) -> None:
    memory = f"memory {machine['memory_bandwidth'] / 1e9:.1f} GB/s"
    caption = f"{machine['machine']}; torch {machine['torch']}; {memory}"
    table = Table(title=title, caption=caption)
    table.add_column("step", no_wrap=True)
    for name in ("ns", "quartiles", "ratio", "true bits", "bytes", "of memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for t in timings:
        cells = [f"{t.ns:.3g}", f"{t.low:.3g} to {t.high:.3g}", f"{t.ratio:.2f}", f"{t.bits:.2f}"]
        cells.append("" if t.moved is None else f"{t.moved:.1f}")
        cells.append("" if t.bandwidth is None else f"{t.bandwidth:.0%}")
        table.add_row(t.name, *cells, style="bold" if t.name.startswith("stq") else None)
    console.print(table)
    if starts:
        table = Table(title="First step of a new process")
        for name in ("step", "cold, s", "warm, s", "peak bytes per parameter"):
            table.add_column(name, justify="left" if name == "step" else "right")
        for s in starts:
            table.add_row(s.name, f"{s.cold:.1f}", f"{s.warm:.1f}", f"{s.memory:.2f}")
        console.print(table)
    for name, points in curves.items():
        console.print(f"{name}: " + ", ".join(f"{p.size:,}: {p.value:.2f}" for p in points))
