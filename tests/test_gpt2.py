"""GPT-2's 148 real shapes: few templates, and memory that stays packed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stq_compile as stq
from stq_compile.architectures import gpt2
from stq_compile.backend import session_of
from stq_compile.benchmarks.measure import parameters


def test_two_groups_and_148_tensors_are_few_templates() -> None:
    params = parameters(list(gpt2(12, 16).values()))
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1, "lr": 1e-3}, {"params": vectors}]
    optimizer = stq.compile(torch.optim.AdamW(groups, weight_decay=0.01), precision=4, min_numel=64)
    optimizer.step()
    session = session_of(optimizer)
    assert session is not None
    (step,) = session.compiled
    assert len(step.program.units) == 1
    assert sum(len(u.instances) for u in step.program.units) == 148
    assert len(step.buckets) == 2  # packed ones, and vectors below min_numel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "options"), [("AdamW", ""), ("SGD", ", lr=0.1, momentum=0.9")]
)
def test_no_full_size_temporary(optimizer: str, options: str, tmp_path: Path) -> None:
    """200 M parameters: peak memory above parameters and gradients is the packed states and less
    than 64 MiB, the first step included. A small optimizer loads the compiler's modules first."""
    script = f"""
import torch, stq_compile as stq
def make(sizes):
    params = [torch.nn.Parameter(torch.zeros(n).normal_()) for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return stq.compile(torch.optim.{optimizer}(params{options}), precision=4)
def field(name):
    lines = open('/proc/self/status').read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(name))
warm = make([8192])
warm.step(); warm.step()
big = make([100_000_000, 50_000_000, 50_000_000])
before = field('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
big.step(); big.step()
print(field('VmHWM') - before - stq.report(big).state_bytes)
"""
    excess = int(run_script(script, tmp_path))
    assert excess < 64 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stock_checkpoint_is_packed_without_a_second_copy(dtype: str, tmp_path: Path) -> None:
    """20 matrices of 2 M elements, 320 MB of float32 states: with the checkpoint in memory, loading
    it and two steps take the packed states and less than 96 MiB."""
    script = f"""
import torch, stq_compile as stq
def make(count):
    params = [torch.nn.Parameter(torch.randn(2000, 1000)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return stq.compile(torch.optim.AdamW(params), precision=4)
def stock(optimizer):
    groups = optimizer.state_dict()['param_groups']
    state = {{}}
    for i, p in enumerate(optimizer.param_groups[0]['params']):
        state[i] = {{'step': torch.tensor(3.0)}}
        for key in ('exp_avg', 'exp_avg_sq'):
            state[i][key] = torch.rand_like(p).to(torch.{dtype})
    return {{'state': state, 'param_groups': groups}}
def field(name):
    lines = open('/proc/self/status').read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(name))
warm = make(1)
warm.load_state_dict(stock(warm))
warm.step(); warm.step()
big = make(20)
saved = stock(big)
before = field('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
big.load_state_dict(saved)
big.step(); big.step()
report = stq.report(big)
assert report.bits_per_element < 4.3, report
print(field('VmHWM') - before - report.state_bytes)
"""
    excess = int(run_script(script, tmp_path))
    print(f"{excess / 2**20:.0f} MiB above the packed states")
    assert excess < 96 * 2**20


def run_script(script: str, cache: Path) -> str:
    """The last line that ``script`` prints in a process with empty compiler caches."""
    environment = {**os.environ, "STQ_CACHE_DIR": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]
