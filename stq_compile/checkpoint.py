"""What ``optimizer.state_dict()`` holds for a compiled optimizer, and how it is read back.

A packed state is a dict of plain types and tensors, so ``torch.load(weights_only=True)`` takes the
file with nothing registered::

    {"format": "softsign4", "size": [768, 768], "stride": [768, 1], "normalizer": None,
     "eager_writes": 0, "codes": uint8 [blocks, 64], "scales": int16 [blocks]}

Beside ``state`` and ``param_groups`` stands ``stq``: the version of this layout, the seed and the
step of the random counter, the widths in force and what the planner knows. With them a resumed run
continues bit for bit, later decisions included. A checkpoint that is damaged or does not fit is
refused whole, before anything is changed.

The error of a compensated 16-bit parameter (design/0016) stands beside its states, under
``param_error``, and takes part in all of this; it belongs to the value that the parameter had when
it was saved. The float32 form has none, and neither has the stock optimizer: parameters are then
what is left of them in 16 bits. Loaded without compensation it is dropped, and what comes without
it starts from errors of zero.

Loaded under other options: widths and planner carry over if ``precision`` is the same, and the
next decision follows the new options (the first step decides at once if the budget is exceeded or a
width is not on the ladder). With another ``precision``, or from a run with a planner to one without
it, the states are converted to the widths that the new options give, and a planner starts anew.
Up to version 4 the codes of ``adaptive_log`` and ``midrise8`` stood for other numbers; such a
checkpoint is refused, and what wrote it can save it in the float32 form.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from stq_compile import saved_state
from stq_compile.capture import param_sources, params_of
from stq_compile.collective import anywhere
from stq_compile.errors import CheckpointError
from stq_compile.formats import CONSTANT, ULP8, WIDTHS
from stq_compile.halves import FLOAT_DTYPES
from stq_compile.packed_state import PackedState, is_dense, memory_order, strides_of_states
from stq_compile.planner import saved_plan
from stq_compile.planner.planner import Planner
from stq_compile.saved_state import whole_number
from stq_compile.session import Session
from stq_compile.shards import is_sharded, local, place_of, region_of, wrap
from stq_compile.state_tree import rebuilt, tensors
from stq_compile.step_graph import PARAM_ERROR, Source
from stq_compile.storage import PackedStorage

VERSION = 5
HEADER = "stq"
StateFormat = Literal["packed", "fp32"]


def attach(session: Session) -> None:
    """Register the hooks through which the optimizer saves and loads packed states."""
    optimizer = session.optimizer
    pending: list[Import] = []

    def save(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return export(session, state_dict, session.checkpoint_format)

    def load(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        pending[:] = [_read_together(session, state_dict)]
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
        index: _export_entries(entries, format) for index, entries in state_dict["state"].items()
    }
    if format == "packed":
        session.count_replays()
        for number, error in session.errors.items():
            out["state"].setdefault(number, {})[PARAM_ERROR] = saved_state.save(error, None)
        header = {
            "version": VERSION,
            "sizes": [list(param.shape) for param in session.params()],
            "seed": session.seed,
            "steps": session.steps,
            "precision": _plain(session.options.precision),
            "plan": [[param, key, width] for (param, key), width in session.plan.items()],
            "transitions": session.transitions,
            "planner": None if session.planner is None else session.planner.state_dict(),
        }
        out[HEADER] = header
        groups = list(state_dict["param_groups"])
        out["param_groups"] = [{**groups[0], HEADER: (header,)}, *groups[1:]]
    return out


def _export_entries(entries: Any, format: StateFormat) -> Any:
    """The states of one parameter, whatever containers they are in."""
    held = {key: local(value) for key, value in tensors(entries)}
    keys = {id(v.packed): key for key, v in held.items() if isinstance(v, PackedState)}

    def export_value(_: str, value: Any) -> Any:
        state = local(value)
        if not isinstance(state, PackedState):
            return value
        if format == "fp32":
            return wrap(state.dequantize(), value)
        return saved_state.save(value, keys.get(id(state.packed.normalizer)))

    return rebuilt(entries, export_value)


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
    reencoded: list[str] = field(default_factory=list)
    errors: dict[int, Tensor] = field(default_factory=dict)

    def apply(self, session: Session) -> None:
        """Let the session continue where the checkpoint was made."""
        session.reencoded = tuple(self.reencoded)
        session.count_replays()  # what was replayed until now is not to be counted later
        session.load_errors(self.errors)
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
    header = _take_header(out, header)
    found = Import(out)
    known = header is not None and _check_sizes(session, _mapping(header, HEADER))
    sources = param_sources(session.optimizer)
    states = _mapping(out.get("state"), "state")
    out["state"] = {
        index: _Reader(session, f"state[{index}]", params.get(index), sources, known, found).read(
            entries
        )
        for index, entries in states.items()
    }  # fmt: skip
    if header is not None:
        _read_header(session, found, _mapping(header, HEADER))
    return found


def _check_sizes(session: Session, header: Mapping[str, Any]) -> bool:
    """Whether the checkpoint says that it is of parameters of these shapes; it may not say."""
    sizes = header.get("sizes")
    if sizes is None:
        return False
    live = [list(param.shape) for param in session.params()]
    if not isinstance(sizes, (list, tuple)) or len(sizes) != len(live):
        raise CheckpointError(
            entry=f"{HEADER}.sizes", found=repr(sizes)[:200], expected=f"{len(live)} parameters"
        )
    for number, (found, expected) in enumerate(zip(sizes, live, strict=True)):
        if list(found) != expected:
            raise CheckpointError(
                entry=f"{HEADER}.sizes[{number}]", found=found, expected=expected
            )  # fmt: skip
    return True


def _read_together(session: Session, state_dict: Mapping[str, Any]) -> Import:
    """`read`, and where parameters are sharded, on all processes or on none."""
    try:
        found = read(session, state_dict)
        _rehearse(session.optimizer, found.state_dict)
    except Exception as error:
        anywhere(True, session.params())
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            entry="an entry", found=f"damaged ({type(error).__name__}: {error})",
            expected="what this optimizer saves",
        ) from error  # fmt: skip
    if anywhere(False, session.params()):
        raise CheckpointError(
            entry="the part of another process", found="damaged", expected="what its error says"
        )
    return found


def _rehearse(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load into a shallow copy: torch finds some defects only when the states are replaced."""
    copy = object.__new__(type(optimizer))
    copy.__dict__.update(optimizer.__dict__)
    copy._optimizer_load_state_dict_pre_hooks = OrderedDict()
    copy._optimizer_load_state_dict_post_hooks = OrderedDict()
    type(optimizer).load_state_dict(copy, state_dict)


