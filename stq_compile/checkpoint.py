"""What ``optimizer.state_dict()`` holds for a compiled optimizer, and how it is read back.

A packed state is a dict of plain types and tensors, so ``torch.load(weights_only=True)`` takes the
file with nothing registered::

    {"format": "softsign4", "size": [768, 768], "stride": [768, 1], "normalizer": None,
     "eager_writes": 0, "codes": uint8 [blocks, 64], "scales": int16 [blocks]}

Beside ``state`` and ``param_groups`` stands ``stq``: the version of this layout, the seed and the
step of the random counter, the widths in force and what the planner knows. With them a resumed run
continues bit for bit, later decisions included. A checkpoint that is damaged or does not fit is
refused whole, before anything is changed.

Loaded under other options: widths and planner carry over if ``precision`` is the same, and the
next decision follows the new options (the first step decides at once if the budget is exceeded or a
width is not on the ladder). With another ``precision``, or from a run with a planner to one without
it, the states are converted to the widths that the new options give, and a planner starts anew.
Version 1 had no planner; it loads as a checkpoint of a run without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from stq_compile import reference
from stq_compile.errors import CheckpointError, StqError
from stq_compile.formats import FORMATS, WIDTHS, Format
from stq_compile.layout import unpack
from stq_compile.packed_state import PackedState
from stq_compile.planner import saved_plan
from stq_compile.planner.planner import Planner
from stq_compile.session import Session
from stq_compile.storage import PackedStorage

VERSION = 2
READABLE = (1, 2)
HEADER = "stq"
StateFormat = Literal["packed", "fp32"]


def attach(session: Session) -> None:
    """Register the hooks through which the optimizer saves and loads packed states."""
    optimizer = session.optimizer
    pending: list[Import] = []

    def save(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return export(session, state_dict, session.checkpoint_format)

    def load(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        pending[:] = [read(session, state_dict)]
        return pending[0].state_dict

    def loaded(_: Optimizer) -> None:
        pending.pop().apply(session)
        session.loaded = True

    if not hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
        return  # a wrapper that never called Optimizer.__init__ has no hooks
    session.hooks = [
        optimizer.register_state_dict_post_hook(save),
        optimizer.register_load_state_dict_pre_hook(load),
        optimizer.register_load_state_dict_post_hook(loaded),
    ]


def export(session: Session, state_dict: dict[str, Any], format: StateFormat) -> dict[str, Any]:
    """A stock ``state_dict`` with its packed states in the given form; the live states stay."""
    out = dict(state_dict)
    out["state"] = {
        index: {
            key: _export_value(value, entries, format) for key, value in entries.items()
        }
        for index, entries in state_dict["state"].items()
    }  # fmt: skip
    if format == "packed":
        out[HEADER] = {
            "version": VERSION,
            "seed": session.seed,
            "steps": session.steps,
            "precision": _plain(session.options.precision),
            "plan": [[param, key, width] for (param, key), width in session.plan.items()],
            "transitions": session.transitions,
            "planner": None if session.planner is None else session.planner.state_dict(),
        }
    return out


def _export_value(value: Any, entries: Mapping[str, Any], format: StateFormat) -> Any:
    if not isinstance(value, PackedState):
        return value
    if format == "fp32":
        return value.dequantize()
    storage = value.packed
    normalizer = next(
        (
            key
            for key, other in entries.items()
            if isinstance(other, PackedState) and other.packed is storage.normalizer
        ),
        None,
    )
    return {
        "format": storage.format.name,
        "size": list(value.size()),
        "stride": list(value.stride()),
        "normalizer": normalizer,
        "eager_writes": storage.eager_writes,
        "codes": storage.codes,
        "scales": storage.scales,
    }


def _plain(precision: Any) -> Any:
    return dict(precision) if isinstance(precision, Mapping) else precision


@dataclass
class Import:
    """A checkpoint that was read and checked: the stock form of it, and what the session takes."""

    state_dict: dict[str, Any]
    seed: int | None = None
    steps: int = 0
    transitions: int = 0
    plan: dict[tuple[int, str], int] = field(default_factory=dict)
    planner: Mapping[str, Any] | None = None

    def apply(self, session: Session) -> None:
        """Let the session continue where the checkpoint was made."""
        if self.seed is None:
            return
        session.seed, session.steps, session.plan = self.seed, self.steps, self.plan
        session.transitions = self.transitions
        if session.planner is not None:
            session.planner = Planner(session.options)
            if self.planner is not None:
                session.planner.load_state_dict(self.planner)


def read(session: Session, state_dict: Mapping[str, Any]) -> Import:
    """Check a state dict and turn packed entries into `PackedState`; nothing is changed.

    Raises:
        CheckpointError: an entry is damaged, or does not fit the optimizer; it is named.
    """
    out = dict(state_dict)
    header = out.pop(HEADER, None)
    params = _saved_params(session.optimizer, out)
    states = _mapping(out.get("state"), "state")
    out["state"] = {
        index: _read_entries(session, index, entries, params.get(index))
        for index, entries in states.items()
    }
    found = Import(out)
    if header is not None:
        _read_header(session, found, _mapping(header, HEADER))
    return found


def _saved_params(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[Any, Tensor]:
    """The live parameter behind each parameter number of the checkpoint, as torch pairs them."""
    try:
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            entry="param_groups", found=f"{error!r}", expected="a list of parameter groups"
        ) from error
    live = [p for group in optimizer.param_groups for p in group["params"]]
    return dict(zip(saved, live, strict=False))


def _read_header(session: Session, found: Import, header: Mapping[str, Any]) -> None:
    version = header.get("version")
    if version not in READABLE:
        raise CheckpointError(entry=f"{HEADER}.version", found=version, expected=VERSION)
    found.seed = _whole(header.get("seed"), f"{HEADER}.seed")
    found.steps = _whole(header.get("steps"), f"{HEADER}.steps")
    found.transitions = _whole(header.get("transitions", 0), f"{HEADER}.transitions")
    plan = _read_plan(header.get("plan"))
    planner = header.get("planner")
    if planner is not None:
        saved_plan.check(planner, f"{HEADER}.planner", plan)
    same = header.get("precision") == _plain(session.options.precision)
    if same and (planner is None or session.planner is not None):
        found.plan, found.planner = plan, planner


def _read_plan(rows: Any) -> dict[tuple[int, str], int]:
    entry = f"{HEADER}.plan"
    plan = {}
    if not isinstance(rows or (), (list, tuple)):
        raise CheckpointError(entry=entry, found=type(rows).__name__, expected="a list")
    for row in rows or ():
        try:
            param, key, width = row
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                entry=entry, found=repr(row), expected="[parameter, state, width]"
            ) from error
        if _whole(width, entry) not in WIDTHS:
            raise CheckpointError(entry=entry, found=width, expected=f"one of {WIDTHS}")
        plan[(_whole(param, entry), str(key))] = width
    return plan


def _read_entries(session: Session, index: Any, saved: Any, param: Tensor | None) -> dict[str, Any]:
    """The states of one parameter; normalizers first, since others are in units of them."""
    entries: dict[str, Any] = dict(_mapping(saved, f"state[{index}]"))
    packed = {k: v for k, v in entries.items() if isinstance(v, Mapping) and "codes" in v}
    storages: dict[str, PackedStorage] = {}
    for key in sorted(packed, key=lambda k: packed[k].get("normalizer") is not None):
        where = f"state[{index}].{key}"
        if param is None:
            raise CheckpointError(entry=where, found="no such parameter", expected="a parameter")
        storage = _read_storage(session, packed[key], param, where, storages)
        storages[key] = storage
        entries[key] = PackedState(storage, param.size(), param.stride())
    return entries


def _read_storage(
    session: Session,
    entry: Mapping[str, Any],
    param: Tensor,
    where: str,
    storages: Mapping[str, PackedStorage],
) -> PackedStorage:
    for name, expected in (("size", list(param.size())), ("stride", list(param.stride()))):
        if entry.get(name) != expected:
            raise CheckpointError(entry=f"{where}.{name}", found=entry.get(name), expected=expected)
    format = FORMATS.get(str(entry.get("format")))
    if format is None:
        raise CheckpointError(
            entry=f"{where}.format", found=entry.get("format"), expected=", ".join(FORMATS)
        )
    normalizer = entry.get("normalizer")
    if (normalizer is not None) != format.normalized or (
        normalizer is not None and normalizer not in storages
    ):
        raise CheckpointError(
            entry=f"{where}.normalizer",
            found=normalizer,
            expected="a packed state of the parameter" if format.normalized else None,
        )
    codes, scales = _read_buffers(entry, format, param.numel(), where)
    try:
        storage = PackedStorage(
            param.numel(),
            format,
            normalizer=None if normalizer is None else storages[str(normalizer)],
            rounding=session.options.rounding,
            seed=session.seed,
        )
    except StqError as error:
        raise CheckpointError(entry=where, found=str(error), expected="a valid state") from error
    storage.codes, storage.scales = codes, scales
    storage.eager_writes = _whole(entry.get("eager_writes"), f"{where}.eager_writes")
    return storage


def _read_buffers(
    entry: Mapping[str, Any], format: Format, numel: int, where: str
) -> tuple[Tensor, Tensor]:
    """Codes and scales, copied, since a step writes into them."""
    buffers = []
    empty = reference.empty_buffers(format, 0)
    shapes = _buffer_shapes(format, numel)
    for name, like, shape in zip(("codes", "scales"), empty, shapes, strict=True):
        value = entry.get(name)
        found = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value)
        if found != (like.dtype, shape):
            raise CheckpointError(
                entry=f"{where}.{name}", found=found, expected=(like.dtype, shape)
            )
        assert isinstance(value, Tensor)
        buffers.append(value.detach().clone())
    codes, scales = buffers
    if format.blocked:
        _check_codes(codes, scales, format, where)
    return codes, scales


def _buffer_shapes(format: Format, numel: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    with torch.device("meta"):
        codes, scales = reference.empty_buffers(format, numel)
    return tuple(codes.shape), tuple(scales.shape)


def _check_codes(codes: Tensor, scales: Tensor, format: Format, where: str) -> None:
    words = scales.to(torch.int32) & 0xFFFF
    limit = 0x7F7 << 5 | 31 if format.kind == "adaptive_log" else 0x7F7F
    if words.numel() and int(words.max()) > limit:
        raise CheckpointError(
            entry=f"{where}.scales",
            found="a negative, infinite or NaN scale",
            expected="finite scales",
        )
    for start in range(0, codes.shape[0], reference.CHUNK_BLOCKS):
        chunk = unpack(codes[start : start + reference.CHUNK_BLOCKS], format.width)
        if int(chunk.max()) > format.top_code:
            raise CheckpointError(
                entry=f"{where}.codes", found=int(chunk.max()), expected=f"<= {format.top_code}"
            )


def _mapping(value: Any, entry: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(entry=entry, found=type(value).__name__, expected="a dict")
    return value


def _whole(value: Any, entry: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(entry=entry, found=repr(value), expected="a whole number")
    return value
