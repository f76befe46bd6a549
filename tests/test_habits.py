"""Habits of published optimizers that came out wrong once, each in a small optimizer of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.variables.builder import is_dynamic_source

import stq_compile as stq
from stq_compile import PackedState
from stq_compile.errors import EagerStepWarning
from stq_compile.symbolic_math import symbolic_math
from test_hard_optimizers import MIN_NUMEL, Base, make_params, run, run_all_ways, vector


class CastsInPlace(Base):
    """Updates what a cast to the same dtype gives back, which is the tensor itself (RAdam)."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s.update(m=torch.zeros_like(p), v=torch.zeros_like(p))
        else:
            s["v"] = s["v"].type_as(p)
        wide, m = p.float(), s["m"].to(p.dtype)
        m.lerp_(p.grad, 0.1)
        s["v"].mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
        wide.addcdiv_(m, s["v"].sqrt().add_(1e-8), value=-lr)


class WritesOut(Base):
    """Fills buffers by ``out=``, made beside any parameter (Muon in pytorch-optimizer)."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        m = s.setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
        weights = torch.empty(2)
        twice = torch.empty_like(weights)
        torch.add(torch.ones(2), 1.0, out=weights)
        torch.mul(weights, weights, out=twice)
        twice[0] = 8.0
        p.sub_(m, alpha=lr * 0.1).sub_(p.grad * (twice.sum() / 12), alpha=lr)


class Turned(Base):
    """Means and norms over views, which are added up in the order of their strides, and an
    ordinary update for vectors (NorMuon)."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        m = s.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.3)
        if p.ndim == 1:
            v = s.setdefault("v", torch.zeros_like(p)).lerp_(p.grad.square(), 0.1)
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-lr)
            return
        turned = m.mT
        turned = turned / turned.square().mean(-1, keepdim=True).sqrt()
        p.sub_(turned.div(turned.norm()).mT, alpha=lr)


class NumberFirst(Base):
    """Takes a matrix from a number (LoRA-RITE, Adai)."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if p.ndim == 2:
            kept = s.setdefault("kept", torch.zeros(p.shape[0], p.shape[0]))
            kept.lerp_(p.grad @ p.grad.T, 0.1)
            p.sub_((1.0 - kept.tanh()) @ p.grad, alpha=0.1 * lr)


class Chosen(Base):
    """Keeps the elements that a mask chooses, whose number nobody knows beforehand (SPAM)."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["mask"] = p.detach() > 0
            s["m"] = p.grad[s["mask"]].clone()
        s["m"].lerp_(p.grad[s["mask"]], 0.1)
        p[s["mask"]] -= lr * s["m"]


