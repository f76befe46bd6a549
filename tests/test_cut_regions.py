"""Optimizers whose pointwise parts become kernels around norms, products and means."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stq_compile as stq
from processes import run_processes
from sharded import ALIGNED, OPTIMIZERS, differing, make, mesh_of, outcome, run, widths
from stq_compile import PackedState
from stq_compile.backend import session_of
from stq_compile.codec import CompiledCodec
from stq_compile.compiled_step import CompiledStep
from stq_compile.errors import PartialStepError
from stq_compile.passes import cut

SHAPES = ((64, 96), (96, 40), (128,))


@pytest.fixture(autouse=True)
def _small_parameters_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "WORTH_CUTTING", 1)


class PerParameter(torch.optim.Optimizer):
    """Momentum, second moment, and an update of each parameter by itself."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's is overloaded
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["m"] = torch.zeros_like(p)
                    state["v"] = torch.zeros_like(p)
                self.update(p, p.grad, state, group["lr"])

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], lr: float) -> None:
        raise NotImplementedError


class Lamb(PerParameter):
    """You et al., "Large batch optimization for deep learning", 2020."""

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], lr: float) -> None:
        s["step"] += 1
        s["m"].lerp_(g, 0.1)
        s["v"].mul_(0.99).addcmul_(g, g, value=0.01)
        correction = 1 - 0.99 ** s["step"]
        u = s["m"] / ((s["v"] / correction).sqrt() + 1e-6) + 0.01 * p
        w, n = p.norm(), u.norm()
        p.sub_(lr * torch.where((w > 0) & (n > 0), w / n, 1.0) * u)


class Clipped(PerParameter):
    """Two norms, the second of what the first has a part in; and a mean for each row."""

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], lr: float) -> None:
        if p.ndim > 1:
            g = g - g.mean(1, keepdim=True)
        s["m"].mul_(0.9).add_(g)
        clipped = s["m"] / s["m"].norm().clamp(min=0.5)
        s["v"].mul_(0.9).addcmul_(clipped, clipped)
        u = clipped / (s["v"].sqrt() + 0.01)
        p.sub_(u / u.square().mean().sqrt().clamp(min=1.0), alpha=lr)


class Rotated(PerParameter):
    """SOAP's scheme: Adam in the basis of a matrix that the step keeps beside its moments."""

    def update(self, p: Tensor, g: Tensor, s: dict[str, Any], lr: float) -> None:
        s["m"].lerp_(g, 0.1)
        update = s["m"]
        if p.ndim > 1:
            if "side" not in s:
                s["side"] = torch.zeros(len(p), len(p))
            s["side"].mul_(0.9).add_(g @ g.T, alpha=0.1)
            basis = torch.linalg.qr(s["side"] + torch.eye(len(p))).Q
            s["v"].lerp_((basis.T @ g).square(), 0.1)
            update = basis @ ((basis.T @ s["m"]) / (s["v"].sqrt() + 1e-3))
        p.sub_(update, alpha=lr)


def muon(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.01)


def make_params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype) / 8) for s in SHAPES]


def train(
    cls: Any, steps: int = 6, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    params = make_params(dtype)
    optimizer = cls(params)
    if options:
        stq.compile(optimizer, **options)
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
    return params, optimizer


def gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator)
        p.grad = (p.detach().float() + 0.3 * noise).to(p.dtype)


def distance(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    """How far apart two ways lie, by how far they go."""
    start = _vector(make_params(a[0].dtype))
    return float((_vector(a) - _vector(b)).norm() / (_vector(b) - start).norm())


def _vector(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in params])


def last_step(optimizer: torch.optim.Optimizer) -> CompiledStep:
    session = session_of(optimizer)
    assert session is not None
    return max(session.compiled, key=lambda step: step.number)


MAKERS = [Lamb, *(pytest.param(cls, marks=pytest.mark.slow) for cls in (Clipped, Rotated, muon))]


@pytest.mark.parametrize("cls", MAKERS)
def test_cut_at_few_bits_and_whole_at_32(cls: Any) -> None:
    """What is not packed runs in the eager step's own operators."""
    eager, _ = train(cls)
    wide, optimizer = train(cls, precision=32)
    assert distance(wide, eager) < 1e-6  # Dynamo itself rewrites `addcmul` (design/0003)
    assert not last_step(optimizer).cut_regions
    ours, optimizer = train(cls, precision=8, min_numel=64)
    step = last_step(optimizer)
    assert step.cut_regions
    assert not step.regions or cls is Rotated  # whose vector is a kernel's
    assert distance(ours, eager) < 0.1
    assert stq.report(optimizer).compiles <= 4
    for states in optimizer.state.values():
        for key, value in states.items():
            assert isinstance(value, PackedState) == (key != "step"), key
    half, _ = train(cls, precision=16, min_numel=64)
    assert 0 < distance(half, eager) < 0.01


def test_a_square_preconditioner_is_a_matrix_and_not_a_kernels_state() -> None:
    """It has the shape of its parameter, and a format that its decomposition survives."""
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = stq.compile(Rotated([p]), precision=8, min_numel=64)
    for step in range(2):
        gradients([p], step)
        optimizer.step()
    assert last_step(optimizer).cut_regions
    formats = {row.state: row.format for row in stq.report(optimizer).rows}
    assert formats["side"] == "cholesky8"
    assert formats["m"] == "softsign8"


