"""One packed state in a checkpoint: a dict of plain types and tensors, and back.

    {"format": "ratio4", "size": [768, 768], "stride": [768, 1], "normalizer": "exp_avg_sq",
     "eager_writes": 0, "sharding": None, "split": False,
     "codes": uint8 [blocks, 64], "scales": int16 [blocks]}

Size and stride are those of the whole tensor. Of a sharded state, codes and scales are DTensors, so
that ``torch.distributed.checkpoint`` saves every part once and gives each process what it needs:

- Where torch would divide the rows of ``[blocks, 16 * width]`` between the blocks of the shards
  anyhow, they are one such tensor, the same that one process would save.
- Else (``split``: a border lies inside of a block, or rows are shared out unevenly) every shard's
  blocks stand behind one another, padded to the same number.

``sharding`` says how the state was sharded: sizes of the mesh, and for each of its dimensions the
tensor's dimension that is divided (-1 for none) and torch's factor of a strided shard.

A part that was saved is read as it is. A state that is read for another sharding is cut out block
by block where its blocks are blocks of the whole tensor in both; otherwise it is decoded and
encoded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stq_compile import reference
from stq_compile.errors import CheckpointError, FormatMismatchError, StqError
from stq_compile.formats import (
    BFLOAT16,
    BLOCK,
    FORMATS,
    MATRIX_FORMATS,
    Format,
    block_count,
    side,
)
from stq_compile.layout import unpack
from stq_compile.packed_state import in_order_of, strides_of_states
from stq_compile.shard_blocks import by_rows, is_split, mesh_of, rows_of, stretch
from stq_compile.shards import (
    Box,
    boxes,
    distributed,
    gathered,
    is_sharded,
    layout_of,
    local,
    place_of,
    placements_of,
    slices,
)
from stq_compile.storage import PackedStorage

MAX_SHARDS = 1 << 20
READABLE = {**FORMATS, **MATRIX_FORMATS}


def save(state: Tensor, normalizer: str | None) -> dict[str, Any]:
    """The entry of a state whose local tensor is packed."""
    held = local(state)
    storage: PackedStorage = held.packed
    codes, scales, split = storage.codes, storage.scales, False
    if held is not state:
        codes, scales, split = _spread(state, storage)
    return {
        "format": storage.format.name,
        "size": list(state.size()),
        "stride": list(state.stride()),
        "normalizer": normalizer,
        "eager_writes": storage.eager_writes,
        "sharding": layout_of(state),
        "split": split,
        "codes": codes,
        "scales": scales,
    }


def _spread(state: Tensor, storage: PackedStorage) -> tuple[Tensor, Tensor, bool]:
    """Codes and scales of all shards as DTensors; True if they are split."""
    if not state.is_contiguous():
        raise FormatMismatchError(
            where="checkpoint of a sharded state",
            found=f"strides {state.stride()}",
            expected="a contiguous tensor",
        )
    format, held = storage.format, local(state)
    if not format.blocked:
        if format.width == 0:
            return storage.codes, storage.scales, False
        codes = distributed(storage.codes.view(held.shape), state, state.shape)
        return codes, storage.scales, False
    rows, split = rows_of(state), is_split(state)
    if not split:
        total = block_count(state.numel())
    else:
        total = rows * len(boxes(tuple(state.shape), *mesh_of(layout_of(state))))
    parts = []
    for buffer in (storage.codes, storage.scales):
        if split and len(buffer) < rows:
            padded = buffer.new_zeros(rows, *buffer.shape[1:])
            padded[: len(buffer)] = buffer
            buffer = padded
        parts.append(distributed(buffer, state, (total, *buffer.shape[1:]), by_rows=True))
    return parts[0], parts[1], split


@dataclass
class Piece:
    """A box of the whole tensor, and its codes and scales."""

    box: Box
    codes: Tensor
    scales: Tensor


@dataclass
class Saved:
    """A state that was read from its entry and checked.

    ``own``: the pieces are what this process needs and nothing else.
    """

    format: Format
    shape: tuple[int, ...]
    eager_writes: int
    normalizer: Saved | None
    pieces: list[Piece]
    own: bool

    def values(self) -> Tensor:
        """All values, float32, of the whole tensor's shape."""
        unit = None if self.normalizer is None else self.normalizer.values()
        out = torch.zeros(self.shape)
        for piece in self.pieces:
            where = slices(piece.box)
            count = math.prod(piece.box[0])
            part = None if unit is None else unit[where].reshape(-1)
            flat = reference.decode(piece.codes, piece.scales, self.format, count, part)
            out[where] = flat.view(piece.box[0])
        return out

    def elements(self) -> Tensor:
        """The codes of a format that has one for each element, of the whole tensor's shape."""
        out = torch.zeros(self.shape, dtype=self.pieces[0].codes.dtype)
        for piece in self.pieces:
            out[slices(piece.box)] = piece.codes.view(piece.box[0])
        return out

    def blocks(self) -> tuple[Tensor, Tensor] | None:
        """Codes and scales of all blocks in order, if no piece begins inside of one."""
        found: list[tuple[int, Piece]] = []
        for piece in self.pieces:
            begin = stretch(piece.box, self.shape)
            if begin is None or begin % BLOCK:
                return None
            if len(piece.scales):
                found.append((begin, piece))
        found.sort(key=lambda pair: pair[0])
        ends = [begin + math.prod(piece.box[0]) for begin, piece in found]
        if [begin for begin, _ in found] != [0, *ends[:-1]]:
            return None
        codes = torch.cat([piece.codes for _, piece in found])
        return codes, torch.cat([piece.scales for _, piece in found])


