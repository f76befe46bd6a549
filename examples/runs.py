"""What a training run showed, and the file that keeps it, so that no run is made twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import stq_compile
import stq_compile.codegen
import stq_compile.passes

# Raise it when the examples' code changes in a way that changes results.
VERSION = 1


@dataclass(frozen=True)
class StateSize:
    """What an optimizer's states occupy, everything counted."""

    state_bytes: int
    bits_per_element: float
    saved: float  # of the fp32 bytes, 0 to 1


@dataclass
class Run:
    """What one training run showed.

    `valid_losses` are quick evaluations at (step, loss); `results` is of all validation data at the
    end: "loss", and whatever else the task evaluates. `bits` are true bits per element at (step,
    bits). Step times are of `optimizer.step()` alone; `seconds` is the whole run. `library` tells
    states of stq_compile's code apart, and is empty where it was not used.
    """

    label: str
    seed: int
    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    bits: list[tuple[int, float]] = field(default_factory=list)
    transitions: int = 0
    results: dict[str, float] = field(default_factory=dict)
    size: StateSize | None = None
    seconds: float = 0.0
    library: str = ""

    @property
    def valid_loss(self) -> float:
        return self.results.get("loss", math.nan)

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.step_seconds)

    @property
    def mean_step_ms(self) -> float:
        """Without the first tenth, in which steps are compiled."""
        return 1e3 * statistics.fmean(self.step_seconds[len(self.step_seconds) // 10 :])

    @property
    def most_bits(self) -> float:
        return max((bits for _, bits in self.bits), default=math.nan)


def run_file(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where the run with this identity is kept: everything that decides it is in the name's hash.

    The identity has the entries "task", "optimizer" (each with a "name"), "variant" (with a
    "slug") and "seed", and any others, all of which JSON can hold.
    """
    # Keys are not sorted: the order of the widths' patterns has a meaning.
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    names = (identity["task"]["name"], identity["optimizer"]["name"], identity["variant"]["slug"])
    return folder / f"{'-'.join(names)}-{identity['seed']}-{digest}.json"


def save_run(run: Run, identity: Mapping[str, Any], file: Path) -> None:
    """Write whole or not at all: another process may look for the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps({"identity": identity, "run": asdict(run)}))
    unfinished.replace(file)


def load_run(file: Path) -> Run | None:
    """The run in `file`, None where there is no such file."""
    if not file.exists():
        return None
    content = json.loads(file.read_text())["run"]
    content["size"] = StateSize(**content["size"])
    for name in ("valid_losses", "bits"):
        content[name] = [(step, value) for step, value in content[name]]
    return Run(**content)


def library_digest() -> str:
    """A short hash of stq_compile's source text."""
    digest = hashlib.sha256()
    for package in (stq_compile, stq_compile.passes, stq_compile.codegen):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*")):
                if file.suffix in (".py", ".h"):
                    digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]
