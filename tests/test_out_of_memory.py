"""Memory runs out at every allocation of a step and of a change of widths, one after the other.

The allocator itself fails (`failing_allocator.c`), so that what is tested is torch's own error, out
of whatever depth it comes. It must be loaded before torch is: each test is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")


@pytest.fixture(scope="module")
def allocator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("allocator") / "failing_allocator.so"
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, "-O1", "-fPIC", "-shared", str(HERE / "failing_allocator.c")]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
    return library


def attempts(allocator: Path, case: str, *more: str) -> str:
    """Run `out_of_memory_process.py`; returns what it printed."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "LD_PRELOAD": str(allocator), "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / "out_of_memory_process.py"), str(allocator), case, *more],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize(
    "case", [pytest.param("planned", marks=pytest.mark.slow), "counting", "eager"]
)
def test_at_every_allocation_of_a_step(allocator: Path, case: str) -> None:
    output = attempts(allocator, case)
    tried = int(output.split()[-1])
    # A step of kernels takes no memory for tensors at all, once it has its tables.
    assert tried == 0 if case == "counting" else tried >= 20


@pytest.mark.slow
def test_at_allocations_of_the_first_step(allocator: Path) -> None:
    attempts(allocator, "counting", "first")