def is_entry(value: Any) -> bool:
    """Whether a part of a checkpoint stands for a packed state."""
    return isinstance(value, Mapping) and "codes" in value


def place(
    saved: Saved,
    like: Tensor,
    options: Mapping[str, Any],
    normalizer: PackedStorage | None,
    device: torch.device,
) -> tuple[PackedStorage, bool]:
    """The part of a saved state that this process holds, and whether it is exact.

    Args:
        saved: the state.
        like: a tensor of its shape, strides and sharding.
        options: of the `PackedStorage`.
        normalizer: the placed normalizer of a normalized format.
        device: where it is to be; ``like`` may be a meta tensor.
    """
    held = local(like)
    cut = saved.format.whole and not saved.own  # a part of a matrix cannot be factored
    format = BFLOAT16 if cut else saved.format
    storage = PackedStorage(held.numel(), format, normalizer=normalizer, device=device, **options)
    storage.eager_writes = saved.eager_writes
    if saved.own or saved.format.width == 0:
        _hold(storage, saved.pieces[0].codes, saved.pieces[0].scales)
        return storage, True
    box = place_of(like)
    if not saved.format.blocked and not cut:
        storage.codes = in_order_of(saved.elements()[slices(box)], held)
        return storage, True
    same = None if cut else next((piece for piece in saved.pieces if piece.box == box), None)
    if same is not None and held.is_contiguous():  # divided as it was: these are its blocks
        _hold(storage, same.codes, same.scales)
        return storage, True
    begin = stretch(box, saved.shape) if held.is_contiguous() else None
    found = None if cut or begin is None or begin % BLOCK else saved.blocks()
    end = -1 if begin is None else begin + held.numel()
    if found is not None and begin is not None and (end % BLOCK == 0 or end == like.numel()):
        rows = slice(begin // BLOCK, block_count(end))
        codes, scales = found
        _hold(storage, codes[rows], scales[rows])
        return storage, True
    storage.write(in_order_of(saved.values()[slices(box)], held))
    return storage, False


def _hold(storage: PackedStorage, codes: Tensor, scales: Tensor) -> None:
    """Give a storage copies of buffers, on its device."""
    device = storage.device
    storage.codes, storage.scales = codes.to(device, copy=True), scales.to(device, copy=True)


def read(entry: Mapping[str, Any], like: Tensor, where: str, others: Mapping[str, Saved]) -> Saved:
    """Check an entry.

    Args:
        entry: what `save` gave.
        like: a tensor of the shape, strides and sharding that it must have.
        where: the entry's name, for errors.
        others: the states of the parameter that were read before, by key.

    Raises:
        CheckpointError: what is wrong, and where.
    """
    for name, expected in (
        ("size", list(like.size())),
        ("stride", list(strides_of_states(like))),
    ):
        if entry.get(name) != expected:
            raise CheckpointError(entry=f"{where}.{name}", found=entry.get(name), expected=expected)
    format = READABLE.get(str(entry.get("format")))
    matrix = len(like.shape) == 2
    square = matrix and like.shape[0] == like.shape[1]
    if format is None or (format.matrix and not matrix) or (format.whole and not square):
        names = ", ".join(READABLE if square else FORMATS)
        raise CheckpointError(entry=f"{where}.format", found=entry.get("format"), expected=names)
    normalizer = entry.get("normalizer")
    fits = normalizer is None
    if format.normalized:
        fits = isinstance(normalizer, str) and normalizer in others
        fits = fits and not others[str(normalizer)].format.normalized
    if not fits:
        raise CheckpointError(
            entry=f"{where}.normalizer",
            found=normalizer,
            expected="a packed state of the parameter" if format.normalized else None,
        )
    pieces, own = _read_pieces(entry, format, like, where)
    for piece in pieces:
        if format.whole:
            piece = _without_diagonal(piece, where)
        if format.coded.blocked:
            _check_codes(piece, format.coded, where)
    writes = whole_number(entry.get("eager_writes"), f"{where}.eager_writes")
    divisor = others[str(normalizer)] if format.normalized else None
    return Saved(format, tuple(like.shape), writes, divisor, pieces, own)


def _read_pieces(
    entry: Mapping[str, Any], format: Format, like: Tensor, where: str
) -> tuple[list[Piece], bool]:
    codes, scales = entry.get("codes"), entry.get("scales")
    sharding, split = entry.get("sharding"), entry.get("split", False)
    if type(split) is not bool or (split and (not format.blocked or sharding is None)):
        raise CheckpointError(entry=f"{where}.split", found=split, expected="True or False")
    shape = tuple(like.shape)
    mesh, placements = _read_sharding(sharding, shape, f"{where}.sharding")
    whole: Box = (shape, (0,) * len(shape))
    if is_sharded(codes):
        if _is_own(codes, like, format, sharding if split else None):
            box = place_of(like)
            count = block_count(math.prod(box[0])) if split else None
            parts = [local(codes)[:count], local(scales)[:count]]
            return [_piece(box, parts[0], parts[1], format, where)], True
        codes, scales = gathered(codes), gathered(scales)
    if not split:
        return [_piece(whole, codes, scales, format, where)], not is_sharded(like)
    places = boxes(shape, mesh, placements)
    rows = max(block_count(math.prod(size)) for size, _ in places)
    expected = (rows * len(places), format.block_bytes)
    _check_buffer(codes, torch.uint8, expected, f"{where}.codes")
    _check_buffer(scales, torch.int16, expected[:1], f"{where}.scales")
    assert isinstance(codes, Tensor)
    assert isinstance(scales, Tensor)
    pieces = []
    for i, box in enumerate(places):
        part = slice(i * rows, i * rows + block_count(math.prod(box[0])))
        pieces.append(Piece(box, codes[part].detach().cpu(), scales[part].detach().cpu()))
    return pieces, False


def _is_own(codes: Any, like: Tensor, format: Format, sharding: Any) -> bool:
    """Whether the local tensor of codes is this process's part of the state, no more and no less.

    ``sharding`` is given for split codes: they are in the order of the shards that were saved.
    """
    if not is_sharded(like):
        return False
    placed: Any = like  # a DTensor
    if codes.device_mesh != placed.device_mesh:
        return False
    if sharding is not None:
        return bool(sharding == layout_of(like))
    if not format.blocked:
        return format.width > 0 and layout_of(codes) == layout_of(like)
    return layout_of(codes) == by_rows(like) and not is_split(like)


def _piece(box: Box, codes: Any, scales: Any, format: Format, where: str) -> Piece:
    count = math.prod(box[0])
    empty = reference.empty_buffers(format, 0)
    with torch.device("meta"):
        shapes = [tuple(buffer.shape) for buffer in reference.empty_buffers(format, count)]
    by_element = not format.blocked and not format.whole
    if type(codes) is Tensor and by_element and tuple(codes.shape) == box[0]:
        codes = codes.reshape(-1) if codes.layout == torch.strided else codes
    _check_buffer(codes, empty[0].dtype, shapes[0], f"{where}.codes")
    _check_buffer(scales, empty[1].dtype, shapes[1], f"{where}.scales")
    return Piece(box, codes.detach().cpu(), scales.detach().cpu())


def _check_buffer(value: Any, dtype: torch.dtype, shape: tuple[int, ...], entry: str) -> None:
    found: Any = type(value)
    if type(value) is Tensor:
        plain = value.layout == torch.strided and value.device.type != "meta"
        found = (value.dtype, tuple(value.shape)) if plain else (value.layout, value.device)
    if found != (dtype, shape):
        raise CheckpointError(entry=entry, found=found, expected=(dtype, shape))


def _read_sharding(
    sharding: Any, shape: tuple[int, ...], entry: str
) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    if sharding is None:
        return (), ()
    try:
        mesh, dims = sharding
        rows = [(size, dim, factor) for size, (dim, factor) in zip(mesh, dims, strict=True)]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            entry=entry, found=repr(sharding), expected="(sizes, ((dimension, factor), ...))"
        ) from error
    shards = 1
    for size, dim, factor in rows:
        valid = all(type(x) is int for x in (size, dim, factor))
        if not valid or size < 1 or factor < 1 or not -1 <= dim < len(shape):
            raise CheckpointError(entry=entry, found=repr(sharding), expected="a mesh of sizes")
        shards *= size if dim >= 0 else 1
        if shards > MAX_SHARDS or factor > MAX_SHARDS:
            raise CheckpointError(
                entry=entry, found=f"{shards} shards", expected=f"at most {MAX_SHARDS}"
            )
    try:
        placements = placements_of(tuple((dim, factor) for _, dim, factor in rows))
    except StqError as error:
        raise CheckpointError(entry=entry, found=str(error), expected="no sharding") from error
    return tuple(size for size, _, _ in rows), placements