def test_states_have_the_formats_of_kernels() -> None:
    """What the update divides by a root is kept in units of that root. Regions are traced for
    every shape; what is pointwise in them is the same kernel."""
    _, optimizer = train(Lamb, 3, precision={"m": 3, "v": 4}, min_numel=64)
    regions = last_step(optimizer).cut_regions
    assert len(regions) == 3
    assert len({id(bucket.unit.compiled) for r in regions for bucket in r.buckets}) == 2
    formats = {row.state: row.format for row in stq.report(optimizer).rows}
    assert formats["m"].startswith("midrise3")
    assert formats["v"].startswith("adaptive_log4")


@pytest.mark.slow
def test_the_planner_looks_at_what_numbers_cut() -> None:
    """And leaves alone what reaches the parameter by way of a product, or a mean of each row."""
    ours, optimizer = train(Lamb, 9, min_numel=64, interval=2)
    planner = last_step(optimizer).session.planner
    assert planner is not None
    assert planner.looks == 4
    assert planner.measured.keys() == {(i, key) for i in range(3) for key in ("m", "v")}
    for errors in (found.errors for found in planner.measured.values()):
        assert 0.1 < errors[2] < 1
        assert 0 < errors[8] < errors[5] < errors[3] < errors[2]
    assert distance(ours, train(Lamb, 9)[0]) < 0.3
    _, optimizer = train(Clipped, 5, min_numel=64, interval=2)
    planner = last_step(optimizer).session.planner
    assert planner is not None
    assert planner.measured.keys() == {(2, "m"), (2, "v")}


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_parameters_of_16_bits(rounding: Any) -> None:
    wide, _ = train(Lamb, 20)
    options: dict[str, Any] = {"precision": 8, "min_numel": 64, "param_rounding": rounding}
    ours, optimizer = train(Lamb, 20, torch.bfloat16, **options)
    assert last_step(optimizer).cut_regions
    assert distance(ours, wide) < 0.2


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are made in its context: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if type(t) is Tensor}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if type(made) is Tensor and made.untyped_storage().data_ptr() not in known:
                storage = made.untyped_storage()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def test_no_state_is_decoded_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value per element of one parameter is between kernels, and nothing is left."""
    params, optimizer = train(Lamb, precision=4, min_numel=64)

    def decoded(*args: Any) -> Any:
        raise AssertionError("a state was decoded")

    monkeypatch.setattr(PackedState, "dequantize", decoded)
    monkeypatch.setattr(CompiledCodec, "decode", decoded)
    alive = Alive()
    for region in last_step(optimizer).cut_regions:
        monkeypatch.setattr(region, "_run", _within(alive, region._run))
    gradients(params, 6)
    optimizer.step()
    largest = max(p.numel() for p in params)
    assert 4 * largest <= alive.most < 5 * largest
    assert alive.now < 1000


def _within(alive: Alive, call: Any) -> Any:
    def called(*args: Any) -> Any:
        with alive:
            return call(*args)

    return called


def test_a_parameter_is_updated_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = train(Lamb, precision=4, min_numel=64)
    twins, twin = train(Lamb, precision=4, min_numel=64)
    for each in (params, twins):
        gradients(each, 6)
    twin.step()
    before = [_bits(p, optimizer) for p in params]
    region = last_step(optimizer).cut_regions[1]
    monkeypatch.setattr(region.rest, "changes", _fails)
    with pytest.raises(PartialStepError, match="1 of 3"):
        optimizer.step()
    after = [_bits(p, optimizer) for p in params]
    expected = [_bits(p, twin) for p in twins]
    first = region.instances[0].param.source.param
    moved = [i for i in range(3) if not _same(after[i], before[i])]
    assert len(moved) == 1
    assert first not in moved
    assert _same(after[moved[0]], expected[moved[0]])


def _fails(*args: Any) -> Any:
    raise MemoryError("none is left")


def _bits(p: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [optimizer.state[p][key] for key in ("m", "v")]
    return [p.detach().clone(), *(x.packed.codes.clone() for x in states)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_a_packed_run_that_is_resumed_ends_in_the_same_bits() -> None:
    params, optimizer = train(Lamb, 3, precision=4, min_numel=64)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = stq.compile(Lamb(others), precision=4, min_numel=64)
    other.load_state_dict(saved)
    for step in range(3, 6):
        for each, opt in ((params, optimizer), (others, other)):
            gradients(each, step)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def on_processes(rank: int, world: int, **options: Any) -> Any:
    cut.WORTH_CUTTING = 1
    OPTIMIZERS["lamb"] = Lamb
    model, compiled = make(ALIGNED, "lamb", mesh_of(world), **options)
    run(model, compiled, range(4))
    assert last_step(compiled).cut_regions
    return outcome(model, compiled)


PINNED: dict[str, Any] = {"precision": 4}
PLANNED: dict[str, Any] = {"interval": 1}


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(2, PINNED, marks=pytest.mark.slow),
        *(pytest.param(4, options, marks=pytest.mark.slow) for options in (PINNED, PLANNED)),
    ],
)
def test_shards_have_the_bits_of_one_process(
    world: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "lamb", Lamb)
    model, compiled = make(ALIGNED, "lamb", **options)
    run(model, compiled, range(4))
    expected = outcome(model, compiled)
    for found in run_processes(world, partial(on_processes, **options)):
        assert not differing(found["params"], expected["params"])
        assert not differing(found["states"], expected["states"])
        assert widths(found) == widths(expected)
