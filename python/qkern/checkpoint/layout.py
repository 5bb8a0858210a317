"""Where everything goes in an output file, before the first byte is read. No torch.

    8 bytes, header, spaces | body | tail

The header comes last into room that is enough for any header the file can get: safetensors allows
spaces behind it. The body has a place for all that is known: dense tensors and fp32 scales, codes.
Whether 8 bits hold a weight's scales is known only after it was quantized, so these scales are
written to a slot of a second file, the spill, and copied into the tail at the end. There are no
gaps, and numbers are aligned to their size, in the file and in its data: what is no multiple of
four bytes is at the very end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from qkern.checkpoint.entries import Piece, weight_pieces
from qkern.checkpoint.stream import Done
from qkern.errors import CorruptFileError, FormatError
from qkern.formats import QuantFormat

_LARGEST_HEADER: Final = 100_000_000  # safetensors reads no larger one
_COPIED: Final = 1 << 22  # bytes at a time


class Weight(NamedTuple):
    """A tensor that is quantized.

    Args:
        name: its key.
        shape: of the dense tensor.
        dtype: of the dense tensor, as torch names it.
        format: after ``for_shape``; with ``double_quant`` what is tried.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: QuantFormat


class Place(NamedTuple):
    """Where a job writes: in the file itself or in its spill, in bytes from the start."""

    in_spill: bool
    offset: int


