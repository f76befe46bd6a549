"""`PackedState`: a tensor that is ordinary to everyone who asks and packed codes in memory.

Its type is that which the optimizer gave it: float32, or that of a 16-bit parameter. Codes stand
for float32 values whatever it is; kernels see those, and other operations their casts.

The compiler sees the logical side: Dynamo traces a `PackedState` as a plain tensor,
and its buffers are invisible to guards, so that a change of width never re-traces. Every other
operation, an eager ``optimizer.step()`` included, is answered by decoding, computing and
encoding again: correct, and as slow as that sounds.

A `PackedState` is a strided window (size, stride, offset) on a `PackedStorage`, as an ordinary
tensor is one on its memory. So views work, and writing through a view changes the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from stq_compile.dynamo import traced_optimizer
from stq_compile.errors import FormatMismatchError, TracingError
from stq_compile.formats import CONSTANT, Format
from stq_compile.storage import REFERENCE, Codec, PackedStorage


@lru_cache
def _anchor_on(device: torch.device) -> Tensor:
    """What Dynamo sees inside every `PackedState` of a device: one constant tensor, so that nothing
    that changes is guarded."""
    with _disable_current_modes():
        return torch.empty(0, device=device)


CPU = torch.device("cpu")


class PackedState(Tensor):
    """A tensor of float32, or of 16 bits, whose values live in a `PackedStorage`, on its device."""

    _storage: PackedStorage | None  # None only for the stand-ins that Dynamo makes while tracing
    _anchor: Tensor

    @staticmethod
    def __new__(
        cls,
        storage: PackedStorage | None,
        size: Iterable[int],
        stride: Iterable[int],
        offset: int = 0,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> PackedState:
        """``device``: of a stand-in, which has no storage."""
        device = device if storage is None else storage.device
        self: PackedState = Tensor._make_wrapper_subclass(
            cls,
            torch.Size(size),
            strides=tuple(stride),
            storage_offset=offset,
            dtype=dtype,
            device=device,
        )
        self._storage = storage
        self._anchor = _anchor_on(device)
        return self

    # Tensor declares a method; torch's documented way to switch it off is this assignment.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def zeros_like(cls, like: Tensor, format: Format, **storage: Any) -> PackedState:
        """Zeros with the size, strides and type of ``like`` (dense); they are never in memory.

        ``like`` may be a meta tensor, with a ``device`` among the options of the storage.
        """
        packed = PackedStorage(like.numel(), format, **storage)
        return cls(packed, like.size(), like.stride(), dtype=like.dtype)

    @classmethod
    def pack(cls, values: Tensor, format: Format, **storage: Any) -> PackedState:
        """Encode a dense tensor."""
        state = cls.zeros_like(values, format, device=values.device, **storage)
        state.packed.write(memory_order(values))
        return state

    @classmethod
    def wrap(cls, values: Tensor, **storage: Any) -> PackedState:
        """A dense tensor as a packed state of format float32; if it is one, in the same memory."""
        packed = PackedStorage(values.numel(), CONSTANT, device=values.device, **storage)
        packed.take(memory_order(values.detach()).float())
        return cls(packed, values.size(), values.stride(), dtype=values.dtype)

    @property
    def packed(self) -> PackedStorage:
        """The physical side."""
        if self._storage is None:
            raise FormatMismatchError(
                where="PackedState", found="a tracing stand-in", expected="a state with storage"
            )
        return self._storage

    @property
    def format(self) -> Format:
        return self.packed.format

    def dequantize(self, codec: Codec = REFERENCE) -> Tensor:
        """The values as an ordinary float32 tensor of the same size and strides, whatever the
        type of the state."""
        if self._storage is None:
            return self._anchor.new_empty_strided(self.size(), self.stride())
        values = self._storage.read(codec)
        return values.as_strided(self.size(), self.stride(), self.storage_offset())

    # Methods that torch answers from memory without asking the dispatcher.
    def numpy(self, *, force: bool = False) -> Any:
        return self.dequantize().numpy(force=force)

    def tolist(self) -> Any:
        return self.dequantize().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.dequantize(), spec) if spec else str(self)

    # Methods that reach for the memory itself, of which there is none: they would crash.
    def __dlpack__(self, **options: Any) -> Any:
        return self.dequantize().__dlpack__(**options)

    def share_memory_(self) -> PackedState:
        """Move codes and scales into shared memory; the values do not change."""
        for buffer in (self.packed.codes, self.packed.scales):
            buffer.share_memory_()  # type: ignore[no-untyped-call]  # torch's
        self.packed.buffers_replaced()
        return self

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._storage is None:
            return f"PackedState(size={tuple(self.size())}, tracing)"
        inner = str(self.dequantize()).removeprefix("tensor(").removesuffix(")")
        return f"PackedState({inner}, format={self.format.name})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedState:
        storage = deepcopy(self.packed, memo)
        offset = int(self.storage_offset())
        return PackedState(storage, self.size(), self.stride(), offset, dtype=self.dtype)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return PackedState, (
            self.packed,
            tuple(self.size()),
            self.stride(),
            self.storage_offset(),
            self.device,
            self.dtype,
        )

    # What Dynamo asks of a traceable wrapper subclass.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        window = (tuple(self.size()), self.stride(), self.storage_offset(), self.device, self.dtype)
        return ["_anchor"], window

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[Any, ...], size: object, stride: object
    ) -> PackedState:
        stand_in = PackedState(None, *context)
        stand_in._anchor = inner["_anchor"]
        return stand_in

    @classmethod
    def __metadata_guard__(cls, old: object, new: object) -> bool:
        return True

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as a plain function there
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.clone.default and _keeps_layout(args[0], kwargs):
            state = args[0]
            offset = int(state.storage_offset())
            return PackedState(
                state.packed.clone(), state.size(), state.stride(), offset, dtype=state.dtype
            )
        if torch.Tag.inplace_view in func.tags:
            raise FormatMismatchError(
                where=f"{func} of a packed state",
                found="a change of its shape in place",
                expected="the operator that returns a new view",
            )
        if is_view(func) and isinstance(args[0], PackedState):
            return _view(func, args, kwargs)
        if any(isinstance(a, PackedState) and a._storage is None for a in args):
            _check_tracing(func)
        return run_dense(func, args, kwargs)


def memory_order(values: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, ``[numel]``."""
    if not is_dense(values):
        raise FormatMismatchError(
            where="packed state",
            found=f"size {tuple(values.size())} with strides {values.stride()}",
            expected="a dense, non-overlapping tensor",
        )
    return values.as_strided((values.numel(),), (1,), values.storage_offset())