def _take_header(out: dict[str, Any], header: Any) -> Any:
    """The header, which stands in the first group too: what torch.distributed.checkpoint keeps."""
    groups = []
    for group in out["param_groups"]:
        group = dict(_mapping(group, "param_groups"))
        own = group.pop(HEADER, None)
        if header is None and own is not None:
            if not isinstance(own, (tuple, list)) or len(own) != 1:
                raise CheckpointError(entry=HEADER, found=type(own).__name__, expected="(header,)")
            header = own[0]
        groups.append(group)
    out["param_groups"] = groups
    return header


def _saved_params(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[Any, Tensor]:
    """The live parameter behind each parameter number of the checkpoint, as torch pairs them."""
    try:
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            entry="param_groups", found=f"{error!r}", expected="a list of parameter groups"
        ) from error
    return dict(zip(saved, params_of(optimizer), strict=False))


def _read_header(session: Session, found: Import, header: Mapping[str, Any]) -> None:
    version = header.get("version")
    if version != VERSION:
        raise CheckpointError(
            entry=f"{HEADER}.version", found=version,
            expected=f'{VERSION}; save it with format="fp32" where it was written',
        )  # fmt: skip
    found.seed = whole_number(header.get("seed"), f"{HEADER}.seed")
    found.steps = whole_number(header.get("steps"), f"{HEADER}.steps")
    found.transitions = whole_number(header.get("transitions", 0), f"{HEADER}.transitions")
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
        if whole_number(width, entry) not in WIDTHS:
            raise CheckpointError(entry=entry, found=width, expected=f"one of {WIDTHS}")
        plan[(whole_number(param, entry), str(key))] = width
    return plan