def _without_diagonal(piece: Piece, where: str) -> Piece:
    """The entries of a Cholesky factor below its diagonal, which is checked."""
    count = len(piece.scales) - 2 * side(math.prod(piece.box[0]))
    diagonal = piece.scales[count:].clone().view(torch.float32)
    if not bool((diagonal.isfinite() & (diagonal >= 0)).all()):
        raise CheckpointError(
            entry=f"{where}.scales", found="a diagonal that is negative or not finite",
            expected="that of a Cholesky factor",
        )  # fmt: skip
    return Piece(piece.box, piece.codes, piece.scales[:count])


def _check_codes(piece: Piece, format: Format, where: str) -> None:
    words = reference.scale_words(piece.scales)
    scales = reference.scale_pattern(words, format)
    least = reference.LEAST_SCALE_BITS[20 if format.kind == "adaptive_log" else 16]
    if bool(((words != 0) & ((scales < least) | (scales >= reference.INFINITY_BITS))).any()):
        raise CheckpointError(
            entry=f"{where}.scales",
            found="a negative, infinite or NaN scale, or one below the least",
            expected="finite scales",
        )
    for start in range(0, piece.codes.shape[0], reference.CHUNK_BLOCKS):
        chunk = unpack(piece.codes[start : start + reference.CHUNK_BLOCKS], format.width)
        if int(chunk.max()) > format.top_code:
            raise CheckpointError(
                entry=f"{where}.codes", found=int(chunk.max()), expected=f"<= {format.top_code}"
            )


def whole_number(value: Any, entry: str) -> int:
    """A number of at least 0, as it stands in a checkpoint."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(entry=entry, found=repr(value), expected="a whole number")
    return value
