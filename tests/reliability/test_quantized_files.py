"""C7, C8: what a file says of a quantized tensor, each field of it changed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_states import fuzz
from safetensors.numpy import save_file

import qkern
from qkern.checkpoint.load import load_into
from qkern.checkpoint.reader import CheckpointReader
from qkern.checkpoint.source import Source

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes as bnb

Entries = dict[str, np.ndarray[Any, Any]]
STATE = "weight.quant_state.bitsandbytes__nf4"
ABSMAX, MAP = "weight.absmax", "weight.quant_map"
NESTED, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"


def bitsandbytes_entries(*, storage: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    """What its Linear4bit(96, 128) saves: 192 blocks, double quantization."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        96, 128, bias=False, compress_statistics=True, quant_type="nf4", quant_storage=storage
    )
    state: dict[str, torch.Tensor] = layer.to("cpu").state_dict()
    return {key: entry.contiguous() for key, entry in state.items()}


@pytest.fixture(scope="module")
def good() -> Entries:
    return {key: entry.numpy() for key, entry in bitsandbytes_entries().items()}


def write(entries: Entries, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({k: np.ascontiguousarray(v) for k, v in entries.items()}, path, metadata)
    return path


def refused(path: Path, text: str) -> None:
    """By every door, in the same words."""
    doors: list[Callable[[], Any]] = [
        lambda: Source(path),
        lambda: CheckpointReader(path),
        lambda: load_into(torch.nn.Linear(96, 128, bias=False), path.parent),
    ]
    for door in doors:
        with pytest.raises(qkern.CorruptFileError, match=text) as error:
            door()
        assert str(path) in str(error.value)


def state(**changes: Any) -> Callable[[Entries], None]:
    """Change fields of the JSON; ``...`` takes one out."""

    def change(entries: Entries) -> None:
        fields = {**json.loads(entries[STATE].tobytes()), **changes}
        fields = {key: value for key, value in fields.items() if value is not ...}
        entries[STATE] = np.frombuffer(json.dumps(fields).encode(), np.uint8)

    return change


def text(content: bytes) -> Callable[[Entries], None]:
    return lambda entries: entries.update({STATE: np.frombuffer(content, np.uint8)})


def put(key: str, change: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[Entries], None]:
    return lambda entries: entries.update({key: change(entries[key])})


def drop(*keys: str) -> Callable[[Entries], None]:
    return lambda entries: [entries.pop(key) for key in keys] and None


@pytest.mark.case("C7")
def test_the_file_that_is_changed_is_good(good: Entries, tmp_path: Path) -> None:
    source = Source(write(good, tmp_path / "model.safetensors"))
    assert source.state("weight").shape == (128, 96)
    assert source.state("weight").offset == json.loads(good[STATE].tobytes())["nested_offset"]
    assert source.keys_of("weight") == [*sorted(good, key=lambda k: source.entries[k].begin)]


CHANGES: dict[str, tuple[Callable[[Entries], None], str]] = {
    "one scale": (put(ABSMAX, lambda a: a[:1]), "absmax: got 1 x uint8, the state says 192"),
    "a scale less": (put(ABSMAX, lambda a: a[:-1]), "absmax: got 191"),
    "a scale more": (put(ABSMAX, lambda a: np.append(a, a[:1])), "absmax: got 193"),
    "no scales": (drop(ABSMAX), "missing weight.absmax"),
    "scales of another dtype": (put(ABSMAX, np.float32), "absmax: got 192 x float32"),
    "codes cut off": (put("weight", lambda p: p[:-1]), "weight: got 6143 x uint8.*6144"),
    "codes too many": (put("weight", lambda p: np.append(p, p[:2])), "weight: got 6146"),
    "codes of another dtype": (put("weight", np.uint16), "weight: got 6144 x U16"),
    "no codes": (drop("weight"), "missing weight"),
    "NaN among the codes": (put(MAP, lambda m: np.where(m == 0, np.nan, m)), "table of 16 codes"),
    "codes unsorted": (put(MAP, lambda m: m[::-1]), "table of 16 codes"),
    "one code off": (put(MAP, lambda m: m + (m == 1) * np.float32(1e-7)), "table of 16 codes"),
    "15 codes": (put(MAP, lambda m: m[:15]), "quant_map: got 15 x float32"),
    "17 codes": (put(MAP, lambda m: np.append(m, m[:1])), "quant_map: got 17"),
    "codes in fp64": (put(MAP, np.float64), "quant_map: got 16 x float64"),
    "no table": (drop(MAP), "missing weight.quant_map"),
    "no second level": (drop(NESTED, NESTED_MAP), "missing weight.nested_absmax"),
    "no second-level scales": (drop(NESTED), "missing weight.nested_absmax"),
    "no second-level table": (drop(NESTED_MAP), "missing weight.nested_quant_map"),
    "NaN in the second level": (put(NESTED, lambda a: a * np.nan), "NaN or infinity among"),
    "second level too long": (put(NESTED, lambda a: np.append(a, a)), "nested_absmax: got 2"),
    "second-level table off": (put(NESTED_MAP, lambda m: m[::-1]), "table of 256 codes"),
    "no state": (drop(STATE), "missing|unexpected"),
    "no JSON": (text(b"\xff{"), "not a readable quantization state"),
    "a list": (text(b"[]"), "a JSON list, an object is needed"),
    "nested deeply": (text(b"[" * 9999), "not a readable quantization state"),
    "empty": (text(b""), "not a readable quantization state"),
    "too long": (text(b" " * 65537), "65537 x uint8.*65536 bytes at most"),
    "a key twice": (text(b'{"blocksize": 64, "blocksize": 32}'), "a key stands there twice"),
    "a long number": (text(b'{"blocksize": ' + b"9" * 9999 + b"}"), "not a readable"),
    "another dtype": (put(STATE, lambda s: s.astype(np.int32)), "JSON as uint8 is needed"),
    "no blocksize": (state(blocksize=...), "blocksize missing"),
    "no shape": (state(shape=...), "shape missing"),
    "blocksize 0": (state(blocksize=0), "blocksize 0 is not supported: allowed are 32"),
    "blocksize negative": (state(blocksize=-64), "blocksize -64"),
    "blocksize 63": (state(blocksize=63), "blocksize 63"),
    "blocksize huge": (state(blocksize=2**63), "blocksize 9223372036854775808"),
    "blocksize a text": (state(blocksize="64"), "blocksize '64'"),
    "blocksize a fraction": (state(blocksize=64.0), r"blocksize 64\.0"),
    "blocksize a list": (state(blocksize=[64]), r"blocksize \[64\]"),
    "blocksize another": (state(blocksize=128), "absmax: got 192 x uint8, the state says 96"),
    "shape too large": (state(shape=[128, 97]), "weight: got 6144 x uint8, the state says 6208"),
    "shape too small": (state(shape=[128, 64]), "the state says 4096"),
    "shape negative": (state(shape=[-128, -96]), r"shape \[-128, -96\]"),
    "shape of fractions": (state(shape=[128.5, 96]), r"shape \[128\.5, 96\]"),
    "shape of texts": (state(shape=["128", "96"]), "shape"),
    "shape a number": (state(shape=12288), "shape 12288"),
    "shape beyond 64 bits": (state(shape=[2**40, 2**40]), "shape"),
    "shape of many": (state(shape=[1] * 65), "shape"),
    "dtype unknown": (state(dtype="float8"), "dtype 'float8'.*allowed are float32, float16"),
    "dtype null": (state(dtype=None), "dtype None"),
    "dtype a list": (state(dtype=["float32"]), "dtype"),
    "second blocksize": (state(nested_blocksize=255), r"\(255, 'float32'\).*256 and float32"),
    "second dtype": (state(nested_dtype="float16"), r"\(256, 'float16'\)"),
    "offset NaN": (state(nested_offset=float("nan")), "nested_offset nan"),
    "offset infinite": (state(nested_offset=1e39), r"nested_offset 1e\+39"),
    "offset of many digits": (state(nested_offset=10**400), "nested_offset 1000"),
    "offset a text": (state(nested_offset="0.5"), "nested_offset '0.5'"),
    "offset missing": (state(nested_offset=...), "absmax: got 192 x uint8.*192 x float32"),
}


@pytest.mark.case("C7")
@pytest.mark.parametrize("name", CHANGES)
def test_each_field_of_a_bitsandbytes_file(name: str, good: Entries, tmp_path: Path) -> None:
    change, reason = CHANGES[name]
    entries = dict(good)
    change(entries)
    path = write(entries, tmp_path / "model.safetensors")
    if name == "no state":  # nothing says that it is quantized: then it is no linear weight
        assert Source(path).tensors["weight"].dtype == "uint8"
        with pytest.raises(qkern.CorruptFileError, match=r"size mismatch|does not fit"):
            load_into(torch.nn.Linear(96, 128, bias=False), tmp_path)
        return
    refused(path, reason)


@pytest.mark.case("C8")
@pytest.mark.parametrize(
    "change",
    [state(quant_type="zz9"), state(quant_type="nf3"), state(version=2), state(scale_bits=6)],
)
def test_what_a_newer_version_wrote(change: Any, good: Entries, tmp_path: Path) -> None:
    entries = dict(good)
    change(entries)
    reason = (
        r"(quant_type '(zz9|nf3)'|field '(version|scale_bits)') is not known here: made by a newer"
    )
    refused(write(entries, tmp_path / "model.safetensors"), reason)


@pytest.mark.case("C8")
def test_a_file_may_say_which_version_it_needs(good: Entries, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for needed in ("99", "99.1.0", qkern.__version__ + "1", "later", "", "1" * 99):
        write(good, path, {"qkern_needs": needed})
        refused(path, f"made by a newer qkern: needs '{needed[:40]}', this is {qkern.__version__}")
    for needed in ("0", "0.0.9", qkern.__version__):
        assert Source(write(good, path, {"qkern_needs": needed})).is_quantized


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_codes_stored_as_another_dtype(storage: torch.dtype, good: Entries, tmp_path: Path) -> None:
    """bitsandbytes' quant_storage, for FSDP: the same bytes under another name."""
    from safetensors.torch import save_file as save_torch

    entries = bitsandbytes_entries(storage=storage)
    assert entries["weight"].dtype == storage
    save_torch(entries, tmp_path / "model.safetensors")
    plain = write(good, tmp_path / "plain.safetensors")
    with CheckpointReader(tmp_path) as there, CheckpointReader(plain) as here:
        assert torch.equal(there.read("weight").packed, here.read("weight").packed)
        assert torch.equal(there.read("weight").dequantize(), here.read("weight").dequantize())
    source = Source(tmp_path)
    assert source.read_bytes("weight").tobytes() == good["weight"].tobytes()
    short = {**entries, "weight": entries["weight"][:-1]}
    save_torch(short, tmp_path / "model.safetensors")
    with pytest.raises(qkern.CorruptFileError, match=r"weight: got .* the state says 6144 x uint8"):
        Source(tmp_path)


def test_random_changes_are_told_or_harmless() -> None:
    """``make fuzz`` makes many more of them."""
    counts = fuzz(3000)
    assert min(counts.values()) > 500
