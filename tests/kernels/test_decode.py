"""The assembly that looks codes up, which no interpreter runs: its text, executed here."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("triton")
from qkern.kernels.decode import SHUFFLE

Words = npt.NDArray[np.uint32]
LINE = re.compile(r"(shr\.u32|shfl\.sync\.idx\.b32) (\S+), (\S+), (\w+|\$\d)[,;]?(.*)")


def execute(text: str, words: Words) -> dict[str, Words]:
    """Registers after the text ran in each of 32 lanes, whose entry is the lane's own number."""
    registers = {"$8": words}
    for line in re.split(r"[\n;]+", text):
        found = LINE.match(line.strip())
        if found is None:
            assert line.strip() in {"{", "}", ".reg .b32 t", ""}, line
            continue
        operation, target, source, operand, rest = found.groups()
        if operation == "shr.u32":
            registers[target] = registers[source] >> np.uint32(operand)
        else:
            # PTX: the segment's first lane, and within it the operand's lower bits.
            assert (source, rest.split(",")) == ("$9", [" 0x100f", " 0xffffffff"])
            segments = np.uint32(0x10)
            entries = []
            for lane in (0, 15, 16, 31):
                first = np.uint32(lane) & segments
                fetched = first | (registers[operand] & ~segments & np.uint32(31))
                assert (fetched <= (first | np.uint32(15))).all()
                entries.append(fetched % 16)  # lane i keeps entry i % 16
            assert all((entry == entries[0]).all() for entry in entries)
            registers[target] = entries[0]
    return registers


def test_shuffles_fetch_the_entries_of_all_nibbles() -> None:
    half = np.arange(65536, dtype=np.uint32)
    for words in (half, half << np.uint32(16), half | (half[::-1] << np.uint32(16))):
        registers = execute(SHUFFLE.value, words)
        for byte in range(4):
            code = (words >> np.uint32(8 * byte)) & np.uint32(255)
            assert (registers[f"${byte}"] == code >> 4).all()
            assert (registers[f"${byte + 4}"] == code & 15).all()