class NoneStates(Base):
    """Makes states in ``_init_group`` that are no tensors, or that are not there (optimi)."""

    def _init_group(self, group: dict[str, Any], momenta: list[Tensor]) -> None:
        for p in group["params"]:
            s = self.state[p]
            if not s:
                s.update(m=torch.zeros_like(p), compensation=None, calls=0, name="sgd")
            momenta.append(s["m"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            momenta: list[Tensor] = []
            self._init_group(group, momenta)
            for p, m in zip(group["params"], momenta, strict=True):
                p.sub_(m.mul_(0.9).add_(p.grad), alpha=0.1 * group["lr"])


class Counts(Base):
    """Counts its steps in Python, in states and in the group."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        group = self.param_groups[0]
        s["step"] = s.get("step", 0) + 1
        if s["step"] > group.get("seen", 0):
            group["seen"] = s["step"]
        v = s.setdefault("v", torch.zeros_like(p))
        v.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
        root = (v / (1 - 0.9 ** s["step"])).sqrt().add_(1e-8)
        p.addcdiv_(p.grad, root, value=-lr / (1 + 0.1 * group["seen"]))


class FlatStart(Base):
    """Keeps its starting point flat, and goes on by its distance from it (Prodigy)."""

    def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
        if not s:
            s["start"], s["far"] = p.flatten().clone(), 0.0
        away = (s["start"] - p.flatten()).dot(p.grad.flatten()) / p.grad.norm()
        s["far"] = max(s["far"], float(away))
        p.sub_(p.grad, alpha=lr * (1e-3 + s["far"]) / float(p.grad.norm()))


HABITS = [CastsInPlace, WritesOut, NumberFirst, Chosen, NoneStates]
SLOW = (NumberFirst,)


@pytest.mark.parametrize(
    "cls", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in HABITS]
)
def test_it_takes_the_eager_optimizers_steps(cls: Any) -> None:
    ways = run_all_ways(cls)
    torch.testing.assert_close(ways.ours, ways.eager, rtol=1e-6, atol=1e-7)
    assert ways.distance < 0.1
    for report in (stq.report(ways.optimizer), stq.report(ways.packed_optimizer)):
        assert "defect" not in report.note
        assert ("eagerly" in report.note) == (cls is Chosen)
    states = [row for row in stq.report(ways.packed_optimizer).rows if row.width < 32]
    assert states


def test_at_32_bits_a_step_with_norms_has_the_eager_steps_bits() -> None:
    """Of vectors beside them as well: a last bit may be all that tells two bfloat16 apart."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in ((70, 130), (130,))]
        optimizer = Turned(params)
        if compiled:
            stq.compile(optimizer, precision=32)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        found.append(vector(params))
    assert stq.report(optimizer).compiles > 0
    assert torch.equal(*found)


def test_a_state_that_a_step_casts_stays_what_it_is() -> None:
    """Its second moment keeps the format of one, and no second copy of it is made."""
    params, optimizer = run(CastsInPlace, precision=8, min_numel=MIN_NUMEL)
    value = optimizer.state[params[0]]["v"]
    assert isinstance(value, PackedState)
    assert value.format.kind == "adaptive_log"


def test_at_32_bits_what_a_step_compiles_itself_is_compiled() -> None:
    """An eager step runs the optimizer's own functions as it would without stq_compile."""
    calls = []

    def backend(module: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return module.forward

    @torch.compile(backend=backend)
    def update(p: Tensor, grad: Tensor) -> None:
        p.sub_(grad, alpha=0.1)

    class CompilesItself(Base):
        def update(self, p: Tensor, s: dict[str, Any], lr: float) -> None:
            torch._dynamo.graph_break()
            update(p, p.grad)

    torch._dynamo.reset()
    with pytest.warns(EagerStepWarning):
        run(CompilesItself, precision=32)
    assert calls


def test_a_state_that_a_step_makes_may_be_the_only_packed_one() -> None:
    """It has the widest of all pins until its key is known, and is packed while Dynamo traces."""
    eager, _ = run(CastsInPlace)
    params, optimizer = run(CastsInPlace, precision={"*": 32, "v": 8}, min_numel=MIN_NUMEL)
    formats = {(row.state, row.format) for row in stq.report(optimizer).rows if len(row.shape) == 2}
    assert formats == {("m", "float32"), ("v", "adaptive_log8")}
    torch.testing.assert_close(vector(params), vector(eager), rtol=0.05, atol=0.01)


def test_a_count_costs_one_graph() -> None:
    """The first step makes states, the second serves all others: it counts from the outset."""
    eager, _ = run(Counts)
    params, optimizer = run(Counts, precision=32)
    torch.testing.assert_close(vector(params), vector(eager), rtol=1e-6, atol=1e-7)
    assert stq.report(optimizer).compiles == 2


def test_sources_that_the_user_names_stay() -> None:
    config: Any = torch.compiler.config
    with (
        config.patch(dynamic_sources="L['x']"),
        symbolic_math(frozenset({"step", "not, a name"})),
    ):
        assert config.dynamic_sources.split(",")[0] == "L['x']"
        assert is_dynamic_source("L['self'].param_groups[0]['step']")
        assert is_dynamic_source("L['self'].state[list(dict.keys(L['self'].state))[0]]['step']")
        assert not is_dynamic_source("L['self'].param_groups[0]['steps']")
        assert not is_dynamic_source("L['self'].step")
    assert not is_dynamic_source("L['self'].param_groups[0]['step']")


@pytest.mark.filterwarnings("ignore::stq_compile.errors.EagerStepWarning")
def test_a_copy_of_the_weights_in_another_shape_is_one() -> None:
    eager, _ = run(FlatStart)
    params, optimizer = run(FlatStart, precision=8, min_numel=MIN_NUMEL)
    formats = {row.format for row in stq.report(optimizer).rows if row.width < 32}
    assert formats == {"softsign12"}
    moved = vector(eager) - vector(make_params())
    assert (vector(params) - vector(eager)).norm() < 0.25 * moved.norm()