def strides_of_states(param: Tensor) -> tuple[int, ...]:
    """The strides of ``zeros_like(param)``: those of the parameter, if it is dense."""
    if is_dense(param):
        return param.stride()
    return torch.empty_like(param, device="meta").stride()


def in_order_of(values: Tensor, like: Tensor) -> Tensor:
    """The elements of ``values`` in the order in which those of ``like`` lie in memory."""
    ordered = torch.empty_strided(
        like.size(), strides_of_states(like), dtype=values.dtype, device=like.device
    )
    return memory_order(ordered.copy_(values))


def is_dense(values: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlap."""
    if values.numel() == 0:
        return True
    expected = 1
    for size, stride in sorted(
        zip(values.size(), values.stride(), strict=True), key=lambda pair: pair[1]
    ):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _check_tracing(func: Any) -> None:
    """Only an optimizer's step may be traced on stand-ins: others would read the anchor."""
    if traced_optimizer() is None:
        raise TracingError(operation=func)


def _keeps_layout(state: PackedState, kwargs: dict[str, Any]) -> bool:
    """Whether a clone is the whole storage in the same layout, so that its codes can be copied."""
    return (
        state._storage is not None
        and kwargs.get("memory_format") in (None, torch.preserve_format)
        and state._storage.numel == state.numel()
        and is_dense(state)
    )


def is_view(func: Any) -> bool:
    """Whether the result shares memory with the first argument and writes nothing."""
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch work out the window on a meta tensor of the same geometry."""
    state: PackedState = args[0]
    numel = 0 if state._storage is None else state._storage.numel
    extent = (
        1
        + state.storage_offset()
        + sum((n - 1) * s for n, s in zip(state.size(), state.stride(), strict=True) if n > 0)
    )
    base = torch.empty(max(numel, extent), device="meta", dtype=state.dtype)
    window = base.as_strided(state.size(), state.stride(), state.storage_offset())

    def wrap(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        if out.dtype != state.dtype:
            raise FormatMismatchError(
                where=f"{func} of a packed state", found=str(out.dtype), expected=str(state.dtype)
            )
        offset = int(out.storage_offset())
        view = PackedState(
            state._storage, out.size(), out.stride(), offset, state.device, out.dtype
        )
        view._anchor = state._anchor
        return view

    return tree_map(wrap, func(window, *args[1:], **kwargs))


def run_dense(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    read: Callable[[PackedStorage], Tensor] = PackedStorage.read,
    write: Callable[[PackedStorage, Tensor], None] = PackedStorage.write,
) -> Any:
    """Run ``func`` on decoded values, then encode what it wrote.

    Windows on one storage become windows on one decoded copy, so aliasing is kept. ``read`` and
    ``write`` say where decoded values come from and go to.
    """
    flats: dict[int, Tensor] = {}
    dense_of: dict[int, Tensor] = {}
    originals: dict[int, PackedState] = {}

    def dense(x: Any) -> Any:
        if not isinstance(x, PackedState):
            return x
        if id(x) not in dense_of:
            if x._storage is None:
                value = x.dequantize().to(x.dtype)
            else:
                key = id(x._storage)
                if key not in flats:
                    flats[key] = read(x._storage).to(x.dtype)
                value = flats[key].as_strided(x.size(), x.stride(), x.storage_offset())
            dense_of[id(x)] = value
            originals[id(value)] = x
        return dense_of[id(x)]

    out = func(*tree_map(dense, args), **tree_map(dense, kwargs))
    for state in _written(func, args, kwargs):
        if state._storage is not None and id(state._storage) in flats:
            write(state._storage, flats.pop(id(state._storage)))
    return tree_map(lambda x: originals.get(id(x), x) if isinstance(x, Tensor) else x, out)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[PackedState]:
    """The packed arguments that the operator's schema says it writes."""
    written: list[PackedState] = []
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is None or not spec.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(spec.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, PackedState):
                written.append(item)
    return written
