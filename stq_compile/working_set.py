"""A step that runs eagerly on packed states: decode, run the optimizer's own code, encode.

Every operator of the step is answered on decoded values (`packed_state.run_dense`), but a state is
not encoded after each operator that writes it. A `WorkingSet` keeps the decoded values of the
states of one parameter; when the step turns to the states of another parameter, and when it ends,
what was written is encoded, once. So a state is rounded once a step, as in a compiled step, and no
more than one parameter's states are in float32 at a time (all of them in a ``foreach`` optimizer,
whose operators take all of them).

A step may go over its parameters twice, and hand values from the first time to the second in a
state (AdaHessian's Hutchinson estimates, whose squares it then averages and divides by). Such a
state carries nothing from step to step: it is new, or overwritten before it is read. If it has
values of either sign, few bits would turn many of them into zeros before they are used. It is held
in bfloat16 until the step ends, and gets its own format then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stq_compile import interrupts
from stq_compile.birth import newborn
from stq_compile.formats import BFLOAT16, CONSTANT, FLOAT32, Format, MatrixKind, choose_format
from stq_compile.halves import FLOAT_DTYPES
from stq_compile.matrices import is_orthonormal, is_semidefinite, square_orthonormal
from stq_compile.packed_state import PackedState, is_dense, is_view, run_dense
from stq_compile.storage import DEVICES, REFERENCE, Codec, PackedStorage, Replacement

Owners = Callable[[], Mapping[int, tuple[int, int]]]
"""For every packed state that the optimizer holds, by ``id`` of its storage: the number of its
parameter, and the width that it is to be kept at. Asked again when an unknown one is met."""

aten = torch.ops.aten
OVERWRITES = {
    aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.copy_.default,
    aten._foreach_zero_.default, aten._foreach_copy_.default,
}  # fmt: skip
"""Operators after which nothing of the former values of their first argument is left."""

PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}


class WorkingSet(TorchDispatchMode):
    """Runs the operators of a ``with`` block on decoded states; encodes what was written.

    ``min_numel``: constants of so many elements or more are born packed; None leaves them alone.
    ``multiplied`` says afterwards whether the block multiplied matrices.
    """

    def __init__(self, owners: Owners, min_numel: int | None, codec: Codec = REFERENCE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.multiplied = False
        self._min_numel = min_numel
        self._codec = codec
        self._ask = owners
        self._owners = owners()
        self._decoded: set[PackedStorage] = set()
        self._present: set[int | None] = set()  # whose states these are
        self._written: set[PackedStorage] = set()
        self._met: dict[PackedStorage, bool] = {}  # whether nothing of before the step is in it
        self._held: dict[PackedStorage, Format] = {}  # in bfloat16, and in what before

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.multiplied = self.multiplied or func in PRODUCTS
        packed = [x for x in tree_leaves((args, kwargs)) if isinstance(x, PackedState)]
        if not packed and self._min_numel is not None:
            born = newborn(func, args, kwargs, self._min_numel)
            if born is not None:
                return born
        if not packed or is_view(func) or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        self._turn_to({self._owner(state.packed) for state in packed} - {None})
        self._meet(packed, tree_leaves(args[0]) if func in OVERWRITES else [])
        return run_dense(func, args, kwargs, self._read, self._write)

    def __exit__(self, kind: Any, *error: Any) -> None:
        """What is decoded is encoded; after an error it is forgotten, and the codes hold: the
        states of the parameter that the step was at are then as they were before it."""
        super().__exit__(kind, *error)  # type: ignore[no-untyped-call]  # torch's
        try:
            if kind is None:
                self._turn_to(set(), ended=True)
        finally:
            for storage in self._decoded:
                storage.working = None
            self._let_go()

    def _meet(self, states: Iterable[PackedState], overwritten: Iterable[Any]) -> None:
        """Note of states that the step comes to whether it makes them anew."""
        whole = {id(x) for x in overwritten if isinstance(x, Tensor)}
        for state in states:
            storage = state.packed
            if storage not in self._met:
                all_of_it = id(state) in whole and state.numel() == storage.numel
                self._met[storage] = storage.newborn or all_of_it

    def _owner(self, storage: PackedStorage) -> int | None:
        if id(storage) not in self._owners and storage.format == CONSTANT:
            # A newborn state, if it is none of the step's temporaries. What is decoded keeps its
            # owner, also if the optimizer holds it no more.
            kept = {id(s): self._owners[id(s)] for s in self._decoded}
            self._owners = kept | dict(self._ask())
        known = self._owners.get(id(storage))
        return None if known is None else known[0]

    def _read(self, storage: PackedStorage) -> Tensor:
        if id(storage) not in self._owners:
            return storage.read(self._codec)
        if storage.working is None:
            values = storage.read(self._codec)
            basis = storage.format.kind == "orthogonal"
            storage.working = square_orthonormal(values) if basis else values
            self._decoded.add(storage)
            self._present.add(self._owners[id(storage)][0])
        return storage.working

    def _write(self, storage: PackedStorage, values: Tensor) -> None:
        if storage.working is not None:
            if values is not storage.working:  # a cast of what `_read` gave; else that itself
                storage.working.copy_(values)
            self._written.add(storage)
        else:
            storage.write(values, self._codec)

    def _turn_to(self, owners: set[int | None], *, ended: bool = False) -> None:
        """Encode and forget the decoded states of all other owners; normalizers first.

        Not while the step stays with owners whose states are decoded: one that goes through a list
        tensor by tensor, between ``foreach`` operators on all of them, goes on with values that
        were not rounded. ``ended``: the step will not come back to any of them.
        """
        if owners <= self._present and not ended:
            return
        self._present &= owners
        done = [s for s in self._decoded if self._owners[id(s)][0] not in owners]
        made: list[Replacement] = []
        for storage in sorted(done, key=lambda s: s.format.normalized):
            values = storage.working
            assert values is not None
            if storage in self._written:
                if not ended and self._is_to_be_held(storage, values):
                    self._held.setdefault(storage, storage.format)
                    made.append(storage.encoded(values, BFLOAT16, codec=self._codec))
                    continue
                width = self._owners[id(storage)][1]
                encoded = encoded_as(storage, values, width, made, codec=self._codec)
                made += [] if encoded is None else [encoded]
        with interrupts.scope() as hold:
            hold()  # the states of one parameter change together
            for storage in done:
                storage.working = None
            self._decoded.difference_update(done)
            self._written.difference_update(done)
            for replacement in made:
                PackedStorage.replace(replacement)

    def _is_to_be_held(self, storage: PackedStorage, values: Tensor) -> bool:
        narrow = min(storage.format.width, self._owners[id(storage)][1]) < BFLOAT16.width
        if not (narrow and self._met[storage] and bool((values < 0).any())):
            return False
        # A factored matrix is kept well enough, and its values in bfloat16 may have no factor.
        return not is_semidefinite(values, known=storage.format.whole)

    def _let_go(self) -> None:
        """Give the states that were held in bfloat16 their own formats, one after the other."""
        for storage, former in self._held.items():
            values = storage.read(self._codec)
            if former == CONSTANT or former.normalized or former.whole or not former.signed:
                width = self._owners[id(storage)][1] if former == CONSTANT else former.width
                former = format_for(values, width)
            PackedStorage.replace(storage.encoded(values, former, codec=self._codec))
        self._held.clear()


def encoded_as(
    storage: PackedStorage,
    values: Tensor,
    width: int,
    before: Iterable[Replacement] = (),
    whole: Tensor | None = None,
    codec: Codec = REFERENCE,
    matrix: MatrixKind | None = None,
) -> Replacement | None:
    """New values of a state, as `PackedStorage.encoded`; None if nothing changes.

    The format changes only if they do not fit it: a state that is still a constant gets its format
    now, one that was never negative so far and is so now a signed format of the same width, and
    a matrix that is of its format's kind no more one for any values. ``matrix``: what the graph
    says of the values. ``whole``: all values of a state of which ``values`` are this process's
    part, so that all processes choose alike.
    """
    format, seen = storage.format, values if whole is None else whole
    if format == CONSTANT and not float(storage.codes) and not bool(seen.any()):
        return None
    unfit = not format.signed and bool((seen < 0).any())
    if format.matrix is not None:
        fits = is_semidefinite if format.whole else is_orthonormal
        unfit = not format.matrix == matrix == "orthogonal" and not fits(seen)
    if format == CONSTANT or unfit:
        width = width if format == CONSTANT else format.width
        wanted = format_for(seen, width, matrix, cut=whole is not None)
        return storage.encoded(values, wanted, codec=codec)
    return storage.encoded(values, before=before, codec=codec)


def format_for(
    values: Tensor, width: int, matrix: MatrixKind | None = None, *, cut: bool = False
) -> Format:
    """The format of a state of which nothing is known but its values, and ``matrix`` perhaps.

    Without it, a square matrix that is symmetric and positive semidefinite, or has orthonormal
    columns, counts as one that stays so (what does not is found out when it is next encoded).
    ``cut``: processes hold parts of it, so that none can factor it; it gets 16 bits then.
    """
    if width == FLOAT32.width:
        return FLOAT32
    if matrix != "orthogonal":
        fits = is_semidefinite(values, known=matrix == "semidefinite")
        matrix = "semidefinite" if fits else "orthogonal" if is_orthonormal(values) else None
    if matrix == "semidefinite" and cut:
        return BFLOAT16
    nonnegative = not bool((values < 0).any())
    return choose_format(width, nonnegative=nonnegative, normalizable=False, matrix=matrix)


LIKE_WEIGHTS = 0.9
"""Cosine from which on a state counts as a copy of its parameter."""

IN_DOUBLE = 1 << 20
"""Elements that are converted to float64 at a time."""


def is_like(value: Tensor, param: Any) -> bool:
    """Whether a state is a copy of the weights, or an average of them: slow weights, starting
    points, the iterate of a schedule-free optimizer. In their own shape, or in another one.

    A block's rounding error is a fraction of its largest weight, and a step moves weights by much
    less than that; such a state needs 16 bits to follow (design/0013).
    """
    if not isinstance(param, Tensor) or value.numel() != param.numel():
        return False
    values = value.dequantize() if isinstance(value, PackedState) else value.detach()
    flat = values.flatten(), param.detach().flatten()
    parts = zip(*(torch.split(x, IN_DOUBLE) for x in flat), strict=True)
    pairs = ((a.double(), b.double()) for a, b in parts)
    product, ours, theirs = (
        math.fsum(sums) for sums in zip(*((a @ b, a @ a, b @ b) for a, b in pairs), strict=True)
    )
    scale = math.sqrt(ours * theirs)
    return scale > 0 and product > LIKE_WEIGHTS * scale


def can_be_packed(value: Tensor) -> bool:
    """Whether an ordinary tensor may become a packed state."""
    return (
        type(value) is Tensor
        and value.dtype in FLOAT_DTYPES
        and value.device.type in DEVICES
        and value.layout == torch.strided
        and not value.requires_grad
        and is_dense(value)
    )
