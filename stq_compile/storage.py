"""`PackedStorage`: the physical side of a packed state (codes, scales, format, random stream)."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stq_compile import interrupts, reference
from stq_compile.errors import FormatMismatchError, NegativeStateError
from stq_compile.formats import BFLOAT16, BLOCK, CONSTANT, FLOAT32, Format, block_count
from stq_compile.options import Rounding
from stq_compile.rounding import NEAREST, Noise, step_key

EAGER_CLOCK = 1 << 48
"""Eager writes draw their random bits from counters that no compiled step reaches."""

DEVICES = ("cpu", "cuda")
"""Types of the devices on which states may be packed (``cuda`` is AMD's name of a GPU, too)."""

TILE_BLOCKS = 1 << 12
"""Blocks that are converted at a time: two megabytes of float32, which stay in the cache."""


class Codec(Protocol):
    """What turns values into codes and back. `reference` is one; all give its bits."""

    def encode(
        self,
        x: Tensor,
        format: Format,
        noise: Noise,
        normalizer: Tensor | None = None,
        first_block: int = 0,
    ) -> tuple[Tensor, Tensor]: ...

    def decode(
        self,
        codes: Tensor,
        scales: Tensor,
        format: Format,
        numel: int,
        normalizer: Tensor | None = None,
    ) -> Tensor: ...


class Buffers(NamedTuple):
    """The codes and scales of ``numel`` values, and those of the state in whose units they are."""

    codes: Tensor
    scales: Tensor
    format: Format
    numel: int
    unit: Buffers | None = None

    def tile(self, start: int, count: int, codec: Codec) -> Tensor:
        """``count`` values from ``start`` on, the first of a block."""
        codes, scales = self._rows(start, count)
        unit = None if self.unit is None else self.unit.tile(start, count, codec)
        return codec.decode(codes, scales, self.format, count, unit)

    def put(self, start: int, count: int, made: tuple[Tensor, Tensor]) -> None:
        """Fill in the codes and scales of a tile."""
        for mine, other in zip(self._rows(start, count), made, strict=True):
            mine.copy_(other)

    def _rows(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        if self.format == CONSTANT or self.format.whole:
            return self.codes, self.scales
        if not self.format.blocked:
            return self.codes[start : start + count], self.scales
        rows = slice(start // BLOCK, start // BLOCK + block_count(count))
        return self.codes[rows], self.scales[rows]


REFERENCE: Codec = reference
_REPLACEMENTS = itertools.count(1)


class Renewal(NamedTuple):
    """What a state is to hold from now on, and its count of eager writes then."""

    storage: PackedStorage
    made: Buffers
    normalizer: PackedStorage | None
    eager_writes: int


Replacement = tuple[Renewal, ...]
"""A state's new buffers, and those of the states in its units."""


class PackedStorage:
    """``numel`` float32 values, in memory order, held in ``format``.

    A normalized format stores values in units of the square root of another state, its
    ``normalizer``; whenever that one is written, the states that depend on it are re-encoded, so
    that their values stay what they were.

    Attributes:
        codes: uint8 ``[blocks, 16 * width]``; int16 or float32 ``[numel]`` for 16 and 32 bits.
        scales: int16 ``[blocks]``, the bit patterns of the scale words; empty for 16 and 32.
        first_block: where the random counter begins: not at 0 for a shard of a larger tensor.
        sharded: whether other processes hold other parts of the tensor.
        version: counts the replacements of the buffers, so that tables of pointers know.
        replacements: a number that every replacement in any state changes, to one that was never
            there before, also where several threads change states.
        working: float32 ``[numel]``, while an eager step works on decoded values; they are then
            the state, and the codes are behind.
    """

    replacements = 0

    def __init__(
        self,
        numel: int,
        format: Format,
        *,
        normalizer: PackedStorage | None = None,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        stream: int = 0,
        first_block: int = 0,
        sharded: bool = False,
        device: torch.device | None = None,
    ) -> None:
        _check_normalizer(format, normalizer, numel)
        self.numel = numel
        self.format = format
        self.normalizer = normalizer
        self.rounding: Rounding = rounding
        self.seed = seed
        self.stream = stream
        self.first_block = first_block
        self.sharded = sharded
        self.eager_writes = 0
        self.version = 0
        self.working: Tensor | None = None
        self.codes, self.scales = reference.empty_buffers(format, numel, device)
        self._dependents: weakref.WeakSet[PackedStorage] = weakref.WeakSet()
        if normalizer is not None:
            normalizer._dependents.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; a normalizer's bytes are its own."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.codes.device

    def read(self, codec: Codec = REFERENCE) -> Tensor:
        """The values, float32 ``[numel]``, in a new tensor."""
        if self.working is not None:
            return self.working.clone()
        unit = None if self.normalizer is None else self.normalizer.read(codec)
        return codec.decode(self.codes, self.scales, self.format, self.numel, unit)

    @property
    def newborn(self) -> bool:
        """Whether it holds zeros that no step has written yet."""
        return self.format == CONSTANT and not float(self.codes)

    @property
    def buffers(self) -> Buffers:
        """All that the values are made from."""
        unit = None if self.normalizer is None else self.normalizer.buffers
        return Buffers(self.codes, self.scales, self.format, self.numel, unit)

    def write(self, values: Tensor, codec: Codec = REFERENCE) -> None:
        """Replace all values by float32 ``[numel]``, encoded in the present format."""
        self.replace(self.encoded(values, codec=codec))

    def rewrite(self, values: Tensor, format: Format, codec: Codec = REFERENCE) -> None:
        """Replace all values by float32 ``[numel]``, in another format (without normalizer)."""
        self.replace(self.encoded(values, format, codec=codec))

    def encoded(
        self,
        values: Tensor,
        format: Format | None = None,
        before: Iterable[Replacement] = (),
        codec: Codec = REFERENCE,
    ) -> Replacement:
        """What `replace` takes to hold float32 ``[numel]``, in the present format or another one
        (without normalizer). Changes nothing; all memory that the change needs is taken here.

        ``before``: what will have been replaced by then, the normalizer perhaps.
        """
        if values.numel() != self.numel:
            raise FormatMismatchError(
                where="packed state", found=f"{values.numel()} values", expected=str(self.numel)
            )
        values = values.detach().reshape(-1).float()
        source = Buffers(values, self.scales.new_empty(0), FLOAT32, self.numel)
        if format is None:
            format = FLOAT32 if self.format == CONSTANT else self.format
            normalizer = self.normalizer
        else:
            _check_normalizer(format, None, self.numel)
            normalizer = None
        unit = None if normalizer is None else normalizer.buffers
        for renewal in itertools.chain(*before):
            unit = renewal.made if renewal.storage is normalizer else unit
        made, writes = self._converted(source, format, unit, codec)
        return self._replacement(made, normalizer, writes, codec)

    def reencode(
        self,
        format: Format,
        normalizer: PackedStorage | None = None,
        *,
        codec: Codec = REFERENCE,
        following: Mapping[PackedStorage, Format] = MappingProxyType({}),
    ) -> None:
        """Change the format and keep the values, up to the new format's rounding.

        Tile by tile, so that no float32 copy of the state exists. All new codes, those of
        dependent states included, are complete before any old ones are dropped: a failure loses
        nothing. A dependent state takes the format that ``following`` gives it, in the same go.
        """
        _check_normalizer(format, normalizer, self.numel)
        if normalizer is self or (format.normalized and self._dependents):
            raise FormatMismatchError(
                where=f"format {format.name}",
                found="a state in whose units others are kept",
                expected="a state that no other depends on",
            )
        if format == self.format and normalizer is self.normalizer:
            return
        unit = None if normalizer is None else normalizer.buffers
        writes = self.eager_writes
        if self.newborn:
            codes, scales = reference.empty_buffers(format, self.numel, self.device)
            made = Buffers(codes, scales, format, self.numel, unit)
        else:
            made, writes = self._converted(self.buffers, format, unit, codec)
        self.replace(self._replacement(made, normalizer, writes, codec, following))

    def take(self, values: Tensor) -> None:
        """Make a ``constant`` state hold float32 or bfloat16 ``[numel]``, in their own memory."""
        self._check_new()
        half = values.dtype == torch.bfloat16
        format, codes = (BFLOAT16, values.view(torch.int16)) if half else (FLOAT32, values)
        self._take(Buffers(codes, self.scales, format, self.numel), None)

    def fill(self, value: float) -> None:
        """Make a ``constant`` state hold ``value`` everywhere."""
        self._check_new()
        self.codes = torch.full((1,), value, device=self.device)

    def _check_new(self) -> None:
        if self.format != CONSTANT:
            raise FormatMismatchError(
                where="packed state", found=f"format {self.format.name}", expected="a new state"
            )

    def _replacement(
        self,
        made: Buffers,
        normalizer: PackedStorage | None,
        writes: int,
        codec: Codec = REFERENCE,
        following: Mapping[PackedStorage, Format] = MappingProxyType({}),
    ) -> Replacement:
        """New buffers of this state, and of those in its units, which keep their values."""
        renewed = [Renewal(self, made, normalizer, writes)]
        for state in list(self._dependents):
            format = following.get(state, state.format)
            unit = made if format.normalized else None
            own, count = state._converted(state.buffers, format, unit, codec)
            renewed.append(Renewal(state, own, self if format.normalized else None, count))
        return tuple(renewed)

    @staticmethod
    def replace(replacement: Replacement) -> None:
        """Take new buffers, all of them: signals wait, and no tensor is allocated."""
        with interrupts.scope() as hold:
            hold()
            for storage, made, normalizer, writes in replacement:
                storage._take(made, normalizer)
                storage.eager_writes = writes

    def _take(self, made: Buffers, normalizer: PackedStorage | None) -> None:
        former = self.normalizer
        self.codes, self.scales, self.format = made.codes, made.scales, made.format
        self.normalizer = normalizer
        if former is not normalizer:
            if former is not None:
                former._dependents.discard(self)
            if normalizer is not None:
                normalizer._dependents.add(self)
        self.buffers_replaced()

    def buffers_replaced(self) -> None:
        """Let those know who keep the buffers' addresses."""
        self.version += 1
        PackedStorage.replacements = next(_REPLACEMENTS)

    def kept(self) -> dict[str, Any]:
        """What `restore` takes: references to the buffers, which a change of format replaces."""
        names = ("codes", "scales", "format", "normalizer", "eager_writes")
        return {name: getattr(self, name) for name in names}

    def restore(self, kept: dict[str, Any]) -> None:
        """Undo changes of format."""
        if self.normalizer is not None:
            self.normalizer._dependents.discard(self)
        self.__dict__.update(kept)
        if self.normalizer is not None:
            self.normalizer._dependents.add(self)
        self.buffers_replaced()

    def clone(self) -> PackedStorage:
        """An independent copy, with a copy of its own of the normalizer."""
        other = PackedStorage.__new__(PackedStorage)
        other.__dict__.update(self.__getstate__())
        other._dependents = weakref.WeakSet()
        other.codes, other.scales = self.codes.clone(), self.scales.clone()
        if self.normalizer is not None:
            other.normalizer = self.normalizer.clone()
            other.normalizer._dependents.add(other)
        return other

    def _converted(
        self, source: Buffers, format: Format, unit: Buffers | None, codec: Codec
    ) -> tuple[Buffers, int]:
        """The values of ``source`` in ``format``, by this state's rounding and random stream, and
        the count of eager writes after it."""
        noise = NEAREST
        if self.rounding == "stochastic" and format.kind != "orthogonal":
            noise = Noise(step_key(self.seed, EAGER_CLOCK + self.eager_writes, self.stream))
        buffers = reference.empty_buffers(format, self.numel, self.device)
        made = Buffers(*buffers, format, self.numel, unit)
        nonzero = False
        whole = source.format.whole or format.whole
        tile = max(self.numel, 1) if whole else TILE_BLOCKS * BLOCK
        for start in range(0, self.numel, tile):
            count = min(tile, self.numel - start)
            values = source.tile(start, count, codec)
            if source.format.signed and not format.signed and bool((values < 0).any()):
                raise NegativeStateError(minimum=float(values.min()), format=format.name)
            root = None if unit is None else unit.tile(start, count, codec)
            block = self.first_block + start // BLOCK
            made.put(start, count, codec.encode(values, format, noise, root, block))
            nonzero = nonzero or bool(values.any())
        # Zeros use no random number: the next write may have this one. But all shards count alike.
        return made, self.eager_writes + int(self.sharded or nonzero)

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k != "_dependents"}
        if self.working is not None:
            codes, scales = reference.encode(self.working, FLOAT32, NEAREST)
            plain = {"format": FLOAT32, "codes": codes, "scales": scales, "normalizer": None}
            state |= {**plain, "working": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._dependents = weakref.WeakSet()
        if self.normalizer is not None and "_dependents" in self.normalizer.__dict__:
            self.normalizer._dependents.add(self)


def _check_normalizer(format: Format, normalizer: PackedStorage | None, numel: int) -> None:
    if format.normalized != (normalizer is not None):
        raise FormatMismatchError(
            where=f"format {format.name}",
            found="a normalizer" if normalizer is not None else "no normalizer",
            expected="one" if format.normalized else "none",
        )
    if normalizer is not None and normalizer.numel != numel:
        raise FormatMismatchError(
            where=f"normalizer of format {format.name}",
            found=f"{normalizer.numel} values",
            expected=str(numel),
        )
    if normalizer is not None and normalizer.format.normalized:
        raise FormatMismatchError(
            where=f"normalizer of format {format.name}",
            found=f"the normalized format {normalizer.format.name}",
            expected="a format with scales of its own",
        )
