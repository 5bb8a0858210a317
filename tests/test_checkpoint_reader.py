"""Files that are missing, wrong or spoilt: each a typed error that names what and where."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern import flat_keys
from qkern.checkpoint.reader import CheckpointReader

INDEX = "model.safetensors.index.json"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A directory with one tensor of each kind."""
    tensors = {"norm.weight": torch.randn(8)}
    for quant_type, double_quant in (("nf4", True), ("int8", False), ("int8_row", False)):
        q = qkern.quantize(torch.randn(9, 13), quant_type, double_quant=double_quant)
        tensors |= flat_keys.flatten(q, f"{quant_type}.weight")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a")
    return (tmp_path / "a").rename(tmp_path / "model.safetensors").parent


def raw(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_headers_say_what_is_there(stored: Path) -> None:
    with CheckpointReader(stored) as reader:
        assert reader.is_quantized
        kinds = ["int8.weight", "int8_row.weight", "nf4.weight"]
        assert list(reader.tensors) == [*kinds, "norm.weight"]
        nf4 = reader.tensors["nf4.weight"]
        assert (nf4.shape, nf4.dtype, nf4.numel) == ((9, 13), "float32", 117)
        assert nf4.format == qkern.QuantFormat("nf4")
        rows = reader.tensors["int8_row.weight"]
        assert (rows.shape, rows.format) == ((9, 13), qkern.QuantFormat("int8_row", 13))
        for name, tensor in reader.tensors.items():
            read = reader.read(name)
            assert read.shape == tensor.shape
            assert read.nbytes == tensor.nbytes


def test_a_stray_companion_is_a_tensor_of_its_own(stored: Path) -> None:
    tensors = load_file(stored / "model.safetensors")
    save_file(tensors | {"norm.weight.absmax": torch.ones(3)}, stored / "model.safetensors")
    with CheckpointReader(stored) as reader:
        assert reader.tensors["norm.weight.absmax"].shape == (3,)


def test_int8_rows_have_the_dtype_of_the_configuration(stored: Path) -> None:
    def dtypes(path: Path) -> set[str]:
        with CheckpointReader(path) as reader:
            stated = str(reader.read("int8_row.weight").dtype).removeprefix("torch.")
            return {stated, reader.tensors["int8_row.weight"].dtype}

    assert dtypes(stored) == {"float16"}
    (stored / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    assert dtypes(stored) == {"bfloat16"}
    assert dtypes(stored / "model.safetensors") == {"bfloat16"}


def test_values_may_start_at_any_byte(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [1, 9]},
    }
    data = b"\1" + struct.pack("<2f", 1.5, -2.5)
    with CheckpointReader(raw(tmp_path / "x.safetensors", header, data)) as reader:
        assert reader.read("b.weight").tolist() == [[1.5, -2.5]]


def one_byte(path: Path, name: str, dtype: str) -> Path:
    return raw(path, {name: {"dtype": dtype, "shape": [1], "data_offsets": [0, 1]}}, b"1")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*none"):
        qkern.inspect_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        qkern.inspect_checkpoint(tmp_path)
    one_byte(tmp_path / "adapter.safetensors", "a", "U8")
    with pytest.raises(FileNotFoundError, match=r"name one of its files: adapter\.safetensors"):
        qkern.inspect_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(FileNotFoundError, match="neither a directory nor a file"):
        qkern.inspect_checkpoint(tmp_path / "pipe")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"PK" * 99)
    with pytest.raises(qkern.CorruptFileError, match=r"x\.bin: not a .*is a pickle.*convert it"):
        qkern.inspect_checkpoint(tmp_path / "x.bin")
    with pytest.raises(qkern.CorruptFileError, match=r'"a\\u\{1b\}\[2J" .* control characters'):
        qkern.inspect_checkpoint(one_byte(tmp_path / "x", "a\x1b[2J", "U8"))
    with pytest.raises(qkern.CorruptFileError, match="x: not a readable safetensors file"):
        qkern.inspect_checkpoint(one_byte(tmp_path / "x", "a", "F99"))


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ("{}", qkern.CorruptFileError, "weight_map is missing"),
        ("[" * 99_999, qkern.CorruptFileError, "not a valid index"),
        ('{"weight_map": {"a": "../b"}}', qkern.CorruptFileError, "not the name of a file"),
        ('{"weight_map": {"a": "gone"}}', FileNotFoundError, "gone"),
    ],
)
def test_an_index_that_cannot_be_used(
    content: str, error: type[Exception], text: str, tmp_path: Path
) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(error, match=text):
        qkern.inspect_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("shards", "weight_map", "text"),
    [
        (({"a": 1}, {"b": 2}), {"a": "0", "b": "1", "c": "1"}, "c is listed in 1 and found in no"),
        (({"a": 1}, {"b": 2}), {"a": "0"}, None),
        (({"a": 1, "z": 3}, {"b": 2}), {"a": "0", "b": "1"}, "z is listed in no shard"),
        (({"a": 1}, {"b": 2}), {"a": "1", "b": "0"}, "differ in 2 tensors: a is listed in 1"),
        (({"a": 1}, {"a": 2}), {"a": "0", "b": "1"}, "a is in both"),
    ],
)
def test_shards_that_differ_from_their_index(
    shards: tuple[dict[str, int], ...], weight_map: Any, text: str | None, tmp_path: Path
) -> None:
    for i, shard in enumerate(shards):
        save_file({k: torch.full((2,), float(v)) for k, v in shard.items()}, tmp_path / str(i))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if text is None:  # a file that the index does not name is none of the checkpoint's
        assert [row.name for row in qkern.inspect_checkpoint(tmp_path).tensors] == ["a"]
        return
    with pytest.raises(qkern.CorruptFileError, match=text):
        qkern.inspect_checkpoint(tmp_path)