class ShardLayout:
    """One output file.

    Args:
        name: of the file.
        items: entries as pieces, with or without content, and weights; their order is kept where
            alignment allows.
        metadata: of the header.

    Attributes:
        name: of the file.
        items: as given.
        places: of every key that a job writes: dense tensors, codes, and scales, those of a
            double-quantized weight under the key of the scales with second-level ones behind.
        start: bytes before the data.
        body_end: bytes before the tail.
        spill_size: bytes of the spill.
        most: bytes that the file has at most.

    Raises:
        CorruptFileError: if two entries would have one key.
        FormatError: if the header would be larger than readers take.
    """

    def __init__(
        self, name: str, items: Sequence[Piece | Weight], metadata: Mapping[str, str]
    ) -> None:
        self.name = name
        self.items = tuple(items)
        self.places: dict[str, Place] = {}
        self.spill_size = 0
        self._metadata = dict(metadata)
        self._body: list[Piece] = []
        bound = self._place_items()
        self._body.sort(key=lambda piece: -item_size(piece.dtype))
        body, data = sum(piece.nbytes for piece in self._body), self._most_data(bound)
        self.start = 8 + _round_up(self._header_bound(bound, data))
        if self.start > _LARGEST_HEADER:
            msg = f"{name}: its header would have {self.start} bytes, readers take 100,000,000"
            raise FormatError(msg)
        offset = self.start
        for piece in self._body:
            self.places[piece.key] = Place(in_spill=False, offset=offset)
            offset += piece.nbytes
        self.body_end = self.start + body
        self.most = self.start + data

    def finish(self, path: Path, spill: Path, done: Mapping[str, Done]) -> dict[str, int]:
        """Write the tail and the header of a file whose body and spill are written.

        Args:
            path: of the file.
            spill: of its spill.
            done: what became of each weight, by its name.

        Returns:
            The bytes of every entry by its key.
        """
        tail = self._tail(done)
        pieces = [*self._body, *(piece for piece, _ in tail)]
        header = self._header(pieces)
        with path.open("r+b") as file, spill.open("rb") as spilled:
            file.seek(self.body_end)
            for piece, place in tail:
                if piece.content is not None:
                    file.write(piece.content)
                elif place is not None:
                    _copy(spilled, place.offset, piece.nbytes, file)
            file.truncate()
            file.seek(0)
            file.write(header)
        return {piece.key: piece.nbytes for piece in pieces}

    def _place_items(self) -> list[tuple[tuple[Piece, ...], ...]]:
        """Give each item a place in body or spill; all entries it can have, by variants."""
        variants: list[tuple[tuple[Piece, ...], ...]] = []
        keys: dict[str, None] = {}
        for item in self.items:
            if isinstance(item, Piece):
                if item.content is None:
                    self._place(item)
                variants.append(((item,),))
            else:
                variants.append(self._place_weight(item))
            for key in {piece.key: None for variant in variants[-1] for piece in variant}:
                if key in keys:
                    msg = f"{self.name}: two entries would have the key {key}"
                    raise CorruptFileError(msg)
                keys[key] = None
        return variants

    def _place(self, piece: Piece) -> None:
        if piece.nbytes % 4 == 0:
            self._body.append(piece)
        else:
            self._spill(piece.key, piece.nbytes)

    def _spill(self, key: str, nbytes: int) -> None:
        self.places[key] = Place(in_spill=True, offset=self.spill_size)
        self.spill_size += _round_up(nbytes)

    def _place_weight(self, weight: Weight) -> tuple[tuple[Piece, ...], ...]:
        pieces = weight_pieces(*weight)
        self._place(pieces.codes)
        if not weight.format.double_quant:
            self._place(pieces.scales)
            return ((pieces.codes, pieces.scales, *pieces.tables),)
        plain = weight_pieces(*weight[:3], weight.format.replace(double_quant=False))
        assert pieces.nested is not None
        nested = pieces.scales.nbytes + pieces.nested.nbytes
        self._spill(pieces.scales.key, max(nested, plain.scales.nbytes))
        return (
            (pieces.codes, pieces.scales, pieces.nested, *pieces.tables),
            (plain.codes, plain.scales, *plain.tables),
        )

    def _tail(self, done: Mapping[str, Done]) -> list[tuple[Piece, Place | None]]:
        """Entries behind the body, in their order, and where their bytes lie in the spill."""
        tail: list[tuple[Piece, Place | None]] = []

        def add(piece: Piece, behind: int = 0, key: str | None = None) -> None:
            place = self.places.get(key or piece.key)
            if piece.content is not None:
                tail.append((piece, None))
            elif place is not None and place.in_spill:
                tail.append((piece, Place(in_spill=True, offset=place.offset + behind)))

        for item in self.items:
            if isinstance(item, Piece):
                add(item)
                continue
            result = done[item.name]
            nested = item.format.double_quant and result.double_quant
            fmt = item.format.replace(double_quant=nested)
            pieces = weight_pieces(*item[:3], fmt, result.offset)
            add(pieces.codes)
            add(pieces.scales)
            if pieces.nested is not None:
                add(pieces.nested, pieces.scales.nbytes, pieces.scales.key)
            for table in pieces.tables:
                add(table)
        return sorted(tail, key=lambda each: -item_size(each[0].dtype))

    def _most_data(self, items: Iterable[tuple[tuple[Piece, ...], ...]]) -> int:
        return sum(max(sum(p.nbytes for p in variant) for variant in item) for item in items)

    def _header_bound(self, items: Iterable[tuple[tuple[Piece, ...], ...]], data: int) -> int:
        """Bytes of JSON that the longest header has, if all offsets have the digits of the last."""
        longest = sum(
            max(sum(1 + len(_entry(piece, data, data)) for piece in variant) for variant in item)
            for item in items
        )
        return longest + len(self._opening()) + 1

    def _opening(self) -> bytes:
        return b'{"__metadata__":' + json.dumps(self._metadata, separators=(",", ":")).encode()

    def _header(self, pieces: Iterable[Piece]) -> bytes:
        parts, offset = [self._opening()], 0
        for piece in pieces:
            parts.append(_entry(piece, offset, offset + piece.nbytes))
            offset += piece.nbytes
        text = b",".join(parts) + b"}"
        size = self.start - 8
        assert len(text) <= size, (self.name, len(text), size)
        return size.to_bytes(8, "little") + text.ljust(size)


def item_size(dtype: str) -> int:
    """Bytes of a number of one of safetensors' dtypes; 1 for what is smaller than a byte."""
    found = re.search(r"\d+", dtype)
    return max(int(found[0]) // 8, 1) if found else 1


def _entry(piece: Piece, begin: int, end: int) -> bytes:
    content = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": (begin, end)}
    text = f"{json.dumps(piece.key)}:{json.dumps(content, separators=(',', ':'))}"
    return text.encode()


def _copy(source: BinaryIO, offset: int, nbytes: int, target: BinaryIO) -> None:
    source.seek(offset)
    while nbytes:
        chunk = source.read(min(nbytes, _COPIED))
        if not chunk:
            msg = f"{source.name} ends before byte {offset + nbytes}: {os.fstat(source.fileno())}"
            raise OSError(msg)
        target.write(chunk)
        nbytes -= len(chunk)


def _round_up(count: int) -> int:
    return -(-count // 8) * 8
