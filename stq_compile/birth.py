"""States are packed from birth: a state that an optimizer makes as a constant costs no memory.

Inside `Birth`, ``torch.zeros_like(param)`` and its relatives give a `PackedState` of format
``constant`` instead of float32 memory; the first compiled step gives it its real format.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from stq_compile.formats import CONSTANT
from stq_compile.halves import FLOAT_DTYPES
from stq_compile.packed_state import PackedState, is_dense
from stq_compile.shards import local, wrap
from stq_compile.storage import DEVICES

aten = torch.ops.aten
_ZERO = {aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default}
_ONE = {aten.ones_like.default, aten.ones.default, aten.new_ones.default}
_FULL = {aten.full_like.default, aten.full.default, aten.new_full.default}


class Birth(TorchDispatchMode):
    """Answers constant factories of ``min_numel`` or more float or half elements with packed ones.

    Of a sharded tensor the elements of the whole one count, and the packed state is the local
    tensor of a DTensor.
    """

    def __init__(self, min_numel: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.min_numel = min_numel

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        born = newborn(func, args, kwargs, self.min_numel)
        return func(*args, **kwargs) if born is None else born


def newborn(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], min_numel: int
) -> Tensor | None:
    """The packed constant that a call of a factory is answered with; None if it is none."""
    value = _constant_of(func, args)
    if value is None:
        return None
    shape = torch.empty(0, device="meta")
    outer = args[0] if isinstance(args[0], Tensor) else shape
    like = local(outer)
    with _disable_current_modes():
        meta_args = (like.to("meta"), *args[1:]) if isinstance(args[0], Tensor) else args
        meta = func(*meta_args, **{**kwargs, "device": "meta"})
    device = torch.device(kwargs.get("device") or (like.device if like is not shape else "cpu"))
    sharded = like is not outer
    if (
        (outer if sharded else meta).numel() < min_numel
        or (sharded and meta.shape != like.shape)  # as large as the whole tensor
        or meta.dtype not in FLOAT_DTYPES
        or (meta.ndim == 0 and meta.dtype != torch.float32)  # kernels read it as it is
        or device.type not in DEVICES
        or not is_dense(meta)
    ):
        return None
    state = PackedState.zeros_like(meta, CONSTANT, device=device)
    state.packed.fill(value)
    return wrap(state, outer)


def _constant_of(func: Any, args: tuple[Any, ...]) -> float | None:
    """The value that a factory call fills with; None if it is no constant factory."""
    if func in _ZERO:
        return 0.0
    if func in _ONE:
        return 1.0
    if func in _FULL:
        value = args[2] if func is aten.new_full.default else args[1]
        return float(value) if isinstance(value, (int, float)) else None
    return None


def init_states(optimizer: Optimizer, min_numel: int) -> list[Tensor]:
    """Create the states that ``_init_group`` makes, packed; returns the parameters that got some.

    This is what the optimizer does at the start of its own step. One without ``_init_group``
    creates its states inside the step, where the compiler sees them as returned values.
    """
    init = getattr(optimizer, "_init_group", None)
    if init is None:
        return []
    before = {id(p) for p, state in optimizer.state.items() if state}
    if len(before) == sum(len(group["params"]) for group in optimizer.param_groups):
        return []
    waiting = [
        group
        for group in optimizer.param_groups
        if any(p.grad is not None and id(p) not in before for p in group["params"])
    ]
    lists = len(inspect.signature(init).parameters) - 1
    try:
        with Birth(min_numel), torch.no_grad():
            for group in waiting:
                init(group, *([] for _ in range(lists)))
    except BaseException:  # half of a parameter's states would count as all of them
        forget(optimizer, [p for p in list(optimizer.state) if id(p) not in before])
        raise
    return [p for p in list(optimizer.state) if id(p) not in before and optimizer.state[p]]


def forget(optimizer: Optimizer, born: Iterable[Tensor]) -> None:
    """Take the states of parameters away again, before any step has written them."""
    for param in born:
        del optimizer.state[param]