WEIGHT = "nf4.weight"
ROWS = "int8_row"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{WEIGHT}.absmax"), r"missing nf4\.weight\.absmax"),
        (lambda t: t.pop(WEIGHT), r"missing nf4\.weight"),
        (lambda t: t.update({f"{WEIGHT}.absmax": t[f"{WEIGHT}.absmax"][:1]}), "the state says"),
        (lambda t: t.update({f"{WEIGHT}.quant_map": torch.zeros(16)}), "table of 16 codes"),
        (lambda t: t.update({f"{WEIGHT}.quant_state.qkern__int8": torch.zeros(1)}), "found 2"),
        (
            lambda t: t.update({f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.zeros(2)}),
            "not a readable quantization state",
        ),
        (lambda t: t.pop(f"{ROWS}.SCB"), r"missing int8_row\.SCB"),
        (lambda t: t.pop(f"{ROWS}.weight"), r"missing int8_row\.weight"),
        (lambda t: t.update({f"{ROWS}.SCB": torch.ones(8)}), r"got .*\[8\], float32 \(9,\)"),
        (lambda t: t.update({f"{ROWS}.weight": torch.ones(9, 13)}), "got float32"),
        (lambda t: t[f"{ROWS}.weight_format"].fill_(2), "weight_format: got 2, only 0"),
    ],
)
def test_a_quantized_tensor_that_contradicts_itself(change: Any, text: str, stored: Path) -> None:
    tensors = load_file(stored / "model.safetensors")
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, stored / "model.safetensors")
    with pytest.raises(qkern.CorruptFileError, match=rf"model\.safetensors: (nf4|int8).*{text}"):
        qkern.inspect_checkpoint(stored)


def test_any_cut_is_told(stored: Path) -> None:
    file = stored / "model.safetensors"
    whole = file.read_bytes()
    for length in range(0, len(whole), 29):
        file.write_bytes(whole[:length])
        with pytest.raises(qkern.CorruptFileError, match=r"model\.safetensors"):
            qkern.inspect_checkpoint(stored)


def test_any_changed_byte_is_told_or_harmless(stored: Path) -> None:
    file = stored / "model.safetensors"
    whole, rng = file.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for i in range(300):
        spoilt = bytearray(whole)
        spoilt[rng.randrange(header if i % 2 else len(whole))] = rng.randrange(256)
        file.write_bytes(spoilt)
        try:
            report = qkern.inspect_checkpoint(stored)
        except qkern.CorruptFileError:
            refused += 1
        else:
            json.dumps(report.as_dict(), allow_nan=False)
    assert 100 < refused < 300
