"""`PackedStorage`: the physical side of a packed state (codes, scales, format, random stream)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from stq_compile import reference
from stq_compile.errors import FormatMismatchError, NegativeStateError
from stq_compile.formats import CONSTANT, FLOAT32, Format
from stq_compile.options import Rounding
from stq_compile.rounding import NEAREST, Noise, step_key

EAGER_CLOCK = 1 << 48
"""Eager writes draw their random bits from counters that no compiled step reaches."""


class PackedStorage:
    """``numel`` float32 values, in memory order, held in ``format``.

    A normalized format stores values in units of the square root of another state, its
    ``normalizer``; whenever that one is written, the states that depend on it are re-encoded, so
    that their values stay what they were.

    Attributes:
        codes: uint8 ``[blocks, 16 * width]``; int16 or float32 ``[numel]`` for 16 and 32 bits.
        scales: int16 ``[blocks]``, the bit patterns of the scale words; empty for 16 and 32.
        version: counts the replacements of the buffers, so that tables of pointers know.
        working: float32 ``[numel]``, while an eager step works on decoded values; they are then
            the state, and the codes are behind.
    """

    def __init__(
        self,
        numel: int,
        format: Format,
        *,
        normalizer: PackedStorage | None = None,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        _check_normalizer(format, normalizer, numel)
        self.numel = numel
        self.format = format
        self.normalizer = normalizer
        self.rounding: Rounding = rounding
        self.seed = seed
        self.stream = stream
        self.eager_writes = 0
        self.version = 0
        self.working: Tensor | None = None
        self.codes, self.scales = reference.empty_buffers(format, numel)
        self._dependents: weakref.WeakSet[PackedStorage] = weakref.WeakSet()
        if normalizer is not None:
            normalizer._dependents.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; a normalizer's bytes are its own."""
        return self.codes.nbytes + self.scales.nbytes

    def read(self) -> Tensor:
        """The values, float32 ``[numel]``, in a new tensor."""
        if self.working is not None:
            return self.working.clone()
        unit = None if self.normalizer is None else self.normalizer.read()
        return reference.decode(self.codes, self.scales, self.format, self.numel, unit)

    def write(self, values: Tensor) -> None:
        """Replace all values by float32 ``[numel]``, encoded in the present format."""
        format = FLOAT32 if self.format == CONSTANT else self.format
        values = self._checked(values, format)
        codes, scales = self._encoded(values, format, _values(self.normalizer))
        self._replace(codes, scales, format, self.normalizer)

    def rewrite(self, values: Tensor, format: Format) -> None:
        """Replace all values by float32 ``[numel]``, in another format (without normalizer)."""
        _check_normalizer(format, None, self.numel)
        codes, scales = self._encoded(self._checked(values, format), format, None)
        former = self.normalizer
        self._replace(codes, scales, format, None)
        if former is not None:
            former._dependents.discard(self)

    def reencode(self, format: Format, normalizer: PackedStorage | None = None) -> None:
        """Change the format and keep the values, up to the new format's rounding.

        All new codes, those of dependent states included, are complete before any old ones are
        dropped: a failure loses nothing.
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
        if self.format == CONSTANT and not float(self.codes):
            codes, scales = reference.empty_buffers(format, self.numel)
        else:
            values = self._checked(self.read(), format)
            codes, scales = self._encoded(values, format, _values(normalizer))
        former = self.normalizer
        self._replace(codes, scales, format, normalizer)
        if former is not None and former is not normalizer:
            former._dependents.discard(self)
        if normalizer is not None:
            normalizer._dependents.add(self)

    def fill(self, value: float) -> None:
        """Make a ``constant`` state hold ``value`` everywhere."""
        if self.format != CONSTANT:
            raise FormatMismatchError(
                where="packed state", found=f"format {self.format.name}", expected="a new state"
            )
        self.codes = torch.full((1,), value)

    def _replace(
        self, codes: Tensor, scales: Tensor, format: Format, normalizer: PackedStorage | None
    ) -> None:
        """Take new buffers; states in units of this one are re-encoded to keep their values."""
        renewed = []
        if self._dependents:
            unit = reference.decode(codes, scales, format, self.numel, _values(normalizer))
            renewed = [(s, s._encoded(s.read(), s.format, unit)) for s in self._dependents]
        self.codes, self.scales, self.format, self.normalizer = codes, scales, format, normalizer
        self.version += 1
        for state, buffers in renewed:
            state.codes, state.scales = buffers
            state.version += 1

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
        self.version += 1

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

    def _encoded(
        self, values: Tensor, format: Format, unit: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        noise = NEAREST
        if self.rounding == "stochastic":
            noise = Noise(step_key(self.seed, EAGER_CLOCK + self.eager_writes, self.stream))
        if bool(values.any()):  # zeros use no random number: the next write may have this one
            self.eager_writes += 1
        return reference.encode(values, format, noise, unit)

    def _checked(self, values: Tensor, format: Format | None = None) -> Tensor:
        format = format or self.format
        if values.numel() != self.numel:
            raise FormatMismatchError(
                where="packed state", found=f"{values.numel()} values", expected=str(self.numel)
            )
        values = values.detach().reshape(-1).float()
        if not format.signed and bool((values < 0).any()):
            raise NegativeStateError(minimum=float(values.min()), format=format.name)
        return values

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


def _values(storage: PackedStorage | None) -> Tensor | None:
    return None if storage is None else storage.read()


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
