"""Runs passes and owns what is around them: timing, verification, keeping, dumping, bisection."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stq_compile.step_graph import Program, verify

LOG = logging.getLogger(__name__)

PassFunction = Callable[[Program], Program]

TRACING = threading.RLock()
"""Held while a pass runs. Tracing is a state of the whole process in torch: two threads that trace
would confuse it, and while one does, Dynamo refuses to run what it has compiled in any other."""


@dataclass(frozen=True)
class Pass:
    """A named pass."""

    name: str
    run: PassFunction


@dataclass(frozen=True)
class Stage:
    """The program after a pass, and how long the pass took in seconds."""

    name: str
    program: Program
    seconds: float


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    stop_after: str | None = None,
    dump: Path | None = None,
    first: int = 0,
) -> list[Stage]:
    """Run ``passes`` in order and return every stage, the given program first.

    Each stage is verified. ``stop_after`` ends after the pass of that name, to bisect a wrong
    result; ``dump`` is a folder that gets each stage as ``NN_name.py``, numbered from ``first``.
    """
    if stop_after is not None and stop_after not in [p.name for p in passes]:
        raise ValueError(f"no pass {stop_after!r}; the passes are {[p.name for p in passes]}")
    stages = []
    for stage in iter_passes(program, passes, dump=dump, first=first):
        stages.append(stage)
        if stage.name == stop_after:
            break
    return stages


def iter_passes(
    program: Program, passes: Sequence[Pass], *, dump: Path | None = None, first: int = 0
) -> Iterator[Stage]:
    """The stages of `run_passes`, each as soon as it is verified."""
    _dump(Stage("input", program, 0.0), dump, first)
    verify(program, "input")
    yield Stage("input", program, 0.0)
    for number, step in enumerate(passes, first + 1):
        start = time.perf_counter()
        with TRACING:
            program = step.run(program)
        stage = Stage(step.name, program, time.perf_counter() - start)
        _dump(stage, dump, number)
        verify(program, step.name)
        LOG.debug(
            "pass %s: %d graphs, %d nodes, %.1f ms",
            stage.name, len(program.units), program.nodes, 1e3 * stage.seconds,
        )  # fmt: skip
        yield stage


def _dump(stage: Stage, folder: Path | None, number: int) -> None:
    """Write a stage when it is made, so that a broken one is there to be read."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}_{stage.name}.py").write_text(f"{stage.program}\n")
