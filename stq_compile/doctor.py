"""What this machine has, and whether a tiny step works on every target that it has."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.optim import AdamW

from stq_compile import api
from stq_compile.codegen.cpp import cache
from stq_compile.codegen.target import parse_target
from stq_compile.errors import first_line
from stq_compile.inspection import inspect_optimizer
from stq_compile.options import Options
from stq_compile.targets import ONE_MATRIX, make_optimizer

PACKAGES = ("stq-compile", "torch", "triton", "numpy", "sympy", "rich", "typer")
STEPS = 3


@dataclass(frozen=True)
class Finding:
    """One line: ``ok`` is None where there is nothing that could fail."""

    name: str
    found: str
    ok: bool | None = None


def examine() -> Iterator[Finding]:
    """Versions, compilers, processor, GPU, caches; then one tiny step on every target."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        yield Finding(package, _version(package))
    yield _compiler()
    yield Finding("instruction set", torch.backends.cpu.get_cpu_capability())
    yield Finding("threads", str(torch.get_num_threads()))
    yield Finding("gpu", _gpu())
    yield _cache()
    yield _tried("step on the cpu", _cpu_step)
    yield _tried("triton kernel for cuda:90", _triton_kernel)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> Finding:
    name = "c++ compiler"
    try:
        compiler = get_cpp_compiler()
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except Exception as error:  # torch raises its own kinds where there is none
        return Finding(name, f"none: {error}", ok=False)
    return Finding(name, f"{shutil.which(compiler) or compiler}: {done.stdout.splitlines()[0]}")


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none; kernels for GPUs can be generated, not run"
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    return f"{name}, cuda:{major}{minor}; steps cannot be run on it yet"


def _cache() -> Finding:
    """Where built kernels are kept."""
    folder, problem = cache.chosen()
    if problem:
        found = f"{folder}: {problem}; set {cache.VARIABLE} to a folder of your own"
        return Finding("kernel cache", found, ok=False)
    sizes = list(_sizes(folder))
    found = f"{folder}, {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"
    return Finding("kernel cache", found, ok=True)


def _sizes(folder: Path) -> Iterator[int]:
    """Bytes of each file, but for those that another process removes meanwhile."""
    for root, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield Path(root, name).stat().st_size


def _tried(name: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding(name, attempt(), ok=True)
    except Exception as error:
        return Finding(name, first_line(error), ok=False)


def _cpu_step() -> str:
    """Some steps of AdamW, compiled with fp32 states against eager, and packed at 4 bits."""
    eager, exact, packed = (_train(precision) for precision in (None, 32, 4))
    torch.testing.assert_close(exact, eager, rtol=1e-6, atol=1e-7)
    off = float((packed - eager).norm() / (eager - _start()).norm())
    if not off < 0.5:
        raise AssertionError(f"the packed step moved parameters {off:.0%} off")
    return f"works: fp32 states as eager, 4 bits within {off:.0%} of the distance moved"


def _start() -> torch.Tensor:
    return torch.linspace(-1, 1, 64 * 128).reshape(64, 128)


def _train(precision: int | None) -> torch.Tensor:
    """The parameter after a few steps; None trains eagerly."""
    param = torch.nn.Parameter(_start())
    optimizer = AdamW([param], lr=0.01, foreach=False)
    if precision is not None:
        api.compile(optimizer, precision=precision)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return param.detach()


def _triton_kernel() -> str:
    found = inspect_optimizer(make_optimizer("AdamW", ONE_MATRIX), Options(precision=4))
    (row,) = found.kernels(parse_target("cuda:90"))
    return f"compiles: {row['registers']} registers, {row['spill_bytes']} bytes spilled"
