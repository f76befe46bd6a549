"""Parameters of many shapes, sharded or not, and gradients that are the same on any number of
processes: so that sharded steps can be compared with those of one process bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import stq_compile as stq
from stq_compile.backend import session_of
from stq_compile.dcp import LoadPlanner

Optimizer = torch.optim.Optimizer

# On 2 and on 4 processes the borders between shards of these lie between blocks of 128 ...
ALIGNED = {
    "even": (256, 128),
    "uneven": (101, 256),
    "short": (1, 4224),  # of 2 processes one has nothing
    "deep": (8, 4, 8, 32),
    "small": (10,),
}
# ... and those of these cut blocks.
CUT = {"rows": (35, 160), "vector": (5200,)}


def muon(params: Iterable[Any]) -> Optimizer:
    """On the matrices; torch's own step fails on a sharded one of fewer rows than processes."""
    named = [(p if isinstance(p, tuple) else ("", p)) for p in params]
    matrices = [(name, p) for name, p in named if p.ndim == 2 and p.shape[0] >= 4]
    return torch.optim.Muon(
        matrices if matrices[0][0] else [p for _, p in matrices], lr=1e-2
    )  # fmt: skip


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "muon": muon,
}

MUON_WIDTHS = {2: 6, 5: 3, 8: 4}
"""After which steps the widths of Muon's states are changed: the planner leaves them alone."""


class Shapes(nn.Module):
    """A parameter of each shape, a frozen one, and one that is there under two names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator) / 10
            self.register_parameter(name, nn.Parameter(values))
        self.frozen = nn.Parameter(torch.ones(64, 128), requires_grad=False)
        self.tied = self.get_parameter(next(iter(shapes)))


def mesh_of(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def make(
    shapes: Mapping[str, tuple[int, ...]],
    optimizer: str = "adamw",
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> tuple[Shapes, Optimizer]:
    """The model, sharded over ``mesh`` if one is given, and its compiled optimizer."""
    model = Shapes(shapes)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    stock = OPTIMIZERS[optimizer](model.named_parameters())
    return model, stq.compile(stock, **{"min_numel": 64, **options})


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    """A step whose gradients depend on its number and the parameters' shapes alone."""
    for i, param in enumerate(model.parameters()):
        if not param.requires_grad:
            continue
        generator = torch.Generator().manual_seed(1000 * number + i)
        spread = torch.rand(param.shape[:1] + (1,) * (param.ndim - 1), generator=generator) + 0.1
        grad = torch.randn(param.shape, generator=generator) * spread
        if isinstance(param, DTensor):
            placed = distribute_tensor(
                grad, param.device_mesh, param.placements, src_data_rank=None
            )  # fmt: skip
            param.grad = placed
        else:
            param.grad = grad
    optimizer.step()
    if isinstance(optimizer, torch.optim.Muon):
        change_by_hand(optimizer, number)


def change_by_hand(optimizer: Optimizer, number: int) -> None:
    """The widths that Muon's states have after a step, every other state another."""
    if number not in MUON_WIDTHS:
        return
    session = session_of(optimizer)
    assert session is not None
    states = [(source.param, key) for _, source, key, _ in session.states()]
    width = MUON_WIDTHS[number]
    session.change_widths({state: width + 2 * (i % 2) for i, state in enumerate(states)})


def run(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    for number in steps:
        step(model, optimizer, number)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, as an ordinary one."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach() + 0


def outcome(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What a run came to: parameters, states, widths and decisions."""
    names = {id(param): name for name, param in model.named_parameters()}
    return {
        "params": {name: whole(param) for name, param in model.named_parameters()},
        "states": {
            f"{names[id(param)]}:{key}": whole(value)
            for param, state in optimizer.state.items()
            for key, value in state.items()
        },
        "report": stq.report(optimizer),
        "history": stq.history(optimizer).records,
    }


def widths(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(row.param, row.state, row.format) for row in result["report"].rows]


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that differ in any bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm())


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
    }


def save_dcp(model: nn.Module, optimizer: Optimizer, path: str, later: Any = None) -> Any:
    """Save both through torch.distributed.checkpoint.

    With ``later``, a process group that nothing else uses, meanwhile: a future to wait for.
    """
    state = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
    }
    if later is not None:
        return dcp.async_save(state, checkpoint_id=path, process_group=later)
    return dcp.save(state, checkpoint_id=path)


def load_dcp(model: nn.Module, optimizer: Optimizer, path: str) -> None:
    """Load what `save_dcp` saved, from any number of processes."""
    state = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=path, planner=LoadPlanner())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
