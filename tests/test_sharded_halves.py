"""16-bit parameters on shards are rounded as whole ones are, by kernels and in regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import stq_compile as stq
from processes import run_processes
from sharded import OPTIMIZERS, mesh_of
from stq_compile.backend import session_of

SHAPE = (101, 256)
"""On two processes not the same number of rows, and no block is cut."""
STEPS = 4


def trained(optimizer: str, rounding: str, mesh: Any = None) -> tuple[Tensor, Tensor | None]:
    """The bits of a bfloat16 parameter and of its error after some steps."""

    def placed(values: Tensor) -> Tensor:
        return values if mesh is None else distribute_tensor(values, mesh, [Shard(0)])

    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(placed(torch.randn(SHAPE, generator=generator).bfloat16()))
    options: dict[str, Any] = {"precision": 4, "param_rounding": rounding}
    compiled = stq.compile(OPTIMIZERS[optimizer]([param]), **options)
    for _ in range(STEPS):
        param.grad = placed(torch.randn(SHAPE, generator=generator).bfloat16())
        compiled.step()
    assert stq.report(compiled).compiles <= 2
    session = session_of(compiled)
    assert session is not None
    error = session.errors.get(0)
    return _whole(param), None if error is None else _whole(error)


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


CASES = [(o, r) for o in ("adamw", "muon") for r in ("nearest", "stochastic", "compensated")]


def on_two(rank: int, world: int) -> list[tuple[Tensor, Tensor | None]]:
    mesh = mesh_of(world)
    return [trained(*case, mesh) for case in CASES]


@pytest.mark.slow
def test_the_bits_of_one_process() -> None:
    (found, _) = run_processes(2, on_two)
    for case, (param, error) in zip(CASES, found, strict=True):
        whole, whole_error = trained(*case)
        assert torch.equal(param, whole), case
        assert (error is None) == (case[1] != "compensated")
        if error is not None and whole_error is not None:
            assert torch.equal(error, whole_error), case
            assert bool(whole_error.any())
