"""The kernel that changes a state's format: decode in the old one, encode in the new one.

It works block by block, so no float32 copy of the state exists, and writes to new buffers, so the
old codes are whole until the new ones are. Both emitters take it as any other kernel.
"""

from __future__ import annotations

from stq_compile.codegen.expand import CODE_STORES, Stored, code_kind, decode, encode
from stq_compile.codegen.ir import Builder, Kernel, KernelOperand, OperandKind, Value
from stq_compile.codegen.lower import bytes_per_element
from stq_compile.codegen.verify import verify_kernel
from stq_compile.formats import Format
from stq_compile.options import Rounding

OLD, NEW, UNIT, KEY = "old", "new", "normalizer", "key"


def reencode_kernel(
    old: Format, new: Format, rounding: Rounding, normalizer: Format | None = None
) -> Kernel:
    """The kernel from ``old`` to ``new``; ``normalizer`` is the format of the state in whose
    units a normalized one of them is kept, and which must be in its final format."""
    operands = [*_buffers(OLD, old), *_buffers(NEW, new, written=True)]
    if normalizer is not None:
        operands += _buffers(UNIT, normalizer)
    key = KEY if rounding == "stochastic" and new.width < 32 else None
    if key is not None:
        operands.append(KernelOperand(KEY, OperandKind.KEY))
    b = Builder(f"reencode_{old.name}_{new.name}_{rounding}", operands)
    unit = None
    if normalizer is not None:
        b.origin, b.prefix = UNIT, f"{UNIT}_"
        unit = _value(b, UNIT, normalizer, None)
    b.origin, b.prefix = OLD, f"{OLD}_"
    value = _value(b, OLD, old, unit if old.normalized else None)
    b.origin, b.prefix = f"-> {NEW}", f"{NEW}_"
    _store(b, value, new, unit if new.normalized else None, key)
    b.kernel.summary = (
        f"{b.kernel.name}: a state from {old.name} to {new.name}; "
        f"{bytes_per_element(b.kernel):.2f} bytes per element"
    )
    verify_kernel(b.kernel)
    return b.kernel


def _buffers(stem: str, format: Format, *, written: bool = False) -> list[KernelOperand]:
    if format.kind == "float32":
        return [KernelOperand(f"{stem}_codes", OperandKind.FLOATS, written)]
    if not format.blocked:
        return [KernelOperand(f"{stem}_codes", code_kind(format), written, format.width)]
    codes = KernelOperand(f"{stem}_codes", OperandKind.CODES, written, format.width)
    return [codes, KernelOperand(f"{stem}_scales", OperandKind.WORDS, written)]


def _value(b: Builder, stem: str, format: Format, unit: Value | None) -> Value:
    if format.kind == "float32":
        return b.read("load", f"{stem}_codes")
    return decode(b, Stored(f"{stem}_codes", f"{stem}_scales", None, format), unit)


def _store(b: Builder, value: Value, format: Format, unit: Value | None, key: str | None) -> None:
    codes, scales = f"{NEW}_codes", f"{NEW}_scales"
    if format.kind == "float32":
        b.store("store", codes, value)
        return
    code, word = encode(b, value, Stored(codes, scales, key, format), unit)
    b.store(CODE_STORES[code_kind(format)], codes, code, width=format.width)
    if word is not None:
        b.store("store_word", scales, word)