class _Reader:
    """Reads the states of one parameter."""

    def __init__(
        self,
        session: Session,
        where: str,
        param: Tensor | None,
        sources: Mapping[int, Source],
        known: bool,
        found: Import,
    ) -> None:
        """``known``: whether the checkpoint is known to be of parameters of these shapes."""
        self.session, self.where, self.param, self.found = session, where, param, found
        self.source = None if param is None else sources[id(param)]
        live = {} if param is None else session.optimizer.state.get(param, {})
        self.live = dict(tensors(live))
        self.known = known
        self.states: dict[str, saved_state.Saved] = {}
        self.storages: dict[str, PackedStorage] = {}

    def read(self, entries: Any) -> Any:
        """The states; normalizers first, since others are in units of them."""
        entries = _mapping(entries, self.where)
        states = rebuilt(rebuilt(dict(entries), self._first), self._second)
        if PARAM_ERROR in self.states:
            assert self.source is not None
            self.found.errors[self.source.param] = states.pop(PARAM_ERROR)
        return states

    def _first(self, key: str, value: Any) -> Any:
        alone = saved_state.is_entry(value) and value.get("normalizer") is None
        return self._packed(key, value) if alone else value

    def _second(self, key: str, value: Any) -> Any:
        if saved_state.is_entry(value):
            return self._packed(key, value)
        if self.param is None or not isinstance(value, Tensor):
            return value
        if isinstance(local(value), PackedState):  # read before
            return value
        self._check_shape(key, value)
        return _taken(value, self.param)

    def _packed(self, key: str, entry: Mapping[str, Any]) -> Tensor:
        where = f"{self.where}.{key}"
        if self.param is None or self.source is None:
            raise CheckpointError(entry=where, found="no such parameter", expected="a parameter")
        like = self._like(key, entry)
        self.states[key] = state = saved_state.read(entry, like, where, self.states)
        if (state.format == ULP8) != (key == PARAM_ERROR):
            raise CheckpointError(
                entry=f"{where}.format",
                found=state.format.name,
                expected=f"{ULP8.name} for {PARAM_ERROR} and for nothing else",
            )
        source = Source(self.source.param, self.source.name, key)
        options = self.session.storage_options(source, region_of(like))
        divisor = self.storages.get(str(entry.get("normalizer")))
        device = local(self.param).device
        storage, exact = saved_state.place(state, like, options, divisor, device)
        self.storages[key] = storage
        if not exact:
            self.found.reencoded.append(where)
        return wrap(_packed(storage, local(like), self.param), like)

    def _like(self, key: str, entry: Mapping[str, Any]) -> Tensor:
        """A tensor of the shape, strides and sharding that a state must have.

        Those of the state that is there now. If there is none, the parameter's; or what the entry
        says, if it is known to be one of a parameter like this.
        """
        assert self.param is not None
        live = self.live.get(key)
        size, stride = entry.get("size"), entry.get("stride")
        if live is not None or not self.known or is_sharded(self.param):
            return self.param if live is None else live
        if size == list(self.param.shape):
            return self.param
        try:
            like = torch.empty_strided(size, stride, device="meta")  # type: ignore[arg-type]  # checked
            dense = is_dense(like)
        except (TypeError, RuntimeError):
            dense = False
        if not dense:
            where = f"{self.where}.{key}"
            raise CheckpointError(entry=where, found=(size, stride), expected="a dense tensor")
        return like

    def _check_shape(self, key: str, value: Tensor) -> None:
        """A state is a scalar, or of its parameter's shape, or of the shape that it has now."""
        assert self.param is not None
        live = self.live.get(key)
        shapes = [(), tuple(self.param.shape)]
        if live is not None:
            shapes.append(tuple(live.shape))
        fits = tuple(value.shape) in shapes
        if live is None:  # it may be a matrix or a vector along the parameter's dimensions
            fits = fits or self.known or {*value.shape} <= {1, *self.param.shape}
        if not fits or value.is_complex() or value.device.type == "meta":
            found = f"{value.dtype}{list(value.shape)} on {value.device}"
            entry = f"{self.where}.{key}"
            raise CheckpointError(entry=entry, found=found, expected=f"a shape of {shapes}")


def _taken(value: Tensor, param: Tensor) -> Tensor:
    """A state of another kind, as the optimizer should have it.

    Of a whole tensor for a sharded parameter, this process's part. A bfloat16 one is packed as it
    is: torch would make a float32 copy of every such state before the first could be packed. As
    torch does with float32 ones, it is taken and not copied.
    """
    if value.shape != param.shape or not value.ndim:
        return value
    if is_sharded(param) and not is_sharded(value):
        size, start = place_of(param)
        for dim, (n, s) in enumerate(zip(size, start, strict=True)):
            value = value.narrow(dim, s, n)
        value = wrap(value.contiguous(), param)
    held = local(value)
    if held.dtype != torch.bfloat16 or not is_dense(held) or held.stride() != local(param).stride():
        return value
    device = local(param).device
    storage = PackedStorage(held.numel(), CONSTANT, device=device)
    storage.take(memory_order(held.to(device)))
    return wrap(_packed(storage, held, param), value)


def _packed(storage: PackedStorage, like: Tensor, param: Tensor) -> PackedState:
    """A state of its parameter's type, which is what torch turns it into otherwise."""
    dtype = param.dtype if param.dtype in FLOAT_DTYPES else torch.float32
    return PackedState(storage, like.size(), strides_of_states(like), dtype=dtype)


def _mapping(value: Any, entry: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(entry=entry, found=type(value).__name__, expected="a dict")
    return value
