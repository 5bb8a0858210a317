"""Entries of quantized tensors, mutated at random: a typed error, or what the entries do hold.

    python tests/fuzz_states.py [runs] [seed]

``make fuzz`` runs it beside the fuzzer of headers; a short run is part of the tests.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import qkern
from qkern import entry_keys
from qkern.entry_keys import Described
from qkern.formats import QuantFormat, dynamic_code

Entries = dict[str, Described]
NAMES = ("uint8", "int8", "float32", "float16", "bfloat16", "float64", "int64", "bool", "F99")
# What a field of the JSON becomes.
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 63, 64, 128, 4096, 2**31, 2**63, 2**64, 10**400, 0.5, 64.0, 1e308, -0.0),
    *(float("nan"), float("inf"), None, True, False, "", "nf4", "fp4", "int8", "int8_row", "zz9"),
    *("float32", "bfloat16", "float8", "64", [], [0], [-1], [1, 2], [2**40, 2**40], [1] * 70),
    *([64.0], ["1"], [None], [[]], {}, {"a": 1}, "\x1b[2J", "é" * 99),
)
FIELDS = (
    *("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype"),
    *("nested_offset", "version", ""),
)


def described(values: np.ndarray[Any, Any]) -> Described:
    return Described(values.dtype.name, values.shape, lambda: values)


def good_entries() -> list[tuple[Entries, str]]:
    """Entries as files hold them: each format, with 8-bit scales and without, with odd sizes."""
    found = []
    rng = np.random.default_rng(0)
    for quant_type, double_quant in (
        ("nf4", True),
        ("fp4", False),
        ("int8", True),
        ("int8", False),
    ):
        weight = rng.standard_normal((9, 13), np.float32)
        q = qkern.quantize(weight, quant_type, double_quant=double_quant)
        state = {"quant_type": quant_type, "blocksize": 64, "dtype": "float32", "shape": [9, 13]}
        entries = {"w": q.packed.reshape(-1), "w.absmax": q.absmax}
        if q.format.code is not None:
            entries["w.quant_map"] = np.array(q.format.code, np.float32)
        if q.nested_absmax is not None:
            entries["w.nested_absmax"] = q.nested_absmax
            entries["w.nested_quant_map"] = np.array(dynamic_code(), np.float32)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
            state["nested_offset"] = float(q.offset[0])
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        entries[f"w.quant_state.{q.format.kind.state}"] = text
        found.append(({key: described(entry) for key, entry in entries.items()}, "w"))
    rows = {"weight": np.ones((9, 13), np.int8), "SCB": np.ones(9, np.float32)}
    rows["weight_format"] = np.zeros((), np.uint8)
    found.append(({f"l.{key}": described(entry) for key, entry in rows.items()}, "l.weight"))
    return found


def mutate_field(entries: Entries, rng: random.Random) -> None:
    keys = [key for key in entries if ".quant_state." in key]
    if not keys:
        return
    try:
        state = json.loads(entries[keys[0]].values().tobytes())
    except (ValueError, AttributeError):
        return
    if not isinstance(state, dict):
        return
    if rng.random() < 0.2:
        state.pop(rng.choice(FIELDS), None)
    else:
        state[rng.choice(FIELDS)] = rng.choice(VALUES)
    entries[keys[0]] = described(np.frombuffer(json.dumps(state).encode(), np.uint8))


def mutate_bytes(entries: Entries, rng: random.Random) -> None:
    key = rng.choice(list(entries))
    values = entries[key].values()
    if values is None or values.dtype.name != entries[key].dtype:
        return
    content = bytearray(values.tobytes())
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(content) + 1)
        cut = place + rng.randint(0, 2)
        content[place:cut] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 2)))
    whole = len(content) - len(content) % values.itemsize
    entries[key] = described(np.frombuffer(bytes(content[:whole]), values.dtype))


def mutate_shape(entries: Entries, rng: random.Random) -> None:
    key = rng.choice(list(entries))
    entry = entries[key]
    shape = list(entry.shape)
    if shape and rng.random() < 0.7:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 16, 59, 2**40, 2**63 - 1))
    else:
        shape = rng.choice(([], [1], [0], [2, 3], [1, 1, 1]))
    values = np.resize(entry.values() if entry.values() is not None else np.zeros(1), (4,))
    entries[key] = Described(entry.dtype, tuple(shape), lambda: values)


def mutate_dtype(entries: Entries, rng: random.Random) -> None:
    key = rng.choice(list(entries))
    entries[key] = entries[key]._replace(dtype=rng.choice(NAMES))


def mutate_keys(entries: Entries, rng: random.Random) -> None:
    key = rng.choice(list(entries))
    entry = entries.pop(key) if rng.random() < 0.7 else entries[key]
    other = rng.choice(("w", "w.absmax", "w.quant_state.qkern__int8", "l.SCB", "l.weight", "w.x"))
    if rng.random() < 0.5:
        entries[other] = entry


def mutate_data(entries: Entries, rng: random.Random) -> None:
    key = rng.choice(list(entries))
    entries[key] = entries[key]._replace(values=lambda: None)


MUTATIONS: tuple[Callable[[Entries, random.Random], None], ...] = (
    *(mutate_field, mutate_field, mutate_field, mutate_bytes, mutate_bytes),
    *(mutate_shape, mutate_dtype, mutate_keys, mutate_data),
)


def holds(entries: Entries, prefix: str, state: entry_keys.State) -> bool:
    """Whether the entries have the bytes that a decoder of ``state`` will read."""
    fmt, numel = state.format, int(np.prod([int(size) for size in state.shape], dtype=object))
    width = {**entry_keys.STORAGE, "int8": 1}
    packed, scales = entries[prefix], entries[entry_keys.scales_key(prefix, fmt)]
    enough = packed.numel * width[packed.dtype] == fmt.packed_size(numel)
    enough &= scales.numel >= fmt.num_blocks(numel)
    enough &= scales.dtype == ("uint8" if fmt.double_quant else "float32")
    if fmt.double_quant:
        enough &= entries[f"{prefix}.nested_absmax"].numel == fmt.num_nested(numel)
        enough &= bool(np.isfinite(np.float32(state.offset)))
    return enough and isinstance(fmt, QuantFormat)


def fuzz(runs: int, seed: int = 0) -> dict[str, int]:
    """Counts of what was accepted and refused.

    Raises:
        AssertionError: with the mutated entries, for anything but these two.
    """
    rng, originals = random.Random(seed), good_entries()
    counts = {"accepted": 0, "refused": 0}
    for run in range(runs):
        entries, prefix = rng.choice(originals)
        entries = dict(entries)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            if entries:
                rng.choice(MUTATIONS)(entries, rng)
        try:
            state = entry_keys.read_state(entries, prefix)
            entry_keys.check_parts(entries, prefix, state)
        except qkern.CorruptFileError as error:
            counts["refused"] += 1
            assert len(str(error)) < 1000, error  # noqa: PT017 - of each, not of one expected
        except Exception as error:
            msg = f"run {run} of seed {seed}: {prefix}: {entries}"
            raise AssertionError(msg) from error
        else:
            counts["accepted"] += 1
            assert holds(entries, prefix, state), (run, seed, entries)
        entry_keys.prefixes(entries)
        for key in entries:
            entry_keys.owner(key)
    return counts


if __name__ == "__main__":
    print(fuzz(*map(int, sys.argv[1:])) if len(sys.argv) > 1 else fuzz(1_000_000))
